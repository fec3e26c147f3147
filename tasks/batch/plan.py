"""The plan: the dataset cut into chunks and shards, written once and never recomputed."""

from __future__ import annotations

import functools
import hashlib
import json
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
from pydantic import Field

from serving.model.contract import Contract, Frozen
from serving.model.encoding import BatchUnit
from serving.model.environment_choice import Environment
from serving.model.interface import Engine
from serving.model.pin import ModelPin
from serving.model.tuner import Tuning
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
from tasks.batch.column_types import pack_schema
from tasks.batch.dataset import Dataset, Snapshot, SourceFile
from tasks.batch.feature_pins import FeaturePin
from tasks.batch.footer import GroupBytes
from tasks.batch.options import BatchOptions

ROOT = "_overnight"
# Where the parts of challengers lie in the folder of a run.
CHALLENGERS = "challengers"
# How much of a digest the names of parts and records have.
DIGEST_SHOWN = 12
# The newest of plans, manifests and parts. Those of releases before there were versions have none, and are of version
# 1, as those of streams are. From 2 on a part bears what it is made of, whichever run it was made for.
FORMAT_VERSION = 2
_PARTS_BY_CONTENT = 2

# Of a row without keys of its own: the number, and where the file's name begins.
_PLACE_BYTES = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Versions:
    """The Python environment that a model runs in, and versions and processor that predictions are made with."""

    environment: Environment = "caller"
    made_with: tuple[str, ...] = ()


class ReusedPart(Frozen):
    """The part of an earlier run that a chunk of this one has, since it is made of the same."""

    shard: int
    place: int
    path: str


class Challenger(Frozen):
    """Another model that scores the rows of a plan: its pinned version, and how its passes are made.

    `columns` are those that it reads, without the keys. Batches are counted within the blocks of the plan.
    """

    model: ModelPin
    contract: Contract
    columns: tuple[str, ...]
    batch_size: int
    batch_unit: BatchUnit
    engine: Engine
    environment: Environment = "caller"
    made_with: tuple[str, ...] = ()


class Plan(Frozen):
    """Everything a run is tied to. Any process that has it can score any of its chunks, and gets the same bytes.

    `digest` tells it from other plans of the same run, and is part of the names of its parts. `order` is the run's
    number among those planned at the destination, whatever clocks said. `addresses` are those that the source was
    called by; plans of earlier releases have none. A table of a stream has no digest: its parts
    follow one another, and each says its own range.

    `empty_schema` are the columns of a dataset without rows, packed, whose plan has one chunk without pieces.

    `shape` is the digest of model, contract and options, without the source. `made_with` names the versions and the
    processor that decide the last bits of a prediction. `reused` are chunks whose parts an earlier run has made, and
    `reuse_note` says why not more of them are. `features` are the feature tables that are joined to the dataset.

    `challengers` score the same rows. `columns_beside` are read for them alone: `beside_bytes` are those of a decoded
    row, `beside_reading` what is held of a row group as it is read. Those of `columns_kept` are in their parts. `place`
    is 0 in the plan of a run, and n in that of its n-th challenger.
    """

    format_version: int = 1
    key: str
    run: str
    digest: str = ""
    order: int = 0
    planned_at: datetime
    model: ModelPin
    contract: Contract
    options: BatchOptions
    source: Snapshot
    addresses: tuple[str, ...] = Field(default=(), exclude_if=operator.not_)
    snapshot: Snapshot
    features: tuple[FeaturePin, ...] = Field(default=(), exclude_if=operator.not_)
    columns: tuple[str, ...]
    partitions: dict[str, str]
    batch_size: int
    batch_unit: BatchUnit
    engine: Engine
    environment: Environment = "caller"
    tuning: Tuning | None
    row_bytes: float
    rows: int
    empty_schema: str = Field(default="", exclude_if=operator.not_)
    rows_per_chunk: int = 0
    shape: str = ""
    made_with: tuple[str, ...] = ()
    reused: tuple[ReusedPart, ...] = ()
    reuse_note: str = ""
    challengers: tuple[Challenger, ...] = Field(default=(), exclude_if=operator.not_)
    columns_beside: tuple[str, ...] = Field(default=(), exclude_if=operator.not_)
    columns_kept: tuple[str, ...] = Field(default=(), exclude_if=operator.not_)
    beside_bytes: float = Field(default=0.0, exclude_if=operator.not_)
    beside_reading: int = Field(default=0, exclude_if=operator.not_)
    place: int = Field(default=0, exclude_if=operator.not_)
    shards: tuple[tuple[Chunk, ...], ...]

    @property
    def chunks(self) -> dict[tuple[int, int], Chunk]:
        """Every chunk by its shard and its place in it."""
        return {(s, c): chunk for s, shard in enumerate(self.shards) for c, chunk in enumerate(shard)}

    def chunk(self, at: tuple[int, int]) -> Chunk:
        """Return a chunk by its shard and its place in it."""
        return self.shards[at[0]][at[1]]

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Plan:
        """Return a copy with other values, which keeps nothing that was worked out from those before."""
        copied = super().model_copy(update=update, deep=deep)
        for name in ("reused_parts", "making", "challenger_plans"):
            copied.__dict__.pop(name, None)
        return copied

    @functools.cached_property
    def reused_parts(self) -> dict[tuple[int, int], ReusedPart]:
        """The parts of earlier runs by the chunks that have them."""
        return {(part.shard, part.place): part for part in self.reused}

    @functools.cached_property
    def challenger_plans(self) -> tuple[Plan, ...]:
        """A plan for each challenger: of the same chunks, whose parts lie apart and have a digest of their own."""
        return tuple(_plan_challenger(self, place, each) for place, each in enumerate(self.challengers, start=1))

    @property
    def parts_folder(self) -> str:
        """Where the parts of this plan lie below the destination."""
        return f"{self.folder}/{CHALLENGERS}/{self.place}" if self.place else f"run={self.run}"

    @property
    def rows_reused(self) -> int:
        """How many rows are in parts of earlier runs."""
        return sum(self.chunk(at).rows for at in self.reused_parts)

    @property
    def has_content_parts(self) -> bool:
        """Whether a part bears what it is made of, and no run."""
        return self.format_version >= _PARTS_BY_CONTENT

    @functools.cached_property
    def making(self) -> str:
        """The digest of all that decides the bytes of a part but the rows that go into it."""
        shared = {"batch_size", "batch_unit", "engine", "environment", "columns", "partitions", "shape", "made_with"}
        told: list[object] = [self.model_dump(mode="json", include=shared), self.snapshot.columns_missing]
        told += [_identify_features(pin, self.contract) for pin in self.features]
        return _digest_json(told)

    @property
    def feature_names(self) -> tuple[str, ...]:
        """The columns that the model gets from feature tables."""
        return tuple(name for pin in self.features for name in pin.names)

    @property
    def input_columns(self) -> tuple[str, ...]:
        """The columns that the model gets, of the source or of a feature table, each once."""
        there = {*self.columns, *self.feature_names}
        return tuple(column.name for column in self.contract.columns if column.name in there)

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


def plan_path(run: str) -> str:
    """Return where the plan of a run lies below the destination."""
    return f"{ROOT}/{run}/plan.json"


def manifest_path(run: str) -> str:
    """Return where the manifest of a run lies below the destination."""
    return f"{ROOT}/{run}/manifest.json"


def record_path(run: str, plan_digest: str, name: str) -> str:
    """Return where a record of one plan of a run lies below the destination.

    Where a plan was deleted, and the run planned again, a record of the first plan is none of the second.
    """
    suffix = f"-{plan_digest[:DIGEST_SHOWN]}" if plan_digest else ""
    return f"{ROOT}/{run}/{name}{suffix}.json"


def _plan_challenger(plan: Plan, place: int, challenger: Challenger) -> Plan:
    """Return the plan of a challenger, which takes nothing from earlier runs."""
    shape = _digest_json([digest_shape(challenger.model, challenger.contract, plan.options), plan.columns_kept])
    derived = plan.model_copy(
        update={
            **{name: getattr(challenger, name) for name in Challenger.model_fields if name != "columns"},
            "columns": tuple(dict.fromkeys([*challenger.columns, *plan.options.key_columns])),
            "shape": shape[:32],
            "place": place,
            "challengers": (),
            "columns_beside": (),
            "reused": (),
            "reuse_note": "",
            "tuning": None,
        }
    )
    return derived.model_copy(update={"digest": digest_plan(derived)})


def digest_plan(plan: Plan) -> str:
    """Return the SHA-256, in hexadecimal, of all that shapes the parts of a plan and of its challengers.

    The run key stands for model, snapshot, contract and options; files are told here by path and row groups alone,
    so that a staged copy that is made again, with the same content under the same name, is the same.
    """
    shape = plan.model_dump(
        mode="json", include={"key", "columns", "partitions", "batch_size", "batch_unit", "engine", "shards"}
    )
    files = [
        (file.path, file.origin, file.origin_row, file.row_groups, *_list_others(plan, file))
        for file in plan.snapshot.files
    ]
    # Plans had no environment once.
    own: dict[str, object] = {"environment": plan.environment} if plan.environment != "caller" else {}
    own |= {"made_with": plan.made_with, "shape": plan.shape} if plan.has_content_parts else {}
    others = [_plan_challenger(plan, at, each).digest for at, each in enumerate(plan.challengers, start=1)]
    own |= {"challengers": others} if others else {}
    return _digest_json({**shape, **own, "files": files})


def digest_chunk(plan: Plan, chunk: Chunk) -> str:
    """Return the SHA-256, in hexadecimal, of what a part is made of: rows of files, model, batches and engine.

    Two chunks of two runs that have the same digest have the same part, byte for byte. Where rows have no keys of their
    own, the part holds the names of their files.
    """
    files = plan.snapshot.files
    if plan.has_content_parts:
        return _digest_json([plan.making, [_identify_piece(plan, piece) for piece in chunk.pieces]])
    pieces = [
        (files[p.file].path, files[p.file].origin, files[p.file].origin_row, p.row_group, p.row_start, p.row_stop)
        for p in chunk.pieces
    ]
    return _digest_json([plan.key, pieces, plan.batch_size, plan.batch_unit, plan.engine.model_dump(mode="json")])


def _identify_piece(plan: Plan, piece: Piece) -> list[object]:
    file = plan.snapshot.files[piece.file]
    told: list[object] = [plan.snapshot.identify(file), piece.row_group, piece.row_start, piece.row_stop]
    if not plan.options.key_columns:
        told += [file.origin or file.path, file.origin_row]
    if plan.partitions:
        values = file.partition_values
        told.append([values.get(name) for name in plan.partitions])
    return [*told, *_list_others(plan, file)]


def _list_others(plan: Plan, file: SourceFile) -> list[dict[str, str]]:
    """Return the columns of a plan's parts that a file holds in another type; nothing where there are none."""
    # Columns that are kept are in the parts of challengers alone.
    read = {*plan.columns, *(plan.columns_kept if plan.place else ())}
    others = {name: kind for name, kind in file.read_as.items() if name in read}
    return [others] if others else []


def _identify_features(pin: FeaturePin, contract: Contract) -> list[object]:
    """Return what tells the rows of a feature table, and what a model reads of them, from those of others."""
    files = [
        [*pin.snapshot.identify(file), file.partition_values, *([file.read_as] if file.read_as else [])]
        for file in pin.snapshot.files
    ]
    read = {column.name for column in contract.columns}
    # Others may be read for another model of the run.
    others = {name for name in pin.columns if pin.table.name_column(name) not in read}
    columns = [name for name in pin.columns if name not in others]
    return [columns, {name: kind for name, kind in pin.partitions.items() if name not in others}, files]


def digest_shape(model: ModelPin, contract: Contract, options: BatchOptions) -> str:
    """Return the digest of all that decides predictions but the source and the machine: 32 hexadecimal digits."""
    told: list[object] = [model.name, model.version, model.digest, contract.model_dump(mode="json")]
    # Parts hold statistics where there is a gate.
    told += [options.key_fields(), options.gate is not None]
    return _digest_json(told)[:32]


def _digest_json(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def run_key(
    model: ModelPin,
    snapshot: Snapshot,
    contract: Contract,
    options: BatchOptions,
    features: Sequence[Snapshot] = (),
    challengers: Sequence[tuple[ModelPin, Contract]] = (),
) -> str:
    """Return the digest of all that decides the output: 32 hexadecimal digits.

    The same call made again over the same models and files has the same key: it is the same run.
    """
    chosen = json.dumps(options.key_fields(), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    # A table's metadata is written again when it changes in other ways than its rows; its version says its types.
    pinned, *others = (
        each.model_dump_json(exclude={"types": True, "iceberg": {"metadata", "named"}})
        for each in (snapshot, *features)
    )
    text = "\n".join([model.digest, pinned, contract.model_dump_json(), chosen, *others])
    if challengers:
        # A run without any has the key that it has had before there were challengers.
        compared = [(pin.uri, pin.digest, given.model_dump_json()) for pin, given in challengers]
        text += f"\n{json.dumps([compared, options.columns_kept])}"
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
    versions: Versions | None = None,
    planned_at: datetime | None = None,
) -> Plan:
    """Cut a dataset into chunks and shards.

    Measured sizes only shape the plan: once it is written, every attempt reads it. Flow runs that score it together
    have slots of their own: what they score twice at the end is a chunk of each, and there are to be many of those.
    """
    versions = versions or Versions()
    sizes = replace(sizes, slots=sizes.slots * options.workers)
    rows_per_chunk = options.rows_per_chunk or sizes.rows_per_chunk or choose_chunk_rows(dataset.rows, sizes)
    # A dataset without rows has one chunk, so that a part without rows says which columns there are.
    chunks = cut_chunks(dataset.snapshot.files, rows_per_chunk, sizes.step, CHUNK_BYTES_MAX) or [Chunk(pieces=())]
    plan = Plan(
        format_version=FORMAT_VERSION,
        key=key,
        run=options.name or key,
        planned_at=planned_at or datetime.now(UTC),
        model=model,
        contract=contract,
        # The address of an index may have a login in it, and a worker that resumes is told its own.
        options=options.model_copy(update={"packages": None}),
        source=source,
        snapshot=dataset.snapshot,
        columns=tuple(used_columns(contract, options, dataset.schema)),
        partitions=dataset.partitions,
        batch_size=sizes.batch_size,
        batch_unit=sizes.batch_unit,
        engine=sizes.engine,
        environment=versions.environment,
        tuning=sizes.tuning,
        row_bytes=sizes.row_bytes,
        rows=dataset.rows,
        empty_schema="" if dataset.rows else pack_schema(dataset.schema),
        rows_per_chunk=rows_per_chunk,
        shape=digest_shape(model, contract, options),
        made_with=versions.made_with,
        shards=cut_shards(chunks, dataset.rows, sizes),
    )
    return plan.model_copy(update={"digest": digest_plan(plan)})


def used_columns(contract: Contract, options: BatchOptions, schema: pa.Schema) -> list[str]:
    """Return the columns to read, in the file's order of use: the model's, then keys and what joins, each once."""
    wanted = [column.name for column in contract.columns] + list(options.copied_columns)
    return [name for name in dict.fromkeys(wanted) if name in schema.names]
