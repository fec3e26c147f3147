from __future__ import annotations

import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.errors import DependencyFault, DeviceLost, ModelFailed
from serving.model.contract import Output
from serving.model.encoding import Encoded, Flags, encode
from serving.model.forward import Forward
from serving.model.interface import Arrays, Halted, Predictions
from serving.model.outputs import name_outputs
from serving.model.torch_model import TorchModel
from tasks.batch.parts import output_columns
from tests.serving.toys import Picky, alone, column, matrix, network

REASON = "ValueError: no row may begin with 1 <<object object at 0x...>>"
X = np.random.default_rng(2).standard_normal((100, 4), dtype=np.float32)


@dataclass
class Plain:
    """A model that is a Python function of arrays, and counts the rows of each call."""

    answer: Callable[[Arrays], Any]
    outputs: tuple[Output, ...] = (Output(name="score", dtype="float32"),)
    rows_seen: list[int] = field(default_factory=list)
    slots: int = 1

    def prepare(self, encoded: Encoded) -> Encoded:
        return encoded

    def predict(self, inputs: Arrays) -> dict[str, Any]:
        rows = len(next(iter(inputs.values())))
        self.rows_seen.append(rows)
        return name_outputs(self.answer(inputs), self.outputs, rows, np.asarray)

    def slot(self) -> AbstractContextManager[None]:
        return nullcontext()


def encoded(x_NF: np.ndarray, bad: dict[int, str] | None = None) -> Encoded:
    """Rows as `encode` hands them on: a row of memory a column, and the bad ones flagged."""
    flags = Flags.all_good(len(x_NF))
    for row, reason in (bad or {}).items():
        flags.mark_row(row, "c0", reason)
    return Encoded(inputs={"x": np.ascontiguousarray(x_NF.T).T}, flags=flags, rows=len(x_NF))


def score(module: torch.nn.Module, rows: Encoded, batch_size: int) -> np.ndarray:
    model = TorchModel(module, matrix(4))
    with model.slot():
        return Forward(model, matrix(4), batch_size).score(rows)["score"]


def rejects(rows: Encoded) -> dict[int, tuple[str, str]]:
    return {row: rows.flags.reasons[code - 1] for row, code in enumerate(rows.flags.code_N) if code}


def beginning_with(first: float, rows: Any) -> np.ndarray:
    x = X.copy()
    x[rows, 0] = first
    return x


def test_scoring_that_may_not_continue_ends_before_the_next_batch() -> None:
    model = Plain(lambda inputs: inputs["x"][:, 0])
    forward = Forward(model, matrix(4), 30, may_continue=lambda: len(model.rows_seen) < 2)

    with pytest.raises(Halted):
        forward.score(encoded(X))
    assert [30, 30] == model.rows_seen


sets_of_rows = st.sets(st.integers(0, 99), max_size=30)


@settings(max_examples=150)
@given(st.sets(st.integers(1, 99), max_size=30), sets_of_rows, sets_of_rows, st.integers(1, 120))
def test_exactly_the_bad_rows_are_rejected_and_no_bit_of_the_others_changes(
    raising: set[int], undefined: set[int], broken: set[int], batch_size: int
) -> None:
    # The first row is good, so that a first batch of one does not fail the model.
    undefined, broken = undefined - raising - {0}, broken - raising - undefined - {0}
    x = beginning_with(1, sorted(raising))
    x[sorted(undefined), 0] = 2
    rows = encoded(x, dict.fromkeys(broken, "null"))
    first = set(range(batch_size))
    if first <= raising | undefined | broken:
        return
    found, undisturbed = score(Picky(), rows, batch_size), score(network(), encoded(X), batch_size)
    expected = dict.fromkeys(raising, ("", REASON))
    expected |= dict.fromkeys(undefined, ("score", "prediction is not finite")) | dict.fromkeys(broken, ("c0", "null"))
    good = np.flatnonzero(rows.flags.code_N == 0)

    assert expected == rejects(rows)
    assert undisturbed[good].tobytes() == found[good].tobytes()


def test_what_an_undisturbed_batch_costs_is_one_pass_and_a_bad_row_a_few_more() -> None:
    undisturbed, disturbed = Picky(), Picky()
    score(undisturbed, encoded(X), 64)
    score(disturbed, encoded(beginning_with(1, [70])), 64)

    assert [64, 36] == undisturbed.rows_seen
    assert [64, 36] == disturbed.rows_seen[:2]
    assert 36 == disturbed.rows_seen[-1]
    assert 2 + 2 * 6 + 1 >= len(disturbed.rows_seen)


def test_a_batch_of_nothing_but_rejects_never_reaches_the_model() -> None:
    module = Picky()
    rows = encoded(X, dict.fromkeys(range(64, 100), "null"))
    found = score(module, rows, 32)

    assert [32, 32] == module.rows_seen
    assert [0.0] * 36 == found[64:].tolist()


def test_a_table_of_nothing_but_rejects_never_reaches_the_model() -> None:
    module = Picky()
    score(module, encoded(X, dict.fromkeys(range(100), "null")), 32)

    assert [] == module.rows_seen


def test_bad_rows_are_filled_with_a_good_one_before_the_model_sees_them() -> None:
    seen: list[np.ndarray] = []
    model = Plain(lambda inputs: seen.append(inputs["x"]) or inputs["x"][:, 0])
    x = X.copy()
    x[[0, 5]] = np.nan
    Forward(model, matrix(4), 10).score(encoded(x[:10], {0: "null", 5: "null"}))

    assert np.array_equal(X[1], seen[0][0])
    assert np.array_equal(X[1], seen[0][5])


@pytest.mark.parametrize("first", [1, 2])
def test_a_first_batch_without_one_prediction_fails_the_model_at_once(first: float) -> None:
    reason = REASON if first == 1 else "prediction is not finite (output 'score')"
    with pytest.raises(ModelFailed) as caught:
        score(Picky(), encoded(beginning_with(first, slice(0, 8)), {0: "null", 3: "null"}), 8)

    assert f"got none of 6: {reason}. That is the model, not the rows" in str(caught.value)


@pytest.mark.parametrize("first", [1, 2])
def test_a_later_batch_without_one_prediction_is_a_batch_of_rejects(first: float) -> None:
    rows = encoded(beginning_with(first, slice(8, 16)))
    score(Picky(), rows, 8)

    assert set(range(8, 16)) == set(rejects(rows))


def test_a_first_batch_of_rejects_proves_nothing_about_the_model() -> None:
    with pytest.raises(ModelFailed, match="got none of 8"):
        score(Picky(), encoded(beginning_with(1, slice(8, 16)), dict.fromkeys(range(8), "null")), 8)


def test_a_model_that_fails_on_batches_and_not_on_rows_fails() -> None:
    def answer(inputs: Arrays) -> Any:
        if len(inputs["x"]) > 3:
            message = "too many rows"
            raise ValueError(message)
        return inputs["x"][:, 0]

    with pytest.raises(
        ModelFailed, match=r"ValueError: too many rows with 0 of 8 rows replaced. The model fails on batches"
    ):
        Forward(Plain(answer), matrix(4), 8).score(encoded(X))


def test_an_answer_of_the_wrong_shape_is_no_affair_of_the_rows() -> None:
    model = Plain(lambda inputs: inputs["x"])
    with pytest.raises(ModelFailed, match="Output 'score' must hold 1 values"):
        Forward(model, matrix(4), 50).score(encoded(X))

    assert [50] == model.rows_seen


def test_a_null_label_is_a_reject_and_wide_labels_are_whole_or_rejects() -> None:
    outputs = (Output(name="label", dtype="str"), Output(name="pair", dtype="str", shape=(2,)))

    def answer(inputs: Arrays) -> Any:
        label = np.array(["a", "b", "c", "d"], dtype=object)
        label[inputs["x"][:, 0] == 7] = None
        pair = np.stack([np.array(["p"] * 4, dtype=object)] * 2, axis=1)
        pair[inputs["x"][:, 0] == 8, 1] = np.nan
        return {"label": label, "pair": pair}

    x = X[:4].copy()
    x[1, 0], x[2, 0] = 7, 8
    rows = encoded(x, {3: "null"})
    found = Forward(Plain(answer, outputs), matrix(4, *outputs), 4).score(rows)

    assert {1: ("label", "prediction is null"), 2: ("pair", "prediction is null"), 3: ("c0", "null")} == rejects(rows)
    assert ["a", None, "c"] == found["label"][:3].tolist()
    assert [["p", "p"], ["p", None]] == found["pair"][1:3].tolist()


def test_labels_of_batches_that_never_reach_the_model_are_none() -> None:
    output = Output(name="label", dtype="str")
    rows = encoded(X[:2], {0: "null", 1: "null"})
    found = Forward(Plain(lambda _: ["a"], (output,)), matrix(4, output), 2).score(rows)

    assert [None, None] == found["label"].tolist()


def test_a_null_and_an_infinite_number_among_integers_reject_only_their_rows() -> None:
    output = Output(name="count", dtype="int64")
    x = X.copy()
    x[:, 0] = np.arange(100)
    x[[3, 60], 0] = np.nan, np.inf
    rows = encoded(x)
    found = Forward(Plain(lambda inputs: inputs["x"][:, 0], (output,)), matrix(4, output), 50).score(rows)

    infinite = ("", "ValueError: output 'count' must be finite to be int64")
    assert {3: ("count", "prediction is null"), 60: infinite} == rejects(rows)
    assert [0, 1, 2, 4] == found["count"][[0, 1, 2, 4]].tolist()


@pytest.mark.parametrize(
    ("dtype", "values", "reason"),
    [
        ("int64", [7, None, 2**63 - 1], "null"),
        ("bool", [True, None, False], "null"),
        ("str", ["a", None, "c"], "null"),
        ("float64", [0.5, math.nan, 1.5], "not finite"),
    ],
)
def test_a_null_is_a_prediction_of_an_output_that_is_not_required_and_else_a_reject(
    dtype: str, values: list[Any], reason: str
) -> None:
    for required in (True, False):
        output = Output(name="y", dtype=dtype, required=required)
        rows = encoded(X[:3])
        found = Forward(Plain(lambda _: np.array(values, dtype=object), (output,)), matrix(4, output), 3).score(rows)
        (column, *_) = output_columns(matrix(4, output), found, rows.flags).values()

        assert ({1: ("y", f"prediction is {reason}")} if required else {}) == rejects(rows)
        assert [values[0], None, values[2]] == column.to_pylist()
        assert output.arrow_type == column.type


def test_an_infinite_number_is_a_reject_of_any_output() -> None:
    output = Output(name="y", dtype="float64", required=False)
    rows = encoded(X[:3])
    Forward(Plain(lambda _: [math.inf, math.nan, 1.0], (output,)), matrix(4, output), 3).score(rows)

    assert {0: ("y", "prediction is not finite")} == rejects(rows)


class Hungry(torch.nn.Module):
    """A network that runs out of memory above some number of rows."""

    def __init__(self, rows_max: int, error: Callable[[], Exception], *, inplace: bool = False) -> None:
        super().__init__()
        self.inner = network()
        self.rows_max, self.error, self.inplace = rows_max, error, inplace
        self.rows_seen: list[int] = []

    def forward(self, x_NF: torch.Tensor) -> torch.Tensor:
        self.rows_seen.append(len(x_NF))
        if self.inplace:
            x_NF.mul_(2)
        if len(x_NF) > self.rows_max:
            raise self.error()
        return self.inner(x_NF if self.inplace else x_NF * 2)


OUT_OF_MEMORY = [
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    MemoryError,
    lambda: pa.ArrowMemoryError("malloc of size 1 failed"),
    lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried"),
    lambda: RuntimeError("CUDA error: out of memory"),
    lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_out_of_memory_halves_the_batch_and_the_size_that_fits_is_remembered(error: Callable[[], Exception]) -> None:
    module, rows = Hungry(20, error), encoded(X)
    model = TorchModel(module, matrix(4))
    forward = Forward(model, matrix(4), 64)
    with model.slot():
        found = forward.score(rows)["score"]

    assert [64, 32, 16, 16, 16, 16, 16, 16, 4] == module.rows_seen
    assert 16 == forward.safe_batch_size
    assert {} == rejects(rows)
    assert np.allclose(score(Hungry(1000, MemoryError), encoded(X), 64), found, rtol=1e-5)


def test_the_error_of_torchs_own_allocator_is_out_of_memory() -> None:
    def answer(inputs: Arrays) -> Any:
        torch.empty(1 << 50 if len(inputs["x"]) > 32 else 1)
        return inputs["x"][:, 0]

    forward = Forward(Plain(answer), matrix(4), 100)
    found = forward.score(encoded(X))["score"]

    assert 25 == forward.safe_batch_size
    assert np.array_equal(X[:, 0], found)


def test_a_row_that_does_not_fit_in_memory_is_a_reject() -> None:
    def answer(inputs: Arrays) -> Any:
        if (inputs["x"][:, 0] == 1).any():
            raise MemoryError
        return inputs["x"][:, 0]

    rows = encoded(beginning_with(1, [40]))
    Forward(Plain(answer), matrix(4), 32).score(rows)

    assert {40: ("", "MemoryError: ")} == rejects(rows)


def test_a_network_that_works_in_place_is_given_each_row_as_it_was_after_out_of_memory() -> None:
    undisturbed = score(Hungry(1000, MemoryError), encoded(X), 64)
    found = score(Hungry(20, MemoryError, inplace=True), encoded(X), 64)

    assert np.allclose(undisturbed, found, rtol=1e-5)


def test_a_model_that_works_in_place_is_given_each_row_as_it_was_after_an_error() -> None:
    def answer(inputs: Arrays) -> Any:
        inputs["x"][:, 1] *= 2
        if (inputs["x"][:, 0] == 1).any():
            message = "a row"
            raise ValueError(message)
        return inputs["x"][:, 1]

    rows = encoded(beginning_with(1, [7, 70]))
    found = Forward(Plain(answer), matrix(4), 64).score(rows)["score"]
    good = np.flatnonzero(rows.flags.code_N == 0)

    assert {7, 70} == set(rejects(rows))
    assert np.array_equal(X[good, 1] * 2, found[good])


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be asynchronous"),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
        RuntimeError("HIP error: unspecified launch failure"),
        torch.AcceleratorError("CUDA error: unspecified launch failure"),
    ],
)
def test_a_device_error_ends_it_at_once_and_rejects_no_row(error: Exception) -> None:
    def answer(inputs: Arrays) -> Any:
        if len(model.rows_seen) > 1:
            raise error
        return inputs["x"][:, 0]

    model, rows = Plain(answer), encoded(X)
    with pytest.raises(DeviceLost, match=r"The device must answer, got .* This process ends; call again to resume"):
        Forward(model, matrix(4), 50).score(rows)

    assert [50, 50] == model.rows_seen
    assert {} == rejects(rows)


def test_a_device_error_while_bad_rows_are_looked_for_ends_it_too() -> None:
    errors: Iterator[Exception] = iter([ValueError("a row"), RuntimeError("CUDA error: device-side assert triggered")])

    def answer(_: Arrays) -> Any:
        raise next(errors)

    with pytest.raises(DeviceLost):
        Forward(Plain(answer), matrix(4), 50).score(encoded(X))


def test_the_words_of_a_device_in_another_error_are_a_rows_affair() -> None:
    def answer(inputs: Arrays) -> Any:
        if (inputs["x"][:, 0] == 1).any():
            message = "CUDA error: said the row"
            raise ValueError(message)
        return inputs["x"][:, 0]

    rows = encoded(beginning_with(1, [3]))
    Forward(Plain(answer), matrix(4), 50).score(rows)

    assert {3: ("", "ValueError: CUDA error: said the row")} == rejects(rows)


def test_a_reason_is_one_short_line_without_addresses() -> None:
    def answer(inputs: Arrays) -> Any:
        if (inputs["x"][:, 0] == 1).any():
            message = f"at {id(inputs):#x}\n  and 0XFF\tand " + "more " * 100
            raise ValueError(message)
        return inputs["x"][:, 0]

    rows = encoded(beginning_with(1, [3]))
    Forward(Plain(answer), matrix(4), 50).score(rows)
    ((_, reason),) = rejects(rows).values()

    assert reason.startswith("ValueError: at 0x... and 0x... and more more")
    assert 200 == len(reason)


def test_the_reasons_are_the_same_with_any_batch_size() -> None:
    def answer(inputs: Arrays) -> Any:
        worst = np.flatnonzero(inputs["x"][:, 0] == 1)
        if len(worst):
            message = f"row {worst[0]} of {len(inputs['x'])}"
            raise ValueError(message)
        return inputs["x"][:, 0]

    seen = []
    for batch_size in (1, 7, 100):
        rows = encoded(beginning_with(1, [3, 4, 90]))
        Forward(Plain(answer), matrix(4), batch_size).score(rows)
        seen.append(rejects(rows))

    assert dict.fromkeys([3, 4, 90], ("", "ValueError: row 0 of 1")) == seen[0] == seen[1] == seen[2]


def test_inputs_of_every_kind_are_cut_filled_and_scored_together() -> None:
    contract = alone(
        column("str", "s"), column("float32", "v", shape=(2,)), column("datetime64[ns]", "t"), column("int8", "n")
    )
    table = pa.table(
        {
            "s": ["a", None, "c", "d"],
            "v": [[1.0, 2.0], [3.0, 4.0], [5.0], [7.0, 8.0]],
            "t": pa.array([0, 1, 2, 3], pa.timestamp("s")),
            "n": pa.array([1, 2, 3, 4], pa.int8()),
        },
        schema=pa.schema(
            [("s", pa.string()), ("v", pa.list_(pa.float32())), ("t", pa.timestamp("s")), ("n", pa.int8())]
        ),
    )
    seen: list[Any] = []

    def answer(inputs: Arrays) -> Any:
        seen.extend(zip(inputs["s"], inputs["v"].tolist(), inputs["t"].tolist(), inputs["n"].tolist(), strict=True))
        return inputs["v"].sum(axis=1)

    rows = encode(contract, table)
    found = Forward(Plain(answer), contract, 4).score(rows)["score"]

    assert {1: ("s", "null"), 2: ("v", "a list that has not 2 values")} == rejects(rows)
    assert [seen[0]] * 2 == seen[1:3]
    assert ("d", [7.0, 8.0], 3 * 10**9, 4) == seen[3]
    assert [3.0, 15.0] == found[[0, 3]].tolist()


def test_no_rows_are_no_predictions() -> None:
    found: Predictions = Forward(Plain(lambda _: None), matrix(4), 8).score(encoded(X[:0]))

    assert (0,) == found["score"].shape


class Padded(Plain):
    """Takes ragged rows of tokens, and answers with their sums."""

    def __init__(self) -> None:
        super().__init__(lambda inputs: np.array([row.sum() for row in inputs["x"]], dtype=np.float32))
        self.tokens_seen: list[int] = []

    def predict(self, inputs: Arrays) -> dict[str, Any]:
        self.tokens_seen.append(len(inputs["x"]) * max(len(row) for row in inputs["x"]))
        return super().predict(inputs)


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60), bad=sets_of_rows, tokens=st.integers(1, 120))
def test_rows_with_lengths_pass_in_batches_of_few_tokens_and_come_back_in_order(
    lengths: list[int], bad: set[int], tokens: int
) -> None:
    rows_N = np.empty(len(lengths), dtype=object)
    rows_N[:] = [np.full(length, at) for at, length in enumerate(lengths)]
    flags = Flags.all_good(len(lengths))
    for row in bad & set(range(1, len(lengths))):
        flags.mark_row(row, "c0", "null")
    before = flags.code_N.copy()
    model = Padded()
    contract = alone(column("int64"))
    given_rows = Encoded(inputs={"x": rows_N}, flags=flags, rows=len(lengths), length_N=np.array(lengths))
    scores = Forward(model, contract, tokens).score(given_rows)["score"]

    good = before == 0
    assert [at * length for at, length in enumerate(lengths) if good[at]] == scores[good].tolist()
    assert before.tolist() == flags.code_N.tolist()
    assert max(model.tokens_seen) <= max(tokens, *lengths)
    assert len(model.tokens_seen) <= len(lengths)


def ragged(lengths: list[int]) -> Encoded:
    rows_N = np.empty(len(lengths), dtype=object)
    rows_N[:] = [np.full(length, at) for at, length in enumerate(lengths)]
    return Encoded(
        inputs={"x": rows_N}, flags=Flags.all_good(len(lengths)), rows=len(lengths), length_N=np.array(lengths)
    )


class Narrow(Padded):
    """Has no memory for more than 40 tokens."""

    def predict(self, inputs: Arrays) -> dict[str, Any]:
        found = super().predict(inputs)
        if self.tokens_seen[-1] > 40:
            raise MemoryError
        return found


def test_out_of_memory_halves_tokens_so_that_a_long_batch_does_not_shrink_short_ones() -> None:
    model = Narrow()
    forward = Forward(model, alone(column("int64")), 120)
    longest = forward.score(ragged([30, 30, 30, 30]))["score"]
    halved = len(model.tokens_seen)
    short = forward.score(ragged([2] * 60))["score"]

    assert [0, 30, 60, 90] == longest.tolist()
    assert [2.0 * row for row in range(60)] == short.tolist()
    assert [120, 60, 30, 30, 30, 30] == model.tokens_seen[:halved]
    assert 30 == forward.safe_batch_size
    assert [30] * 4 == model.tokens_seen[halved:]


def test_a_row_of_more_tokens_than_fit_in_memory_is_a_reject() -> None:
    rows = ragged([3, 3, 50, 4])
    found = Forward(Narrow(), alone(column("int64")), 120).score(rows)["score"]

    assert {2: ("", "MemoryError: ")} == rejects(rows)
    assert [0, 3, 12] == found[[0, 1, 3]].tolist()


class Ahead(Plain):
    """A model whose passes are begun ahead, as a GPU's; it tells when each was begun and finished."""

    passes_ahead = 1

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__(lambda inputs: module(torch.from_numpy(inputs["x"])).detach())
        self.told: list[tuple[str, float]] = []

    def begin(self, inputs: Arrays) -> Arrays:
        self.told.append(("begin", inputs["x"][0, 0]))
        return inputs

    def finish(self, begun: Arrays) -> dict[str, Any]:
        self.told.append(("finish", begun["x"][0, 0]))
        return self.predict(begun)


def numbered(rows: int = 100) -> np.ndarray:
    return np.arange(10, 10 + 4 * rows, dtype=np.float32).reshape(rows, 4)


def test_a_pass_is_begun_before_the_one_ahead_of_it_is_waited_for() -> None:
    model, x = Ahead(network()), numbered()
    found = Forward(model, matrix(4), 40).score(encoded(x))["score"]

    assert ["begin", "begin", "finish", "begin", "finish", "finish"] == [step for step, _ in model.told]
    assert np.array_equal(score(network(), encoded(x), 40), found)


@given(failing=sets_of_rows, flagged=sets_of_rows, size=st.integers(1, 60))
def test_overlapping_passes_reject_the_same_rows_as_single_ones(
    failing: set[int], flagged: set[int], size: int
) -> None:
    x = beginning_with(1, sorted(failing - {0}))
    bad = dict.fromkeys(flagged - {0}, "null")
    alone_rows, ahead_rows = encoded(x, bad), encoded(x, bad)
    alone_scores = score(Picky(), alone_rows, size)
    ahead_scores = Forward(Ahead(Picky()), matrix(4), size).score(ahead_rows)["score"]

    assert rejects(alone_rows) == rejects(ahead_rows)
    good = alone_rows.flags.code_N == 0
    assert np.array_equal(alone_scores[good], ahead_scores[good])


def test_passes_are_begun_ahead_no_more_once_memory_ran_out() -> None:
    class Small(Ahead):
        def predict(self, inputs: Arrays) -> dict[str, Any]:
            if len(inputs["x"]) > 16:
                raise torch.OutOfMemoryError
            return super().predict(inputs)

    model = Small(network())
    forward = Forward(model, matrix(4), 25)
    found = forward.score(encoded(X))["score"]
    forward.score(encoded(X))

    assert 12 == forward.safe_batch_size
    assert 5 > len([step for step, _ in model.told if step == "begin"])
    assert 1e-6 > np.abs(score(network(), encoded(X), 12) - found).max()


def failing_for(calls: range, error: Callable[[], BaseException]) -> Plain:
    """A model whose calls of these numbers fail."""

    def answer(inputs: Arrays) -> Any:
        if len(model.rows_seen) - 1 in calls:
            raise error()
        return inputs["x"][:, 0]

    model = Plain(answer)
    return model


def test_a_connection_that_fails_for_a_while_rejects_no_row_and_is_tried_again_after_longer_and_longer() -> None:
    model, rows, slept = failing_for(range(1, 6), ConnectionResetError), encoded(X), list[float]()
    found = Forward(model, matrix(4), 50, sleep=slept.append).score(rows)["score"]

    assert {} == rejects(rows)
    assert np.array_equal(X[:, 0], found)
    assert [50] * 7 == model.rows_seen
    assert 0.1 * 0.75 <= slept[0] <= 0.1 * 1.25
    assert (0.1 + 0.2 + 0.5 + 1 + 2) * 0.75 <= sum(slept) <= (0.1 + 0.2 + 0.5 + 1 + 2) * 1.25


def test_a_connection_that_does_not_return_fails_the_chunk_and_rejects_no_row() -> None:
    model, rows, slept = failing_for(range(1, 1000), lambda: TimeoutError("no answer")), encoded(X), list[float]()
    with pytest.raises(DependencyFault) as caught:
        Forward(model, matrix(4), 50, sleep=slept.append).score(rows)

    assert {} == rejects(rows)
    assert "got TimeoutError: no answer (tries: 9)" in str(caught.value)
    assert "call again; the run resumes" in str(caught.value)
    assert 25 <= sum(slept) <= 50


def test_nothing_is_waited_for_where_nothing_fails_or_a_row_does() -> None:
    slept: list[float] = []
    rows = encoded(beginning_with(1, [3]))
    with TorchModel(Picky(), matrix(4)).slot():
        Forward(TorchModel(Picky(), matrix(4)), matrix(4), 50, sleep=slept.append).score(rows)

    assert [3] == list(rejects(rows))
    assert [] == slept


def test_a_wait_ends_within_a_tenth_of_a_second_once_scoring_must_stop() -> None:
    slept: list[float] = []
    model = failing_for(range(1000), ConnectionResetError)
    forward = Forward(model, matrix(4), 50, may_continue=lambda: sum(slept) < 1, sleep=slept.append)
    with pytest.raises(Halted):
        forward.score(encoded(X))

    assert sum(slept) < 1.1 + 1e-9
    assert max(slept) <= 0.1 + 1e-9


def test_a_connection_that_fails_during_the_bisection_rejects_only_the_bad_rows() -> None:
    def answer(inputs: Arrays) -> Any:
        if len(model.rows_seen) in (2, 4, 5, 9):
            raise ConnectionResetError
        if (inputs["x"][:, 0] == 1).any():
            message = "a row"
            raise ValueError(message)
        return inputs["x"][:, 0]

    model, rows = Plain(answer), encoded(beginning_with(1, [7, 70]))
    found = Forward(model, matrix(4), 100, sleep=lambda _: None).score(rows)["score"]
    good = np.flatnonzero(rows.flags.code_N == 0)

    assert dict.fromkeys((7, 70), ("", "ValueError: a row")) == rejects(rows)
    assert np.array_equal(X[good, 0], found[good])


def test_a_model_that_exits_rejects_the_row_that_it_exits_on() -> None:
    def answer(inputs: Arrays) -> Any:
        if (inputs["x"][:, 0] == 1).any():
            sys.exit("enough")
        return inputs["x"][:, 0]

    rows = encoded(beginning_with(1, [7]))
    found = Forward(Plain(answer), matrix(4), 50).score(rows)["score"]

    assert {7: ("", "ModelExit: it must return, got SystemExit: enough")} == rejects(rows)
    assert np.array_equal(np.delete(X[:, 0], 7), np.delete(found, 7))


def test_a_library_in_rust_that_panics_rejects_the_row_that_it_panics_on() -> None:
    panic = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})

    def answer(inputs: Arrays) -> Any:
        if (inputs["x"][:, 0] == 1).any():
            message = "index out of bounds"
            raise panic(message)
        return inputs["x"][:, 0]

    rows = encoded(beginning_with(1, [7]))
    found = Forward(Plain(answer), matrix(4), 50).score(rows)["score"]

    assert {7: ("", "ModelExit: PanicException: index out of bounds")} == rejects(rows)
    assert np.array_equal(np.delete(X[:, 0], 7), np.delete(found, 7))


def test_a_model_that_exits_on_every_row_fails() -> None:
    with pytest.raises(ModelFailed, match=r"got none of 50: ModelExit: it must return, got SystemExit: 3. That is the"):
        Forward(failing_for(range(1000), lambda: SystemExit(3)), matrix(4), 50).score(encoded(X))


def test_a_ctrl_c_is_never_taken_for_an_error_of_the_model() -> None:
    rows = encoded(X)
    with pytest.raises(KeyboardInterrupt):
        Forward(failing_for(range(1, 2), KeyboardInterrupt), matrix(4), 50).score(rows)

    assert {} == rejects(rows)


def test_the_exit_that_a_signals_handler_asks_for_passes_through_the_model() -> None:
    rows = encoded(X)
    before = signal.signal(signal.SIGUSR1, lambda *_: sys.exit(0))
    try:
        with pytest.raises(SystemExit):
            Forward(
                Plain(lambda inputs: os.kill(os.getpid(), signal.SIGUSR1) or inputs["x"][:, 0]), matrix(4), 50
            ).score(rows)
    finally:
        signal.signal(signal.SIGUSR1, before)

    assert {} == rejects(rows)
