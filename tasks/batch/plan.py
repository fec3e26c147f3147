"""The plan: the dataset cut into chunks and shards, written once and never recomputed."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TypeVar

import numpy as np
import pyarrow as pa
from pydantic import ValidationError

from serving.errors import DestinationUnusable, OvernightError, PlanTooLarge, PublishRefused, RunNameTaken
from serving.model.contract import TEXT_DTYPES, Contract, Frozen, Output
from serving.model.encoding import BatchUnit
from serving.model.interface import Engine
from serving.model.registry import ModelPin
from serving.model.tuner import Tuning
from tasks.batch.dataset import Dataset, Snapshot, SourceFile
from tasks.batch.footer import GroupBytes
from tasks.batch.options import BatchOptions
from tasks.storage import Storage

ROOT = "_overnight"

CHUNK_SECONDS_MAX = 10.0
CHUNK_BYTES_MAX = 64 << 20
# Measured: below, threads spend their time handing blocks over; above, only memory grows.
BLOCK_BYTES = 8 << 20
CHUNKS_PER_SLOT_MIN = 8
SHARD_SECONDS = 60.0
SHARDS_PER_SLOT_MIN = 2
SHARDS_MAX = 1000
# What mimalloc, Arrow's allocator, keeps of what a slot's three threads have freed until it is purged: fitted to runs
# over small shapes, which kept 30 to 53 MiB. With jemalloc they kept 8 to 12.
SLOT_BYTES = 48 << 20
# Averages of row groups differ a little; only rows that are larger than that get blocks of their own size.
ROW_BYTES_OFF = 1.25
# A page of a part ends after so many rows or bytes, whichever are more.
_PAGE_BYTES, _PAGE_ROWS = 1 << 20, 1024
# Of a text that a model puts out, as assumed.
_TEXT_BYTES = 64
# Of a row: its flag three times over, and the offsets of two columns of rejects.
_FLAG_BYTES = 20
# Of a row without keys of its own: the number, and where the file's name begins.
_PLACE_BYTES = 12


class Piece(Frozen):
    """Rows [row_start, row_stop) of one row group of one file; files are numbered as in the snapshot."""

    file: int
    row_group: int
    row_start: int
    row_stop: int

    @property
    def rows(self) -> int:
        """How many rows it holds."""
        return self.row_stop - self.row_start


class Chunk(Frozen):
    """What one checkpoint covers: pieces in the order of the dataset."""

    pieces: tuple[Piece, ...]

    @property
    def rows(self) -> int:
        """How many rows it holds."""
        return sum(piece.rows for piece in self.pieces)


class Plan(Frozen):
    """Everything a run is tied to. Whoever holds it can score any of its chunks and get the same bytes.

    `digest` tells it from other plans of the same run, and is part of the names of its parts. `order` is the run's
    number among those planned at the destination, whatever clocks said. A table of a stream has no digest: its parts
    follow one another, and each says its own range.
    """

    key: str
    run: str
    digest: str = ""
    order: int = 0
    planned_at: datetime
    model: ModelPin
    contract: Contract
    options: BatchOptions
    source: Snapshot
    snapshot: Snapshot
    columns: tuple[str, ...]
    partitions: dict[str, str]
    batch_size: int
    batch_unit: BatchUnit
    engine: Engine
    tuning: Tuning | None
    row_bytes: float
    rows: int
    shards: tuple[tuple[Chunk, ...], ...]

    @property
    def chunks(self) -> dict[tuple[int, int], Chunk]:
        """Every chunk by its shard and its place in it."""
        return {(s, c): chunk for s, shard in enumerate(self.shards) for c, chunk in enumerate(shard)}

    @property
    def step(self) -> int:
        """How many rows the edges of blocks are multiples of."""
        return batch_step(self.batch_size, self.batch_unit)

    def block_rows(self, chunk: Chunk) -> int:
        """Return the rows of a chunk's blocks: fewer than of others where its rows are larger than those measured.

        Never more than it has: rows decoded beyond it would stay in memory for as long as its keys do.
        """
        widest = max(self.piece_bytes(piece).decoded / piece.rows for piece in chunk.pieces)
        rows = block_rows(self.step, widest if widest > ROW_BYTES_OFF * self.row_bytes else self.row_bytes)
        return min(rows, chunk.rows)

    def piece_bytes(self, piece: Piece) -> GroupBytes:
        """Return what a piece takes of its row group; of a plan that was made without, what the rows measured take."""
        file = self.snapshot.files[piece.file]
        if not file.group_bytes:
            keys = 32 * piece.rows * max(1, len(self.options.key_columns))
            return GroupBytes(int(self.row_bytes * piece.rows), keys, keys, 0)
        sizes, share = file.group_bytes[piece.row_group], piece.rows / file.row_groups[piece.row_group]
        places = (
            0 if self.options.key_columns else piece.rows * (len((file.origin or file.path).encode()) + _PLACE_BYTES)
        )
        return GroupBytes(
            int(sizes.decoded * share) + places,
            int(sizes.keys * share) + places,
            int(sizes.keys_encoded * share) + (8 * piece.rows if places else 0),
            sizes.reading,
        )

    @property
    def folder(self) -> str:
        """Where the run's bookkeeping lies below the destination."""
        return f"{ROOT}/{self.run}"


def digest_plan(plan: Plan) -> str:
    """Return the SHA-256, in hexadecimal, of all that shapes the parts of a plan.

    The run key stands for model, snapshot, contract and options; files are told here by path and row groups alone,
    so that a staged copy that is made again, with the same content under the same name, is the same.
    """
    shape = plan.model_dump(
        mode="json", include={"key", "columns", "partitions", "batch_size", "batch_unit", "engine", "shards"}
    )
    files = [(file.path, file.origin, file.origin_row, file.row_groups) for file in plan.snapshot.files]
    return _digest_json({**shape, "files": files})


def digest_chunk(plan: Plan, chunk: Chunk) -> str:
    """Return the SHA-256, in hexadecimal, of what a part is made of: rows of files, model, batches and engine."""
    files = plan.snapshot.files
    pieces = [
        (files[p.file].path, files[p.file].origin, files[p.file].origin_row, p.row_group, p.row_start, p.row_stop)
        for p in chunk.pieces
    ]
    return _digest_json([plan.key, pieces, plan.batch_size, plan.batch_unit, plan.engine.model_dump(mode="json")])


def _digest_json(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def run_key(model: ModelPin, snapshot: Snapshot, contract: Contract, options: BatchOptions) -> str:
    """Return the digest of all that decides the output: 32 hexadecimal digits.

    The same call made again over the same model and files has the same key: it is the same run.
    """
    chosen = json.dumps(options.key_fields(), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    text = f"{model.digest}\n{snapshot.model_dump_json()}\n{contract.model_dump_json()}\n{chosen}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What shapes a plan: size of a batch, slots, bytes of a decoded row, rows a second of one slot, the engine.

    The rate is None where nothing needed to be measured, the tuning where none was made.
    """

    batch_size: int
    slots: int
    row_bytes: float
    rows_per_second: float | None
    engine: Engine = field(default_factory=Engine)
    tuning: Tuning | None = None
    batch_unit: BatchUnit = "rows"

    @property
    def step(self) -> int:
        """How many rows the edges of chunks are multiples of, where they can be."""
        return batch_step(self.batch_size, self.batch_unit)


def block_rows(step: int, row_bytes: float) -> int:
    """Return the rows of a block: batches of `step` rows that together stay near 8 MiB."""
    return step * max(1, int(BLOCK_BYTES / max(row_bytes, 1) / step))


def batch_step(batch_size: int, batch_unit: BatchUnit) -> int:
    """Return the rows of a batch; one where it counts tokens, since its rows are then any of the block."""
    return batch_size if batch_unit == "rows" else 1


def make_plan(
    *,
    key: str,
    model: ModelPin,
    contract: Contract,
    options: BatchOptions,
    source: Snapshot,
    dataset: Dataset,
    sizes: Sizes,
    planned_at: datetime | None = None,
) -> Plan:
    """Cut a dataset into chunks and shards.

    Measured sizes only shape the plan: once it is written, every attempt reads it. Flow runs that score it together
    have slots of their own: what they score twice at the end is a chunk of each, and there are to be many of those.
    """
    sizes = replace(sizes, slots=sizes.slots * options.workers)
    rows_per_chunk = options.rows_per_chunk or choose_chunk_rows(dataset.rows, sizes)
    chunks = cut_chunks(dataset.snapshot.files, rows_per_chunk, sizes.step, CHUNK_BYTES_MAX)
    plan = Plan(
        key=key,
        run=options.name or key,
        planned_at=planned_at or datetime.now(UTC),
        model=model,
        contract=contract,
        options=options,
        source=source,
        snapshot=dataset.snapshot,
        columns=tuple(used_columns(contract, options, dataset.schema)),
        partitions={name: str(dataset.schema.field(name).type) for name in dataset.hive},
        batch_size=sizes.batch_size,
        batch_unit=sizes.batch_unit,
        engine=sizes.engine,
        tuning=sizes.tuning,
        row_bytes=sizes.row_bytes,
        rows=dataset.rows,
        shards=cut_shards(chunks, dataset.rows, sizes),
    )
    return plan.model_copy(update={"digest": digest_plan(plan)})


def choose_chunk_rows(rows: int, sizes: Sizes) -> int:
    """Return the rows of a chunk: min(10 s of work, 64 MiB decoded, 1/8 of a slot's rows).

    Rounded down to a batch times a power of two, so that only the last batch of a piece is short.
    """
    most = min(
        CHUNK_SECONDS_MAX * sizes.rows_per_second if sizes.rows_per_second else math.inf,
        CHUNK_BYTES_MAX / max(sizes.row_bytes, 1),
        rows / (sizes.slots * CHUNKS_PER_SLOT_MIN),
    )
    batches = max(most, sizes.step) / sizes.step
    return int(sizes.step * 2 ** math.floor(math.log2(batches)))


def cut_chunks(
    files: Sequence[SourceFile], rows_per_chunk: int, batch_size: int, bytes_per_chunk: float = math.inf
) -> list[Chunk]:
    """Cut files into chunks of whole row groups, or of even slices of one that is larger than a chunk.

    Every row of every file is in exactly one chunk, in the order of the dataset. A row group of more bytes than a chunk
    may have is cut by what its own rows take on average, if need be below a batch.
    """
    chunks: list[Chunk] = []
    held: list[Piece] = []
    held_rows, held_bytes = 0, 0
    for at, file in enumerate(files):
        for group, rows in enumerate(file.row_groups):
            size = file.group_bytes[group].decoded if file.group_bytes else 0
            most = min(rows_per_chunk, _rows_within(bytes_per_chunk, size, rows, batch_size))
            if held and (held_rows + rows > rows_per_chunk or held_bytes + size > bytes_per_chunk):
                chunks.append(Chunk(pieces=tuple(held)))
                held, held_rows, held_bytes = [], 0, 0
            if rows > most:
                chunks += [Chunk(pieces=(piece,)) for piece in _slice_row_group(at, group, rows, most, batch_size)]
            elif rows:
                held.append(Piece(file=at, row_group=group, row_start=0, row_stop=rows))
                held_rows, held_bytes = held_rows + rows, held_bytes + size
    if held:
        chunks.append(Chunk(pieces=tuple(held)))
    return chunks


def _rows_within(most: float, size: int, rows: int, batch_size: int) -> int:
    """Return how many rows of a row group of `size` bytes stay within `most` bytes: whole batches where one does."""
    if size <= most:
        return rows
    within = max(1, int(rows * most / size))
    return within - within % batch_size if within >= batch_size else within


def _slice_row_group(file: int, group: int, rows: int, rows_per_chunk: int, batch_size: int) -> list[Piece]:
    even = math.ceil(rows / math.ceil(rows / rows_per_chunk))
    step = min(rows_per_chunk, math.ceil(even / batch_size) * batch_size)
    # A slice that starts on a multiple of the batch has the batches that the row group as a whole would have.
    step -= step % batch_size if step > batch_size else 0
    return [
        Piece(file=file, row_group=group, row_start=start, row_stop=min(start + step, rows))
        for start in range(0, rows, step)
    ]


def cut_shards(chunks: Sequence[Chunk], rows: int, sizes: Sizes) -> tuple[tuple[Chunk, ...], ...]:
    """Cut chunks into runs of about 60 s of work: at least two a slot, at most 1,000 a run."""
    seconds = rows / sizes.rows_per_second if sizes.rows_per_second else len(chunks) * CHUNK_SECONDS_MAX / 2
    least = SHARDS_PER_SLOT_MIN * sizes.slots if sizes.slots > 1 else 1
    count = min(max(least, math.ceil(seconds / SHARD_SECONDS)), len(chunks), SHARDS_MAX)
    edges = [len(chunks) * at // count for at in range(count + 1)]
    return tuple(tuple(chunks[start:stop]) for start, stop in itertools.pairwise(edges))


def memory_bytes(plan: Plan, slots: int) -> int:
    """Return what the run's data takes at its peak, over what the process takes idle.

    Counted is what each slot holds where its model is slower than its reader, so that the queue is full:

    - the row group that it reads, as stored, with a page and a dictionary of each column;
    - a decoded block, its copy as it grows, and where a chunk has several one more that waits for its successor;
    - the inputs of a block being scored and of one being encoded, which may take a copy; of two more, with their keys,
      where a chunk has several;
    - the keys and predictions of two chunks, one being scored, one being written. The latter's are there once more in
      one piece, and as Parquet: as gathered and as encoded for a page, compressed, and in the file;
    - SLOT_BYTES for what the allocators of its three threads keep.

    Measured over the shapes of tests/benchmarks/memory.py, what is used is no more than 20 % above this, or 32 MiB a
    slot where that is more. It may be 30 % below: slots seldom peak together, and a fast model leaves the queue empty.
    What the model itself takes for a pass is not counted, nor what an allocator other than Arrow's own keeps.
    """
    chunks = plan.chunks.values()
    needed = max(_block_bytes(plan, chunk) + _out_bytes(plan, chunk) for chunk in chunks)
    reading = max(plan.piece_bytes(piece).reading for chunk in chunks for piece in chunk.pieces)
    return int(slots * (needed + reading + SLOT_BYTES))


def _block_bytes(plan: Plan, chunk: Chunk) -> float:
    rows = plan.block_rows(chunk)
    sizes = [(plan.piece_bytes(piece), piece.rows) for piece in chunk.pieces]
    decoded, keys = max(each.decoded / n for each, n in sizes), max(each.keys / n for each, n in sizes)
    inputs = plan.contract.row_bytes()
    # The queue has two places, one of which the turn of a chunk takes: one of a single block has none waiting.
    return rows * (2 * decoded + 3 * inputs + (decoded + 2 * inputs + 2 * keys if rows < chunk.rows else 0))


def _out_bytes(plan: Plan, chunk: Chunk) -> float:
    sizes = [plan.piece_bytes(piece) for piece in chunk.pieces]
    keys, encoded = sum(size.keys for size in sizes), sum(size.keys_encoded for size in sizes)
    in_one_piece = keys if plan.block_rows(chunk) < chunk.rows or len(chunk.pieces) > 1 else 0
    page = min(encoded, max(_PAGE_BYTES, _PAGE_ROWS * encoded / chunk.rows))
    answers = sum(output.width * _value_bytes(output) for output in plan.contract.outputs)
    return 2 * keys + in_one_piece + 2 * page + 2 * encoded + chunk.rows * (_FLAG_BYTES + 6 * answers)


def _value_bytes(output: Output) -> int:
    return _TEXT_BYTES if output.dtype in TEXT_DTYPES else np.dtype(output.dtype).itemsize


def check_fits(needed: int, allowed: int, plan: Plan, slots: int) -> None:
    """Refuse a plan that needs more bytes than are allowed; raises PlanTooLarge."""
    if needed > allowed:
        largest = max(chunk.rows for chunk in plan.chunks.values())
        message = (
            f"The run must fit in {allowed >> 20} MiB, but {slots} slots over chunks of {largest:,} rows need "
            f"{needed >> 20} MiB. Lower rows_per_chunk or slots, or raise memory_mb."
        )
        raise PlanTooLarge(message)


def save_plan(storage: Storage, plan: Plan) -> Plan:
    """Write the plan, or return the one that was written first.

    Raises RunNameTaken where the explicit name holds a run of another plan.
    """
    storage.put_new(f"{plan.folder}/plan.json", plan.model_dump_json().encode())
    standing = load_plan(storage, plan.run)
    if standing is None:
        message = f"The plan of run {plan.run} must be readable once written, but is gone from {storage.url}."
        raise OvernightError(message)
    return check_plan_key(standing, plan.key)


def load_plan(storage: Storage, run: str) -> Plan | None:
    """Read the plan of a run, None where there is none.

    One of an earlier release has no digest and gets it here; its parts of then bear none, and are scored again.
    Raises DestinationUnusable where the plan is not what its digest says.
    """
    plan = read_record(storage, f"{ROOT}/{run}/plan.json", Plan)
    if plan is None or not plan.shards:
        return plan
    digest = digest_plan(plan)
    if plan.digest and plan.digest != digest:
        message = (
            f"{storage.address(f'{plan.folder}/plan.json')} must be as it was written, with the digest "
            f"{plan.digest[:12]}, but its content has {digest[:12]}. Put it back, or delete {plan.folder} below the "
            "destination, and call again for all of the run."
        )
        raise DestinationUnusable(message)
    return plan.model_copy(update={"digest": digest})


R = TypeVar("R", bound=Frozen)


def read_record(storage: Storage, path: str, kind: type[R]) -> R | None:
    """Read a plan, start or manifest, None where there is none; raises DestinationUnusable where it is of no use."""
    data = storage.read(path)
    try:
        return None if data is None else kind.model_validate_json(data)
    except ValidationError as error:
        message = (
            f"{storage.address(path)} must be a {kind.__name__.lower()} that this version of Overnight reads, got: "
            f"{error.errors()[0]['msg']} at {error.errors()[0]['loc']}. Use the version that wrote it, or another name "
            "or destination."
        )
        raise DestinationUnusable(message) from error


def check_plan_key(plan: Plan, key: str) -> Plan:
    """Return the plan if it has this key; raises RunNameTaken otherwise."""
    if plan.key != key:
        message = (
            f"The run name {plan.run!r} already holds a run of another plan (key {plan.key}, model {plan.model.uri}, "
            f"planned {plan.planned_at:%Y-%m-%d %H:%M} UTC); this call's key is {key}. Choose another name, or none."
        )
        raise RunNameTaken(message)
    return plan


class RunStart(Frozen):
    """What ties the attempts of one flow run to one run: its name, and the key that it was planned with.

    Those of earlier releases have no key.
    """

    run: str
    key: str = ""


def save_start(storage: Storage, flow_run_id: str, start: RunStart) -> RunStart:
    """Tie a flow run to a run, create-only; return what it is tied to."""
    path = f"{ROOT}/starts/{flow_run_id}.json"
    storage.put_new(path, start.model_dump_json().encode())
    return load_start(storage, flow_run_id) or start


def load_start(storage: Storage, flow_run_id: str) -> RunStart | None:
    """Return what an earlier attempt of this flow run was tied to, None for a first attempt."""
    return read_record(storage, f"{ROOT}/starts/{flow_run_id}.json", RunStart)


def load_started_plan(storage: Storage, start: RunStart) -> Plan:
    """Return the plan that an earlier attempt of a flow run has begun.

    Raises OvernightError where it is gone, RunNameTaken where another call was planned in its place since.
    """
    plan = load_plan(storage, start.run)
    if plan is None:
        message = (
            f"The plan of run {start.run} must be there, since this flow run began it, but is gone from {storage.url}."
        )
        raise OvernightError(message)
    return check_plan_key(plan, start.key) if start.key else plan


class OrderNumber(Frozen):
    """The run that holds a number in the order of runs."""

    run: str


def order_path(number: int) -> str:
    """Return where a number in the order of runs lies below the destination."""
    return f"{ROOT}/order/{number:08d}.json"


def confirm_plan(storage: Storage, plan: Plan) -> Plan:
    """Return the plan with the number in the order of runs that its record has now, just before it is published.

    Raises PublishRefused where the record was deleted while the run went on, or is that of another plan by now, and
    where the number is another run's or nobody's: runs that were planned since could not be told from this one.
    """
    stored = load_plan(storage, plan.run)
    if stored is not None and stored.order:
        holder = read_record(storage, order_path(stored.order), OrderNumber)
        if holder is None or holder.run != plan.run:
            message = (
                f"{storage.address(order_path(stored.order))} must hold run {plan.run}, which was planned under that "
                f"number, but {'is gone' if holder is None else f'holds run {holder.run}'}: records were deleted. "
                f"Nothing was published. Delete {plan.folder} below the destination and call again: the run is planned "
                "once more, and parts that are there are taken where that plan comes out the same."
            )
            raise PublishRefused(message)
    if stored is None or (stored.key, stored.digest) != (plan.key, plan.digest):
        message = (
            f"{storage.address(f'{plan.folder}/plan.json')} must stand until run {plan.run} is published, but "
            f"{'is gone' if stored is None else 'is another by now'}. Nothing was published; call again: the run is "
            "planned once more, and parts that are there are taken where that plan comes out the same."
        )
        raise PublishRefused(message)
    return plan.model_copy(update={"order": stored.order})


def used_columns(contract: Contract, options: BatchOptions, schema: pa.Schema) -> list[str]:
    """Return the columns to read, in the file's order of use: the model's, then the keys, each once."""
    wanted = [column.name for column in contract.columns] + list(options.key_columns)
    return [name for name in dict.fromkeys(wanted) if name in schema.names]
