"""Which chunk comes next, for one process among many that score the same plan without a coordinator.

Workers do not talk to each other. Each takes shards in an order of its own, leaves a shard that
another one scores, and at the end helps with what is left. Whether a chunk is done is decided by its part alone; where
there are challengers, by the parts of all models.
Of a large run a worker asks for the parts of the shards at hand, by one page of a listing, rather than for all of them.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from tasks.batch.parts import ChunkId, list_followed, list_parts, list_parts_from, part_path
from tasks.batch.plan import Plan
from tasks.spot.drain import Drain
from tasks.storage import Storage

# How long a chunk in progress elsewhere is waited for, in times of what one takes, and how often it is looked for.
_PATIENCE, _PATIENCE_SECONDS_MIN, _PATIENCE_STEP = (1.5, 4.0), 0.2, 2.0
# Where marks lie in the folder of a plan, what is in them, and what that of a whole shard is called.
MARKS, _MARK, _SHARD_MARK = "marks", b"{}", "shard"
_MARKS_PER_PAGE = 1000
_POLL_SECONDS = 0.1
# A slot in search of a chunk looks at so many pages of the listing before it waits for one in progress.
_PAGES_MAX = 8
# A worker scores one chunk and has read one or two more.
_CHUNKS_IN_PROGRESS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkClaim:
    """A chunk to score: of the slot's own shard, or one of what is left where the slot helps."""

    chunk: ChunkId
    helping: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringMachine:
    """What scoring uses of its machine: time, random numbers and threads. A simulation has its own.

    `clock` counts seconds, `wait` waits for an event at most so many of them, and `random` spreads workers over shards:
    nothing else depends on its values. A slot reads up to `blocks_ahead` blocks ahead in a thread of its own, with 0 in
    that of the slot, and writes parts by a `writer` of its own.
    """

    clock: Callable[[], float] = time.monotonic
    wait: Callable[[threading.Event, float], bool] = threading.Event.wait
    random: random.Random = field(default_factory=random.Random)
    blocks_ahead: int = 2
    writer: Callable[[], Executor] = lambda: ThreadPoolExecutor(1, thread_name_prefix="write-behind")
    lock: Callable[[], AbstractContextManager[object]] = threading.Lock


class ChunkScheduler:
    """What this process has taken of a plan; its methods may be called from many threads at once.

    One that has `joined` knows that another worker is there, before it sees that one write: to begin with it leaves
    alone what has been begun. Sets of chunks are kept as a whole number for each shard, with a bit for each chunk: a
    thousand workers of a hundred thousand chunks can be simulated in one process.
    """

    def __init__(
        self,
        plan: Plan,
        destination: Storage,
        drain: Drain,
        *,
        joined: bool = False,
        machine: ScoringMachine | None = None,
    ) -> None:
        self._plan, self._destination, self._drain, self._joined = plan, destination, drain, joined
        self._machine = machine or ScoringMachine()
        self._random = self._machine.random
        self._lock = threading.Lock()
        self._all = [(1 << len(chunks)) - 1 for chunks in plan.shards]
        # The plans of challengers that are scored beside this one.
        self._followed: tuple[Plan, ...] = ()
        # Parts that were there when the pass began, and those that are known by now.
        self._before, self._done = self._make_masks(), self._make_masks()
        self._claimed, self._faulted = self._make_masks(), self._make_masks()
        # Parts of earlier runs that were there when all were last listed: no page of a listing has them.
        self._reused = self._make_masks()
        self._lost: set[int] = set()
        # As last listed: how many marks the chunks of a shard have, by places, and shards that others have marked.
        self._marks: dict[int, Counter[int]] = {}
        self._marked_elsewhere: set[int] = set()
        self._marked_here: set[int] = set()
        self._sees_others = joined or plan.options.workers > 1
        self._order: list[int] = []
        self._waiting: set[int] = set()
        # Given to a slot that has yet to claim its first chunk.
        self._given: set[int] = set()
        self._nothing_left = False
        self._row_seconds: list[float] = []
        self.stop = threading.Event()
        self.cut_short = False

    def _make_masks(self) -> list[int]:
        return [0] * len(self._plan.shards)

    def begin(self) -> list[int]:
        """Begin a pass over what is missing: return its shards, in an order of this worker's own.

        Those that have no part yet come first: another worker is probably scoring the rest.
        """
        if not self._joined:
            # Those of an earlier attempt would have its shards taken for those of workers that are there.
            self._destination.delete([entry.path for entry in self._destination.entries(self._marks_folder)])
            self._marks, self._marked_elsewhere = {}, set()
        self._followed = list_followed(self._destination, self._plan)
        parts = self._list_parts()
        with self._lock:
            begun = {shard for shard, mask in enumerate(parts) if mask & ~self._reused[shard]}
            self._before, self._done, self._claimed = parts, list(parts), self._make_masks()
            self._lost = begun if self._joined else set()
            self.cut_short = self._nothing_left = False
            shards = self._list_unfinished()
            self._waiting, self._given = set(shards), set()
        self._random.shuffle(shards)
        shards.sort(key=begun.__contains__)
        self._order = shards[::-1]
        return shards

    def next_shard(self) -> int | None:
        """Return the next shard for a slot that is free, None where there is nothing more to begin.

        One that another worker scores is passed over. Once there are no others, a slot begins with one that has chunks
        left which no slot of this process has claimed, to help.
        """
        while self._order:
            shard = self._order.pop()
            with self._lock:
                self._waiting.discard(shard)
            if not self._is_scored_elsewhere(shard) and self._mark_shard(shard):
                self._given.add(shard)
                return shard
        unfinished = [] if self._nothing_left else [at for at in self._list_unfinished() if at not in self._given]
        return self._random.choice(unfinished) if unfinished else None

    def claim_chunks(self, shard: int, idle: threading.Semaphore) -> Generator[ChunkClaim]:
        """Yield the chunks for one slot: its own shard's, unless another worker scores it; then what is left.

        What is left is taken one at a time, each when the slot has acquired `idle`: chunks read ahead
        then would be taken from workers that could score them now.
        """
        with self._lock:
            self._waiting.discard(shard)
        if not self._is_scored_elsewhere(shard):
            for chunk in self._shuffle_chunks(shard):
                if self.is_stopping() or shard in self._lost:
                    break
                if self._claim(chunk):
                    self._given.discard(shard)
                    yield ChunkClaim(chunk=chunk, helping=False)
                elif not _holds(self._before, chunk):
                    break
        self._given.discard(shard)
        last: ChunkId | None = None
        while not self.is_stopping() and not self._waiting:
            if not idle.acquire(timeout=_POLL_SECONDS):
                continue
            left = self._follow(last) or self._choose_left_over()
            if left is None:
                self._nothing_left = True
                return
            if self._claim(left) and self._mark_chunk(left):
                last = left
                yield ChunkClaim(chunk=left, helping=True)
            else:
                last = None
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
        return taken[len(taken) // 2] * self._plan.chunk(chunk).rows if taken else None

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
            _drop(self._claimed, claim.chunk)
        return False

    def note_scored(self, chunk: ChunkId, seconds: float, *, won: bool) -> None:
        """Note a chunk whose part this process wrote, or found written."""
        with self._lock:
            self._row_seconds.append(seconds / self._plan.chunk(chunk).rows)
            _add(self._done, chunk)
            if not won:
                self._lost.add(chunk[0])

    def note_fault(self, chunk: ChunkId) -> None:
        """Note a chunk that can't be read; no slot tries it again in this call."""
        with self._lock:
            _add(self._faulted, chunk)

    def follow_no_longer(self, plan: Plan) -> None:
        """Leave a challenger that was given up out of what makes a chunk done."""
        with self._lock:
            self._followed = tuple(each for each in self._followed if each.place != plan.place)

    def list_missing(self, chunk: ChunkId) -> tuple[int, ...]:
        """Return the places of the plans that a chunk has no part of: 0 for this plan, then its challengers'."""
        if not self._followed:
            return (0,)
        plans = (self._plan, *self._followed)
        return tuple(each.place for each in plans if not self._destination.exists(part_path(each, chunk)))

    def _list_parts(self) -> list[int]:
        """Return the chunks of all shards that have their parts now, and note those of earlier runs among them."""
        parts, reused = self._make_masks(), self._make_masks()
        found = set(list_parts(self._destination, self._plan))
        for chunk in found & self._plan.reused_parts.keys():
            _add(reused, chunk)
        self._reused = reused
        for chunk in found.intersection(*(list_parts(self._destination, each) for each in self._followed)):
            if chunk[0] < len(parts):
                _add(parts, chunk)
        return parts

    def _list_page(self, shard: int) -> range:
        """Note which chunks of a shard, and of those that follow on one page, are done now; return these shards."""
        pages = [list_parts_from(self._destination, each, shard) for each in (self._plan, *self._followed)]
        shards = range(shard, min(page.stop for page, _ in pages))
        found = {at: self._all[at] for at in shards}
        for page_at, (_, parts) in enumerate(pages):
            # Those of earlier runs are in none of the pages.
            there = {at: 0 if page_at else self._reused[at] for at in shards}
            for at, place in parts:
                if at in there:
                    there[at] |= 1 << place
            found = {at: mask & there[at] for at, mask in found.items()}
        with self._lock:
            for at, mask in found.items():
                # Another worker may have set a part aside since this one began.
                self._before[at] &= mask
                self._done[at] = mask
                self._sees_others |= self._is_foreign(at)
        return shards

    @property
    def _marks_folder(self) -> str:
        return f"{self._plan.folder}/{MARKS}"

    def _list_marks(self, shards: range) -> None:
        """Note the marks of some shards, and of those that follow on the last page."""
        found: dict[int, Counter[int]] = {}
        after, stop = f"{shards.start:05d}-", shards.start
        while stop < shards.stop:
            page = self._destination.entries_after(self._marks_folder, after, _MARKS_PER_PAGE)
            for entry in page:
                after = entry.path.rpartition("/")[2]
                shard, place, *_ = after.split("-")
                if place != _SHARD_MARK:
                    found.setdefault(int(shard), Counter())[int(place)] += 1
                elif int(shard) not in self._marked_here:
                    self._marked_elsewhere.add(int(shard))
            stop = len(self._all) if len(page) < _MARKS_PER_PAGE else int(after.split("-")[0])
        # The last page may end in the middle of a shard.
        others = {shard: marks for shard, marks in self._marks.items() if not shards.start <= shard < stop}
        self._marks = others | {shard: marks for shard, marks in found.items() if shard < stop}

    def _mark_shard(self, shard: int) -> bool:
        """Mark a shard as one that a slot begins; False where another worker has come before.

        A mark is no lock: it spares work, and says nothing about what is done. A worker without a shard to begin helps
        with those that others have marked.
        """
        if not self._sees_others:
            return True
        self._list_marks(range(shard, shard + 1))
        if shard in self._marked_elsewhere:
            return False
        # An earlier pass may have marked it.
        is_ours = shard in self._marked_here
        self._marked_here.add(shard)
        if self._destination.put_new(f"{self._marks_folder}/{shard:05d}-{_SHARD_MARK}", _MARK) or is_ours:
            return True
        self._marked_here.discard(shard)
        self._marked_elsewhere.add(shard)
        return False

    def _mark_chunk(self, chunk: ChunkId) -> bool:
        """Mark a chunk that this slot helps with, so that no other helper begins it; False where one has come before.

        A mark of a helper that died is followed by the next one, once the time that a chunk takes is over.
        """
        if not self._sees_others:
            return True
        marks = self._marks.setdefault(chunk[0], Counter())
        marks[chunk[1]] += 1
        path = f"{self._marks_folder}/{chunk[0]:05d}-{chunk[1]:04d}-{marks[chunk[1]]:03d}"
        if self._destination.put_new(path, _MARK):
            return True
        with self._lock:
            _drop(self._claimed, chunk)
        return False

    def _has_part(self, chunk: ChunkId) -> bool:
        plans = (self._plan, *self._followed)
        has_part = all(self._destination.exists(part_path(each, chunk)) for each in plans)
        if has_part:
            with self._lock:
                _add(self._done, chunk)
        return has_part

    def _claim(self, chunk: ChunkId) -> bool:
        """Claim a chunk among this process's slots; False where it is claimed or has its part."""
        with self._lock:
            if _holds(self._claimed, chunk) or _holds(self._before, chunk):
                return False
            _add(self._claimed, chunk)
        return not self._has_part(chunk)

    def _is_scored_elsewhere(self, shard: int) -> bool:
        """Return whether another worker has written to a shard since this one began."""
        # A page of the listing tells of many shards: most of which that is known need no page of their own.
        if not self._is_foreign(shard):
            self._list_page(shard)
        return self._is_foreign(shard)

    def _is_foreign(self, shard: int) -> bool:
        if shard in self._lost or shard in self._marked_elsewhere:
            return True
        return bool(self._done[shard] & ~self._before[shard] & ~self._claimed[shard])

    def _missing(self, shard: int) -> int:
        """Return the chunks of a shard that have no part, as far as is known, and that no slot here has claimed."""
        return self._all[shard] & ~self._done[shard] & ~self._faulted[shard] & ~self._claimed[shard]

    def _list_unfinished(self) -> list[int]:
        """Return the shards that have missing chunks, in their order."""
        return [shard for shard in range(len(self._all)) if self._missing(shard)]

    def _follow(self, last: ChunkId | None) -> ChunkId | None:
        """Return the chunk after the one that a slot has helped with last, None where that is not missing.

        A helper that goes on in one shard is one more worker that others see there; one that jumps is seen nowhere.
        """
        if last is None:
            return None
        follower = last[0], (last[1] + 1) % len(self._plan.shards[last[0]])
        return follower if self._missing(last[0]) >> follower[1] & 1 else None

    def _choose_left_over(self) -> ChunkId | None:
        """Return a random missing chunk that no slot of this process has claimed; None where there is none.

        In a shard that another worker scores, it has probably claimed the chunks that follow a finished one. They are
        taken last, and only after the time that a chunk takes.
        """
        while not self.is_stopping():
            shards = self._list_unfinished()
            if not shards:
                # A part may have been set aside meanwhile: the end is told by a listing of all parts.
                parts = self._list_parts()
                with self._lock:
                    self._before = [before & now for before, now in zip(self._before, parts, strict=True)]
                    self._done = parts
                    shards = self._list_unfinished()
                if not shards:
                    return None
            ready, left = self._find_ready(shards)
            if ready is not None:
                return ready
            if left and self._wait_for_part(chunk := self._random.choice(left)):
                return chunk
        return None

    def _find_ready(self, shards: list[int]) -> tuple[ChunkId | None, list[ChunkId]]:
        """Return a chunk that no other worker seems to have claimed, of some of these shards as they are now.

        Where there is none, return the missing chunks that others have claimed too.
        """
        self._random.shuffle(shards)
        looked_at: set[int] = set()
        pages = 0
        for shard in shards:
            if shard in looked_at:
                continue
            if pages == _PAGES_MAX:
                break
            page = self._list_page(shard)
            if self._sees_others and any(self._missing(at) for at in page):
                self._list_marks(page)
            pages += 1
            looked_at |= set(page)
            ready = {at: mask for at in page if (mask := self._ready(at))}
            if ready:
                most = max(mask.bit_count() for mask in ready.values())
                at = self._random.choice([at for at, mask in ready.items() if 2 * mask.bit_count() >= most])
                return (at, self._random.choice(list(_bits(ready[at])))), []
        return None, [(shard, at) for shard in sorted(looked_at) for at in _bits(self._missing(shard))]

    def _ready(self, shard: int) -> int:
        """Return the missing chunks of a shard without those that another worker has claimed, going by its parts."""
        missing = self._missing(shard)
        if not missing or not self._is_foreign(shard):
            return missing
        chunks, finished = len(self._plan.shards[shard]), self._all[shard] & ~missing
        claimed = finished
        for _ in range(_CHUNKS_IN_PROGRESS):
            claimed |= (claimed << 1 | claimed >> (chunks - 1)) & self._all[shard]
        for place in self._marks.get(shard, ()):
            claimed |= 1 << place
        return missing & ~claimed

    def _wait_for_part(self, chunk: ChunkId) -> bool:
        """Wait for the part of a chunk in progress elsewhere; return whether it is still missing after that.

        For one and a half to four times what a chunk takes, drawn at random: of workers that wait for one chunk, one
        then comes first.
        """
        patience = max(self._random.uniform(*_PATIENCE) * (self.chunk_seconds(chunk) or 1.0), _PATIENCE_SECONDS_MIN)
        until = self._machine.clock() + patience
        while self._machine.clock() < until:
            if self.is_stopping() or self._has_part(chunk):
                return False
            self._machine.wait(self.stop, min(patience / 10, _PATIENCE_STEP))
        return not self._has_part(chunk)


def _add(masks: list[int], chunk: ChunkId) -> None:
    masks[chunk[0]] |= 1 << chunk[1]


def _drop(masks: list[int], chunk: ChunkId) -> None:
    masks[chunk[0]] &= ~(1 << chunk[1])


def _holds(masks: list[int], chunk: ChunkId) -> bool:
    return bool(masks[chunk[0]] >> chunk[1] & 1)


def _bits(mask: int) -> Generator[int]:
    while mask:
        yield (mask & -mask).bit_length() - 1
        mask &= mask - 1
