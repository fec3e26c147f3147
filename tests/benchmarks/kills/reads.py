"""What a process has read, from the kernel's log of its calls, held against what was left for it to read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from tasks.batch.parts import ChunkId
from tasks.batch.plan import Plan
from tasks.storage import Storage

# The calls that open or read a file, or map it; `?` passes over those that a machine does not have.
TRACED = "?open,openat,read,pread64,readv,preadv,preadv2,mmap,sendfile,copy_file_range"
_CALL = re.compile(
    r"(?P<at>\d+\.\d+) (?P<call>\w+)\((?P<given>.*)\) += (?P<got>-?\d+|0x[0-9a-f]+)(?:<(?P<path>.*?)>)?(?: |$)"
)
_FILE = re.compile(r"\d+<(?P<path>[^>]*)>")


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """Bytes read of a file or object, or with none of them its opening; where they start, if that is known."""

    address: str
    start: int | None
    size: int
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """Bytes [start, stop) of a file."""

    start: int
    stop: int

    def overlap(self, read: Read) -> int:
        """Return how many of a read's bytes lie in it; all of those whose place is not known."""
        if read.start is None:
            return read.size
        return max(0, min(self.stop, read.start + read.size) - max(self.start, read.start))


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A source file as a resume finds it: its footer's begin, row groups that are finished, and bytes of rows left.

    A row group that is cut into several chunks counts by its rows: `bytes_remaining` is their share of it.
    """

    footer: int
    finished: tuple[Range, ...]
    bytes_remaining: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """What a resume has read of the source and of the parts, in bytes, and what it opened that was finished."""

    bytes_remaining: int
    bytes_read: int
    bytes_read_of_footers: int
    bytes_read_of_finished_rows: int
    finished_files_opened: int
    finished_parts_opened_before_publishing: int
    bytes_read_of_parts_in_publishing: int

    @property
    def read_over_remaining(self) -> float:
        """Bytes of the source that were read, footers apart, over those of the rows that were left."""
        return (self.bytes_read - self.bytes_read_of_footers) / self.bytes_remaining


def tally(
    reads: Iterable[Read], layouts: Mapping[str, Layout], finished_parts: Sequence[str], publishing: float
) -> Tally:
    """Sort reads by what they are of: source files by their layout, and finished parts by their addresses."""
    parts = set(finished_parts)
    of_source = [read for read in reads if read.address in layouts]
    of_parts = [read for read in reads if read.address in parts]
    # Arrow looks for a footer in the last 64 KiB: a read that reaches it is for it, whatever rows come along.
    of_footers = [read for read in of_source if _reaches(read, layouts[read.address].footer)]
    of_rows = [read for read in of_source if not _reaches(read, layouts[read.address].footer)]
    finished = sum(range_.overlap(read) for read in of_rows for range_ in layouts[read.address].finished)
    opened = {read.address for read in of_source if not layouts[read.address].bytes_remaining}
    return Tally(
        bytes_remaining=sum(layout.bytes_remaining for layout in layouts.values()),
        bytes_read=sum(read.size for read in of_source),
        bytes_read_of_footers=sum(read.size for read in of_footers),
        bytes_read_of_finished_rows=finished,
        finished_files_opened=len(opened),
        finished_parts_opened_before_publishing=len({read.address for read in of_parts if read.at < publishing}),
        bytes_read_of_parts_in_publishing=sum(read.size for read in of_parts if read.at >= publishing),
    )


def _reaches(read: Read, footer: int) -> bool:
    return read.start is not None and read.start + read.size > footer


def lay_out(plan: Plan, source: Storage, done: Iterable[ChunkId]) -> dict[str, Layout]:
    """Return the layout of every source file of a plan, by address, for a resume that finds these chunks done."""
    finished = set(done)
    left: dict[tuple[int, int], int] = {}
    for chunk_id, chunk in plan.chunks.items():
        for piece in chunk.pieces if chunk_id not in finished else ():
            left[piece.file, piece.row_group] = left.get((piece.file, piece.row_group), 0) + piece.rows
    layouts = {}
    for at, file in enumerate(plan.snapshot.files):
        with source.open_pinned(file.entry) as stream:
            metadata = pq.read_metadata(stream)
        groups = [_group(metadata.row_group(group), set(plan.columns)) for group in range(metadata.num_row_groups)]
        remaining = 0.0
        for group, rows in enumerate(file.row_groups):
            range_ = groups[group]
            remaining += (range_.stop - range_.start) * left.get((at, group), 0) / max(rows, 1)
        layouts[source.address(file.path)] = Layout(
            # The footer ends in its own length and four letters.
            footer=file.size - metadata.serialized_size - 8,
            finished=tuple(range_ for group, range_ in enumerate(groups) if (at, group) not in left),
            bytes_remaining=int(remaining),
        )
    return layouts


def _group(group: pq.RowGroupMetaData, columns: set[str]) -> Range:
    """Return the bytes of a row group's columns, which lie side by side where the run reads all of them."""
    found = [group.column(at) for at in range(group.num_columns) if group.column(at).path_in_schema in columns]
    starts = [column.dictionary_page_offset or column.data_page_offset for column in found]
    stops = [start + column.total_compressed_size for start, column in zip(starts, found, strict=True)]
    if sum(stops) - sum(starts) != max(stops) - min(starts):
        message = f"The columns that are read must lie side by side, got {sorted(columns)} with others between."
        raise ValueError(message)
    return Range(start=min(starts), stop=max(stops))


def traced_reads(folder: Path) -> list[Read]:
    """Return what `strace -ff -y -ttt -s 0` has logged of openings and reads, one file a thread."""
    reads = [found for log in folder.iterdir() for line in log.read_text().splitlines() if (found := _traced(line))]
    return sorted(reads, key=lambda read: read.at)


def _traced(line: str) -> Read | None:
    """Read one line of the log; None for calls that failed, or are not of a file."""
    match = _CALL.match(line)
    if match is None or match["got"].startswith("-"):
        return None
    at, call, given = float(match["at"]), match["call"], match["given"]
    if call in ("open", "openat"):
        return Read(address=match["path"], start=None, size=0, at=at)
    files = _FILE.findall(given)
    if not files:
        return None
    if call == "mmap":
        # Whatever is mapped may be read, without another call.
        _, size, *_, start = given.split(", ")
        return Read(address=files[0], start=int(start, 0), size=int(size, 0), at=at)
    start = int(given.rpartition(", ")[2]) if call == "pread64" else None
    # sendfile names the file that it reads second.
    return Read(address=files[call == "sendfile"], start=start, size=int(match["got"]), at=at)
