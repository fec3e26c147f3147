"""Score the chunks of a plan: a slot is a thread that reads ahead and writes behind its forward passes.

Where there are challengers, a block is read once, and encoded once for all models that take the same inputs.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from serving.errors import DependencyFault, DeviceLost, ModelUnfit, OvernightError, SourceFault
from serving.faults import describe_error
from serving.model.contract import Input
from serving.model.encoding import Encoded, Flags, encode
from serving.model.forward import Forward, iter_retry_delays
from serving.model.interface import Halted, Isolated, Model, Predictions
from serving.model.loading import check_model_unchanged
from tasks.batch.chunk_reader import Reader, read_ahead
from tasks.batch.chunk_scheduler import ChunkClaim, ChunkScheduler, ScoringMachine
from tasks.batch.chunk_statistics import StatisticsCollector
from tasks.batch.column_statistics import ColumnStatistics
from tasks.batch.disclosure import withhold_values
from tasks.batch.feature_lookup import FeatureLookup, JoinedReader, open_joined_reader
from tasks.batch.memory import use_jemalloc
from tasks.batch.options import Disclose
from tasks.batch.part_footer import Reasons, count_reasons
from tasks.batch.parts import encode_part, give_up_challenger, key_names, list_followed, part_path
from tasks.batch.plan import Plan
from tasks.batch.scoring_result import Samples, ScoringResult, check_rejects, list_reasons, show_value
from tasks.spot.drain import Drain
from tasks.storage import Storage

_CHALLENGERS = "challengers"
# A service that is away should not be asked for every chunk, each of which waits for it.
_FAILED_IN_A_ROW_MAX = 3

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedModel:
    """A model, and the plan that its parts are of: that of the run, or that of a challenger."""

    plan: Plan
    model: Model


class Scorer:
    """Scores shards of one plan for one process; its methods may be called from many threads at once.

    It obeys its drain, which others tell of notices: a slot then finishes its chunk where that fits.
    `challengers` are those of the plan, in its order, None for one that was given up. One that fails in another way
    than by rows, or that rejects more rows than the model of the run may, is given up: the run goes on without it.
    `pauses` gives the seconds between the tries of a pass that failed by what the model calls or runs on. `observe` is
    told of what was done as it goes on: each part, then what the slot took. `features` is that of another scorer of the
    same plan in this process, which may have read feature tables already. Errors may quote rows as `disclose` says.
    """

    def __init__(  # noqa: PLR0913 - by name, and most have a default
        self,
        *,
        plan: Plan,
        destination: Storage,
        model: Model,
        max_reject_fraction: float,
        challengers: Sequence[Model | None] = (),
        joined: bool = False,
        pauses: Callable[[], Iterator[float]] = iter_retry_delays,
        machine: ScoringMachine | None = None,
        observe: Callable[[ScoringResult], None] = lambda _: None,
        features: FeatureLookup | None = None,
        disclose: Disclose = "values",
    ) -> None:
        use_jemalloc()
        self.plan, self.destination, self.model = plan, destination, model
        self.machine = machine or ScoringMachine()
        self.features = features or FeatureLookup(plan.features, self.machine.lock)
        self.drain = Drain(self.machine.clock)
        self.scheduler = ChunkScheduler(plan, destination, self.drain, joined=joined, machine=self.machine)
        followed = {each.place for each in list_followed(destination, plan)}
        self.models = {0: PlannedModel(plan=plan, model=model)} | {
            each.place: PlannedModel(plan=each, model=loaded)
            for each, loaded in zip(plan.challenger_plans, challengers, strict=True)
            if loaded is not None and each.place in followed
        }
        self.max_reject_fraction, self.disclose = max_reject_fraction, disclose
        self.pauses = pauses
        self.observe = observe
        self._lock = threading.Lock()
        self._rejects: Reasons = Counter()
        self._rejects_of_challengers: Counter[int] = Counter()
        self._failed_in_a_row = 0
        self.samples: Samples = {}

    def score_shard(self, shard: int) -> ScoringResult:
        """Score what is missing of a shard, then help with what is left of the others.

        Runs one slot in the calling thread. Chunks that can't be read, or whose passes fail by what the model calls,
        are left out and collected; three of the latter in a row, and any other error, stop the other slots too.
        """
        with (
            withhold_values(self.disclose),
            self._stopped_by_error(),
            ExitStack() as stack,
            self.machine.writer() as writer,
        ):
            # One within the other: all have the threads of the run's engine, and full precision.
            for each in self.models.values():
                stack.enter_context(each.model.slot())
            slot = _Slot(self, writer)
            with (
                closing(read_ahead(slot.read(shard), self.machine.blocks_ahead)) as items,
                slot.dropped_if_halted(),
                # Before the thread that reads ahead is waited for, which would wait for more to score.
                self._stopped_by_error(),
            ):
                for item in items:
                    if (slot.chunk is None or isinstance(item, ChunkClaim)) and self.scheduler.is_stopping():
                        break
                    if isinstance(item, ChunkClaim):
                        slot.open(item)
                    elif slot.chunk is not None:
                        slot.score(item)
            return slot.finish()

    @contextmanager
    def _stopped_by_error(self) -> Generator[None]:
        """Stop the other slots where this one fails; one that is halted has only run out of time."""
        try:
            yield
        except Halted:
            raise
        except BaseException:
            self.scheduler.stop.set()
            raise

    def count_rejects(self, rejects: Reasons) -> None:
        """Add rejects to those of all slots; raises TooManyRejects."""
        with self._lock:
            self._rejects.update(rejects)
            so_far = Counter(self._rejects)
        check_rejects(so_far, self.plan, self.max_reject_fraction, self.samples, self.disclose)

    def count_failed(self, *, failed: bool) -> int:
        """Count a chunk whose passes failed by what the model calls, or went well; return how many failed in a row."""
        with self._lock:
            self._failed_in_a_row = self._failed_in_a_row + 1 if failed else 0
            return self._failed_in_a_row

    def give_up(self, place: int, why: str) -> None:
        """Go on without a challenger, in this process and in others, and say why."""
        with self._lock:
            given_up = self.models.get(place)
            # Other threads may be going through those of before.
            self.models = {at: each for at, each in self.models.items() if at != place}
        if given_up is None:
            return
        _log.warning("The challenger %s is given up, and the run goes on: %s", given_up.plan.model.uri, why)
        give_up_challenger(self.destination, given_up.plan, why)
        self.scheduler.follow_no_longer(given_up.plan)

    def count_challenger_rejects(self, place: int, rejects: Reasons) -> None:
        """Add rejects to those of a challenger, which is given up where it has too many."""
        with self._lock:
            self._rejects_of_challengers[place] += rejects.total()
            so_far = self._rejects_of_challengers[place]
        if so_far > self.max_reject_fraction * self.plan.rows:
            why = f"at most {self.max_reject_fraction:.4g} of {self.plan.rows:,} rows may be rejects, got {so_far:,}"
            self.give_up(place, f"{why}. Most are:\n{list_reasons(rejects, {})}")

    def keep_samples(self, table: pa.Table, flags: Flags) -> None:
        """Keep one value of each kind of reject that is new in a block, if an error may show it."""
        if self.disclose == "nothing":
            return
        for code, (column, reason) in enumerate(flags.reasons, start=1):
            if (column, reason) in self.samples or column not in table.column_names:
                continue
            rows = np.flatnonzero(flags.code_N == code)
            if len(rows):
                self.samples[column, reason] = show_value(table.column(column)[int(rows[0])])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    """Rows of a chunk, for each model that lacks its part, by the places of their plans.

    `kept` are columns for the parts of challengers. The last block has the statistics of the chunk's inputs, where
    they are kept.
    """

    rows: int
    encoded: dict[int, Encoded]
    keys: pa.Table
    kept: pa.Table
    statistics: dict[str, ColumnStatistics] | None


@dataclass(slots=True, kw_only=True)
class _OpenChunk:
    """The chunk that a slot scores: its blocks scored so far."""

    claim: ChunkClaim
    rows_left: int
    started: float
    keys: list[pa.Table] = field(default_factory=list)
    kept: list[pa.Table] = field(default_factory=list)
    predictions: dict[int, list[Predictions]] = field(default_factory=dict)
    flags: dict[int, list[Flags]] = field(default_factory=dict)
    statistics: dict[str, ColumnStatistics] | None = None

    def add(self, block: _Block, predictions: Mapping[int, Predictions]) -> bool:
        """Add a block that was scored by each model; return whether the chunk is whole."""
        self.keys.append(block.keys)
        self.kept.append(block.kept)
        for place, values in predictions.items():
            self.predictions.setdefault(place, []).append(values)
            self.flags.setdefault(place, []).append(block.encoded[place].flags)
        self.statistics = block.statistics
        self.rows_left -= block.rows
        return self.rows_left == 0

    def list_whole(self) -> list[int]:
        """Return the places of the models that have scored every block, those of challengers first."""
        return sorted((at for at, some in self.predictions.items() if len(some) == len(self.keys)), reverse=True)


class _Slot:
    """One stream of forward passes: blocks come in from a reading thread, whole chunks go out to a writing one."""

    def __init__(self, scorer: Scorer, writer: Executor) -> None:
        self._scorer, self._plan, self._scheduler, self._writer = scorer, scorer.plan, scorer.scheduler, writer
        self._machine = scorer.machine
        self._forwards = {
            place: Forward(
                *(each.model, each.plan.contract, each.plan.batch_size),
                may_continue=self._may_continue,
                # A challenger is passed before the model of the run, which finds the inputs as they were encoded.
                keeps_inputs=place > 0,
                delays=scorer.pauses,
            )
            for place, each in scorer.models.items()
        }
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
            rows = self._plan.chunk(claim.chunk).rows
            self.chunk = _OpenChunk(claim=claim, rows_left=rows, started=self._machine.clock())
        else:
            self._release(claim)

    def score(self, block: _Block) -> None:
        """Score a block by each model, add it to the chunk, and have the chunk written once it has all its rows."""
        try:
            found = {place: self._predict(place, block.encoded[place]) for place in sorted(block.encoded, reverse=True)}
        except DependencyFault as fault:
            self._leave_out(fault)
            return
        predictions = {place: values for place, values in found.items() if values is not None}
        chunk = self.chunk
        if chunk is not None and chunk.add(block, predictions):
            self._submit_write(chunk)
            self.chunk = None

    def _leave_out(self, fault: DependencyFault) -> None:
        """Go on with the next chunk; raises the fault where it is not the first in a row."""
        if self.chunk is None or self._scorer.count_failed(failed=True) >= _FAILED_IN_A_ROW_MAX:
            raise fault
        claim, self.chunk = self.chunk.claim, None
        self._note_fault(claim, fault)

    def _note_fault(self, claim: ChunkClaim, fault: SourceFault | DependencyFault) -> None:
        """Leave a chunk out of this pass, with the reason."""
        self._scheduler.note_fault(claim.chunk)
        self.result.faults[claim.chunk] = fault
        self._release(claim)

    def _predict(self, place: int, encoded: Encoded) -> Predictions | None:
        """Return the predictions of a model; None of a challenger that is given up."""
        if not place:
            with self.result.timed("forward"):
                return self._forwards[place].score(encoded)
        if place not in self._scorer.models:
            return None
        try:
            with self.result.timed(_CHALLENGERS):
                return self._forwards[place].score(encoded)
        except DeviceLost:
            raise
        except OvernightError as error:
            self._scorer.give_up(place, str(error))
            return None

    def finish(self) -> ScoringResult:
        """Wait until the last part is durable; return what the slot has done."""
        if self._writing is not None:
            self._writing.result()
        result = self.result
        self._scorer.observe(
            ScoringResult(
                chunks_dropped=result.chunks_dropped, bytes_read=result.bytes_read, seconds=dict(result.seconds)
            )
        )
        return result

    def _may_continue(self) -> bool:
        """Return whether to go on with the open chunk; asked before each batch."""
        open_chunk = self.chunk
        return open_chunk is None or self._scheduler.may_continue(
            open_chunk.claim, self._machine.clock() - open_chunk.started
        )

    def read(self, shard: int) -> Generator[ChunkClaim | _Block]:
        """Yield each claim, then its blocks; runs in the read-ahead thread."""
        reader, keys = self._open_reader(), key_names(self._plan.options)
        inputs = list(self._plan.input_columns)
        for claim in self._scheduler.claim_chunks(shard, self._idle):
            yield claim
            chunk = self._plan.chunk(claim.chunk)
            missing = self._scheduler.list_missing(claim.chunk)
            blocks, rows_left = reader.blocks(chunk, self._plan.block_rows(chunk)), chunk.rows
            keeps_statistics = self._plan.options.gate is not None and 0 in missing
            collector = StatisticsCollector(chunk.rows) if keeps_statistics else None
            try:
                while True:
                    with self.result.timed("read"):
                        table = next(blocks, None)
                    if table is None:
                        break
                    self.result.bytes_read += table.nbytes
                    with self.result.timed("encode"):
                        encoded = self._encode(table, missing)
                        rows_left -= table.num_rows
                        statistics = None
                        if collector is not None:
                            collector.add(table.select(inputs))
                            statistics = None if rows_left else collector.finish()
                        block = _Block(
                            rows=table.num_rows,
                            encoded=encoded,
                            keys=table.select(keys),
                            kept=table.select(self._plan.columns_kept),
                            statistics=statistics,
                        )
                    # Only keys and inputs are needed from here on. The rest is freed before the next block is read.
                    del table, encoded
                    yield block
                    del block
            except SourceFault as fault:
                reader = self._open_reader()
                self._note_fault(claim, fault)

    def _encode(self, table: pa.Table, missing: Sequence[int]) -> dict[int, Encoded]:
        """Return the inputs of each model that lacks its part: encoded once for those that take the same."""
        found: dict[int, Encoded] = {}
        by_inputs: dict[tuple[Input, ...], Encoded] = {}
        for place in missing:
            if (each := self._scorer.models.get(place)) is None:
                continue
            inputs = each.plan.contract.inputs
            if inputs not in by_inputs:
                # What another model's process has to itself is copied on the way to this one's.
                lend = each.model.lend_memory(table.num_rows) if isinstance(each.model, Isolated) else np.empty
                by_inputs[inputs] = encode(each.plan.contract, table, lend)
            encoded = by_inputs[inputs].with_own_flags()
            if not place and encoded.flags.reasons:
                self._scorer.keep_samples(table, encoded.flags)
            if (prepared := self._prepare(place, each.model, encoded)) is not None:
                found[place] = prepared
        return found

    def _prepare(self, place: int, model: Model, encoded: Encoded) -> Encoded | None:
        try:
            return model.prepare(encoded)
        except Exception as error:
            if not place:
                raise
            self._scorer.give_up(place, describe_error(error))
            return None

    def _open_reader(self) -> Reader | JoinedReader:
        return open_joined_reader(self._plan, self._scorer.features)

    def _release(self, claim: ChunkClaim) -> None:
        if claim.helping:
            self._idle.release()

    def _submit_write(self, open_chunk: _OpenChunk) -> None:
        """Give a whole chunk to the writer, after the one before it is durable."""
        if self._writing is not None:
            self._writing.result()
        sizes = {place: each.safe_batch_size or each.batch_size for place, each in self._forwards.items()}
        self._writing = self._writer.submit(self._write, open_chunk, sizes)
        self._release(open_chunk.claim)

    def _write(self, open_chunk: _OpenChunk, batch_sizes: Mapping[int, int]) -> None:
        chunk, result = open_chunk.claim.chunk, self.result
        found = {place: self._put_part(open_chunk, place, batch_sizes[place]) for place in open_chunk.list_whole()}
        written = {place: each for place, each in found.items() if each is not None}
        won = all(each.won for each in written.values())
        self._scorer.count_failed(failed=False)
        self._scheduler.note_scored(chunk, self._machine.clock() - open_chunk.started, won=won)
        # Where a challenger alone lacked its part, the rows count as those of the earlier run that scored them.
        rows = self._plan.chunk(chunk).rows if 0 in written else 0
        size = sum(each.bytes for each in written.values())
        rejects = written[0].rejects if 0 in written else Counter()
        result.rows += rows
        result.chunks += 1
        result.rejects += rejects
        result.parts_put += sum(each.won for each in written.values())
        result.bytes_written += size
        result.rows_recomputed += 0 if won else rows
        self._scorer.observe(
            ScoringResult(
                rows=rows,
                chunks=1,
                rejects=rejects,
                parts_put=sum(each.won for each in written.values()),
                bytes_written=size,
            )
        )
        for place, each in written.items():
            if place and each.won:
                self._scorer.count_challenger_rejects(place, each.rejects)
        if 0 in written and written[0].won:
            self._scorer.count_rejects(rejects)

    def _put_part(self, open_chunk: _OpenChunk, place: int, batch_size: int) -> _PutPart | None:
        """Write the part of one model, unless another worker has; None for a challenger whose files were changed."""
        chunk = open_chunk.claim.chunk
        # A challenger that was given up meanwhile is known by its plan.
        plan = self._plan.challenger_plans[place - 1] if place else self._plan
        with self.result.timed("write"):
            flags, some = Flags.concat(open_chunk.flags[place]), open_chunk.predictions[place]
            predictions = {name: np.concatenate([each[name] for each in some]) for name in some[0]}
            data = encode_part(
                *(plan, plan.chunk(chunk), pa.concat_tables(open_chunk.keys), predictions, flags, batch_size),
                None if place else open_chunk.statistics,
                pa.concat_tables(open_chunk.kept) if place else None,
            )
            try:
                check_model_unchanged(plan.model)
            except ModelUnfit as error:
                if not place:
                    raise
                self._scorer.give_up(place, str(error))
                return None
            won = self._scorer.destination.put_new(part_path(plan, chunk), data)
        return _PutPart(won=won, bytes=data.nbytes if won else 0, rejects=count_reasons(flags) if won else Counter())


@dataclass(frozen=True, slots=True, kw_only=True)
class _PutPart:
    """A part that was written, or that another worker had written before: that one has no bytes and no rejects."""

    won: bool
    bytes: int
    rejects: Reasons
