"""What scoring comes to: counts of what was done, its rejects, and whether these are too many."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pyarrow as pa

from serving.errors import DependencyFault, SourceFault, TooManyRejects, list_shortly
from serving.option_words import name_option
from tasks.batch.disclosure import shorten_reasons
from tasks.batch.options import Disclose
from tasks.batch.part_footer import Reasons
from tasks.batch.parts import ChunkId
from tasks.batch.plan import Plan

STAGES = ("read", "encode", "forward", "write")
_FAULTS_SHOWN, _REASONS_SHOWN, _SAMPLE_CHARACTERS = 4, 3, 40

# A value of the column that a reject of this column and reason had.
Samples = dict[tuple[str, str], str]


@dataclass(slots=True, kw_only=True)
class ScoringResult:
    """The result of scoring: rows, rejects, what failed by chunk, seconds by stage over all threads."""

    rows: int = 0
    rows_recomputed: int = 0
    chunks: int = 0
    chunks_dropped: int = 0
    parts_put: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    rejects: Reasons = field(default_factory=Counter)
    faults: dict[ChunkId, SourceFault | DependencyFault] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    def add(self, other: ScoringResult) -> None:
        """Add what another slot has done."""
        self.rows += other.rows
        self.rows_recomputed += other.rows_recomputed
        self.chunks += other.chunks
        self.chunks_dropped += other.chunks_dropped
        self.parts_put += other.parts_put
        self.bytes_read += other.bytes_read
        self.bytes_written += other.bytes_written
        self.rejects += other.rejects
        self.faults |= other.faults
        stages = dict.fromkeys([*self.seconds, *other.seconds])
        self.seconds = {stage: self.seconds.get(stage, 0.0) + other.seconds.get(stage, 0.0) for stage in stages}

    def faults_error(self) -> SourceFault | DependencyFault:
        """Return one error that lists the faults of all chunks, of the kind of the first."""
        listed = list_shortly(list(dict.fromkeys(map(str, self.faults.values()))), _FAULTS_SHOWN)
        kind = type(next(iter(self.faults.values())))
        must = "Every source file must be readable and unchanged"
        return kind(
            f"{'What the model calls must answer' if issubclass(kind, DependencyFault) else must}; "
            f"{len(self.faults)} chunks could not be scored:\n"
            f"{listed}\nThe parts of all other chunks are there, and nothing is published."
        )

    @contextmanager
    def timed(self, stage: str) -> Generator[None]:
        """Count the seconds of a block of code towards a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


def show_value(value: pa.Scalar) -> str:
    """Return a value as an error shows it: short, and nothing for a null, which its reason names."""
    if not value.is_valid:
        return ""
    text = repr(str(value))
    return text if len(text) <= _SAMPLE_CHARACTERS else f"{text[:_SAMPLE_CHARACTERS]}..."


def check_rejects(
    rejects: Reasons,
    plan: Plan,
    fraction_max: float,
    samples: Samples | None = None,
    disclose: Disclose = "values",
) -> None:
    """Raise TooManyRejects where the rejects so far are more than the fraction of all rows allows.

    Args:
        rejects: How many rows were rejected, by column and reason.
        plan: Whose rows they are.
        fraction_max: How many of its rows may be rejects.
        samples: A value for each kind of reject that is known.
        disclose: Whether the error may quote values of rows.
    """
    if rejects.total() > fraction_max * plan.rows:
        listed = list_reasons(shorten_reasons(rejects) if disclose == "nothing" else rejects, samples or {})
        message = (
            f"At most {fraction_max:.4g} of {plan.rows:,} rows may be rejects, got {rejects.total():,} so far; nothing "
            f"is published. Most are:\n{listed}\n"
            f"See all with open_rejects(destination, run={plan.run!r}); `overnight rejects DESTINATION --run {plan.run}"
            " --output rejects.parquet` writes these rows as the source has them. Correct the data, or raise "
            f"{name_option('max_reject_fraction')} and call again. Where it was no fault of the rows, call again with "
            f"another {name_option('rescore')}."
        )
        raise TooManyRejects(message)


def list_reasons(rejects: Reasons, samples: Samples) -> str:
    """Return the most frequent reasons of rejects, a line each, with a value where one is known."""
    lines = []
    for (column, reason), rows in rejects.most_common():
        where = f"{column}: {reason}" if column else reason
        such = f", such as {samples[column, reason]}" if samples.get((column, reason)) else ""
        lines.append(f"{where} ({rows:,} rows{such})")
    return list_shortly(lines, _REASONS_SHOWN)
