"""What the footer of a part says: what it is made of, its rows and rejects, and their statistics."""

from __future__ import annotations

import functools
import json
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from serving.errors import SourceChanged
from serving.model.encoding import Flags
from tasks.batch.chunk_layout import Chunk
from tasks.batch.column_statistics import TableStatistics, unpack_statistics
from tasks.batch.part_digest import PART_DIGEST
from tasks.batch.plan import Plan, digest_chunk
from tasks.batch.run_records import check_format_version
from tasks.storage import Entry, Storage

_FORMAT_VERSION_KEY = "overnight.format_version"
CHUNK_DIGEST, STATISTICS = "overnight.chunk_digest", "overnight.statistics"

Reasons = Counter[tuple[str, str]]


def make_part_metadata(
    plan: Plan, chunk: Chunk | None, keys: pa.Table, flags: Flags, batch_size: int
) -> dict[str, str]:
    """Return what the footer of a part says of it, each text by its name."""
    counts = count_reasons(flags)
    return {
        _FORMAT_VERSION_KEY: str(plan.format_version),
        **_identity(plan, chunk),
        "overnight.model": plan.model.name,
        "overnight.model_version": plan.model.version,
        "overnight.model_digest": plan.model.digest,
        "overnight.batch_size": str(batch_size),
        "overnight.rejects": json.dumps(sorted([*pair, count] for pair, count in counts.items())),
        "overnight.rows_key_null": str(count_null_keys(keys)),
    }


def _identity(plan: Plan, chunk: Chunk | None) -> dict[str, str]:
    """Return what a part says of what it is made of; one of format version 1 also of the plan that it was made for."""
    if chunk is None:
        return {"overnight.run_key": plan.key}
    made_of = {CHUNK_DIGEST: digest_chunk(plan, chunk)}
    if plan.has_content_parts:
        return made_of
    return {"overnight.run_key": plan.key, "overnight.plan_digest": plan.digest, **made_of}


def is_part_of(metadata: pq.FileMetaData, plan: Plan, chunk: Chunk | None) -> bool:
    """Return whether a part says that it is made of what this chunk of the plan is."""
    told = metadata.metadata or {}
    return all(told.get(name.encode()) == value.encode() for name, value in _identity(plan, chunk).items())


def count_null_keys(keys: pa.Table) -> int:
    """Return how many rows hold a null in one of their keys."""
    nulls = [column.is_null() for column in keys.columns if column.null_count]
    return int(pc.sum(functools.reduce(pc.or_, nulls)).as_py()) if nulls else 0


def count_reasons(flags: Flags) -> Reasons:
    """Return how many rows were rejected for which column and reason."""
    counts = np.bincount(flags.code_N, minlength=len(flags.reasons) + 1)[1:]
    return Counter({pair: int(count) for pair, count in zip(flags.reasons, counts, strict=True) if count})


@dataclass(frozen=True, slots=True, kw_only=True)
class PartFooter:
    """What the footer of a part says: its rows, its bytes, its rejects, and its rows whose key holds a null.

    `chunk` is the digest of what it is made of, empty for a part of a stream's table. `digest` is that of its bytes,
    empty for a part of an earlier release.
    """

    path: str
    chunk: str
    digest: str
    rows: int
    bytes: int
    rejects: Reasons
    rows_key_null: int


def read_footer(storage: Storage, plan: Plan, chunk: Chunk, entry: Entry) -> PartFooter | None:
    """Read the footer of a part; None where it can't be read, lacks rows or a digest, or is of another plan or chunk.

    Raises FormatTooNew where a newer Overnight has written it.
    """
    try:
        with storage.open_pinned(entry) as stream:
            metadata = pq.read_metadata(stream)
        _check_part_version(metadata, storage.address(entry.path))
        if metadata.num_rows != chunk.rows or not is_part_of(metadata, plan, chunk):
            return None
        footer = parse_footer(entry, metadata)
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError, SourceChanged):
        return None
    # Parts that bear a run, and not what they are made of, are of a release before there were digests.
    return footer if footer.digest or not plan.has_content_parts else None


def parse_footer(entry: Entry, metadata: pq.FileMetaData) -> PartFooter:
    """Return what the metadata of a part's Parquet file says of it. Raises FormatTooNew."""
    _check_part_version(metadata, entry.path)
    told = metadata.metadata
    rejects = Counter({(column, reason): count for column, reason, count in json.loads(told[b"overnight.rejects"])})
    return PartFooter(
        path=entry.path,
        chunk=told.get(CHUNK_DIGEST.encode(), b"").decode(),
        digest=told.get(PART_DIGEST.encode(), b"").decode(),
        rows=metadata.num_rows,
        bytes=entry.size,
        rejects=rejects,
        rows_key_null=int(told.get(b"overnight.rows_key_null", 0)),
    )


def read_part_statistics(storage: Storage, entry: Entry) -> TableStatistics | None:
    """Return the statistics that a part holds, None where it has none or can't be read."""
    try:
        with storage.open_pinned(entry) as stream:
            told = pq.read_metadata(stream).metadata or {}
    except (pa.ArrowException, OSError, ValueError, SourceChanged):
        return None
    text = told.get(STATISTICS.encode())
    return None if text is None else unpack_statistics(text.decode(), storage.address(entry.path))


def _check_part_version(metadata: pq.FileMetaData, address: str) -> None:
    version = (metadata.metadata or {}).get(_FORMAT_VERSION_KEY.encode(), b"")
    check_format_version(int(version) if version.isdigit() else None, address)
