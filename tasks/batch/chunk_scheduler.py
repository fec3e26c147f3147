"""Which chunk comes next, for one process among many that score the same plan without a coordinator.

Workers do not talk to each other. Each takes shards in an order of its own, leaves a shard that
another one scores, and at the end helps with what is left. Whether a chunk is done is decided by its part alone.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field

from tasks.batch.parts import ChunkId, list_parts, part_path
from tasks.batch.plan import Plan
from tasks.spot.drain import Drain
from tasks.storage import Storage

_PATIENCE_MIN, _PATIENCE_MAX = 0.2, 30.0
_POLL_SECONDS = 0.1
# A worker scores one chunk and has read one or two more.
_CHUNKS_IN_PROGRESS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkClaim:
    """A chunk to score: of the slot's own shard, or one of what is left where the slot helps."""

    chunk: ChunkId
    helping: bool


def _open_writer() -> Executor:
    return ThreadPoolExecutor(1, thread_name_prefix="write-behind")


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """What scoring uses of its machine: time, random numbers and threads. A simulation has its own.

    `clock` counts seconds, `wait` waits for an event at most so many of them, and `random` spreads workers over shards:
    nothing else depends on its values. A slot reads up to `blocks_ahead` blocks ahead in a thread of its own, with 0 in
    that of the slot, and writes parts by a `writer` of its own.
    """

    clock: Callable[[], float] = time.monotonic
    wait: Callable[[threading.Event, float], bool] = threading.Event.wait
    random: random.Random = field(default_factory=random.Random)
    blocks_ahead: int = 2
    writer: Callable[[], Executor] = _open_writer


class ChunkScheduler:
    """What this process has taken of a plan; its methods may be called from many threads at once.

    One that has `joined` knows that another worker is there, before it sees that one write: to begin with it leaves
    alone what has been begun.
    """

    def __init__(
        self, plan: Plan, destination: Storage, drain: Drain, *, joined: bool = False, host: Host | None = None
    ) -> None:
        self._plan, self._destination, self._drain, self._joined = plan, destination, drain, joined
        self._rows = {chunk: each.rows for chunk, each in plan.chunks.items()}
        self._chunks = set(self._rows)
        self._host = host or Host()
        self._random = self._host.random
        self._lock = threading.Lock()
        self._known: set[ChunkId] = set()
        self._claimed: set[ChunkId] = set()
        self._faulted: set[ChunkId] = set()
        self._lost: set[int] = set()
        self._waiting: set[int] = set()
        self._row_seconds: list[float] = []
        self.stop = threading.Event()
        self.cut_short = False

    def begin(self) -> list[int]:
        """Begin a pass over what is missing: return its shards, in an order of this worker's own.

        Those that have no part yet come first: another worker is probably scoring the rest.
        """
        parts = self._list_parts()
        with self._lock:
            begun = {shard for shard, _ in parts}
            self._known, self._claimed, self._lost = parts, set(), begun if self._joined else set()
            self.cut_short = False
            self._waiting = {shard for shard, _ in self._chunks - parts - self._faulted}
            shards = sorted(self._waiting)
        self._random.shuffle(shards)
        return sorted(shards, key=begun.__contains__)

    def claim_chunks(self, shard: int, idle: threading.Semaphore) -> Generator[ChunkClaim]:
        """Yield the chunks for one slot: its own shard's, unless another worker scores it; then what is left.

        What is left is taken one at a time, each when the slot has acquired `idle`: chunks read ahead
        then would be taken from workers that could score them now.
        """
        with self._lock:
            self._waiting.discard(shard)
        if shard not in self._find_shards_of_others():
            for chunk in self._shuffle_chunks(shard):
                if self.is_stopping() or shard in self._lost:
                    break
                if self._claim(chunk):
                    yield ChunkClaim(chunk=chunk, helping=False)
                elif chunk not in self._known:
                    break
        while not self.is_stopping() and not self._waiting:
            if not idle.acquire(timeout=_POLL_SECONDS):
                continue
            left = self._choose_left_over()
            if left is None:
                return
            if self._claim(left):
                yield ChunkClaim(chunk=left, helping=True)
            else:
                idle.release()

    def is_stopping(self) -> bool:
        """Return whether nothing new is begun in this pass: this process stops, or was given notice.

        All slots then stop, even where the notice is withdrawn meanwhile: the next pass has work for each.
        """
        if self._drain.notice is not None:
            self.cut_short = True
        return self.stop.is_set() or self.cut_short

    def may_continue(self, claim: ChunkClaim, taken: float) -> bool:
        """Return whether a chunk that has taken so many seconds is finished, or dropped."""
        if self._drain.notice is None:
            return not self.stop.is_set()
        return not self.stop.is_set() and self._drain.may_finish(self.chunk_seconds(claim.chunk), taken)

    def chunk_seconds(self, chunk: ChunkId) -> float | None:
        """Return what a chunk takes, by its rows and the median of those done; None before any is."""
        taken = sorted(self._row_seconds)
        return taken[len(taken) // 2] * self._rows[chunk] if taken else None

    def _shuffle_chunks(self, shard: int) -> list[ChunkId]:
        """Return the chunks of a shard in order, from a random one round to the one before it.

        Workers that begin together on one shard then seldom begin on one chunk.
        """
        chunks = len(self._plan.shards[shard])
        first = self._random.randrange(chunks)
        return [(shard, at % chunks) for at in range(first, first + chunks)]

    def is_still_missing(self, claim: ChunkClaim) -> bool:
        """Return whether a chunk still has no part: another worker may have scored it since it was read ahead."""
        if self._has_part(claim.chunk):
            return False
        if claim.helping or claim.chunk[0] not in self._lost:
            return True
        with self._lock:
            self._claimed.discard(claim.chunk)
        return False

    def note_scored(self, chunk: ChunkId, seconds: float, *, won: bool) -> None:
        """Note a chunk whose part this process wrote, or found written."""
        with self._lock:
            self._row_seconds.append(seconds / self._rows[chunk])
            if not won:
                self._lost.add(chunk[0])

    def note_fault(self, chunk: ChunkId) -> None:
        """Note a chunk that can't be read; no slot tries it again in this call."""
        with self._lock:
            self._faulted.add(chunk)

    def _list_parts(self) -> set[ChunkId]:
        return set(list_parts(self._destination, self._plan))

    def _has_part(self, chunk: ChunkId) -> bool:
        return self._destination.exists(part_path(self._plan, chunk))

    def _claim(self, chunk: ChunkId) -> bool:
        """Claim a chunk among this process's slots; False where it is claimed or has its part."""
        with self._lock:
            if chunk in self._claimed or chunk in self._known:
                return False
            self._claimed.add(chunk)
        return not self._has_part(chunk)

    def _find_shards_of_others(self) -> set[int]:
        """Return the shards that other workers have written to since this one began."""
        return {shard for shard, _ in self._list_parts() - self._known - self._claimed} | self._lost

    def _choose_left_over(self) -> ChunkId | None:
        """Return a random missing chunk that no slot of this process has claimed; None where there is none.

        In a shard that another worker scores, it has probably claimed the chunks that follow a finished one. They are
        taken last, and only after the time that a chunk takes.
        """
        waited: set[ChunkId] = set()
        while not self.is_stopping():
            parts = self._list_parts()
            with self._lock:
                # Another worker may have set a part aside since this one began.
                self._known &= parts
                left = self._chunks - parts - self._faulted - self._claimed
            if not left:
                return None
            foreign = self._find_shards_of_others()
            claimed_elsewhere = {
                chunk for chunk in left if chunk[0] in foreign and not self._chunks_before(chunk) <= left
            }
            if ready := sorted(left - claimed_elsewhere) or sorted(left & waited):
                return self._random.choice(ready)
            chunk = self._random.choice(sorted(left))
            waited.add(chunk)
            self._wait_for_part(chunk)
        return None

    def _chunks_before(self, chunk: ChunkId) -> set[ChunkId]:
        chunks = len(self._plan.shards[chunk[0]])
        return {(chunk[0], (chunk[1] - back) % chunks) for back in range(1, _CHUNKS_IN_PROGRESS + 1)}

    def _wait_for_part(self, chunk: ChunkId) -> None:
        """Wait until the part is there, for one and a half to four times what a chunk takes.

        Drawn at random: of workers that wait for one chunk, one then comes first.
        """
        chunk_seconds = self.chunk_seconds(chunk) or 1.0
        patience = min(max(self._random.uniform(1.5, 4.0) * chunk_seconds, _PATIENCE_MIN), _PATIENCE_MAX)
        until = self._host.clock() + patience
        while self._host.clock() < until and not self.is_stopping() and not self._has_part(chunk):
            self._host.wait(self.stop, min(patience / 10, 1.0))
