"""Rows to measure a model with: of a dataset, or made by the model's contract where there is none.

Shapes: N rows; every input is [N, *shape] of the contract.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from serving.errors import SourceFormat
from serving.model.contract import Contract, Input
from tasks.batch.chunk_reader import Reader
from tasks.batch.dataset import Dataset, open_dataset
from tasks.batch.options import BatchOptions
from tasks.batch.plan import used_columns
from tasks.batch.source import pin_source
from tasks.batch.tuning import list_row_groups
from tasks.endpoint.resolve import Arrays

_BYTES_MAX = 256 << 20
_FILES = 4
_GROUP_ROWS = 65_536
_BLOCK_ROWS = 16_384


def open_rows(source: str, elsewhere: str, contract: Contract, options: BatchOptions) -> Dataset:
    """Open a dataset to measure with, `elsewhere` being where nothing of it lies; raises what a batch run raises.

    Raises SourceFormat for what is no Parquet, since rows of it would have to be staged first.
    """
    snapshot = pin_source(source, elsewhere)
    if snapshot.format != "parquet":
        message = (
            f"The rows to measure with must be Parquet, got {snapshot.format} at {snapshot.root}. Write some of them "
            "so, or leave them out: rows are then made by what the model takes."
        )
        raise SourceFormat(message)
    dataset = open_dataset(snapshot, [column.name for column in contract.columns], options.key_columns)
    contract.check(dataset.schema, f"The dataset at {snapshot.title}")
    return dataset


def write_rows(dataset: Dataset, contract: Contract, options: BatchOptions, rows: int, folder: Path) -> int:
    """Write some of a dataset's rows as a dataset of its own, in row groups as large as its own; return how many.

    Rows stand again and again where it has fewer, and there are fewer where so many would be over 256 MiB.
    """
    columns = used_columns(contract, options, dataset.schema)
    partitions = {name: str(dataset.schema.field(name).type) for name in dataset.hive}
    reader = Reader(dataset.snapshot, columns, partitions, _BLOCK_ROWS, places=False)
    taken: list[pa.Table] = []
    count, group = 0, 0
    for piece in list_row_groups(dataset):
        if count >= rows or sum(table.nbytes for table in taken) >= _BYTES_MAX:
            break
        group = max(group, piece.rows)
        for table in reader.read(piece):
            taken.append(table)
            count += table.num_rows
    return write_table(pa.concat_tables(taken), rows, folder, group=group)


def write_table(table: pa.Table, rows: int, folder: Path, *, group: int = _GROUP_ROWS) -> int:
    """Write `rows` rows as Parquet files, the table's own again and again; return how many: 256 MiB at most."""
    fits = max(1, int(_BYTES_MAX / max(1.0, table.nbytes / table.num_rows)))
    wanted = min(rows, max(fits, 1))
    per_file = math.ceil(wanted / _FILES)
    folder.mkdir(parents=True)
    whole = pa.concat_tables([table] * math.ceil(per_file / table.num_rows)).slice(0, per_file)
    for at in range(_FILES):
        pq.write_table(whole, folder / f"rows-{at}.parquet", row_group_size=max(1, min(group, per_file)))
    return per_file * _FILES


def table_of(contract: Contract, inputs: Arrays) -> pa.Table:
    """Return the columns that a batch run would read, holding the rows of a model's inputs."""
    columns: dict[str, pa.Array] = {}
    for value in contract.inputs:
        columns |= _columns(value, inputs[value.name])
    return pa.table(columns)


def _columns(value: Input, array_N: npt.NDArray[Any]) -> dict[str, pa.Array]:
    if value.is_stacked:
        return {column.name: pa.array(np.ascontiguousarray(array_N[:, at])) for at, column in enumerate(value.columns)}
    (column,) = value.columns
    if not value.shape:
        return {column.name: pa.array(array_N.tolist() if array_N.dtype == object else array_N)}
    flat = pa.array(array_N.ravel().tolist() if array_N.dtype == object else array_N.ravel())
    return {column.name: pa.FixedSizeListArray.from_arrays(flat, int(np.prod(value.shape)))}
