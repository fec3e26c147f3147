"""The memory that a run takes at its peak, and whether it is free: stated before the run starts."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from serving.errors import PlanTooLarge
from serving.model.contract import Contract, Output
from serving.model.interface import Model, SlotMemory
from serving.option_words import name_option
from tasks.batch.as_of_join import HELD_BYTES
from tasks.batch.chunk_layout import BLOCK_BYTES, Chunk
from tasks.batch.feature_pins import FeaturePin, choose_joined_rows, count_joined_bytes
from tasks.batch.options import BatchOptions, Ray
from tasks.batch.plan import Plan

# What Arrow's allocator keeps of what a slot's three threads have freed until it is given back: fitted to the peaks of
# six runs over small shapes by a model that takes no time. With mimalloc it was 66 MiB.
SLOT_BYTES = 48 << 20
# For how long jemalloc keeps freed memory to use it again. With Arrow's own 1,000 ms, rows of 200 columns took 2.4
# times the memory that is stated; with 100 ms they take what they took with mimalloc.
_DECAY_MS = 100
# A page of a part ends after so many rows or bytes, whichever are more.
_PAGE_BYTES, _PAGE_ROWS = 1 << 20, 1024
# Of a text that a model puts out, as assumed.
_TEXT_BYTES = 64
# Of a row of a table that is kept: where it is, as keys and times are sorted.
_SORTED_ROW_BYTES = 64
# Of a row: its flag three times over, and the offsets of two columns of rejects.
_FLAG_BYTES = 20


def use_jemalloc() -> None:
    """Have Arrow take memory from jemalloc in this process, where it has it and the environment names no other.

    mimalloc, which is Arrow's choice, gives freed memory back after 10 ms, so that each block is read into fresh pages:
    on virtual machines their first touch can take longer than the decoding of what goes into them.
    """
    if "jemalloc" in pa.supported_memory_backends() and "ARROW_DEFAULT_MEMORY_POOL" not in os.environ:
        pa.jemalloc_set_decay_ms(_DECAY_MS)
        pa.set_memory_pool(pa.jemalloc_memory_pool())


def check_memory(plan: Plan, slots: int, options: BatchOptions, models: Sequence[Model | None] = ()) -> int:
    """Return the bytes that the run's data, and what its models have for each slot, take at their peak.

    Args:
        plan: The plan.
        slots: The slots of all processes together.
        options: What limits the memory.
        models: The model of the run, then its challengers, None in the place of one that was given up.

    Raises:
        PlanTooLarge: where the bytes are not to be had.
    """
    processes = slots if isinstance(options.runner, Ray) else 1
    needed = memory_bytes(plan, slots) + feature_bytes(plan, slots, processes)
    batch_sizes = (plan.batch_size, *(each.batch_size for each in plan.challengers))
    for model, batch_size in zip(models, batch_sizes, strict=False):
        needed += model.count_slot_bytes(slots, batch_size) if isinstance(model, SlotMemory) else 0
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
    - for each challenger its predictions, its inputs where they are others, and the columns that are read for it alone;
    - SLOT_BYTES for what the allocators of its three threads keep.

    Measured over the shapes of tests/benchmarks/memory.py by a fast model, what is used is within 20 % of this, or
    32 MiB a slot where that is more. By a slow model alone it was 48 to 99 %: the allocator then has time to purge, and
    slots seldom read at once. What the model itself takes for a pass is not counted.

    Nor is what copying takes before: text and Arrow go in bounded blocks, but of an Iceberg table with deletes the used
    columns of one data file are in memory at once.
    """
    if not plan.rows:
        return slots * SLOT_BYTES
    chunks = plan.chunks.values()
    needed = max(_block_bytes(plan, chunk) + _out_bytes(plan, chunk) for chunk in chunks)
    reading = max(plan.piece_bytes(piece).reading for chunk in chunks for piece in chunk.pieces) + plan.beside_reading
    return int(slots * (needed + reading + SLOT_BYTES))


def feature_bytes(plan: Plan, slots: int, processes: int = 1) -> int:
    """Return what joining features takes at its peak: 0 of a plan without.

    Counted is what each process takes to sort the tables that it keeps, and what each slot takes for the rows that it
    joins at once; of a table that is read from files also a row group as stored, blocks as they are decoded and
    prepared, and rows that are held for the join.
    """
    if not plan.features:
        return 0
    rows = choose_joined_rows(plan.features, max(chunk.rows for chunk in plan.chunks.values()))
    kept = sum(3 * pin.decoded_bytes + pin.rows * _SORTED_ROW_BYTES for pin in plan.features if pin.is_kept)
    reading = max((_reading_bytes(pin) for pin in plan.features if not pin.is_kept), default=0)
    return int(processes * kept + slots * (rows * count_joined_bytes(plan.features) + reading))


def _reading_bytes(pin: FeaturePin) -> int:
    stored = max(sizes.reading for file in pin.snapshot.files for sizes, _ in file.sized_groups)
    return 2 * HELD_BYTES + 4 * BLOCK_BYTES + stored


def _block_bytes(plan: Plan, chunk: Chunk) -> float:
    rows = plan.block_rows(chunk)
    sizes = [(plan.piece_bytes(piece), piece.rows) for piece in chunk.pieces]
    decoded, keys = max(each.decoded / n for each, n in sizes), max(each.keys / n for each, n in sizes)
    decoded += plan.beside_bytes
    inputs = sum(contract.row_bytes() for contract in _list_encoded(plan))
    at_once = plan.rows_decoded_at_once(chunk)
    # The queue has two places, one of which the turn of a chunk takes: one of a single block has none waiting.
    waiting = at_once * decoded + rows * 2 * (inputs + keys) if rows < chunk.rows else 0
    return (rows + at_once) * decoded + rows * 3 * inputs + waiting


def _out_bytes(plan: Plan, chunk: Chunk) -> float:
    sizes = [plan.piece_bytes(piece) for piece in chunk.pieces]
    keys, encoded = sum(size.keys for size in sizes), sum(size.keys_encoded for size in sizes)
    in_one_piece = keys if plan.rows_decoded_at_once(chunk) < chunk.rows or len(chunk.pieces) > 1 else 0
    page = min(encoded, max(_PAGE_BYTES, _PAGE_ROWS * encoded / chunk.rows))
    contracts = _list_contracts(plan)
    answers = sum(output.width * _value_bytes(output) for contract in contracts for output in contract.outputs)
    # What is kept for challengers is held as keys are. Parts are written one after the other.
    kept = 4 * plan.beside_bytes if plan.columns_kept else 0.0
    of_rows = chunk.rows * (_FLAG_BYTES * len(contracts) + 6 * answers + kept)
    return 2 * keys + in_one_piece + 2 * page + 2 * encoded + of_rows


def _list_encoded(plan: Plan) -> list[Contract]:
    """Return the contract of each model, without the inputs that one before it has too: those are encoded once."""
    contracts = _list_contracts(plan)
    before = [{each.inputs for each in contracts[:at]} for at in range(len(contracts))]
    return [
        each.model_copy(update={"inputs": ()}) if each.inputs in seen else each
        for each, seen in zip(contracts, before, strict=True)
    ]


def _list_contracts(plan: Plan) -> list[Contract]:
    """Return the contract of each model that scores the rows of a plan."""
    return [plan.contract, *(each.contract for each in plan.challengers)]


def _value_bytes(output: Output) -> int:
    return _TEXT_BYTES if output.has_objects else np.dtype(output.dtype).itemsize


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
