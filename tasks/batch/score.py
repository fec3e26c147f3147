"""Score the chunks of a plan: one slot a thread, reading ahead and writing behind the forward pass.

Workers do not talk to each other. Each takes shards in an order of its own, leaves a shard that
another is at, and at the end helps from the tails of what is left. An existing part ends all doubt.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from serving.encode import Encoded, Flags, encode
from serving.errors import SourceFault, TooManyRejects
from serving.forward import Forward, Predictions
from serving.model import Model
from tasks.batch.batches import ahead, open_reader
from tasks.batch.parts import ChunkId, Reasons, count_reasons, encode_part, key_names, list_parts, part_path
from tasks.batch.plan import Plan
from tasks.storage import Storage

STAGES = ("read", "encode", "forward", "write")

_BLOCKS_AHEAD = 2
_PATIENCE_MIN, _PATIENCE_MAX = 0.2, 30.0


@dataclass(slots=True, kw_only=True)
class Scored:
    """What scoring came to: rows, rejects, faults of the source by chunk, seconds by stage over all slots."""

    rows: int = 0
    rows_recomputed: int = 0
    chunks: int = 0
    rejects: Reasons = field(default_factory=Counter)
    faults: dict[ChunkId, SourceFault] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    def add(self, other: Scored) -> None:
        """Add what another slot has done."""
        self.rows += other.rows
        self.rows_recomputed += other.rows_recomputed
        self.chunks += other.chunks
        self.rejects += other.rejects
        self.faults |= other.faults
        self.seconds = {stage: self.seconds[stage] + other.seconds[stage] for stage in STAGES}

    @contextmanager
    def timed(self, stage: str) -> Generator[None]:
        """Count the seconds of a block of code towards a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - start


@dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    encoded: Encoded
    keys: pa.Table


@dataclass(slots=True, kw_only=True)
class _Open:
    """The chunk in hand: its blocks scored so far."""

    chunk: ChunkId
    keys: list[pa.Table] = field(default_factory=list)
    predictions: list[Predictions] = field(default_factory=list)
    flags: list[Flags] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)


class Scorer:
    """Scores shards of one plan for one process; its methods may be called from many threads at once."""

    def __init__(self, *, plan: Plan, destination: Storage, model: Model, max_reject_fraction: float) -> None:
        self._plan, self._destination, self._model = plan, destination, model
        self._max_reject_fraction = max_reject_fraction
        self._chunks = plan.chunks
        self._random = random.Random()  # noqa: S311 - spreads workers over shards; nothing depends on its values
        self._lock = threading.Lock()
        self._known: set[ChunkId] = set()
        self._claimed: set[ChunkId] = set()
        self._faulted: set[ChunkId] = set()
        self._left: set[int] = set()
        self._waiting: set[int] = set()
        self._rejects = 0
        self._chunk_seconds: list[float] = []
        self.stop = threading.Event()

    def begin(self) -> list[int]:
        """Begin a pass over what is missing: return its shards, in an order of this worker's own."""
        with self._lock:
            self._known = set(list_parts(self._destination, self._plan.run))
            self._claimed, self._left = set(), set()
            self._waiting = {shard for shard, _ in self._missing(self._known)}
            shards = sorted(self._waiting)
        self._random.shuffle(shards)
        return shards

    def _missing(self, parts: set[ChunkId]) -> set[ChunkId]:
        return set(self._chunks) - parts - self._faulted

    def score_shard(self, shard: int) -> Scored:
        """Score what is missing of a shard, then help with what is left of the others.

        Runs one slot in the calling thread. Source faults are collected, not raised; whatever else is
        raised stops the other slots too.
        """
        done = Scored()
        forward = Forward(self._model, self._plan.contract, self._plan.batch_size)
        try:
            with self._model.slot(), ThreadPoolExecutor(1, thread_name_prefix="write-behind") as writer:
                self._score(self._work(shard, done), forward, writer, done)
        except BaseException:
            self.stop.set()
            raise
        return done

    def _score(
        self, work: Generator[ChunkId | _Block], forward: Forward, writer: ThreadPoolExecutor, done: Scored
    ) -> None:
        held: _Open | None = None
        writing: Future[None] | None = None
        for item in ahead(work, _BLOCKS_AHEAD):
            if isinstance(item, tuple):
                writing = self._hand_over(held, forward, writer, writing, done)
                held = _Open(chunk=item)
            elif held is not None:
                with done.timed("forward"):
                    held.predictions.append(forward.score(item.encoded))
                held.keys.append(item.keys)
                held.flags.append(item.encoded.flags)
            if self.stop.is_set():
                return
        writing = self._hand_over(held, forward, writer, writing, done)
        if writing is not None:
            writing.result()

    def _hand_over(
        self,
        held: _Open | None,
        forward: Forward,
        writer: ThreadPoolExecutor,
        writing: Future[None] | None,
        done: Scored,
    ) -> Future[None] | None:
        """Give a finished chunk to the writer, after the one before it is durable."""
        if writing is not None:
            writing.result()
        if held is None or sum(len(flags.code_N) for flags in held.flags) < self._chunks[held.chunk].rows:
            return None
        return writer.submit(self._write, held, forward.batch_size_safe or self._plan.batch_size, done)

    def _write(self, held: _Open, batch_size: int, done: Scored) -> None:
        with done.timed("write"):
            flags = Flags.joined(held.flags)
            predictions = {name: np.concatenate([p[name] for p in held.predictions]) for name in held.predictions[0]}
            data = encode_part(self._plan, pa.concat_tables(held.keys), predictions, flags, batch_size)
            won = self._destination.put_new(part_path(self._plan.run, held.chunk), data)
        rows = len(flags.code_N)
        done.rows += rows
        done.chunks += 1
        rejects = count_reasons(flags)
        if won:
            done.rejects += rejects
        else:
            done.rows_recomputed += rows
        with self._lock:
            self._chunk_seconds.append(time.perf_counter() - held.started)
            self._rejects += rejects.total() if won else 0
            if not won:
                self._left.add(held.chunk[0])
        check_rejects(self._rejects, self._plan.rows, self._max_reject_fraction)

    def _work(self, shard: int, done: Scored) -> Generator[ChunkId | _Block]:
        """Yield each chunk's id, then its blocks; runs in the read-ahead thread."""
        reader = open_reader(self._plan)
        keys = key_names(self._plan.options)
        for chunk in self._order(shard):
            yield chunk
            try:
                blocks = reader.blocks(self._chunks[chunk])
                while True:
                    with done.timed("read"):
                        table = next(blocks, None)
                    if table is None:
                        break
                    with done.timed("encode"):
                        block = _Block(encoded=encode(self._plan.contract, table), keys=table.select(keys))
                    yield block
            except SourceFault as fault:
                reader = open_reader(self._plan)
                with self._lock:
                    self._faulted.add(chunk)
                done.faults[chunk] = fault

    def _order(self, shard: int) -> Generator[ChunkId]:
        """Yield the chunks for one slot: its own shard's, unless another worker is at it; then what is left."""
        with self._lock:
            self._waiting.discard(shard)
        if shard not in self._foreign():
            for at in range(len(self._plan.shards[shard])):
                if self.stop.is_set() or shard in self._left:
                    break
                if self._claim((shard, at)):
                    yield shard, at
        while not self.stop.is_set() and not self._waiting:
            chunk = self._tail()
            if chunk is None:
                return
            if self._claim(chunk):
                yield chunk

    def _claim(self, chunk: ChunkId) -> bool:
        """Claim a chunk among this process's slots; False where it is claimed or has its part."""
        with self._lock:
            if chunk in self._claimed or chunk in self._known:
                return False
            self._claimed.add(chunk)
        return not self._destination.exists(part_path(self._plan.run, chunk))

    def _tail(self) -> ChunkId | None:
        """Return the last missing chunk of some shard that no slot of this process has in hand.

        A shard's only missing chunk is probably in another worker's hands: it gets the time that a
        chunk takes before it is scored here too.
        """
        waited: set[ChunkId] = set()
        while not self.stop.is_set():
            left = self._missing(set(list_parts(self._destination, self._plan.run))) - self._claimed
            if not left:
                return None
            shard = self._random.choice(sorted({shard for shard, _ in left}))
            tail = max(chunk for chunk in left if chunk[0] == shard)
            if tail in waited or sum(chunk[0] == shard for chunk in left) > 1 or tail[0] not in self._foreign():
                return tail
            waited.add(tail)
            self._wait_for(tail)
        return None

    def _foreign(self) -> set[int]:
        """Return the shards that other workers have written to since this one began."""
        parts = set(list_parts(self._destination, self._plan.run))
        return {shard for shard, _ in parts - self._known - self._claimed} | self._left

    def _wait_for(self, chunk: ChunkId) -> None:
        taken = sorted(self._chunk_seconds)
        patience = min(max(1.5 * taken[len(taken) // 2] if taken else 1.0, _PATIENCE_MIN), _PATIENCE_MAX)
        until = time.monotonic() + patience
        while time.monotonic() < until and not self.stop.is_set():
            if self._destination.exists(part_path(self._plan.run, chunk)):
                return
            self.stop.wait(patience / 10)


def check_rejects(rejects: int, rows: int, fraction_max: float) -> None:
    """Raise TooManyRejects where the rejects so far are more than the fraction of all rows allows."""
    if rejects > fraction_max * rows:
        message = (
            f"At most {fraction_max:.4g} of {rows:,} rows may be rejects, got {rejects:,} so far; nothing is "
            "published. See why with open_rejects(destination, run=...), mend the data, or raise max_reject_fraction "
            "and call again."
        )
        raise TooManyRejects(message)
