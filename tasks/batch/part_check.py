"""The check of one part: its bytes are held against their digest, and what its footer says against chunk and plan.

Parts of earlier releases bear no digest of their bytes: their rows are read, and held against the footer.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from serving.errors import FormatTooNew, SourceChanged
from serving.model.contract import Frozen
from tasks.batch.chunk_layout import Chunk
from tasks.batch.dataset import SOURCE_FILE, SOURCE_ROW
from tasks.batch.footer import check_chunk, check_columns
from tasks.batch.manifest import ManifestPart
from tasks.batch.part_digest import PART_DIGEST, read_digests
from tasks.batch.part_footer import CHUNK_DIGEST, STATISTICS, PartFooter, Reasons, count_null_keys, parse_footer
from tasks.batch.parts import REJECT_COLUMN, REJECT_REASON, key_names, name_kept, part_path, stored_type, write_part
from tasks.batch.plan import Plan, digest_chunk
from tasks.storage import Entry, Storage

DamageKind = Literal[
    "manifest",
    "plan",
    "order",
    "table",
    "missing",
    "size",
    "unreadable",
    "identity",
    "rows",
    "schema",
    "rejects",
    "statistics",
    "row order",
    "extra",
    "bytes",
    "challenger",
]
_CHARACTERS_SHOWN = 300
_Problem = tuple[DamageKind, str]
# What a part says of its model, and the field of the pin that it must equal.
_PINNED = {"overnight.model": "name", "overnight.model_version": "version", "overnight.model_digest": "digest"}


class Damage(Frozen):
    """One thing that is not as the run's records say."""

    kind: DamageKind = Field(description="Which promise is broken.")
    path: str = Field(description="The file, below the destination.")
    message: str = Field(description="What must hold, and what arrived.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedPart:
    """A part that the records name: its chunk, None in a stream's table, and what the manifest says of it, if any."""

    path: str
    chunk: Chunk | None
    rows: int | None
    bytes: int | None
    digest: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartCheck:
    """What came of reading one part: its footer and its key columns, None where they could not be read."""

    footer: PartFooter | None
    keys: str | None
    damages: tuple[Damage, ...]


def expect_part(path: str, chunk: Chunk | None, listed: ManifestPart | None) -> ExpectedPart:
    """Return what a part must be: by its chunk, if it has one, and by what a list of parts says of it, if any."""
    if listed is None:
        return ExpectedPart(path=path, chunk=chunk, rows=None, bytes=None)
    return ExpectedPart(path=path, chunk=chunk, rows=listed.rows, bytes=listed.bytes, digest=listed.digest)


def describe_size(expected: int, found: int) -> str:
    """Return in words that a part has another size than it was published with."""
    return f"The part must have the {expected:,} bytes that it was published with, got {found:,}."


class PartReader:
    """Reads the parts of one plan, all of their bytes, and holds each against its chunk."""

    def __init__(self, storage: Storage, plan: Plan) -> None:
        self._storage, self._plan = storage, plan
        self._keys = key_names(plan.options)
        # Parts of challengers alone hold what models are compared by.
        self._kept = [name_kept(column) for column in plan.columns_kept] if plan.place else []
        self._outputs = {
            output.name: stored_type(output.arrow_type, plan.options.output) for output in plan.contract.outputs
        }

    def check(self, part: ExpectedPart, entry: Entry) -> PartCheck:
        """Read a part and return what is damaged about it."""
        size: list[_Problem] = []
        if part.bytes is not None and part.bytes != entry.size:
            size = [("size", describe_size(part.bytes, entry.size))]
        try:
            found = self._read(part, entry)
        except (pa.ArrowException, OSError, ValueError, TypeError, KeyError, SourceChanged, FormatTooNew) as error:
            got = " ".join(f"{type(error).__name__}: {error}".split())[:_CHARACTERS_SHOWN]
            message = f"The part must read as it was written, with its checksums, got {got}"
            return PartCheck(footer=None, keys=None, damages=_name_damages(part, [*size, ("unreadable", message)]))
        return replace(found, damages=_name_damages(part, size) + found.damages)

    def _read(self, part: ExpectedPart, entry: Entry) -> PartCheck:
        with self._storage.open_pinned(entry) as stream:
            data = stream.read()
        borne, found = read_digests(data)
        if borne != found:
            message = (
                f"The part must have the bytes that it was written with, of digest {borne[:12]}, got {found[:12]}."
            )
            return PartCheck(footer=None, keys=None, damages=_name_damages(part, [("bytes", message)]))
        parquet = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        metadata, schema = parquet.metadata, parquet.schema_arrow
        footer = parse_footer(entry, metadata)
        problems = [*self._check_identity(part, metadata), *self._check_rows(part, footer)]
        wrong = self._check_schema(schema)
        problems += wrong
        is_other = part.digest not in ("", borne)
        if is_other:
            got = borne[:12] or "one without a digest"
            problems.append(("bytes", f"The part must be that which was published, {part.digest[:12]}, got {got}."))
        if not wrong and (is_other or not borne):
            # Of others the bytes are those that were written, and so are the rows.
            table = parquet.read(use_threads=False)
            problems += [
                *self._check_rejects(footer, table),
                *self._check_places(part, table),
                *_check_bytes(data, metadata, table),
            ]
        keys = ", ".join(f"{name} ({schema.field(name).type})" for name in self._key_columns(schema))
        return PartCheck(footer=footer, keys=None if wrong else keys, damages=_name_damages(part, problems))

    def _key_columns(self, schema: pa.Schema) -> list[str]:
        """Return the columns of a part that are keys: those before its outputs."""
        others = {*self._outputs, REJECT_COLUMN, REJECT_REASON, *self._kept}
        return [name for name in schema.names if name not in others]

    def _check_identity(self, part: ExpectedPart, metadata: pq.FileMetaData) -> list[_Problem]:
        plan, held = self._plan, metadata.metadata or {}
        # A changed byte in what a part says of itself may be no text.
        told = {key.decode(errors="replace"): value.decode(errors="replace") for key, value in held.items()}
        if part.chunk is not None and plan.has_content_parts:
            return self._check_chunk(part.chunk, told)
        if told.get("overnight.run_key") != plan.key:
            return [("identity", f"It must be a part of the run with key {plan.key}, got one of another run.")]
        if part.chunk is None or not plan.digest:
            # Of a stream's table, or of a release before parts bore digests.
            return []
        if told.get("overnight.plan_digest") != plan.digest:
            got = told.get("overnight.plan_digest", "none")[:12]
            return [("identity", f"It must be a part of plan {plan.digest[:12]}, got one of plan {got}.")]
        return self._check_chunk(part.chunk, told)

    def _check_chunk(self, chunk: Chunk, told: Mapping[str, str]) -> list[_Problem]:
        """Hold what a part says that it is made of against its chunk, and the model that it names against the plan."""
        plan = self._plan
        if told.get(CHUNK_DIGEST) != digest_chunk(plan, chunk):
            whose = self._paths_by_digest.get(told.get(CHUNK_DIGEST, ""), "no chunk of the plan")
            return [("identity", f"It must be the part of its own chunk, got that of {whose}.")]
        others = sorted(name for name, field in _PINNED.items() if told.get(name) != getattr(plan.model, field))
        message = f"It must be scored by the model of the plan, {plan.model.uri}, got another {', '.join(others)}."
        return [("identity", message)] if others else []

    @functools.cached_property
    def _paths_by_digest(self) -> dict[str, str]:
        return {digest_chunk(self._plan, chunk): part_path(self._plan, at) for at, chunk in self._plan.chunks.items()}

    def _check_rows(self, part: ExpectedPart, footer: PartFooter) -> list[_Problem]:
        listed = "challengers.json" if self._plan.place else "the manifest"
        told = {"its chunk": None if part.chunk is None else part.chunk.rows, listed: part.rows}
        return [
            ("rows", f"It must hold the {rows:,} rows that {whose} has, got {footer.rows:,}.")
            for whose, rows in told.items()
            if rows is not None and rows != footer.rows
        ]

    def _check_schema(self, schema: pa.Schema) -> list[_Problem]:
        keys = self._keys if self._plan.shards else self._key_columns(schema)
        names = [*keys, *self._outputs, REJECT_COLUMN, REJECT_REASON, *self._kept]
        if schema.names != names:
            return [("schema", f"Its columns must be {names}, got {schema.names}.")]
        types = self._outputs | {REJECT_COLUMN: pa.string(), REJECT_REASON: pa.string()}
        return [
            ("schema", f"Its column {name!r} must be of type {kind}, got {schema.field(name).type}.")
            for name, kind in types.items()
            if schema.field(name).type != kind
        ]

    def _check_rejects(self, footer: PartFooter, table: pa.Table) -> list[_Problem]:
        reasons, problems = table.column(REJECT_REASON), []
        counted = _count_rejects(table)
        if counted != footer.rejects:
            problems.append(f"Its rejects must be the {dict(footer.rejects)} of its footer, got {dict(counted)}.")
        nulls = count_null_keys(table.select(self._key_columns(table.schema)))
        if self._plan.digest and nulls != footer.rows_key_null:
            problems.append(
                f"Its rows with a null key must be the {footer.rows_key_null:,} of its footer, got {nulls:,}."
            )
        for output in self._plan.contract.outputs:
            name, is_null = output.name, table.column(output.name).is_null()
            both = pc.and_(pc.invert(is_null), reasons.is_valid())
            # A text that a model does not answer may be null without a reason, as an output may that is not required.
            may_be_null = output.dtype == "str" or not output.required
            wrong = both if may_be_null else pc.xor(is_null, reasons.is_valid())
            if rows := pc.sum(wrong).as_py():
                where = "in rejects" if may_be_null else "in rejects and nowhere else"
                problems.append(f"Its column {name!r} must be null {where}, got {rows:,} others.")
        return [("rejects", message) for message in problems]

    def _check_places(self, part: ExpectedPart, table: pa.Table) -> list[_Problem]:
        """Hold the place of each row, where the rows have no keys of the caller's own, against the plan."""
        if part.chunk is None or self._plan.options.key_columns:
            return []
        files = self._plan.snapshot.files
        at = 0
        for piece in part.chunk.pieces:
            file = files[piece.file]
            start = file.origin_row + sum(file.row_groups[: piece.row_group]) + piece.row_start
            names = table.column(SOURCE_FILE).slice(at, piece.rows)
            rows = table.column(SOURCE_ROW).slice(at, piece.rows).to_numpy()
            name = file.origin or file.path
            if names.unique().to_pylist() != [name] or not np.array_equal(rows, np.arange(start, start + piece.rows)):
                last = start + piece.rows - 1
                return [("row order", f"Its rows must be {start:,} to {last:,} of {name}, in order, got others.")]
            at += piece.rows
        return []


def _name_damages(part: ExpectedPart, problems: Sequence[_Problem]) -> tuple[Damage, ...]:
    return tuple(Damage(kind=kind, path=part.path, message=message) for kind, message in problems)


def _count_rejects(table: pa.Table) -> Reasons:
    pairs = table.select([REJECT_COLUMN, REJECT_REASON]).filter(pc.is_valid(table.column(REJECT_REASON)))
    groups = pairs.group_by([REJECT_COLUMN, REJECT_REASON]).aggregate([([], "count_all")]).to_pylist()
    return Counter({(each[REJECT_COLUMN] or "", each[REJECT_REASON]): each["count_all"] for each in groups})


def _check_bytes(data: bytes, metadata: pq.FileMetaData, table: pa.Table) -> list[_Problem]:
    """Hold the bytes of a part of an earlier release against those that its rows are written as, or else its footer.

    Checksums cover the pages of such a part, and nothing covers its footer. The same rows written again by the same
    version of pyarrow are the same bytes; where they are not, the footer must still tell types and ranges of the rows.
    """
    again = write_undigested(metadata, table)
    if again == data:
        return []
    check_columns(metadata, range(metadata.num_columns), len(data))
    fresh = pq.read_metadata(pa.BufferReader(again))
    if (fresh.created_by, fresh.num_row_groups) != (metadata.created_by, metadata.num_row_groups):
        # Another version of the writer may write otherwise.
        return []
    if not metadata.schema.equals(fresh.schema):
        return [("schema", "Its footer must tell the types of its columns as they are written, got others.")]
    return _check_statistics(metadata, fresh)


def write_undigested(metadata: pq.FileMetaData, table: pa.Table) -> memoryview:
    """Return the bytes that a part of these rows has where it bears no digest.

    Args:
        metadata: The metadata of its file.
        table: Its rows, as they are read from it.
    """
    told = dict(table.schema.metadata or {})
    told.pop(PART_DIGEST.encode(), None)
    statistics = told.pop(STATISTICS.encode(), None) or (metadata.metadata or {}).get(STATISTICS.encode(), b"")
    return write_part(table.replace_schema_metadata(told).combine_chunks(), statistics.decode(), bears_digest=False)


def _check_statistics(metadata: pq.FileMetaData, fresh: pq.FileMetaData) -> list[_Problem]:
    """Hold the least and greatest values in a footer, by which readers pass over rows, against those of the rows."""
    wrong = set()
    for group in range(metadata.num_row_groups):
        for at in range(metadata.num_columns):
            column, chunk = metadata.schema.column(at), metadata.row_group(group).column(at)
            check_chunk(chunk, column, metadata.row_group(group).num_rows)
            told, true = chunk.statistics, fresh.row_group(group).column(at).statistics
            # To compare statistics with None ends the process.
            if (told is None) != (true is None) or (told is not None and told != true):
                wrong.add(column.path)
    message = f"Its footer must tell the least and the greatest value of each column, got others of {sorted(wrong)}."
    return [("statistics", message)] if wrong else []
