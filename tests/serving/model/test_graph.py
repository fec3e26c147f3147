from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from pydantic import ValidationError

from serving.errors import ModelFailed, SchemaMismatch
from serving.model.batching import BatchingConfig
from serving.model.contract import Contract, Input, Output
from serving.model.encoding import Encoded, Flags
from serving.model.graph import (
    Combine,
    Graph,
    GraphModel,
    average_outputs,
    check_steps_fit,
    number_graph,
    share_batching,
)
from serving.model.pin import ModelPin
from serving.model.release import Release, Scaling
from tests.serving.toys import column, matrix

SCORE = Output(name="score", dtype="float32")


def taking(name: str, dtype: str = "float32", shape: tuple[int, ...] = (1,), *outputs: Output) -> Contract:
    """A contract of one tensor; it gives a label, unless other outputs are given."""
    taken = Input(name=name, dtype=dtype, shape=shape, columns=(column(dtype, name, shape=shape),))
    return Contract(inputs=(taken,), outputs=outputs or (Output(name="label", dtype="float32"),))


def pin(name: str = "m", version: str = "1", digest: str = "d") -> ModelPin:
    return ModelPin(name=name, version=version, model_id=None, source="", digest=digest)


def graph(combine: Combine, *contracts: Contract, **changes: Any) -> Graph:
    steps = tuple(
        Release(endpoint="churn", pin=pin(version=str(at)), contract=each) for at, each in enumerate(contracts, start=1)
    )
    return Graph.model_validate(
        {"endpoint": "churn", "version": "123456789", "combine": combine, "steps": steps, **changes}
    )


def test_a_chain_takes_what_its_first_step_takes_and_gives_what_its_last_one_gives() -> None:
    found = graph("chain", matrix(3), taking("score"))

    assert matrix(3).inputs == found.contract.inputs
    assert taking("score").outputs == found.contract.outputs
    assert found == Graph.model_validate_json(found.model_dump_json())


def test_a_scalar_and_a_tensor_of_one_value_a_row_are_the_same() -> None:
    check_steps_fit("chain", [("models:/a/1", matrix(3)), ("models:/b/1", taking("score", "float32", ()))])


@pytest.mark.parametrize(
    ("combine", "second", "said"),
    [
        (
            "chain",
            taking("points"),
            r"models:/b/2 must take what models:/a/1, the step before it, gives",
        ),
        ("chain", taking("score", "float64"), r"score float32 \[-1, 1\]; got score float64 \[-1, 1\]"),
        ("chain", taking("score", "float32", (2,)), r"got score float32 \[-1, 2\]\. Log one of the two"),
        ("chain", matrix(3), r"got x float32 \[-1, 3\]"),
        (
            "chain",
            taking("score", "float32", (1,), Output(name="x", dtype="float32")),
            r"other names than its inputs.*'x'",
        ),
        (
            "mean",
            matrix(4),
            r"models:/b/2 must take what models:/a/1 takes.*x float32 \[-1, 3\]; got x float32 \[-1, 4\]",
        ),
        ("mean", matrix(3, Output(name="points", dtype="float32")), r"must give what models:/a/1 gives"),
    ],
)
def test_steps_that_do_not_fit_together_are_refused_by_name(combine: Combine, second: Contract, said: str) -> None:
    with pytest.raises(SchemaMismatch, match=said):
        check_steps_fit(combine, [("models:/a/1", matrix(3)), ("models:/b/2", second)])


def test_words_have_no_mean() -> None:
    words = matrix(3, Output(name="label", dtype="str"))
    with pytest.raises(SchemaMismatch, match=r"must be float numbers to be averaged, got others: \['label'\]"):
        check_steps_fit("mean", [("models:/a/1", words), ("models:/b/1", words)])


@pytest.mark.parametrize("count", [0, 1, 4])
def test_a_graph_has_two_or_three_steps(count: int) -> None:
    with pytest.raises(ValidationError, match="steps"):
        graph("mean", *[matrix(3)] * count)


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 3), st.sampled_from("xyz")), min_size=2, max_size=3))
def test_the_number_of_a_graph_is_that_of_its_steps_in_their_order(steps: list[tuple[str, int, str]]) -> None:
    pairs = [(pin(name, str(version), digest), {"params": {}}) for name, version, digest in steps]
    number = number_graph("chain", pairs)

    assert 9 == len(str(int(number)))
    assert number == number_graph("chain", list(pairs))
    assert number != number_graph("mean", pairs)
    assert number != number_graph("chain", [*pairs[:-1], (pairs[-1][0], {"params": {"a": 1}})])
    assert (number == number_graph("chain", pairs[::-1])) == (steps == steps[::-1])


def test_only_where_requests_arrive_are_they_waited_for() -> None:
    batching = BatchingConfig(batch_size_max=8, wait_ms_max=3)

    assert [3, 0, 0] == [share_batching("chain", batching, at).wait_ms_max for at in range(3)]
    assert [3, 3, 3] == [share_batching("mean", batching, at).wait_ms_max for at in range(3)]
    assert {8} == {share_batching("chain", batching, at).batch_size_max for at in range(3)}


def test_replicas_and_batching_are_changed_for_every_step() -> None:
    found = graph("chain", matrix(3), taking("score")).with_scaling(Scaling(replicas_max=3)).without_batching()

    assert [3, 3] == [step.scaling.replicas_max for step in found.steps]
    assert [BatchingConfig()] * 2 == [step.batching for step in found.steps]


@given(
    st.integers(2, 3).flatmap(
        lambda count: st.lists(
            st_numpy.arrays(np.float32, (5, 2), elements=st.floats(-1e6, 1e6, width=32)), min_size=count, max_size=count
        )
    )
)
def test_a_mean_is_between_its_values_and_of_their_type(values: list[Any]) -> None:
    contract = matrix(3, Output(name="score", dtype="float32", shape=(2,)))
    mean = average_outputs([{"score": value} for value in values], contract)["score"]

    assert np.float32 == mean.dtype
    assert (np.min(values, axis=0) <= mean).all()
    assert (mean <= np.max(values, axis=0)).all()


class Function:
    """A model that is a function of its one input."""

    slots = 2

    def __init__(self, output: str, function: Any) -> None:
        self.output, self.function = output, function

    def prepare(self, encoded: Encoded) -> Encoded:
        return encoded

    def predict(self, inputs: Any) -> dict[str, Any]:
        (given,) = inputs.values()
        return {self.output: self.function(given)}

    def slot(self) -> Any:
        return nullcontext()


def test_a_graph_in_this_process_answers_as_its_models_do() -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    total, first = Function("score", lambda given: given.sum(axis=1)), Function("score", lambda given: given[:, 0])
    squared = Function("label", lambda given: given[:, 0] ** 2)
    chain = GraphModel(combine="chain", steps=((matrix(3), total), (taking("score"), squared)))
    mean = GraphModel(combine="mean", steps=((matrix(3), total), (matrix(3), first)))
    encoded = Encoded(inputs={"x": x}, flags=Flags.all_good(2), rows=2)

    assert [9, 144] == chain.predict(chain.prepare(encoded).inputs)["label"].tolist()
    assert [1.5, 7.5] == mean.predict({"x": x})["score"].tolist()
    assert 2 == chain.slots


def test_a_step_that_gives_no_finite_number_fails() -> None:
    broken = Function("score", lambda given: given[:, 0] / 0)
    chain = GraphModel(combine="chain", steps=((matrix(3), broken), (taking("score"), broken)))
    with np.errstate(all="ignore"), pytest.raises(ModelFailed, match="must give finite numbers, got others in 'score'"):
        chain.predict({"x": np.ones((1, 3), np.float32)})
