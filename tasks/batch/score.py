"""Score the chunks of a plan: a slot is a thread that reads ahead and writes behind its forward passes."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Executor, Future
from contextlib import closing, contextmanager
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from serving.errors import SourceFault, TooManyRejects, list_shortly
from serving.model.encoding import Encoded, Flags, encode
from serving.model.forward import Forward, Halted, iter_retry_delays
from serving.model.interface import Model, Predictions
from serving.model.loading import check_model_unchanged
from serving.option_words import name_option
from tasks.batch.chunk_reader import open_reader, read_ahead
from tasks.batch.chunk_scheduler import ChunkClaim, ChunkScheduler, Host
from tasks.batch.parts import ChunkId, Reasons, count_reasons, encode_part, key_names, part_path
from tasks.batch.plan import Plan
from tasks.spot.drain import Drain
from tasks.storage import Storage

STAGES = ("read", "encode", "forward", "write")
_FAULTS_SHOWN, _REASONS_SHOWN, _SAMPLE_CHARACTERS = 4, 3, 40

# A value of the column that a reject of this column and reason had.
Samples = dict[tuple[str, str], str]


@dataclass(slots=True, kw_only=True)
class ScoringResult:
    """The result of scoring: rows, rejects, faults of the source by chunk, seconds by stage over all threads."""

    rows: int = 0
    rows_recomputed: int = 0
    chunks: int = 0
    chunks_dropped: int = 0
    rejects: Reasons = field(default_factory=Counter)
    faults: dict[ChunkId, SourceFault] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    def add(self, other: ScoringResult) -> None:
        """Add what another slot has done."""
        self.rows += other.rows
        self.rows_recomputed += other.rows_recomputed
        self.chunks += other.chunks
        self.chunks_dropped += other.chunks_dropped
        self.rejects += other.rejects
        self.faults |= other.faults
        self.seconds = {stage: self.seconds[stage] + other.seconds[stage] for stage in STAGES}

    def faults_error(self) -> SourceFault:
        """Return one error that lists the faults of all chunks, of the kind of the first."""
        listed = list_shortly(list(dict.fromkeys(map(str, self.faults.values()))), _FAULTS_SHOWN)
        return type(next(iter(self.faults.values())))(
            f"Every source file must be readable and unchanged; {len(self.faults)} chunks could not be scored:\n"
            f"{listed}\nThe parts of all other chunks are there, and nothing is published."
        )

    @contextmanager
    def timed(self, stage: str) -> Generator[None]:
        """Count the seconds of a block of code towards a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - start


class Scorer:
    """Scores shards of one plan for one process; its methods may be called from many threads at once.

    It obeys its drain, which others tell of notices: a slot then finishes its chunk where that fits.
    `pauses` gives the seconds between the tries of a pass that failed by what the model calls or runs on.
    """

    def __init__(
        self,
        *,
        plan: Plan,
        destination: Storage,
        model: Model,
        max_reject_fraction: float,
        joined: bool = False,
        pauses: Callable[[], Iterator[float]] = iter_retry_delays,
        host: Host | None = None,
    ) -> None:
        self.plan, self.destination, self.model = plan, destination, model
        self.host = host or Host()
        self.drain = Drain(self.host.clock)
        self.scheduler = ChunkScheduler(plan, destination, self.drain, joined=joined, host=self.host)
        self.max_reject_fraction = max_reject_fraction
        self.pauses = pauses
        self._lock = threading.Lock()
        self._rejects: Reasons = Counter()
        self.samples: Samples = {}

    def score_shard(self, shard: int) -> ScoringResult:
        """Score what is missing of a shard, then help with what is left of the others.

        Runs one slot in the calling thread. Source faults are collected, not raised; any other error stops the other
        slots too.
        """
        try:
            with self.model.slot(), self.host.writer() as writer:
                slot = _Slot(self, writer)
                with closing(read_ahead(slot.read(shard), self.host.blocks_ahead)) as items, slot.dropped_if_halted():
                    for item in items:
                        if (slot.chunk is None or isinstance(item, ChunkClaim)) and self.scheduler.is_stopping():
                            break
                        if isinstance(item, ChunkClaim):
                            slot.open(item)
                        elif slot.chunk is not None:
                            with slot.result.timed("forward"):
                                predictions = slot.forward.score(item.encoded)
                            slot.add(item, predictions)
                            del predictions
                return slot.finish()
        except BaseException:
            self.scheduler.stop.set()
            raise

    def count_rejects(self, rejects: Reasons) -> None:
        """Add rejects to those of all slots; raises TooManyRejects."""
        with self._lock:
            self._rejects.update(rejects)
            so_far = Counter(self._rejects)
        check_rejects(so_far, self.plan, self.max_reject_fraction, self.samples)

    def keep_samples(self, table: pa.Table, flags: Flags) -> None:
        """Keep one value of each kind of reject that is new in a block: an error shows it."""
        for code, (column, reason) in enumerate(flags.reasons, start=1):
            if (column, reason) in self.samples or column not in table.column_names:
                continue
            rows = np.flatnonzero(flags.code_N == code)
            if len(rows):
                self.samples[column, reason] = _show_value(table.column(column)[int(rows[0])])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    encoded: Encoded
    keys: pa.Table


@dataclass(slots=True, kw_only=True)
class _OpenChunk:
    """The chunk that a slot scores: its blocks scored so far."""

    claim: ChunkClaim
    rows_left: int
    started: float
    keys: list[pa.Table] = field(default_factory=list)
    predictions: list[Predictions] = field(default_factory=list)
    flags: list[Flags] = field(default_factory=list)

    def add(self, block: _Block, predictions: Predictions) -> bool:
        """Add a scored block; return whether the chunk is whole."""
        self.keys.append(block.keys)
        self.predictions.append(predictions)
        self.flags.append(block.encoded.flags)
        self.rows_left -= block.encoded.rows
        return self.rows_left == 0


class _Slot:
    """One stream of forward passes: blocks come in from a reading thread, whole chunks go out to a writing one."""

    def __init__(self, scorer: Scorer, writer: Executor) -> None:
        self._scorer, self._plan, self._scheduler, self._writer = scorer, scorer.plan, scorer.scheduler, writer
        self._chunks, self._host = scorer.plan.chunks, scorer.host
        self.forward = Forward(
            *(scorer.model, scorer.plan.contract, scorer.plan.batch_size),
            may_continue=self._may_continue,
            delays=scorer.pauses,
        )
        self.chunk: _OpenChunk | None = None
        self._writing: Future[None] | None = None
        self._idle = threading.Semaphore(1)
        self.result = ScoringResult()

    @contextmanager
    def dropped_if_halted(self) -> Generator[None]:
        """Count the chunk as dropped where its forward pass is halted for lack of time."""
        try:
            yield
        except Halted:
            self.result.chunks_dropped += 1

    def open(self, claim: ChunkClaim) -> None:
        """Begin a chunk, unless another worker has scored it since it was read ahead."""
        self.chunk = None
        if self._scheduler.is_still_missing(claim):
            rows = self._chunks[claim.chunk].rows
            self.chunk = _OpenChunk(claim=claim, rows_left=rows, started=self._host.clock())
        else:
            self._release(claim)

    def add(self, block: _Block, predictions: Predictions) -> None:
        """Add a scored block to the chunk, and have the chunk written once it has all its rows."""
        chunk = self.chunk
        if chunk is not None and chunk.add(block, predictions):
            self._submit_write(chunk)
            self.chunk = None

    def finish(self) -> ScoringResult:
        """Wait until the last part is durable; return what the slot has done."""
        if self._writing is not None:
            self._writing.result()
        return self.result

    def _may_continue(self) -> bool:
        """Return whether to go on with the open chunk; asked before each batch."""
        open_chunk = self.chunk
        return open_chunk is None or self._scheduler.may_continue(
            open_chunk.claim, self._host.clock() - open_chunk.started
        )

    def read(self, shard: int) -> Generator[ChunkClaim | _Block]:
        """Yield each claim, then its blocks; runs in the read-ahead thread."""
        reader, keys = open_reader(self._plan), key_names(self._plan.options)
        for claim in self._scheduler.claim_chunks(shard, self._idle):
            yield claim
            chunk = self._chunks[claim.chunk]
            blocks = reader.blocks(chunk, self._plan.block_rows(chunk))
            try:
                while True:
                    with self.result.timed("read"):
                        table = next(blocks, None)
                    if table is None:
                        break
                    with self.result.timed("encode"):
                        encoded = self._scorer.model.prepare(encode(self._plan.contract, table))
                        if encoded.flags.reasons:
                            self._scorer.keep_samples(table, encoded.flags)
                        block = _Block(encoded=encoded, keys=table.select(keys))
                    # Only keys and inputs are needed from here on. The rest is freed before the next block is read.
                    del table, encoded
                    yield block
                    del block
            except SourceFault as fault:
                reader = open_reader(self._plan)
                self._scheduler.note_fault(claim.chunk)
                self.result.faults[claim.chunk] = fault
                self._release(claim)

    def _release(self, claim: ChunkClaim) -> None:
        if claim.helping:
            self._idle.release()

    def _submit_write(self, open_chunk: _OpenChunk) -> None:
        """Give a whole chunk to the writer, after the one before it is durable."""
        if self._writing is not None:
            self._writing.result()
        batch_size = self.forward.safe_batch_size or self._plan.batch_size
        self._writing = self._writer.submit(self._write, open_chunk, batch_size)
        self._release(open_chunk.claim)

    def _write(self, open_chunk: _OpenChunk, batch_size: int) -> None:
        chunk = open_chunk.claim.chunk
        with self.result.timed("write"):
            flags = Flags.concat(open_chunk.flags)
            predictions = {
                name: np.concatenate([p[name] for p in open_chunk.predictions]) for name in open_chunk.predictions[0]
            }
            keys = pa.concat_tables(open_chunk.keys)
            data = encode_part(self._plan, self._chunks[chunk], keys, predictions, flags, batch_size)
            check_model_unchanged(self._plan.model)
            won = self._scorer.destination.put_new(part_path(self._plan, chunk), data)
        self._scheduler.note_scored(chunk, self._host.clock() - open_chunk.started, won=won)
        self.result.rows += len(flags.code_N)
        self.result.chunks += 1
        if won:
            rejects = count_reasons(flags)
            self.result.rejects += rejects
            self._scorer.count_rejects(rejects)
        else:
            self.result.rows_recomputed += len(flags.code_N)


def _show_value(value: pa.Scalar) -> str:
    """Return a value as an error shows it: short, and nothing for a null, which its reason names."""
    if not value.is_valid:
        return ""
    text = repr(str(value))
    return text if len(text) <= _SAMPLE_CHARACTERS else f"{text[:_SAMPLE_CHARACTERS]}..."


def check_rejects(rejects: Reasons, plan: Plan, fraction_max: float, samples: Samples | None = None) -> None:
    """Raise TooManyRejects where the rejects so far are more than the fraction of all rows allows.

    Args:
        rejects: How many rows were rejected, by column and reason.
        plan: Whose rows they are.
        fraction_max: How many of its rows may be rejects.
        samples: A value for each kind of reject that is known.
    """
    if rejects.total() > fraction_max * plan.rows:
        message = (
            f"At most {fraction_max:.4g} of {plan.rows:,} rows may be rejects, got {rejects.total():,} so far; nothing "
            f"is published. Most are:\n{_list_reasons(rejects, samples or {})}\n"
            f"See all with open_rejects(destination, run={plan.run!r}), correct the data, or raise "
            f"{name_option('max_reject_fraction')} and call again. Where it was no fault of the rows, call again with "
            f"another {name_option('rescore')}."
        )
        raise TooManyRejects(message)


def _list_reasons(rejects: Reasons, samples: Samples) -> str:
    lines = []
    for (column, reason), rows in rejects.most_common():
        where = f"{column}: {reason}" if column else reason
        such = f", such as {samples[column, reason]}" if samples.get((column, reason)) else ""
        lines.append(f"{where} ({rows:,} rows{such})")
    return list_shortly(lines, _REASONS_SHOWN)
