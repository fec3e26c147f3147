"""The memory that a run takes at its peak, and whether it is free: stated before the run starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from serving.errors import PlanTooLarge
from serving.model.contract import TEXT_DTYPES, Output
from serving.option_words import name_option
from tasks.batch.chunk_layout import Chunk
from tasks.batch.options import BatchOptions, Ray
from tasks.batch.plan import Plan

# What mimalloc, Arrow's allocator, keeps of what a slot's three threads have freed until it is purged: fitted to the
# peaks of six to twenty runs over small shapes by a model that takes no time, which kept 40 to 83 MiB. One shape
# kept 16 at most with jemalloc. Asking mimalloc to give it back after each chunk keeps about 20, but takes up to
# 1.8 times the CPU time where the model takes none.
SLOT_BYTES = 66 << 20
# A page of a part ends after so many rows or bytes, whichever are more.
_PAGE_BYTES, _PAGE_ROWS = 1 << 20, 1024
# Of a text that a model puts out, as assumed.
_TEXT_BYTES = 64
# Of a row: its flag three times over, and the offsets of two columns of rejects.
_FLAG_BYTES = 20


def check_memory(plan: Plan, slots: int, options: BatchOptions) -> int:
    """Return the bytes that the run's data takes at its peak; raises PlanTooLarge where they are not to be had."""
    needed = memory_bytes(plan, slots)
    elsewhere = isinstance(options.runner, Ray) and options.runner.address is not None
    allowed = options.memory_mb << 20 if options.memory_mb else None if elsewhere else free_memory()
    if allowed is not None:
        check_fits(needed, allowed, plan, slots)
    return needed


def memory_bytes(plan: Plan, slots: int) -> int:
    """Return what the run's data takes at its peak, over what the process takes idle.

    Counted is what each slot holds where its model is slower than its reader, so that the queue is full:

    - the row group that it reads, as stored, with a page and a dictionary of each column;
    - a decoded block, a copy of what is decoded at once as it grows, and where a chunk has several blocks as much again
      that waits for its successor;
    - the inputs of a block being scored and of one being encoded, which may take a copy; of two more, with their keys,
      where a chunk has several;
    - the keys and predictions of two chunks, one being scored, one being written. The latter's are there once more in
      one piece, and as Parquet: as gathered and as encoded for a page, compressed, and in the file;
    - SLOT_BYTES for what the allocators of its three threads keep.

    Measured over the shapes of tests/benchmarks/memory.py by a fast model, what is used is within 20 % of this, or
    32 MiB a slot where that is more. By a slow model alone it was 48 to 99 %: the allocator then has time to purge, and
    slots seldom read at once. What the model itself takes for a pass is not counted.

    Nor is what copying takes before: text and Arrow go in bounded blocks, but of an Iceberg table with deletes the used
    columns of one data file are in memory at once.
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
    at_once = plan.rows_decoded_at_once(chunk)
    # The queue has two places, one of which the turn of a chunk takes: one of a single block has none waiting.
    waiting = at_once * decoded + rows * 2 * (inputs + keys) if rows < chunk.rows else 0
    return (rows + at_once) * decoded + rows * 3 * inputs + waiting


def _out_bytes(plan: Plan, chunk: Chunk) -> float:
    sizes = [plan.piece_bytes(piece) for piece in chunk.pieces]
    keys, encoded = sum(size.keys for size in sizes), sum(size.keys_encoded for size in sizes)
    in_one_piece = keys if plan.rows_decoded_at_once(chunk) < chunk.rows or len(chunk.pieces) > 1 else 0
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
            f"{needed >> 20} MiB. Lower {name_option('rows_per_chunk')} or {name_option('slots')}, or raise "
            f"{name_option('memory_mb')}."
        )
        raise PlanTooLarge(message)


def free_memory(read: Callable[[Path], str] = Path.read_text) -> int | None:
    """Return the bytes that this process may still take: what is available, within its cgroup.

    None where the system does not say (macOS).
    """
    try:
        lines = dict(line.split(":", 1) for line in read(Path("/proc/meminfo")).splitlines())
    except OSError:
        return None
    available = int(lines["MemAvailable"].split()[0]) << 10
    try:
        limit, used = (read(Path("/sys/fs/cgroup") / name).strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return available
    return available if limit == "max" else min(available, int(limit) - int(used))
