"""A part: one Parquet file with every row of its chunk, key, predictions, or nulls and the reason."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Mapping

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from serving.errors import BadInput, SchemaMismatch, suggest_name
from serving.model.contract import Contract, Output, is_text
from serving.model.encoding import Flags
from serving.model.interface import Predictions
from serving.option_words import name_option
from tasks.batch.chunk_layout import Chunk
from tasks.batch.chunk_statistics import collect_statistics
from tasks.batch.column_statistics import ColumnStatistics, TableStatistics, pack_statistics
from tasks.batch.column_types import unpack_schema
from tasks.batch.dataset import SOURCE_FILE, SOURCE_ROW, Dataset, list_entries_at
from tasks.batch.options import BatchOptions
from tasks.batch.part_digest import NO_DIGEST, PART_DIGEST, write_digest
from tasks.batch.part_footer import STATISTICS, make_part_metadata
from tasks.batch.plan import DIGEST_SHOWN, Plan
from tasks.storage import Entry, Storage

REJECT_COLUMN, REJECT_REASON = "reject_column", "reject_reason"

# Of polars and of Delta; pyarrow's decimal256 has more.
_DECIMAL_DIGITS_MAX = 38

_NAME = re.compile(r"part-([0-9]{5}|[1-9][0-9]{5,})-([0-9]{4}|[1-9][0-9]{4,})(?:-([0-9a-f]{12}))?\.parquet")
# The keys that S3 lists in one call.
_PAGE = 1000

ChunkId = tuple[int, int]


def part_path(plan: Plan, chunk: ChunkId) -> str:
    """Return where the part of a chunk lies below the destination: in the folder of the run that first had it.

    The name holds the digest of the plan: parts of two plans of one run never have the same name.
    """
    if (reused := plan.reused_parts.get(chunk)) is not None:
        return reused.path
    return f"{plan.parts_folder}/part-{chunk[0]:05d}-{chunk[1]:04d}{_suffix(plan.digest)}"


def part_glob(run: str, plan_digest: str) -> str:
    """Return the glob, below the destination, that fits the parts of one plan of a run and no others."""
    return f"run={run}/part-*{_suffix(plan_digest)}"


def is_part_name(name: str) -> bool:
    """Return whether a file is named as parts are, whichever plan it is of."""
    return _NAME.fullmatch(name) is not None


def _suffix(plan_digest: str) -> str:
    return f"-{plan_digest[:DIGEST_SHOWN]}.parquet" if plan_digest else ".parquet"


def list_parts(storage: Storage, plan: Plan) -> dict[ChunkId, Entry]:
    """Return the parts of a plan that exist, by their chunks; opens none of them."""
    entries = storage.entries(plan.parts_folder, depth=1)
    own = {chunk: entry for entry in entries if (chunk := _find_chunk(plan, entry.path)) is not None}
    return own | list_reused_parts(storage, plan)


def list_reused_parts(storage: Storage, plan: Plan) -> dict[ChunkId, Entry]:
    """Return the parts of earlier runs that a plan has and that are there, by their chunks; opens none of them.

    One of another size than it had is there too: it is found out by its footer, and set aside.
    """
    there = list_entries_at(storage, (part.path for part in plan.reused))
    return {chunk: there[part.path] for chunk, part in plan.reused_parts.items() if part.path in there}


def _find_chunk(plan: Plan, path: str) -> ChunkId | None:
    """Return the chunk that a file is named for, None where it is none of this plan's."""
    folder, _, name = path.rpartition("/")
    match = _NAME.fullmatch(name)
    if match is None or (match[3] or "") != plan.digest[:DIGEST_SHOWN] or folder != plan.parts_folder:
        return None
    return int(match[1]), int(match[2])


def list_parts_from(storage: Storage, plan: Plan, shard: int) -> tuple[range, list[ChunkId]]:
    """Return some shards, from this one on, and all their parts in the run's own folder; by one page of a listing.

    By more than one where the shard itself has more parts than a page holds.
    """
    folder, parts, after = plan.parts_folder, list[ChunkId](), f"part-{shard:05d}"
    while True:
        page = storage.entries_after(folder, after, _PAGE)
        parts += (chunk for entry in page if (chunk := _find_chunk(plan, entry.path)) is not None)
        after = page[-1].path.rpartition("/")[2] if page else ""
        # A page may end in the middle of a shard.
        last = _NAME.fullmatch(after)
        stop = len(plan.shards) if len(page) < _PAGE else int(last[1]) if last else shard
        if stop > shard:
            stop = min(stop, len(plan.shards))
            return range(shard, stop), [chunk for chunk in parts if shard <= chunk[0] < stop]


def count_done(storage: Storage, plan: Plan) -> tuple[int, int]:
    """Return how many rows and how many chunks of a plan have all their parts, whichever worker wrote them.

    Those of earlier runs are taken to be there: before the run is published they are looked at.
    """
    chunks, own = plan.chunks, plan.model_copy(update={"reused": ()})
    done = {chunk for chunk in list_parts(storage, own) if chunk in chunks} | plan.reused_parts.keys()
    done = _keep_whole(storage, plan, done)
    return sum(chunks[chunk].rows for chunk in done), len(done)


def list_done(storage: Storage, plan: Plan) -> set[ChunkId]:
    """Return the chunks of a plan that have all their parts, by listings."""
    return _keep_whole(storage, plan, set(list_parts(storage, plan)))


def _keep_whole(storage: Storage, plan: Plan, chunks: set[ChunkId]) -> set[ChunkId]:
    """Return those chunks that have the parts of challengers too."""
    return chunks.intersection(*(list_parts(storage, each) for each in list_followed(storage, plan)))


def give_up_challenger(storage: Storage, plan: Plan, why: str) -> None:
    """Note that a challenger, by its plan, is scored no further in its run; the first reason stands."""
    storage.put_new(_given_up_path(plan), why.encode())


def read_given_up(storage: Storage, plan: Plan) -> str | None:
    """Return why a challenger was given up, None where it was not."""
    data = storage.read(_given_up_path(plan))
    return None if data is None else data.decode(errors="replace")


def _given_up_path(plan: Plan) -> str:
    """Return where it says that a challenger was given up: as a part, by its plan, since a name may have another."""
    return f"{plan.parts_folder}/given-up-{plan.digest[:DIGEST_SHOWN]}.txt"


def list_followed(storage: Storage, plan: Plan) -> tuple[Plan, ...]:
    """Return the plans of the challengers that were not given up; a run without challengers asks for nothing."""
    return tuple(each for each in plan.challenger_plans if read_given_up(storage, each) is None)


def count_rows_done(storage: Storage, plan: Plan) -> int:
    """Return how many rows of a plan have their part, whichever worker wrote it."""
    return count_done(storage, plan)[0]


def key_names(options: BatchOptions) -> list[str]:
    """Return the columns that name a row: the user's, or source file and row number."""
    return list(options.key_columns) or [SOURCE_FILE, SOURCE_ROW]


def check_names(dataset: Dataset, contract: Contract, options: BatchOptions) -> None:
    """Hold the key columns against the dataset, and the names of a part's columns against each other.

    Raises SchemaMismatch for keys that are missing, BadInput for names that clash, and for keys of a type that could
    not be read back from a part.
    """
    if missing := [key for key in options.key_columns if dataset.schema.names.count(key) != 1]:
        names = dataset.schema.names
        meant = suggest_name(missing[0], names)
        message = (
            f"Each key must be one column of the dataset, got {missing}{meant or '.'} Columns found: {names[:40]}."
        )
        raise SchemaMismatch(message)
    if not options.key_columns and (taken := {SOURCE_FILE, SOURCE_ROW} & {column.name for column in contract.columns}):
        message = (
            f"Without key columns {sorted(taken)} name a row, got columns of the model called so. Choose "
            f"{name_option('key_columns')}."
        )
        raise BadInput(message)
    names = [*key_names(options), *(o.name for o in contract.outputs), REJECT_COLUMN, REJECT_REASON]
    # Delta takes names that differ by case alone for one.
    spelt = [name.lower() if options.output == "delta" else name for name in names]
    counts = Counter(spelt)
    if twice := [name for name, as_taken in zip(names, spelt, strict=True) if counts[as_taken] > 1]:
        message = f"A part's columns must have different names, got {twice}. Choose other keys, or rename the output."
        raise BadInput(message)
    for key in options.key_columns:
        _check_readable_key(key, dataset.schema.field(key).type, options)


def _check_readable_key(key: str, given: pa.DataType, options: BatchOptions) -> None:
    """Raise BadInput where a part that holds a key could not be read back, as a trial of one row shows."""
    try:
        stored = stored_type(given, options.output)
        got = _find_unread(stored)
        if got is None:
            trial = io.BytesIO()
            pq.write_table(pa.table({key: pa.nulls(1, stored)}), trial)
            pq.read_table(io.BytesIO(trial.getvalue()))
            pl.read_parquet(io.BytesIO(trial.getvalue()))
            return
    except (Exception, pl.exceptions.PanicException) as error:  # noqa: BLE001 - each reader has errors of its own
        got = " ".join(str(error).split())[:200]
    message = (
        f"A key must have a type that can be written to Parquet and read back by pyarrow and polars, got {key!r} of "
        f"type {given}: {got}. Cast it in the source, or choose other key columns."
    )
    raise BadInput(message)


def _find_unread(given: pa.DataType) -> str | None:
    """Say what of a type polars can't read, or ends in a panic over; None where a trial may be made."""
    if pa.types.is_decimal(given) and given.precision > _DECIMAL_DIGITS_MAX:
        return f"no more than {_DECIMAL_DIGITS_MAX} digits are read"
    if pa.types.is_list_view(given) or pa.types.is_large_list_view(given):
        return "list views are not read"
    inner = [given.field(at).type for at in range(given.num_fields)] if pa.types.is_nested(given) else []
    inner += [given.value_type] if pa.types.is_dictionary(given) else []
    return next((found for each in inner if (found := _find_unread(each))), None)


def part_schema(contract: Contract, options: BatchOptions, dataset: Dataset) -> pa.Schema:
    """Return the schema that the parts of a run will have."""
    types = {key: dataset.schema.field(key).type for key in options.key_columns}
    types = types or {SOURCE_FILE: pa.string(), SOURCE_ROW: pa.int64()}
    types |= {output.name: output.arrow_type for output in contract.outputs}
    types |= {REJECT_COLUMN: pa.string(), REJECT_REASON: pa.string()}
    return pa.schema([(name, stored_type(given, options.output)) for name, given in types.items()])


_SIGNED = {pa.uint8(): pa.int16(), pa.uint16(): pa.int32(), pa.uint32(): pa.int64(), pa.float16(): pa.float32()}

_OF_ICEBERG = {
    **_SIGNED,
    **dict.fromkeys((pa.int8(), pa.int16(), pa.uint8(), pa.uint16()), pa.int32()),
    **dict.fromkeys((pa.time32("s"), pa.time32("ms")), pa.time64("us")),
}


def stored_type(given: pa.DataType, output: str) -> pa.DataType:
    """Return the type in which a part holds a column, so that pyarrow, polars and, where asked for, a table read it.

    pyarrow can't read back a fixed-size list that is null, polars takes a dictionary for a category,
    Delta and Iceberg have neither unsigned integers nor half floats, and Iceberg has no integers of fewer than 32 bits
    and no times in seconds or milliseconds.
    """
    if isinstance(given, pa.BaseExtensionType):
        return stored_type(given.storage_type, output)
    if pa.types.is_dictionary(given):
        return stored_type(given.value_type, output)
    if pa.types.is_fixed_size_list(given):
        return pa.list_(stored_type(given.value_type, output))
    if output == "iceberg":
        if pa.types.is_timestamp(given) and given.unit in ("s", "ms"):
            return pa.timestamp("us", given.tz)
        return _OF_ICEBERG.get(given, given)
    return _SIGNED.get(given, given) if output == "delta" else given


def encode_part(
    plan: Plan,
    chunk: Chunk | None,
    keys: pa.Table,
    predictions: Predictions,
    flags: Flags,
    batch_size: int,
    inputs: Mapping[str, ColumnStatistics] | None = None,
    kept: pa.Table | None = None,
) -> memoryview:
    """Return the bytes of a part: the same in every attempt, since nothing of the attempt is in them.

    `chunk` is what the part holds of the plan, None for a part of a stream's table. `batch_size` is the plan's, or
    what was left of it where memory ran out. With the statistics of the inputs, the part has those of the outputs too.
    The part of a challenger has the columns of the source that are `kept`, under names of their own.
    """
    columns = {name: keys.column(name) for name in keys.column_names}
    outputs = output_columns(plan.contract, predictions, flags)
    columns |= outputs
    columns |= {name_kept(name): kept.column(name) for name in kept.column_names} if kept is not None else {}
    columns = {name: values.cast(stored_type(values.type, plan.options.output)) for name, values in columns.items()}
    table = pa.table(columns, metadata=make_part_metadata(plan, chunk, keys, flags, batch_size))
    if inputs is None:
        return write_part(table.combine_chunks())
    scored = pa.table({output.name: outputs[output.name] for output in plan.contract.outputs})
    statistics = TableStatistics(
        rows=table.num_rows,
        rejects=int(np.count_nonzero(flags.code_N)),
        inputs=dict(inputs),
        outputs=collect_statistics(scored),
    )
    return write_part(table.combine_chunks(), pack_statistics(statistics))


def put_empty_part(storage: Storage, plan: Plan) -> None:
    """Write the part of a plan without rows, which says what columns there are; one that is there stays."""
    schema, place = unpack_schema(plan.empty_schema), (0, 0)
    types = {key: schema.field(key).type for key in plan.options.key_columns}
    types = types or {SOURCE_FILE: pa.string(), SOURCE_ROW: pa.int64()}
    predictions = {output.name: output.make_empty(0) for output in plan.contract.outputs}
    inputs = schema.empty_table().select([name for name in plan.input_columns if name in schema.names])
    data = encode_part(
        plan,
        plan.chunk(place),
        pa.schema(types.items()).empty_table(),
        predictions,
        Flags.all_good(0),
        plan.batch_size,
        collect_statistics(inputs) if plan.options.gate else None,
    )
    storage.put_new(part_path(plan, place), data)


def name_kept(column: str) -> str:
    """Return the name that a column of the source has in the part of a challenger."""
    return f"source.{column}"


def write_part(table: pa.Table, statistics: str = "", *, bears_digest: bool = True) -> memoryview:
    """Return a table, with its metadata, as the bytes of a part: the same for the same table and version of pyarrow.

    Statistics and the digest are in the footer alone: pyarrow keeps the metadata of a table in a file twice. Without
    the digest it is a part as earlier releases have written it.
    """
    sink = pa.BufferOutputStream()
    texts = [field.name for field in table.schema if is_text(field.type)]
    with pq.ParquetWriter(
        sink, table.schema, compression="zstd", use_dictionary=texts, write_page_checksum=True
    ) as writer:
        writer.write_table(table)
        if statistics:
            writer.add_key_value_metadata({STATISTICS: statistics})
        if bears_digest:
            writer.add_key_value_metadata({PART_DIGEST: NO_DIGEST})
    data = memoryview(sink.getvalue()).cast("B")
    if bears_digest:
        write_digest(data)
    return data


def output_columns(contract: Contract, predictions: Predictions, flags: Flags) -> dict[str, pa.Array]:
    """Return what stands beside the keys: predictions, or nulls, and column and reason of each reject."""
    bad_N = flags.code_N != 0
    columns = {output.name: _prediction_column(output, predictions, bad_N) for output in contract.outputs}
    return columns | {REJECT_COLUMN: _reject_column(flags, 0), REJECT_REASON: _reject_column(flags, 1)}


def _prediction_column(output: Output, predictions: Predictions, bad_N: np.ndarray) -> pa.Array:
    value = predictions[output.name]
    if output.width == 1:
        value_N = value.reshape(len(value))
        is_null_N = bad_N if value_N.dtype.kind != "f" or output.required else bad_N | np.isnan(value_N)
        return pa.array(value_N, type=output.arrow_type, mask=is_null_N if is_null_N.any() else None)
    flat = pa.array(value.reshape(-1), type=output.arrow_type.value_type)
    mask = pa.array(bad_N) if bad_N.any() else None
    return pa.FixedSizeListArray.from_arrays(flat, type=output.arrow_type, mask=mask)


def _reject_column(flags: Flags, at: int) -> pa.Array:
    if not flags.reasons:
        return pa.nulls(len(flags.code_N), pa.string())
    words = pa.array([pair[at] or None for pair in flags.reasons], pa.string())
    return words.take(pa.array(flags.code_N - 1, mask=flags.code_N == 0))
