"""Feature tables of a call: pinned as a source is, and held against the source, the model and each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.parquet as pq

from serving.errors import BadInput, SchemaMismatch, SourceFormat, name_input, suggest_name
from serving.model.contract import Contract
from serving.option_words import name_option
from tasks.batch.dataset import Dataset, Snapshot, SourceFile, map_parallel, name_corrupt_file, open_dataset
from tasks.batch.feature_pins import FeaturePin, choose_kept, count_decoded
from tasks.batch.feature_table import FeatureTable
from tasks.batch.join_types import find_key_kind, has_zone, is_time
from tasks.batch.options import BatchOptions
from tasks.batch.source import pin_source
from tasks.storage import open_storage

_COLUMNS_SHOWN = 20


def pin_features(options: BatchOptions, destination: str, contract: Contract) -> tuple[Snapshot, ...]:
    """Pin the feature tables of a call as a source is pinned, in the order of the options.

    Raises BadInput, which names the table: its kinds say why it can't be used.
    """
    return tuple(_pin_table(table, destination, contract) for table in options.features)


def _pin_table(table: FeatureTable, destination: str, contract: Contract) -> Snapshot:
    with name_input(f"Feature table {table.source}"):
        wanted = [*table.join_keys, table.time, *_list_wanted(table, contract)]
        snapshot = pin_source(table.source, destination, wanted)
        if snapshot.format != "parquet":
            copied = (
                "an Iceberg table whose files must be copied first, since rows were deleted or columns changed, or "
                "names have more than letters, digits and _"
            )
            got = copied if snapshot.format == "iceberg" else f"files of {snapshot.format}"
            message = (
                f"It must be Parquet files, a Delta or Iceberg table, or an Overnight destination, whose files can be "
                f"read in place; got {got}. Write what it holds to Parquet, or rewrite the table's data files."
            )
            raise SourceFormat(message)
    return snapshot


def _list_wanted(table: FeatureTable, contract: Contract) -> list[str]:
    """Return the columns of a table that the model may read, as the table calls them."""
    read = [column.name for column in contract.columns]
    if table.columns:
        return [name for name in table.columns if table.name_column(name) in read]
    prefix = table.prefix or ""
    found = [name.removeprefix(prefix) for name in read if name.startswith(prefix)]
    return [name for name in found if name and name not in (*table.join_keys, table.time)]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenFeatures:
    """A feature table with its footers read, and the columns that the model reads of it."""

    table: FeatureTable
    dataset: Dataset
    columns: tuple[str, ...]

    @property
    def fields(self) -> list[pa.Field]:
        """The columns that the model reads, under the names that it has for them."""
        schema = self.dataset.schema
        return [pa.field(self.table.name_column(name), schema.field(name).type) for name in self.columns]


def open_features(options: BatchOptions, snapshots: Sequence[Snapshot], contract: Contract) -> tuple[OpenFeatures, ...]:
    """Read the footers of feature tables, and hold each against the options and what models read.

    Raises SourceEmpty for a table without rows, SchemaMismatch for columns that are missing or can't be joined by, and
    BadInput for a table of which the model reads nothing, or a column that two tables have.
    """
    tables = zip(options.features, snapshots, strict=True)
    opened = tuple(_open_table(table, snapshot, contract) for table, snapshot in tables)
    owners: dict[str, str] = {}
    for each in opened:
        for field in each.fields:
            if field.name in owners:
                message = (
                    f"Each column that the model reads must be in one table, got {field.name!r} in the feature tables "
                    f"{owners[field.name]} and {each.table.source}. Name the columns of each, or give a prefix."
                )
                raise BadInput(message)
            owners[field.name] = each.table.source
    return opened


def _open_table(table: FeatureTable, snapshot: Snapshot, contract: Contract) -> OpenFeatures:
    with name_input(f"Feature table {table.source}"):
        wanted = _list_wanted(table, contract)
        dataset = open_dataset(snapshot, wanted, [*table.join_keys, table.time])
        schema = dataset.schema
        for name in (*table.join_keys, table.time, *table.columns):
            if schema.names.count(name) != 1:
                message = (
                    f"It must have the column {name!r} once{suggest_name(name, schema.names)}; columns found: "
                    f"{_list_columns(schema)}. Correct join_keys, time or columns."
                )
                raise SchemaMismatch(message)
        _check_time(table.time, schema)
        columns = tuple(name for name in wanted if name in schema.names)
        if not columns:
            read = ", ".join([column.name for column in contract.columns][:_COLUMNS_SHOWN])
            message = (
                f"The model must read a column of it, got none: the model reads {read}, and the table has "
                f"{_list_columns(schema)}. Give a prefix, or leave the table out."
            )
            raise BadInput(message)
        return OpenFeatures(table=table, dataset=dataset, columns=columns)


def narrow_features(features: Sequence[OpenFeatures], contract: Contract) -> tuple[OpenFeatures, ...]:
    """Return feature tables with the columns alone that one model reads, without those of which it reads nothing."""
    found = []
    for each in features:
        wanted = {*_list_wanted(each.table, contract)}
        columns = tuple(name for name in each.columns if name in wanted)
        if columns and columns != each.columns:
            keys = [*each.table.join_keys, each.table.time]
            found.append(replace(each, dataset=open_dataset(each.dataset.snapshot, columns, keys), columns=columns))
        elif columns:
            found.append(each)
    return tuple(found)


def _list_columns(schema: pa.Schema) -> str:
    names = [f"{field.name} ({field.type})" for field in schema]
    more = len(names) - _COLUMNS_SHOWN
    return ", ".join(names[:_COLUMNS_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _check_time(name: str, schema: pa.Schema) -> None:
    kind = schema.field(name).type
    if not is_time(kind):
        message = (
            f"The column of time {name!r} must be a date or a timestamp, got {kind}. Cast it in the table, or name "
            "another column."
        )
        raise SchemaMismatch(message)


def check_spine(spine: Dataset, options: BatchOptions, features: Sequence[OpenFeatures]) -> None:
    """Hold a source against the feature tables that are joined to it.

    Raises SchemaMismatch where it lacks the time or a key, or has it in a type that can't be compared; BadInput where
    it has a column that a feature table has too.
    """
    if not features or options.spine_time is None:
        return
    schema, where = spine.schema, spine.snapshot.title
    for name in options.join_columns:
        if schema.names.count(name) != 1:
            what = f"the column of {name_option('spine_time')}" if name == options.spine_time else "the key"
            message = (
                f"The source must have {what} {name!r} once, to join features by"
                f"{suggest_name(name, schema.names)}; columns found at {where}: {_list_columns(schema)}. Correct the "
                "name, or add the column."
            )
            raise SchemaMismatch(message)
    _check_time(options.spine_time, schema)
    for each in features:
        with name_input(f"Feature table {each.table.source}"):
            _check_comparable(schema, options.spine_time, each)


def _check_comparable(spine: pa.Schema, spine_time: str, features: OpenFeatures) -> None:
    table, schema = features.table, features.dataset.schema
    for key in table.join_keys:
        ours, theirs = spine.field(key).type, schema.field(key).type
        if find_key_kind(ours) is None or find_key_kind(ours) != find_key_kind(theirs):
            message = (
                f"Key {key!r} must be of one kind in both tables, whole numbers, text, dates, truth values or bytes, "
                f"got {ours} in the source and {theirs} here. Cast it in one of them."
            )
            raise SchemaMismatch(message)
    ours, theirs = spine.field(spine_time).type, schema.field(table.time).type
    if has_zone(ours) != has_zone(theirs):
        message = (
            f"Times must both have a zone, or both none, to be compared, got {spine_time!r} of {ours} in the source "
            f"and {table.time!r} of {theirs} here. Say in which zone the one without is, by casting it in its table."
        )
        raise SchemaMismatch(message)
    if clash := [field.name for field in features.fields if field.name in spine.names]:
        message = (
            f"Each column that the model reads must be in one table, got {clash} in the source too. Name the columns "
            "to take from here, or give a prefix."
        )
        raise BadInput(message)


def make_feature_pins(features: Sequence[OpenFeatures]) -> tuple[FeaturePin, ...]:
    """Return what a plan is tied to of feature tables. Reads their footers once more, for counts of nulls."""
    kept = choose_kept([count_decoded(each.dataset.snapshot) for each in features])
    return tuple(_make_pin(each, is_kept) for each, is_kept in zip(features, kept, strict=True))


def _make_pin(features: OpenFeatures, is_kept: bool) -> FeaturePin:  # noqa: FBT001 - one of a zip
    table, dataset = features.table, features.dataset
    used = (*table.join_keys, table.time, *features.columns)
    return FeaturePin(
        table=table,
        snapshot=dataset.snapshot,
        columns=features.columns,
        partitions={name: kind for name, kind in dataset.partitions.items() if name in used},
        is_kept=is_kept,
        null_rows=_count_nulls(dataset, [*table.join_keys, table.time]),
    )


def _count_nulls(dataset: Dataset, names: Sequence[str]) -> dict[str, int | None]:
    """Return how many rows of a dataset hold a null in each of some columns, as footers tell."""
    storage = open_storage(dataset.snapshot.root)

    def read(file: SourceFile) -> list[int | None]:
        with storage.open_pinned(file.entry) as stream, name_corrupt_file(storage, file.entry):
            metadata = pq.read_metadata(stream)
        return [_count_nulls_of(file, metadata, name) for name in names]

    counts = zip(*map_parallel(storage, read, dataset.snapshot.files), strict=True)
    return {
        name: None if None in found else sum(each for each in found if each is not None)
        for name, found in zip(names, counts, strict=True)
    }


def _count_nulls_of(file: SourceFile, metadata: pq.FileMetaData, name: str) -> int | None:
    columns = [at for at in range(metadata.num_columns) if metadata.schema.column(at).path == name]
    if not columns:
        return metadata.num_rows if file.partition_values.get(name) is None else 0
    if len(columns) > 1:
        # A column, and a field of a struct, of one name.
        return None
    total = 0
    for group in range(metadata.num_row_groups):
        statistics = metadata.row_group(group).column(columns[0]).statistics
        if statistics is None or not statistics.has_null_count:
            return None
        total += statistics.null_count
    return total
