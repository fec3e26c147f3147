"""The plan: the dataset cut into chunks and shards, written once and never recomputed."""

from __future__ import annotations

import hashlib
import json
import re
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import TypeVar

import pyarrow as pa
from pydantic import ValidationError

from serving.errors import DestinationUnusable, FormatTooNew, OvernightError, PublishRefused, RunNameTaken
from serving.model.contract import Contract, Frozen
from serving.model.encoding import BatchUnit
from serving.model.interface import Engine
from serving.model.registry import ModelPin
from serving.model.tuner import Tuning
from serving.option_words import name_option
from tasks.batch.chunk_layout import (
    BLOCK_BYTES,
    CHUNK_BYTES_MAX,
    ROW_BYTES_OFF,
    Chunk,
    Piece,
    Sizes,
    batch_step,
    block_rows,
    choose_chunk_rows,
    cut_chunks,
    cut_shards,
)
from tasks.batch.dataset import Dataset, Snapshot
from tasks.batch.footer import GroupBytes
from tasks.batch.options import BatchOptions
from tasks.storage import Storage

ROOT = "_overnight"
# Of plans, manifests and parts. Those of releases before there were versions have none, and are of version 1.
FORMAT_VERSION = 1

# Of a row without keys of its own: the number, and where the file's name begins.
_PLACE_BYTES = 12


class Plan(Frozen):
    """Everything a run is tied to. Whoever holds it can score any of its chunks and get the same bytes.

    `digest` tells it from other plans of the same run, and is part of the names of its parts. `order` is the run's
    number among those planned at the destination, whatever clocks said. A table of a stream has no digest: its parts
    follow one another, and each says its own range.
    """

    format_version: int = FORMAT_VERSION
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

    def rows_decoded_at_once(self, chunk: Chunk) -> int:
        """Return the rows of a chunk that its reader decodes at once: a block's, or of large rows some 8 MiB."""
        files = self.snapshot.files
        within = max(files[piece.file].rows_within(BLOCK_BYTES, piece.row_group) for piece in chunk.pieces)
        return min(self.block_rows(chunk), within)

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
    # A table's metadata is written again when it changes in other ways than its rows.
    pinned = snapshot.model_dump_json(exclude={"iceberg": {"metadata", "named"}})
    text = f"{model.digest}\n{pinned}\n{contract.model_dump_json()}\n{chosen}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


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
    """Read a plan, start or manifest; None where there is none.

    Raises:
        FormatTooNew: A newer Overnight has written it.
        DestinationUnusable: It does not read as such a record.
    """
    data = storage.read(path)
    if data is None:
        return None
    try:
        record = kind.model_validate_json(data)
    except ValidationError as error:
        with suppress(ValueError, AttributeError):
            check_format_version(json.loads(data).get("format_version"), storage.address(path))
        problem = error.errors()[0]
        where = f" at {'.'.join(map(str, problem['loc']))}" if problem["loc"] else ""
        message = (
            f"{storage.address(path)} must be a {_in_words(kind)} that this version of Overnight reads, got: "
            f"{problem['msg']}{where}. Put it back as it was written, or use the version that wrote it, or another "
            "name or destination."
        )
        raise DestinationUnusable(message) from error
    check_format_version(getattr(record, "format_version", None), storage.address(path))
    return record


def _in_words(kind: type[Frozen]) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", kind.__name__).lower()


def check_format_version(version: object, address: str) -> None:
    """Raise FormatTooNew where the format version that a file states is newer than the one that is read here."""
    if isinstance(version, int) and version > FORMAT_VERSION:
        message = (
            f"{address} must be of format version {FORMAT_VERSION} or lower to be read by this version of Overnight, "
            f"got version {version}: a newer Overnight has written it. Update Overnight, then call again."
        )
        raise FormatTooNew(message)


def check_plan_key(plan: Plan, key: str) -> Plan:
    """Return the plan if it has this key; raises RunNameTaken otherwise."""
    if plan.key != key:
        message = (
            f"The run name {plan.run!r} already holds a run of another plan (key {plan.key}, model {plan.model.uri}, "
            f"planned {plan.planned_at:%Y-%m-%d %H:%M} UTC); this call's key is {key}. Choose another "
            f"{name_option('name')}, or none."
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
