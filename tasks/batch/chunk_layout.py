"""The layout of a plan: row groups cut into chunks, and chunks into shards, by rows, bytes and time."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
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
# The plan of so many chunks takes some 30 MB as JSON and 350 MiB in memory; each chunk costs an object.
CHUNKS_MAX = 100_000
# So long a chunk may take in a run that would else have more of them: clouds give two minutes' notice.
CHUNK_SECONDS_LARGE = 100.0
# Names of parts have five digits for the shard, and are listed in their order.
_SHARDS_NAMED = 99_999
# A chunk of less than this part of its rows, or of so few, does not end with a file before it is full.
_LEAST_OF_CHUNK, _LEAST_ROWS = 8, 1024
# Of files that are smaller, one in so many ends a chunk.
_FILES_PER_END = 4
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

    The rate is None where nothing needed to be measured, the tuning where none was made. `rows_per_pass` is how many
    rows a batch of tokens has on average, 0 where batches count rows. `rows_per_chunk` is that of an earlier run whose
    boundaries are kept.
    """

    batch_size: int
    slots: int
    row_bytes: float
    rows_per_second: float | None
    engine: Engine = field(default_factory=Engine)
    tuning: Tuning | None = None
    batch_unit: BatchUnit = "rows"
    rows_per_pass: float = 0.0
    rows_per_chunk: int | None = None

    @property
    def step(self) -> int:
        """How many rows the edges of chunks are multiples of, where they can be."""
        return batch_step(self.batch_size, self.batch_unit)


def choose_chunk_rows(rows: int, sizes: Sizes) -> int:
    """Return the rows of a chunk: min(10 s of work, 64 MiB decoded, 1/8 of a slot's rows).

    A model that takes longer for a batch of tokens, as one that generates text does, gets chunks of that batch. Rounded
    down to a batch times a power of two, so that only the last batch of a piece is short. Where a run of that
    would have more than 100,000 chunks they take up to 100 s, as far as bytes and slots allow.
    """
    of_bytes, of_slots = CHUNK_BYTES_MAX / max(sizes.row_bytes, 1), rows / (sizes.slots * CHUNKS_PER_SLOT_MIN)
    of_time = CHUNK_SECONDS_MAX * sizes.rows_per_second if sizes.rows_per_second else math.inf
    if of_time < sizes.rows_per_pass:
        # The next power of two, since half a batch is far slower.
        of_time = 2.0 ** math.ceil(math.log2(sizes.rows_per_pass))
    power = _floor_power(min(of_time, of_bytes, of_slots), sizes.step)
    if rows > CHUNKS_MAX * sizes.step * 2**power:
        enough = math.ceil(math.log2(rows / CHUNKS_MAX / sizes.step))
        longer = of_time * CHUNK_SECONDS_LARGE / CHUNK_SECONDS_MAX
        power = max(power, min(enough, _floor_power(min(longer, of_bytes, of_slots), sizes.step)))
    return int(sizes.step * 2**power)


def _floor_power(rows: float, step: int) -> int:
    return math.floor(math.log2(max(rows, step) / step))


def list_row_groups(files: Sequence[SourceFile]) -> Iterator[Piece]:
    """Yield the row groups of files that have rows, in order, each as one piece."""
    for at, file in enumerate(files):
        for group, rows in enumerate(file.row_groups):
            if rows:
                yield Piece(file=at, row_group=group, row_start=0, row_stop=rows)


def cut_chunks(
    files: Sequence[SourceFile], rows_per_chunk: int, batch_size: int, bytes_per_chunk: float = math.inf
) -> list[Chunk]:
    """Cut files into chunks of whole row groups, or of even slices of one that is larger than a chunk.

    Every row of every file is in exactly one chunk, in the order of the dataset. A row group of more bytes than a chunk
    may have is cut by what its own rows take on average, if need be below a batch.

    A chunk of at least an eighth of its rows, and 1,024, ends with a file that has so many, and with one in four of
    others, as their marks say. Chunks depend so on the files near them alone: where a file is added, changed or
    removed, those of others stay as they are.
    """
    chunks: list[Chunk] = []
    least = _find_least(sum(sum(file.row_groups) for file in files), rows_per_chunk)
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
        if held_rows >= least and (sum(file.row_groups) >= least or _ends_chunk(file)):
            chunks.append(Chunk(pieces=tuple(held)))
            held, held_rows, held_bytes = [], 0, 0
    if held:
        chunks.append(Chunk(pieces=tuple(held)))
    return chunks


def _find_least(rows: int, rows_per_chunk: int) -> float:
    """Return the rows from which on a chunk may end with a file: an eighth of its rows, or more in a large run."""
    least = min(max(rows_per_chunk / _LEAST_OF_CHUNK, _LEAST_ROWS), rows_per_chunk)
    while least < rows_per_chunk and rows > least * CHUNKS_MAX:
        least *= 2
    return least


def _ends_chunk(file: SourceFile) -> bool:
    return hashlib.blake2b(file.mark.encode(), digest_size=1).digest()[0] % _FILES_PER_END == 0


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
    """Cut chunks into runs of about 60 s of work: at most 1,000 a run, or two a slot where that is more."""
    seconds = rows / sizes.rows_per_second if sizes.rows_per_second else len(chunks) * CHUNK_SECONDS_MAX / 2
    least = SHARDS_PER_SLOT_MIN * sizes.slots if sizes.slots > 1 else 1
    count = min(max(least, min(math.ceil(seconds / SHARD_SECONDS), SHARDS_MAX)), len(chunks), _SHARDS_NAMED)
    edges = [len(chunks) * at // count for at in range(count + 1)]
    return tuple(tuple(chunks[start:stop]) for start, stop in itertools.pairwise(edges))


def block_rows(step: int, row_bytes: float) -> int:
    """Return the rows of a block: batches of `step` rows that together stay near 8 MiB."""
    return step * max(1, int(BLOCK_BYTES / max(row_bytes, 1) / step))


def batch_step(batch_size: int, batch_unit: BatchUnit) -> int:
    """Return the rows of a batch; one where it counts tokens, since its rows are then any of the block."""
    return batch_size if batch_unit == "rows" else 1
