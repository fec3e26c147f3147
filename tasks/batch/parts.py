"""A part: one Parquet file with every row of its chunk, key, predictions, or nulls and the reason."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from serving.contract import Contract, Output
from serving.encode import Flags
from serving.errors import BadInput, SchemaMismatch
from serving.forward import Predictions
from tasks.batch.dataset import SOURCE_FILE, SOURCE_ROW, Dataset
from tasks.batch.options import BatchOptions
from tasks.batch.plan import Chunk, Plan
from tasks.storage import Entry, Storage

REJECT_COLUMN, REJECT_REASON = "reject_column", "reject_reason"

_NAME = re.compile(r"part-(\d{5,})-(\d{4,})\.parquet")

ChunkId = tuple[int, int]
Reasons = Counter[tuple[str, str]]


def part_path(run: str, chunk: ChunkId) -> str:
    """Return where the part of a chunk lies below the destination."""
    return f"run={run}/part-{chunk[0]:05d}-{chunk[1]:04d}.parquet"


def list_parts(storage: Storage, run: str) -> dict[ChunkId, Entry]:
    """Return the parts that exist by their chunks; opens none of them."""
    parts = {}
    for entry in storage.entries(f"run={run}"):
        if match := _NAME.fullmatch(entry.path.rpartition("/")[2]):
            parts[int(match[1]), int(match[2])] = entry
    return parts


def key_names(options: BatchOptions) -> list[str]:
    """Return the columns that name a row: the user's, or source file and row number."""
    return list(options.key_columns) or [SOURCE_FILE, SOURCE_ROW]


def check_names(dataset: Dataset, contract: Contract, options: BatchOptions) -> None:
    """Hold the key columns against the dataset, and the names of a part's columns against each other.

    Raises SchemaMismatch for keys that are missing, BadInput for names that clash.
    """
    if missing := [key for key in options.key_columns if key not in dataset.schema.names]:
        message = f"Each key must be a column of the dataset, got {missing}. Columns found: {dataset.schema.names}."
        raise SchemaMismatch(message)
    names = [*key_names(options), *(o.name for o in contract.outputs), REJECT_COLUMN, REJECT_REASON]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        message = (
            f"A part's columns must have different names, got {twice} twice. Choose other keys, or rename the output."
        )
        raise BadInput(message)


def part_schema(contract: Contract, options: BatchOptions, dataset: Dataset) -> pa.Schema:
    """Return the schema that the parts of a run will have."""
    places = {SOURCE_FILE: pa.field(SOURCE_FILE, pa.string()), SOURCE_ROW: pa.field(SOURCE_ROW, pa.int64())}
    keys = [places[key] if key in places else dataset.schema.field(key) for key in key_names(options)]
    outputs = [pa.field(output.name, output.arrow_type) for output in contract.outputs]
    return pa.schema([*keys, *outputs, pa.field(REJECT_COLUMN, pa.string()), pa.field(REJECT_REASON, pa.string())])


def encode_part(plan: Plan, keys: pa.Table, predictions: Predictions, flags: Flags, batch_size: int) -> memoryview:
    """Return the bytes of a part: the same in every attempt, since nothing of the attempt is in them.

    `batch_size` is the plan's, or what was left of it where memory ran out.
    """
    bad_N = flags.code_N != 0
    columns = [_prediction(output, predictions, bad_N) for output in plan.contract.outputs]
    schema = pa.schema([pa.field(output.name, output.arrow_type) for output in plan.contract.outputs])
    table = keys.combine_chunks()
    for field, values in zip(schema, columns, strict=True):
        table = table.append_column(field, values)
    for at, name in enumerate((REJECT_COLUMN, REJECT_REASON)):
        table = table.append_column(name, _reject(flags, at))
    table = table.replace_schema_metadata(_metadata(plan, flags, batch_size))
    sink = pa.BufferOutputStream()
    texts = [field.name for field in table.schema if pa.types.is_string(field.type)]
    pq.write_table(table, sink, compression="zstd", use_dictionary=texts, write_page_checksum=True)
    return memoryview(sink.getvalue())


def _prediction(output: Output, predictions: Predictions, bad_N: np.ndarray) -> pa.Array:
    value = predictions[output.name]
    if output.width == 1:
        return pa.array(value.reshape(len(value)), type=output.arrow_type, mask=bad_N if bad_N.any() else None)
    flat = pa.array(value.reshape(-1), type=output.arrow_type.value_type)
    mask = pa.array(bad_N) if bad_N.any() else None
    return pa.FixedSizeListArray.from_arrays(flat, type=output.arrow_type, mask=mask)


def _reject(flags: Flags, at: int) -> pa.Array:
    if not flags.reasons:
        return pa.nulls(len(flags.code_N), pa.string())
    words = pa.array([pair[at] or None for pair in flags.reasons], pa.string())
    return words.take(pa.array(flags.code_N - 1, mask=flags.code_N == 0))


def _metadata(plan: Plan, flags: Flags, batch_size: int) -> dict[str, str]:
    counts = count_reasons(flags)
    return {
        "overnight.run_key": plan.key,
        "overnight.model": plan.model.name,
        "overnight.model_version": plan.model.version,
        "overnight.model_digest": plan.model.digest,
        "overnight.batch_size": str(batch_size),
        "overnight.rejects": json.dumps(sorted([*pair, count] for pair, count in counts.items())),
    }


def count_reasons(flags: Flags) -> Reasons:
    """Return how many rows were rejected for which column and reason."""
    counts = np.bincount(flags.code_N, minlength=len(flags.reasons) + 1)[1:]
    return Counter({pair: int(count) for pair, count in zip(flags.reasons, counts, strict=True) if count})


@dataclass(frozen=True, slots=True, kw_only=True)
class PartFooter:
    """What the footer of a part says: its rows, its bytes, and its rejects by column and reason."""

    path: str
    rows: int
    bytes: int
    rejects: Reasons


def read_footer(storage: Storage, plan: Plan, chunk: Chunk, entry: Entry) -> PartFooter | None:
    """Read the footer of a part; None where it can't be read or does not hold the rows of its chunk."""
    try:
        with storage.open_pinned(entry) as stream:
            metadata = pq.read_metadata(stream)
    except (pa.ArrowException, OSError, ValueError):
        return None
    told = metadata.metadata or {}
    if metadata.num_rows != chunk.rows or told.get(b"overnight.run_key") != plan.key.encode():
        return None
    rejects = Counter({(column, reason): count for column, reason, count in json.loads(told[b"overnight.rejects"])})
    return PartFooter(path=entry.path, rows=metadata.num_rows, bytes=entry.size, rejects=rejects)
