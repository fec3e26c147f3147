from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from serving.errors import BadInput, ModelNotFound, SchemaMismatch
from serving.model.batching import BatchingConfig
from serving.model.contract import Contract, Input, Output
from serving.model.encoding import Encoded
from serving.model.registry import resolve_model
from tasks.endpoint.deploy import make_graph, make_graph_host, write_graph_manifests
from tasks.endpoint.resolve import (
    LoadedGraph,
    draw_random_rows,
    keep_answered_rows,
    load_endpoint,
    load_endpoint_graph,
    load_endpoint_model,
    read_example_rows,
)
from tasks.endpoint.spec import EndpointSpec
from tests.graphs import graph_of, register_chain
from tests.serving.toys import alone, column, matrix
from tests.support import register_network, register_torch
from tests.tasks.endpoint.values import sample, spec

DTYPES = ("float32", "float64", "int8", "int64", "uint8", "bool", "str", "binary", "datetime64[ns]")


@given(dtype=st.sampled_from(DTYPES), shape=st.sampled_from([(), (3,), (2, 2)]), rows=st.integers(1, 9))
def test_random_rows_are_of_the_contracts_types_and_the_same_each_time(
    dtype: str, shape: tuple[int, ...], rows: int
) -> None:
    contract = Contract(
        inputs=(Input(name="x", dtype=dtype, shape=shape, columns=(column(dtype, "x"),)),),
        outputs=(Output(name="score", dtype="float32"),),
    )
    first, again = draw_random_rows(contract, rows), draw_random_rows(contract, rows)

    assert (rows, *shape) == first["x"].shape
    assert np.dtype(object if dtype in ("str", "binary") else dtype) == first["x"].dtype
    assert np.array_equal(first["x"], again["x"])


class Function:
    """A model that is one function of x."""

    slots = 1

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def prepare(self, encoded: Encoded) -> Encoded:
        return encoded

    def predict(self, inputs: Any) -> dict[str, Any]:
        return {"score": self.function(inputs["x"])}

    def slot(self) -> Any:
        return nullcontext()


def picky(x_NF: Any) -> Any:
    if (x_NF[:, 0] > 1).any():
        message = "no row may begin above 1"
        raise ValueError(message)
    return x_NF[:, 0]


X = np.array([[0, 1], [2, 1], [1, 1]], dtype=np.float32)


@pytest.mark.parametrize(
    ("function", "kept"),
    [
        (lambda x_NF: x_NF[:, 0], [0, 1, 2]),
        (picky, [0, 2]),
        (lambda x_NF: np.where(x_NF[:, 0] == 2, np.nan, x_NF[:, 0]), [0, 2]),
        (lambda x_NF: np.where(x_NF[:, 0] == 2, None, x_NF[:, 0].astype(object)), [0, 2]),
    ],
)
def test_only_rows_that_the_model_answers_are_kept(function: Callable[[Any], Any], kept: list[int]) -> None:
    found = keep_answered_rows(Function(function), {"x": X})

    assert found is not None
    assert X[kept].tolist() == found.inputs["x"].tolist()
    assert X[kept, 0].tolist() == found.outputs["score"].tolist()
    assert len(kept) == found.rows


def test_a_model_that_answers_no_row_gives_no_sample() -> None:
    assert (
        keep_answered_rows(Function(lambda x_NF: x_NF[:, 0] / 0 if len(x_NF) == 9 else picky(x_NF + 9)), {"x": X})
        is None
    )
    assert keep_answered_rows(Function(picky), {"x": X[:0]}) is None
    assert keep_answered_rows(Function(picky), None) is None


def test_pieces_are_the_rows_in_order() -> None:
    pieces = list(sample().split(3))

    assert [3, 3, 2] == [piece.rows for piece in pieces]
    assert np.array_equal(sample().inputs["x"], np.concatenate([piece.inputs["x"] for piece in pieces]))


X_KEPT = np.arange(6, dtype=np.float32).reshape(2, 3)


class Logged:
    """What MLflow keeps of a model, as far as its example goes."""

    folder = "nowhere"

    def __init__(self, example: object) -> None:
        self.mlmodel = self
        self.example = example

    def load_input_example(self, _folder: str) -> object:
        return self.example


AB = alone(column("float32", "a"), column("int64", "b"))


@pytest.mark.parametrize(
    ("contract", "example", "rows"),
    [
        (matrix(2), X, X.tolist()),
        (matrix(2), {"x": X.tolist()}, X.tolist()),
        (matrix(2), X[0], [X[0].tolist()]),
        (matrix(2), np.zeros((2, 3)), None),
        (matrix(2), {"y": X}, None),
        (matrix(2), None, None),
        (matrix(2), pd.DataFrame({"c0": [1.0, 2.0], "c1": [3.0, 4.0]}).astype("float32"), [[1, 3], [2, 4]]),
        (matrix(2), pd.DataFrame({"c0": ["1", "?"], "c1": ["3", "4"]}), [[1, 3]]),
        (matrix(2), pd.DataFrame({"c0": [1.0]}), None),
    ],
)
def test_the_models_own_example_becomes_rows_where_the_contract_takes_it(
    contract: Contract, example: object, rows: list[list[float]] | None
) -> None:
    found = read_example_rows(Logged(example), contract)  # type: ignore[arg-type]

    assert rows == (None if found is None else found["x"].tolist())


def test_an_example_of_columns_becomes_one_input_each() -> None:
    frame = pd.DataFrame({"a": [1.5], "b": [2]})
    found = read_example_rows(Logged(frame.astype({"a": "float32"})), AB)  # type: ignore[arg-type]

    assert found is not None
    assert {"a": [1.5], "b": [2]} == {name: value.tolist() for name, value in found.items()}
    # As float64 a may not fit, and no policy says what to do then.
    assert read_example_rows(Logged(frame), AB) is None  # type: ignore[arg-type]


def test_an_example_of_rows_becomes_one_input_each() -> None:
    contract = alone(column("float64"), column("str", "city"))
    found = read_example_rows(Logged([{"a": 1.5, "city": "Bern"}, {"city": "Graz", "a": 2.5}]), contract)  # type: ignore[arg-type]

    assert found is not None
    assert {"a": [1.5, 2.5], "city": ["Bern", "Graz"]} == {name: value.tolist() for name, value in found.items()}


def test_an_example_that_mlflow_keeps_is_found_and_one_that_it_does_not_keep_is_none(
    linear: str, registry: Path
) -> None:
    kept = register_torch("exemplary", torch.nn.Linear(3, 1), ("a", "b", "c"), X_KEPT)
    resolved, without = resolve_model(kept), resolve_model(linear)
    found = read_example_rows(resolved, resolved.contract({}, {}))

    assert found is not None
    assert X_KEPT.tolist() == found["x"].tolist()
    assert read_example_rows(without, without.contract({}, {})) is None


def graph_spec(**changes: Any) -> EndpointSpec:
    return spec(model=None, **changes)


def test_a_graph_is_resolved_step_by_step_and_answers_as_its_models_do(registry: Path) -> None:
    uris = register_chain()
    found = load_endpoint(graph_spec(steps=uris))
    again = load_endpoint(graph_spec(steps=uris))
    chain = graph_of(uris, "churn")

    assert isinstance(found, LoadedGraph)
    assert chain.graph.contract == found.contract
    assert ", then ".join(uris) == found.description
    assert (found.version, found.digest) == (again.version, again.digest)
    assert found.random is not None
    expected = chain.predict(found.random.inputs)
    for name, answer in found.random.outputs.items():
        assert np.array_equal(expected[name], answer)


def test_a_step_of_another_batching_or_param_is_another_graph(registry: Path) -> None:
    uris = register_chain()
    steps = [{"model": uris[0]}, {"model": uris[1], "batching": {"batch_size_max": 4}}, {"model": uris[2]}]
    first, other = load_endpoint(graph_spec(steps=uris)), load_endpoint_graph(graph_spec(steps=steps))
    graph = make_graph(graph_spec(steps=steps), other, BatchingConfig(batch_size_max=8, wait_ms_max=2))

    assert first.version != other.version
    assert [(8, 2), (4, 0), (8, 0)] == [
        (each.batching.batch_size_max, each.batching.wait_ms_max) for each in graph.steps
    ]
    assert other.version == graph.version


def test_an_ensemble_answers_with_the_mean(registry: Path) -> None:
    uris = [register_network("resolve-mean", seed=seed) for seed in (0, 1)]
    found = load_endpoint(graph_spec(ensemble=uris))

    assert found.random is not None
    expected = graph_of(uris, "churn", combine="mean").predict(found.random.inputs)["score"]
    np.testing.assert_allclose(expected, found.random.outputs["score"], rtol=0, atol=1e-6)
    assert f"the mean of {uris[0]} and {uris[1]}" == found.description


def test_steps_that_do_not_fit_or_are_not_there_are_refused_before_any_is_loaded(registry: Path) -> None:
    prep, network, post = register_chain()
    with pytest.raises(SchemaMismatch, match=f"{post} must take what {prep}, the step before it, gives"):
        load_endpoint(graph_spec(steps=[prep, post]))
    with pytest.raises(SchemaMismatch, match=f"{network} must take what {prep} takes"):
        load_endpoint(graph_spec(ensemble=[prep, network]))
    with pytest.raises(ModelNotFound, match="models:/graph-prep/99"):
        load_endpoint(graph_spec(steps=["models:/graph-prep/99", network]))
    with pytest.raises(BadInput, match="must answer by one model here, got a graph"):
        load_endpoint_model(graph_spec(steps=[prep, network]))


def test_seldon_gets_manifests_of_a_graph_and_no_flow_deploys_them(registry: Path, tmp_path: Path) -> None:
    target = {"kind": "seldon", "folder": str(tmp_path), "python": "python"}
    uris = register_chain()
    written = write_graph_manifests(graph_spec(steps=uris, target=target), tmp_path / "manifests")
    pipeline = yaml.safe_load((written / "pipeline.yaml").read_text())

    assert 3 == len(pipeline["spec"]["steps"])
    assert (written / "2/model/MLmodel").exists()
    with pytest.raises(BadInput, match=r"on triton or ray-serve, got seldon\. Only a cluster chains its models"):
        make_graph_host(graph_spec(steps=uris, target=target).target)
    with pytest.raises(BadInput, match="must be those of a graph on seldon, got the target triton and 3 steps"):
        write_graph_manifests(graph_spec(steps=uris, target={"kind": "triton"}), tmp_path)
