"""How lineage describes datasets: types, sources and names."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest
from mlflow.data.dataset_source_registry import get_dataset_source_from_json
from mlflow.types import Schema

from tasks.batch.described_datasets import DescribedDataset, TableKind
from tasks.batch.lineage import _make_dataset
from tasks.batch.open_lineage import is_configured, name_dataset

TYPES = {
    "flag": (pa.bool_(), "boolean"),
    "small": (pa.int8(), "integer"),
    "count": (pa.uint32(), "long"),
    "id": (pa.int64(), "long"),
    "half": (pa.float16(), "float"),
    "score": (pa.float64(), "double"),
    "name": (pa.large_string(), "string"),
    "kind": (pa.dictionary(pa.int32(), pa.string()), "string"),
    "blob": (pa.binary(4), "binary"),
    "day": (pa.date32(), "datetime"),
    "at": (pa.timestamp("us", "UTC"), "datetime"),
    "price": (pa.decimal128(9, 2), "any"),
    "pair": (pa.struct([("x", pa.int8())]), "any"),
}


def described(address: str, kind: TableKind = "files", version: str | None = None) -> DescribedDataset:
    schema = pa.schema([(name, arrow) for name, (arrow, _) in TYPES.items()])
    schema = schema.append(pa.field("embedding", pa.list_(pa.float32(), 3)))
    sizes = {"rows": 10, "files": 2, "bytes": 99}
    return DescribedDataset(
        address=address, kind=kind, version=version, digest="d" * 32, format="parquet", schema=schema, **sizes
    )


def test_every_arrow_type_has_one_of_mlflows() -> None:
    dataset = _make_dataset(described("/data/customers"))
    columns = json.loads(dataset.schema)["mlflow_colspec"]

    assert {name: named for name, (_, named) in TYPES.items()} == {
        column["name"]: column["type"] for column in columns if column["type"] != "array"
    }
    assert ["array", {"type": "float"}] == [columns[-1]["type"], columns[-1]["items"]]
    assert len(TYPES) + 1 == len(Schema.from_json(json.dumps(columns)).inputs)
    assert {"num_rows": 10, "num_files": 2, "num_bytes": 99} == json.loads(dataset.profile)


@pytest.mark.parametrize(
    ("dataset", "kind", "source"),
    [
        (described("/data/customers"), "local", {"uri": "/data/customers"}),
        (described("s3://lake/customers"), "s3", {"uri": "s3://lake/customers"}),
        (described("gs://lake/customers"), "gs", {"uri": "gs://lake/customers"}),
        (described("/scores", "overnight", "abc"), "local", {"uri": "/scores/run=abc"}),
        (described("s3://lake/t", "delta", "7"), "delta_table", {"path": "s3://lake/t", "delta_table_version": 7}),
        (described("/table", "delta", "abc"), "delta_table", {"path": "/table"}),
    ],
)
def test_mlflow_reads_the_source_of_a_dataset_back(
    dataset: DescribedDataset, kind: str, source: dict[str, object]
) -> None:
    made = _make_dataset(dataset)

    assert (kind, source) == (made.source_type, json.loads(made.source))
    assert source == get_dataset_source_from_json(made.source, made.source_type).to_dict()


@pytest.mark.parametrize(
    ("address", "namespace", "name"),
    [
        ("/data/customers", "file", "/data/customers"),
        ("s3://lake/raw/customers/", "s3://lake", "raw/customers"),
        ("s3://lake", "s3://lake", "/"),
        ("gs://lake/customers", "gs://lake", "customers"),
        ("abfss://box@account.dfs.core.windows.net/a/b", "abfss://box@account.dfs.core.windows.net", "a/b"),
    ],
)
def test_datasets_are_named_by_openlineages_rules(address: str, namespace: str, name: str) -> None:
    assert (namespace, name) == name_dataset(address)


def test_events_are_off_unless_the_environment_asks_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("OPENLINEAGE_URL", "OPENLINEAGE_CONFIG", "OPENLINEAGE_DISABLED"):
        monkeypatch.delenv(variable, raising=False)

    assert not is_configured()

    monkeypatch.setenv("OPENLINEAGE_URL", "http://127.0.0.1:1")

    assert is_configured()

    monkeypatch.setenv("OPENLINEAGE_DISABLED", "True")

    assert not is_configured()
