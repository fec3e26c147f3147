"""Labels of another table: found by the keys of a run, in memory that does not grow with the rows of either.

Rows of both are spread over files by the hash of their key, and joined file by file.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Generator, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa

from serving.errors import KeysUnfit, SchemaMismatch, SourceFormat, name_input
from serving.model.contract import is_text
from serving.option_words import name_option
from tasks.batch.challenger_rules import Labels
from tasks.batch.challengers import check_plain_column
from tasks.batch.chunk_layout import Chunk, list_row_groups
from tasks.batch.chunk_reader import Reader
from tasks.batch.column_types import unpack_types
from tasks.batch.dataset import Dataset, open_dataset
from tasks.batch.join_types import normalize_keys
from tasks.batch.key_check import KeyCheck, check_keys, describe_doubled
from tasks.batch.source import pin_source
from tasks.storage import local_errors, open_storage

LABEL = "label"

_BATCH_ROWS = 1 << 16
# So many rows of both tables are joined at once, by the mean; and no more files than may be open at once.
_ROWS_PER_FILE, _FILES_MAX = 1 << 20, 200


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelTable:
    """A table of labels whose footers are read: its keys are those of a run, and each occurs once."""

    dataset: Dataset
    keys: tuple[str, ...]
    column: str

    @property
    def label_type(self) -> pa.DataType:
        """The type of the labels."""
        return self.dataset.schema.field(self.column).type

    def iterate(self) -> Generator[pa.Table]:
        """Yield keys and labels, some rows at a time, those without a label or with a null in their key left out."""
        columns = [*self.keys, self.column]
        reader = Reader(self.dataset.snapshot, columns, self.dataset.partitions, _BATCH_ROWS, places=False)
        for piece in list_row_groups(self.dataset.snapshot.files):
            for table in reader.blocks(Chunk(pieces=(piece,))):
                named = table.select(columns).rename_columns([*self.keys, LABEL])
                yield named.drop_null()


def describe_labels(labels: Labels) -> str:
    """Return in words which column of which table labels are."""
    where = f"the table {labels.source}" if labels.source else "the source"
    return f"Labels, the column {labels.column!r} of {where}"


def open_label_table(labels: Labels, keys: Sequence[str], schema: pa.Schema, destination: str) -> LabelTable:
    """Open a table of labels, and check its keys.

    Args:
        labels: Which table, and which column.
        keys: The key columns of the run.
        schema: The types of these keys in the run.
        destination: The destination of the run, which must lie outside the table.

    Raises:
        BadInput: There is no such table; its kinds say why. SchemaMismatch where keys or labels are missing in it or of
            other types, SourceFormat where its files are not Parquet.
        KeysUnfit: A key has several labels.
    """
    with name_input(describe_labels(labels)):
        snapshot = pin_source(str(labels.source), destination, [*keys, labels.column])
        if snapshot.format != "parquet":
            message = f"It must be Parquet, or a table of such files, got {snapshot.format}. Write it as Parquet."
            raise SourceFormat(message)
        dataset = open_dataset(snapshot, [labels.column], keys)
    where = f"The table of labels at {snapshot.title}"
    check_plain_column(dataset.schema, labels.column, "the labels", where)
    for key in keys:
        check_plain_column(dataset.schema, key, "a key", where)
        ours, theirs = schema.field(key).type, dataset.schema.field(key).type
        if _find_family(ours) != _find_family(theirs):
            message = (
                f"The key {key!r} must be of one kind in the run and its labels, got {ours} in the run and {theirs} in "
                f"{snapshot.title}. Cast it in one of them."
            )
            raise SchemaMismatch(message)
    if (check := _check_label_keys(dataset, keys)) is not None and check.doubled:
        message = (
            f"{where} must hold one label for each key, but {describe_doubled(check)} Take the others out, or choose "
            f"{name_option('key_columns')} that name a row."
        )
        raise KeysUnfit(message)
    return LabelTable(dataset=dataset, keys=tuple(keys), column=labels.column)


def _check_label_keys(dataset: Dataset, keys: Sequence[str]) -> KeyCheck | None:
    """Return what a check of the keys of labels finds; None where one of them is a partition."""
    if set(keys) & set(dataset.hive):
        return None
    snapshot = dataset.snapshot
    files = [file.path for file in snapshot.files if sum(file.row_groups)]
    return check_keys(open_storage(snapshot.root), files, keys, types=unpack_types(snapshot.types))


def _find_family(given: pa.DataType) -> str:
    """Return what keys are compared as: integers of any width are of one kind, and so are texts of any layout."""
    given = given.value_type if pa.types.is_dictionary(given) else given
    if pa.types.is_integer(given) and not pa.types.is_uint64(given):
        return "integer"
    return "text" if is_text(given) else str(given)


def join_labels(rows: Iterable[pa.Table], labels: LabelTable, count: int) -> Generator[pa.Table]:
    """Yield the rows of a run that have a label, with the label, in no order that means anything.

    Args:
        rows: The rows of the run with their keys, some at a time.
        labels: The labels.
        count: How many rows and labels there are together.

    Raises StorageFull where the temporary folder has no space.
    """
    files = min(_FILES_MAX, max(1, math.ceil(count / _ROWS_PER_FILE)))
    folder = Path(tempfile.gettempdir())
    with local_errors(folder), tempfile.TemporaryDirectory(prefix="overnight-labels-", dir=folder) as scratch:
        ours = _spread(rows, labels.keys, Path(scratch), "rows", files)
        theirs = _spread(labels.iterate(), labels.keys, Path(scratch), LABEL, files)
        for left, right in zip(ours, theirs, strict=True):
            if left.exists() and right.exists():
                yield _join_files(left, right, labels.keys)


def _spread(tables: Iterable[pa.Table], keys: Sequence[str], folder: Path, name: str, files: int) -> list[Path]:
    """Write rows to files by the hash of their key; those with a null in it are left out, since it equals nothing."""
    paths = [folder / f"{name}-{at:03d}.arrow" for at in range(files)]
    writers: dict[int, pa.ipc.RecordBatchFileWriter] = {}
    with ExitStack() as stack:
        for given in tables:
            plain = normalize_keys(given.select(list(keys)))
            frame = pl.DataFrame(plain)
            places = (frame.hash_rows(seed=0).to_numpy() % np.uint64(files)).astype(np.int64)
            whole = frame.select(pl.all_horizontal(pl.all().is_not_null())).to_series().to_numpy()
            columns = {name: given.column(name) for name in given.column_names}
            table = pa.table(columns | {key: plain.column(key) for key in keys})
            for at in np.unique(places[whole]).tolist():
                some = table.filter(pa.array(whole & (places == at)))
                if at not in writers:
                    writers[at] = stack.enter_context(pa.ipc.new_file(paths[at], some.schema))
                writers[at].write_table(some)
    return paths


def _join_files(left: Path, right: Path, keys: Sequence[str]) -> pa.Table:
    with pa.memory_map(str(left)) as ours, pa.memory_map(str(right)) as theirs:
        rows, labels = (pl.DataFrame(pa.ipc.open_file(each).read_all()) for each in (ours, theirs))
        return rows.join(labels, on=list(keys), how="inner").to_arrow()
