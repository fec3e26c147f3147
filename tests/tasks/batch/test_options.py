"""Options: what a person may say, and nothing else."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from tasks.batch.options import BatchOptions


def test_every_option_has_a_default_and_a_description() -> None:
    assert BatchOptions() == BatchOptions.model_validate_json("{}")
    assert [] == [name for name, field in BatchOptions.model_fields.items() if not field.description]


@pytest.mark.parametrize(
    "given",
    [
        {"unknown": 1},
        {"output": "csv"},
        {"delta_mode": "merge"},
        {"output": "delta", "delta_mode": "upsert"},
        {"delta_mode": "replace"},
        {"output": "delta", "iceberg_mode": "replace"},
        {"output": "iceberg", "iceberg_table": "lake.sales.scores", "iceberg_mode": "upsert"},
        {"missing_keys": "delete"},
        {"missing_keys": "mark", "output": "delta", "key_columns": ["id"]},
        {"batch_size": 0},
        {"rows_per_chunk": 0},
        {"slots": 0},
        {"runner": {"kind": "dask"}},
        {"runner": {"kind": "threads", "address": "127.0.0.1:6379"}},
        {"runner": {"kind": "ray", "cpus_per_slot": 0}},
        {"runner": {"kind": "ray", "address": "127.0.0.1:6379"}},
        {"memory_mb": 0},
        {"notices": "all"},
        {"notice_seconds": 0},
        {"max_reject_fraction": 1.1},
        {"max_reject_fraction": -0.1},
        {"policies": {"a": {"cast": "wild"}}},
        {"name": "a/b"},
        {"name": ".."},
        {"name": "_hidden"},
        {"name": "a b"},
        {"name": "per%cent"},
        {"name": ""},
        {"name": "x" * 65},
        {"name": "x\n"},
        {"rescore": ""},
        {"rescore": "a b"},
        {"rescore": "again", "output": "delta"},
        {"rescore": "again", "output": "iceberg", "iceberg_table": "lake.sales.scores"},
        {"output": "iceberg"},
        {"iceberg_table": "lake.sales.scores"},
        {"output": "iceberg", "iceberg_table": "lake.sales.scores", "iceberg_mode": "merge"},
        {"source_version": -1},
        {"source_version": 1, "source_timestamp": "2024-01-01T00:00:00Z"},
        {"source_timestamp": "2024-01-01T00:00:00"},
    ],
)
def test_what_makes_no_sense_is_refused(given: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        BatchOptions.model_validate(given)


@pytest.mark.parametrize("name", ["nightly", "2024-01-31", "v1.2_rc", "0", "x" * 64])
def test_a_name_is_letters_digits_dots_dashes_and_underscores(name: str) -> None:
    assert name == BatchOptions(name=name).name


def test_options_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        BatchOptions().slots = 2  # type: ignore[misc]


def test_the_options_in_the_key_are_those_that_change_the_output() -> None:
    assert {
        *("key_columns", "input_columns", "policies", "output", "delta_mode", "batch_size", "rows_per_chunk"),
        *("bfloat16_tolerance", "torch_compile"),
    } == set(BatchOptions().key_fields())
    assert set(BatchOptions().key_fields()) | {"rescore"} == set(BatchOptions(rescore="again").key_fields())


def test_rescoring_into_a_delta_table_replaces_its_rows() -> None:
    assert "again" == BatchOptions(rescore="again", output="delta", delta_mode="replace").rescore
    with pytest.raises(ValidationError, match="the earlier run would be in the table twice"):
        BatchOptions(rescore="again", output="delta")


def test_keys_may_go_unchecked_but_not_where_rows_are_replaced_by_them() -> None:
    unchecked = BatchOptions(key_columns=("id",), check_keys=False)

    assert BatchOptions(key_columns=("id",)).key_fields() == unchecked.key_fields()
    with pytest.raises(ValidationError, match="check_keys must be true where rows are put into a table by their keys"):
        BatchOptions(key_columns=("id",), check_keys=False, output="delta", delta_mode="upsert")


def test_which_version_of_a_source_is_asked_for_is_no_part_of_the_key_since_the_version_is() -> None:
    assert BatchOptions().key_fields() == BatchOptions(source_version=3).key_fields()
    assert (
        BatchOptions().key_fields()
        == BatchOptions.model_validate({"source_timestamp": "2024-01-01T00:00Z"}).key_fields()
    )


def test_the_table_that_rows_go_into_is_part_of_the_key() -> None:
    told = BatchOptions(output="iceberg", iceberg_table="lake.sales.scores").key_fields()

    assert set(BatchOptions().key_fields()) - {"delta_mode"} | {"iceberg_table", "iceberg_mode"} == set(told)
