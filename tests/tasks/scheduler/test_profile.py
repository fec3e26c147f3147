from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

from serving.errors import SchemaMismatch, SourceFormat, SourceNotFound
from serving.model.contract import Column, Contract, Input, Output
from serving.model.encoding import encode
from tasks.batch.options import BatchOptions
from tasks.scheduler.profile import make_table, open_measured_rows, write_measured_rows, write_table
from tests.support import write_customers

ABC = tuple(Column(name=name, dtype="float32") for name in "abc")
CONTRACT = Contract(
    inputs=(Input(name="x", dtype="float32", shape=(3,), columns=ABC),),
    outputs=(Output(name="score", dtype="float32"),),
)
OPTIONS = BatchOptions(key_columns=("customer",))


def one(name: str, dtype: str, shape: tuple[int, ...] = ()) -> Input:
    return Input(name=name, dtype=dtype, shape=shape, columns=(Column(name=name, dtype=dtype, shape=shape),))


@pytest.mark.parametrize(
    ("value", "array"),
    [
        (CONTRACT.inputs[0], np.arange(12, dtype=np.float32).reshape(4, 3)),
        (one("n", "int64"), np.arange(4)),
        (one("text", "str"), np.array(["a", "b", "c", "d"], dtype=object)),
        (one("image", "float32", (2, 3)), np.arange(24, dtype=np.float32).reshape(4, 2, 3)),
    ],
)
def test_a_table_of_a_model_s_inputs_is_encoded_to_the_same_inputs(value: Input, array: Any) -> None:
    contract = Contract(inputs=(value,), outputs=CONTRACT.outputs)
    encoded = encode(contract, make_table(contract, {value.name: array}))

    np.testing.assert_array_equal(array, encoded.inputs[value.name])
    assert not encoded.flags.code_N.any()


@pytest.mark.parametrize("rows", [1, 100, 5_000])
def test_the_requested_number_of_rows_is_written_with_their_keys(rows: int, tmp_path: Path) -> None:
    source = write_customers(tmp_path / "customers", rows=1_000, files=2, rows_per_group=300)
    dataset = open_measured_rows(str(source), str(tmp_path / "scores"), CONTRACT, OPTIONS)
    written = write_measured_rows(dataset, CONTRACT, OPTIONS, rows, tmp_path / "rows")
    files = sorted((tmp_path / "rows").glob("*.parquet"))
    table = pl.read_parquet(files)

    assert rows <= written == len(table) <= rows + 4
    assert ["a", "b", "c", "customer"] == sorted(table.columns)
    assert set(table["customer"]) <= set(range(1_000))
    assert 300 >= max(pq.ParquetFile(file).metadata.row_group(0).num_rows for file in files)


def test_rows_that_would_fill_the_disk_are_fewer(tmp_path: Path) -> None:
    table = make_table(CONTRACT, {"x": np.zeros((10, 3), dtype=np.float32)})

    assert 100 == write_table(table, 10**9, tmp_path / "rows", bytes_max=1_200)


def test_rows_that_cannot_be_measured_with_are_refused(tmp_path: Path) -> None:
    elsewhere = str(tmp_path / "scores")
    (tmp_path / "rows.csv").write_text("a,b,c\n1,2,3\n")
    (tmp_path / "other").mkdir()
    pl.DataFrame({"a": [1.0]}).write_parquet(tmp_path / "other" / "rows.parquet")

    with pytest.raises(SourceFormat, match="must be Parquet, got csv"):
        open_measured_rows(str(tmp_path / "rows.csv"), elsewhere, CONTRACT, BatchOptions())
    with pytest.raises(SourceNotFound):
        open_measured_rows(str(tmp_path / "nothing"), elsewhere, CONTRACT, BatchOptions())
    with pytest.raises(SchemaMismatch, match="'b'"):
        open_measured_rows(str(tmp_path / "other"), elsewhere, CONTRACT, BatchOptions())
