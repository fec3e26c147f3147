"""The layout of a plan: row groups cut into chunks, and chunks into shards, by rows, bytes and time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from serving.model.contract import Frozen
from serving.model.encoding import BatchUnit
from serving.model.interface import Engine
from serving.model.tuner import Tuning
from tasks.batch.dataset import SourceFile

CHUNK_SECONDS_MAX = 10.0
CHUNK_BYTES_MAX = 64 << 20
# Measured: below, threads spend their time handing blocks over; above, only memory grows.
BLOCK_BYTES = 8 << 20
CHUNKS_PER_SLOT_MIN = 8
SHARD_SECONDS = 60.0
SHARDS_PER_SLOT_MIN = 2
SHARDS_MAX = 1000
# Averages of row groups differ a little; only rows that are larger than that get blocks of their own size.
ROW_BYTES_OFF = 1.25


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


def block_rows(step: int, row_bytes: float) -> int:
    """Return the rows of a block: batches of `step` rows that together stay near 8 MiB."""
    return step * max(1, int(BLOCK_BYTES / max(row_bytes, 1) / step))


def batch_step(batch_size: int, batch_unit: BatchUnit) -> int:
    """Return the rows of a batch; one where it counts tokens, since its rows are then any of the block."""
    return batch_size if batch_unit == "rows" else 1
