from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
import pytest

from serving.model.encoding import Allocate, Encoded, Flags
from serving.model.interface import Arrays, Engine, TuningLimits
from serving.model.tuner import Tuning, measure_throughput, read_tuning, tune, tuning_tag
from tests.serving.toys import matrix

PLAIN, ONEDNN, HALF = Engine(), Engine(linear="onednn"), Engine(precision="bfloat16")
X = np.random.default_rng(5).standard_normal((8192, 4), dtype=np.float32)


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True)
class Timed:
    """Adds up a row's values, in the time that its engine and the size of the batch take."""

    clock: Clock
    seconds: dict[Engine, Callable[[int], float]]
    off: dict[Engine, float] = field(default_factory=dict)
    engine: Engine = PLAIN
    slots: int = 1
    batch_size: int = 256
    batch_sizes: Sequence[int] = (64, 256, 1024, 4096)

    def prepare(self, encoded: Encoded) -> Encoded:
        return encoded

    def predict(self, inputs: Arrays) -> dict[str, Any]:
        x_NF = inputs["x"]
        self.clock.now += self.seconds[self.engine](len(x_NF))
        off = self.off.get(self.engine, 0.0)
        if off < 0:
            message = "no such kernel"
            raise RuntimeError(message)
        return {"score": x_NF.sum(axis=1) + np.float32(off)}

    def slot(self) -> AbstractContextManager[None]:
        return nullcontext()

    def engines(self, limits: TuningLimits) -> Sequence[Engine]:
        return [engine for engine in self.seconds if engine != HALF or limits.bfloat16_tolerance]

    def with_engine(self, engine: Engine) -> Self:
        return replace(self, engine=engine)


def rows(x_NF: np.ndarray = X, bad: Sequence[int] = ()) -> Encoded:
    flags = Flags.all_good(len(x_NF))
    for row in bad:
        flags.mark_row(row, "c0", "null")
    return Encoded(inputs={"x": np.ascontiguousarray(x_NF.T).T}, flags=flags, rows=len(x_NF))


def cached(row: float) -> Callable[[int], float]:
    """A millisecond a pass and so much a row, half as much again where a batch is too large for the cache."""
    return lambda size: 1e-3 + row * size * (1 if size <= 1024 else 1.5)


def tuned(model: Timed, limits: TuningLimits | None = None, sample: Encoded | None = None) -> Tuning | None:
    return tune(model, matrix(4), sample or rows(), limits or TuningLimits(), machine="a machine", clock=model.clock)


def chosen(model: Timed, limits: TuningLimits | None = None) -> tuple[Engine, int]:
    tuning = tuned(model, limits)
    assert tuning is not None
    return tuning.engine, tuning.batch_size


def test_the_fastest_engine_and_batch_size_are_chosen() -> None:
    model = Timed(Clock(), {PLAIN: cached(2e-5), ONEDNN: cached(1e-5)})

    assert (ONEDNN, 1024) == chosen(model)


def test_the_rate_is_that_of_the_choice() -> None:
    tuning = tuned(Timed(Clock(), {PLAIN: cached(1e-5)}))

    assert tuning is not None
    assert 1024 / (1e-3 + 1024e-5) == pytest.approx(tuning.rows_per_second)


def test_other_bits_than_torchs_own_must_be_worth_it() -> None:
    model = Timed(Clock(), {PLAIN: cached(1.05e-5), ONEDNN: cached(1e-5)})

    assert (PLAIN, 1024) == chosen(model)


@pytest.mark.parametrize(
    ("limits", "off", "engine"),
    [
        (TuningLimits(), 1e-7, PLAIN),
        (TuningLimits(bfloat16_tolerance=0.01), 0.005, HALF),
        (TuningLimits(bfloat16_tolerance=0.01), 0.05, PLAIN),
        (TuningLimits(bfloat16_tolerance=0.01), -1, PLAIN),
    ],
)
def test_reduced_precision_is_chosen_only_where_wished_for_and_within_the_tolerance(
    limits: TuningLimits, off: float, engine: Engine
) -> None:
    model = Timed(Clock(), {PLAIN: cached(2e-5), HALF: cached(1e-5)}, off={HALF: off})

    assert engine == chosen(model, limits)[0]


def test_a_kernel_that_is_off_by_more_than_rounding_is_not_chosen() -> None:
    model = Timed(Clock(), {PLAIN: cached(2e-5), ONEDNN: cached(1e-5)}, off={ONEDNN: 1e-3})

    assert PLAIN == chosen(model)[0]


def test_trials_have_their_difference_from_the_default_engine() -> None:
    model = Timed(Clock(), {PLAIN: cached(2e-5), HALF: cached(1e-5)}, off={HALF: 0.25})
    tuning = tuned(model, TuningLimits(bfloat16_tolerance=0.5))

    assert tuning is not None
    assert {0.25} == {round(trial.difference, 6) for trial in tuning.trials if trial.engine == HALF}
    assert {0.0} == {trial.difference for trial in tuning.trials if trial.engine == PLAIN}


def test_a_batch_size_of_the_callers_is_kept() -> None:
    model = Timed(Clock(), {PLAIN: cached(2e-5), ONEDNN: cached(1e-5)})

    assert (ONEDNN, 100) == chosen(model, TuningLimits(batch_size=100))


@pytest.mark.parametrize("seconds", [1.0, 30.0])
def test_a_slow_model_is_not_measured_for_long(seconds: float) -> None:
    model = Timed(Clock(), {PLAIN: lambda _: seconds, ONEDNN: lambda _: seconds})
    tuned(model)

    assert 20 + 6 * seconds > model.clock.now


class Process(Timed):
    """The same in a process of its own."""

    def predict_while(self, inputs: Arrays, may_continue: Callable[[], bool]) -> dict[str, Any]:
        return self.predict(inputs)

    def lend_memory(self, rows: int) -> Allocate:
        return np.empty


@pytest.mark.parametrize(
    ("fixed", "row", "size", "seconds_max"),
    [(0.8, 0.0, 4096, 12), (3.0, 1e-6, 4096, 30), (0.8, 1e-4, 4096, 12), (0.0, 0.05, 64, 20), (0.1, 1e-2, 256, 20)],
)
def test_a_call_whose_seconds_hardly_grow_with_its_rows_gets_the_largest_batch_and_a_slow_one_is_left_soon(
    fixed: float, row: float, size: int, seconds_max: float
) -> None:
    model = Process(Clock(), {PLAIN: lambda rows: fixed + row * rows})
    tuning = tune(model, matrix(4), rows(), TuningLimits(), machine="a machine", clock=model.clock, seconds_max=1.0)
    assert tuning is not None

    assert size == tuning.batch_size
    assert tuning.rows_per_second >= 0.9 * 256 / (fixed + row * 256)
    assert model.clock.now < seconds_max


def test_a_sample_with_bad_rows_is_measured_and_one_without_good_rows_is_not() -> None:
    model = Timed(Clock(), {PLAIN: cached(2e-5), ONEDNN: cached(1e-5)})
    few = tuned(model, sample=rows(bad=range(0, 8192, 3)))

    assert few is not None
    assert ONEDNN == few.engine
    assert tuned(model, sample=rows(bad=range(8192))) is None


def test_a_tuning_is_kept_for_its_machine_and_limits_only() -> None:
    tuning = tuned(Timed(Clock(), {PLAIN: cached(1e-5)}))
    assert tuning is not None
    tags = {tuning_tag("a machine", TuningLimits()): tuning.model_dump_json()}

    assert tuning == read_tuning(tags, "a machine", TuningLimits())
    assert read_tuning(tags, "another", TuningLimits()) is None
    assert read_tuning(tags, "a machine", TuningLimits(slots=1)) is None
    assert read_tuning({tuning_tag("a machine", TuningLimits()): "{}"}, "a machine", TuningLimits()) is None
    earlier = {name: value.replace('"limits"', '"wish"') for name, value in tags.items()}
    assert tuning == read_tuning(earlier, "a machine", TuningLimits())


def test_a_tuning_fits_a_tag_of_mlflow() -> None:
    engines = [Engine(threads=threads, linear=linear) for threads in (1, 2, 64) for linear in ("torch", "onednn")]
    tuning = tuned(Timed(Clock(), dict.fromkeys(engines, cached(1e-5 / 3))))

    assert tuning is not None
    assert 4000 > len(tuning.model_dump_json())


def test_texts_are_compared_and_measured_on_a_few_passes_of_their_tokens() -> None:
    model = Timed(Clock(), {PLAIN: lambda _: 1.0, ONEDNN: lambda _: 1.0})
    # A batch counts tokens: the smallest, of 64, is two rows.
    tuning = tuned(model, sample=replace(rows(), length_N=np.full(len(X), 32)))

    assert tuning is not None
    assert 8 / 4 == tuning.rows_per_second
    assert 20 > model.clock.now


def test_all_slots_are_measured_together() -> None:
    clock, passes, met = Clock(), Counter[int](), threading.Barrier(4, timeout=60)

    class Meets(Timed):
        def predict(self, inputs: Arrays) -> dict[str, Any]:
            passes[threading.get_ident()] += 1
            # The second pass is the first that counts.
            if passes[threading.get_ident()] == 2:
                met.wait()
                clock.now = 1.0
            return {"score": inputs["x"][:, 0]}

    assert 4 * 10 == measure_throughput(Meets(clock, {}), matrix(4), rows(X[:100]), 10, 4, clock)


class OutOfInk(BaseException):
    """What is no error of a model's rows."""


class Breaks(Timed):
    def predict(self, inputs: Arrays) -> dict[str, Any]:
        if threading.current_thread().name.endswith("1"):
            message = "out of ink"
            raise OutOfInk(message)
        return {"score": inputs["x"][:, 0]}


def test_what_one_slot_raises_ends_the_measuring_of_all() -> None:
    with pytest.raises(OutOfInk, match="out of ink"):
        measure_throughput(Breaks(Clock(), {}), matrix(4), rows(X[:100]), 10, 2, Clock())
