"""The config.pbtxt of a release, held against Triton's own schema."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from serving.model.batching import BatchingConfig
from serving.model.contract import Column, Contract, Input, Output
from serving.model.interface import Engine
from serving.model.registry import ModelPin
from serving.model.release import Release, Scaling
from serving.targets.triton_config import instances_of, with_instances, write_config

CONTRACT = Contract(
    inputs=(
        Input(name="x", dtype="float32", shape=(2, 3), columns=(Column(name="x", dtype="float32", shape=(2, 3)),)),
        Input(name='a "quoted"\nname é', dtype="str", columns=(Column(name="t", dtype="str"),)),
        Input(name="when", dtype="datetime64[ns]", columns=(Column(name="when", dtype="datetime64[ns]"),)),
    ),
    outputs=(Output(name="score", dtype="float64"), Output(name="ok", dtype="bool", shape=(4,))),
)
RELEASE = Release(
    endpoint="fraud",
    pin=ModelPin(name="m", version="3", model_id=None, source="s", digest="d"),
    contract=CONTRACT,
)


def parse(config: str) -> Any:
    """Parse a config as Triton does: a field that its schema has not, or a value of another type, is an error."""
    pytest.importorskip("tritonclient", reason="pip install -e '.[dev]' brings tritonclient")
    with warnings.catch_warnings():
        # protobuf's, about code that was generated for the release before.
        warnings.simplefilter("ignore", UserWarning)
        from google.protobuf import text_format
        from tritonclient.grpc import model_config_pb2
    return text_format.Parse(config, model_config_pb2.ModelConfig())


def test_it_says_what_the_release_says_in_tritons_words() -> None:
    batching = BatchingConfig(batch_size_max=32, wait_ms_max=2.5)
    release = RELEASE.model_copy(update={"batching": batching, "rows_max": 100})
    config = parse(write_config("fraud", release, ["10", "9"]))

    assert ("fraud", "python", 100) == (config.name, config.backend, config.max_batch_size)
    assert [9, 10] == list(config.version_policy.specific.versions)
    assert [32] == list(config.dynamic_batching.preferred_batch_size)
    assert 2500 == config.dynamic_batching.max_queue_delay_microseconds
    # With one, requests lie for half a second now and then.
    assert not config.dynamic_batching.HasField("default_queue_policy")


def test_it_names_every_tensor_with_its_type_and_the_shape_of_a_row() -> None:
    config = parse(write_config("fraud", RELEASE, ["3"]))
    names = type(config.input[0]).DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number

    assert [
        ("x", "TYPE_FP32", [2, 3]),
        ('a "quoted"\nname é', "TYPE_STRING", [1]),
        ("when", "TYPE_INT64", [1]),
        ("score", "TYPE_FP64", [1]),
        ("ok", "TYPE_BOOL", [4]),
    ] == [(each.name, names[each.data_type].name, list(each.dims)) for each in (*config.input, *config.output)]


def test_requests_are_not_collected_where_the_batching_says_one_row() -> None:
    assert not parse(write_config("fraud", RELEASE, ["3"])).HasField("dynamic_batching")


def test_a_pass_larger_than_a_request_may_be_is_one_that_triton_lets_through() -> None:
    release = RELEASE.model_copy(update={"batching": BatchingConfig(batch_size_max=512), "rows_max": 8})

    assert 512 == parse(write_config("fraud", release, ["3"])).max_batch_size


@pytest.mark.parametrize(("replicas_min", "count"), [(0, 1), (1, 1), (3, 3)])
def test_replicas_are_instances_of_which_a_loaded_model_has_one_at_least(replicas_min: int, count: int) -> None:
    release = RELEASE.model_copy(update={"scaling": Scaling(replicas_min=replicas_min, replicas_max=8)})
    text = write_config("fraud", release, ["3"])
    (group,) = parse(text).instance_group

    assert (count, "KIND_CPU") == (group.count, group.Kind.Name(group.kind))
    assert count == instances_of(text)


def test_an_engine_on_a_gpu_has_its_instances_there() -> None:
    text = write_config("fraud", RELEASE.model_copy(update={"engine": Engine(device="cuda")}), ["3"])
    (group,) = parse(text).instance_group

    assert "KIND_GPU" == group.Kind.Name(group.kind)


def test_another_number_of_instances_changes_nothing_else() -> None:
    text = write_config("fraud", RELEASE, ["3"])
    more = with_instances(text, 12)

    assert 12 == instances_of(more)
    assert text == with_instances(more, 1)
    assert write_config("fraud", RELEASE, ["3"], instances=12) == more
