"""The tuner: measures which engine and batch size are fastest for a model on this machine, with rows of the dataset.

Shapes: N rows.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import statistics
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from pydantic import AliasChoices, Field, ValidationError

from serving.errors import DependencyFault, DeviceLost
from serving.model.batching import BATCH_ROWS_MAX
from serving.model.contract import Contract, Frozen
from serving.model.encoding import Encoded
from serving.model.forward import Forward
from serving.model.interface import Engine, Isolated, Model, Predictions, Tunable, TuningLimits

TUNING_TAG = "overnight.tuning."

_WINDOW_SECONDS = 0.06
BUDGET_SECONDS = 4.0
_PASS_SECONDS_MAX = 0.5
_FINAL_ROUNDS = 3
_FINALISTS = 3
# What differs in the last bits from torch's default kernels must be worth it.
_GAIN_MIN = 1.1
_LARGER_GAIN_MIN = 1.03
_SLOW_RATIO = 0.75
# Up to the size that a model has untuned, one that gains less is tried too, where a pass takes no longer than this.
_OWN_SECONDS_MAX = 10.0
_ROWS_TO_COMPARE = 1024
# Allows for sums in another order; a wrong kernel is further off by orders of magnitude.
_FLOAT32_TOLERANCE = 1e-5
_PASSES_TO_SORT = 4
# MLflow's tags hold 5,000 characters.
_TRIALS_KEPT = 16


class Trial(Frozen):
    """A setting that was measured; `difference` is the largest from the default engine's predictions of the sample."""

    engine: Engine
    batch_size: int
    rows_per_second: float
    difference: float


class Tuning(Frozen):
    """The chosen setting, the best of those that were measured, and the seconds that measuring might take."""

    machine: str
    limits: TuningLimits = Field(validation_alias=AliasChoices("limits", "wish"))
    engine: Engine
    batch_size: int
    slots: int
    rows_per_second: float
    trials: tuple[Trial, ...]
    seconds_max: float = BUDGET_SECONDS


def tune(
    model: Tunable,
    contract: Contract,
    sample: Encoded,
    limits: TuningLimits,
    *,
    machine: str,
    clock: Callable[[], float],
    seconds_max: float = BUDGET_SECONDS,
) -> Tuning | None:
    """Measure engines and batch sizes on prepared rows with all slots running, and choose.

    Takes about so many seconds, more where one pass does, beside what loading the model for each slot takes. Sizes are
    tried from the smallest, slow engines are dropped, and the best settings are measured again in turn. A model in a
    process of its own whose seconds hardly grow with the rows is tried up to the largest size, however long a pass
    takes: it may be many times as fast there. In less than
    four seconds only the default engine is tried: to prepare another may take longer than it gains. An engine whose
    bits differ from torch's default kernels is chosen only where it is at least 1.1 times as fast and its predictions
    stay within 1e-5 (relative, for float32) or within the caller's tolerance (absolute, for bfloat16).

    Returns None where no row of the sample can be scored. Raises what the model raises.
    """
    if (sample.flags.code_N != 0).all():
        return None
    run = _TuningRun(model, contract, sample, limits, clock, seconds_max)
    run.measure_sizes()
    best = run.choose()
    return Tuning(
        machine=machine,
        limits=limits,
        engine=best.engine,
        batch_size=best.batch_size,
        slots=limits.slots or run.models[best.engine].slots,
        rows_per_second=best.rows_per_second,
        trials=tuple(run.rank()[:_TRIALS_KEPT]),
        seconds_max=seconds_max,
    )


def tuning_tag(machine: str, limits: TuningLimits) -> str:
    """Return the name of the tag by which a model version keeps its tuning for a kind of machine and these limits."""
    digest = hashlib.sha256(f"{machine}\0{limits.model_dump_json()}".encode()).hexdigest()
    return f"{TUNING_TAG}{digest[:16]}"


def list_tunings(tags: Mapping[str, str]) -> dict[str, Tuning | None]:
    """Return the tunings that the tags of a model version hold, by tag; None for one that was given up."""
    found: dict[str, Tuning | None] = {}
    for tag, text in tags.items():
        if tag.startswith(TUNING_TAG):
            try:
                found[tag] = Tuning.model_validate_json(text)
            except ValidationError:
                found[tag] = None
    return found


def read_tuning(tags: Mapping[str, str], machine: str, limits: TuningLimits) -> Tuning | None:
    """Return the tuning that a model version's tags hold for this machine and these limits, None without one."""
    try:
        tuning = Tuning.model_validate_json(tags.get(tuning_tag(machine, limits), ""))
    except ValidationError:
        return None
    return tuning if (tuning.machine, tuning.limits) == (machine, limits) else None


@dataclass(slots=True)
class _TuningRun:
    """What was measured so far."""

    model: Tunable
    contract: Contract
    sample: Encoded
    limits: TuningLimits
    clock: Callable[[], float]
    seconds_max: float
    until: float = field(init=False)
    models: dict[Engine, Tunable] = field(init=False)
    differences: dict[Engine, float] = field(init=False)
    trials: dict[tuple[Engine, int], Trial] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        engines = self.model.engines(self.limits)
        kept = engines if self.seconds_max >= BUDGET_SECONDS else engines[:1]
        self.models = {engine: self.model.with_engine(engine) for engine in kept}
        self.differences = self._compare_engines()
        for engine in self.differences if isinstance(self.model, Isolated) else ():
            # The process of every slot starts, which is no part of what is measured.
            self._measure_rate(engine, self.limits.batch_size or self.model.batch_sizes[0])
        self.until = self.clock() + self.seconds_max

    def _compare_engines(self) -> dict[Engine, float]:
        """Return the engines whose predictions of the sample are near enough to the default's, with the differences."""
        size = self.limits.batch_size or self.model.batch_sizes[0]
        few = self.sample.slice_rows(0, _count_rows_to_score(self.sample, size))
        plain, *others = self.models
        if not others:
            return {plain: 0.0}
        expected = self._predict(plain, few, size)
        kept = {plain: 0.0}
        for engine in others:
            try:
                got = self._predict(engine, few, size)
            except (DependencyFault, DeviceLost):
                raise
            except Exception:  # noqa: BLE001, S112 - an engine that fails where the default does not is not chosen
                continue
            off, allowed = _find_difference(expected, got), self._find_tolerance(engine, expected)
            if off <= allowed:
                kept[engine] = off
        return kept

    def _predict(self, engine: Engine, sample: Encoded, size: int) -> Predictions:
        model = self.models[engine]
        with model.slot():
            return Forward(model, self.contract, size).score(sample.repeat(1))

    def _find_tolerance(self, engine: Engine, expected: Predictions) -> float:
        if engine.precision != "float32":
            return self.limits.bfloat16_tolerance or 0.0
        largest = max((np.abs(v).max(initial=0) for v in expected.values() if v.dtype.kind == "f"), default=0)
        return _FLOAT32_TOLERANCE * max(1.0, float(largest))

    def measure_sizes(self) -> None:
        """Measure each size with each engine that is not too slow."""
        engines = list(self.differences)
        for size in [self.limits.batch_size] if self.limits.batch_size else self.model.batch_sizes:
            for engine in engines:
                if self._is_costly(size) and not self._is_worth_it(engine, size):
                    return
                self._measure_trial(engine, size)
            rates = {engine: self.trials[engine, size].rows_per_second for engine in engines}
            best = max(rates.values())
            if size >= _ROWS_TO_COMPARE:
                engines = [engine for engine, rate in rates.items() if rate >= _SLOW_RATIO * best]
            fastest = max(trial.rows_per_second for trial in self.trials.values())
            if best < _SLOW_RATIO * fastest or _estimate_rows_per_pass(self.sample, size) >= self.sample.rows:
                return

    def _is_costly(self, size: int) -> bool:
        """Whether a trial of a size takes too long if seconds grow with rows, or passes of the last one did."""
        if not self.trials:
            return False
        longest = max(trial.batch_size for trial in self.trials.values())
        fastest = max(trial.rows_per_second for trial in self.trials.values() if trial.batch_size == longest)
        takes_long = _estimate_rows_per_pass(self.sample, longest) / fastest > _PASS_SECONDS_MAX
        return (takes_long and size > longest) or self.clock() + self._expect_seconds(size) > self.until

    def _is_worth_it(self, engine: Engine, size: int) -> bool:
        """Whether a size is so much faster than those tried, as their seconds tell, that a trial may take its time.

        The rate must rise by the root of what the rows rise by: seconds then hardly grow with rows. Up to the model's
        own size a smaller gain will do, where a pass is not too long. With one size tried, twice its rows are measured.
        """
        if not isinstance(self.model, Isolated):
            return False
        tried = [trial for trial in self.trials.values() if trial.engine == engine]
        points = {trial.batch_size: self._find_pass_seconds(trial.batch_size, trial.rows_per_second) for trial in tried}
        largest = max(points)
        if len(points) == 1:
            points[2 * largest] = self._find_pass_seconds(2 * largest, self._measure_rate(engine, 2 * largest))
        (fewer, less), (more, seconds) = sorted(points.items())[-2:]
        expected = seconds + max(0.0, seconds - less) / (more - fewer) * (size - more)
        gain = min(points[at] / at for at in points if at <= largest) * size / expected
        is_own = size <= self.model.batch_size and expected <= _OWN_SECONDS_MAX
        return gain >= (_GAIN_MIN if is_own else math.sqrt(size / largest))

    def _find_pass_seconds(self, size: int, rate: float) -> float:
        slots = self.limits.slots or self.model.slots
        return slots * _estimate_rows_per_pass(self.sample, size) / rate

    def _expect_seconds(self, size: int) -> float:
        """Return what a trial of a size takes: each slot makes a pass to warm up, and one or more that count."""
        fastest = max(trial.rows_per_second for trial in self.trials.values())
        slots = self.limits.slots or self.model.slots
        return max(_WINDOW_SECONDS, 2 * slots * _estimate_rows_per_pass(self.sample, size) / fastest)

    def _measure_trial(self, engine: Engine, size: int) -> None:
        self.trials[engine, size] = Trial(
            engine=engine,
            batch_size=size,
            rows_per_second=self._measure_rate(engine, size),
            difference=self.differences[engine],
        )

    def _measure_rate(self, engine: Engine, size: int) -> float:
        model = self.models[engine]
        return measure_throughput(model, self.contract, self.sample, size, self.limits.slots or model.slots, self.clock)

    def rank(self) -> list[Trial]:
        """Return the trials, the fastest first."""
        return sorted(self.trials.values(), key=lambda trial: -trial.rows_per_second)

    def choose(self) -> Trial:
        """Measure the best settings again, in turn, and return the one to use."""
        ranked = self.rank()
        plain = [trial for trial in ranked if trial.engine == next(iter(self.models))]
        finalists = list({(t.engine, t.batch_size): t for t in (*ranked[:_FINALISTS], *plain[:1])})
        rates: dict[tuple[Engine, int], list[float]] = {at: [self.trials[at].rows_per_second] for at in finalists}
        for _, (engine, size) in itertools.product(range(_FINAL_ROUNDS), finalists):
            if len(finalists) > 1 and self.clock() < self.until + self.seconds_max / 2:
                rates[engine, size].append(self._measure_rate(engine, size))
        for at, measured in rates.items():
            self.trials[at] = self.trials[at].model_copy(update={"rows_per_second": statistics.median(measured)})
        return _choose_trial([self.trials[at] for at in finalists], plain=next(iter(self.models)))


def _choose_trial(trials: Sequence[Trial], *, plain: Engine) -> Trial:
    """Return the fastest trial; prefer a smaller batch that is as fast, and the default engine unless another gains."""
    fastest = max(trial.rows_per_second for trial in trials)
    kept = [t for t in trials if t.engine == plain and t.rows_per_second * _GAIN_MIN >= fastest] or trials
    fastest = max(trial.rows_per_second for trial in kept)
    return min((t for t in kept if t.rows_per_second * _LARGER_GAIN_MIN >= fastest), key=lambda t: t.batch_size)


def measure_throughput(
    model: Model,
    contract: Contract,
    sample: Encoded,
    batch_size: int,
    slots: int,
    clock: Callable[[], float],
    *,
    pass_seconds_max: float = _PASS_SECONDS_MAX,
) -> float:
    """Return the rows a second of all slots together on prepared rows, after one pass each to warm up.

    A first pass that takes longer than `pass_seconds_max` is the measurement itself.
    """
    ready = threading.Barrier(slots)

    def run() -> float:
        try:
            with model.slot():
                forward, mine = Forward(model, contract, batch_size), sample.repeat(1)
                first = mine.slice_rows(0, _count_rows_to_score(sample, batch_size))
                start = clock()
                forward.score(first)
                warm = clock() - start
                ready.wait()
                if warm > pass_seconds_max:
                    return first.rows / warm
                return _measure_steady_rate(forward, mine, first.rows, clock)
        except BaseException:
            ready.abort()
            raise

    with ThreadPoolExecutor(slots, thread_name_prefix="tune") as pool:
        runs = [pool.submit(run) for _ in range(slots)]
    failed = [error for error in (run.exception() for run in runs) if error is not None]
    if failed:
        raise next((error for error in failed if not isinstance(error, threading.BrokenBarrierError)), failed[0])
    return sum(run.result() for run in runs)


def measure_passes(
    model: Model, contract: Contract, sample: Encoded, budget_ms: float, *, slots: int, clock: Callable[[], float]
) -> list[tuple[int, float]]:
    """Measure passes of 1, 2, 4, ... rows of the sample with all slots running; return pairs of rows and seconds.

    Ends with the first that takes longer than the budget. Each is a median of three. Raises what the model raises.
    """
    measured = []
    sizes = itertools.takewhile(lambda rows: rows <= min(BATCH_ROWS_MAX, sample.rows), map((1).__lshift__, range(32)))
    for rows in sizes:
        rates = [measure_throughput(model, contract, sample, rows, slots, clock) for _ in range(_FINAL_ROUNDS)]
        measured.append((rows, rows * slots / statistics.median(rates)))
        if 1000 * measured[-1][1] > budget_ms:
            break
    return measured


def _measure_steady_rate(forward: Forward, sample: Encoded, piece: int, clock: Callable[[], float]) -> float:
    start, rows = clock(), 0
    while True:
        for at in range(0, sample.rows, piece):
            some = sample.slice_rows(at, at + piece)
            forward.score(some)
            rows += some.rows
            if (taken := clock() - start) > _WINDOW_SECONDS:
                return rows / taken


def _estimate_rows_per_pass(sample: Encoded, batch_size: int) -> float:
    return batch_size if sample.length_N is None else batch_size / max(1.0, float(sample.length_N.mean()))


def _count_rows_to_score(sample: Encoded, batch_size: int) -> int:
    """Return how many rows to score at once: a batch, or enough to sort by length."""
    if sample.length_N is None:
        return batch_size
    return max(1, int(_PASSES_TO_SORT * _estimate_rows_per_pass(sample, batch_size)))


def _find_difference(expected: Predictions, got: Predictions) -> float:
    """Return the largest absolute difference of any prediction; infinite where values that are not floats differ."""
    largest = 0.0
    for name, value in expected.items():
        if value.dtype.kind == "f":
            if (np.isfinite(value) != np.isfinite(got[name])).any():
                return float("inf")
            off = np.abs(value.astype(np.float64) - got[name].astype(np.float64))
            largest = max(largest, float(off[np.isfinite(value)].max(initial=0.0)))
        elif not np.array_equal(value, got[name]):
            return float("inf")
    return largest
