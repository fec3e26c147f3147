"""A race: contenders that score the same table in turn, each at its best batch size, their answers compared."""

from __future__ import annotations

import math
import re
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from rich.progress import track

from tasks.batch.manifest import open_predictions
from tests.benchmarks.shared import FOLDER, ROUNDS, console

DIFFERENCE_MAX = 1e-5
COSINE_MIN = 0.999

Run = Callable[[Path, Path, int], dict[str, Any]]


@dataclass(slots=True, kw_only=True)
class Contender:
    """One who scores, and what became of it.

    `run` takes a source, a destination and a batch size, 0 where the contender chooses by itself.
    """

    name: str
    run: Run
    batches: tuple[int, ...] = (0,)
    ours: bool = False
    rounded: bool = False  # computes in less than float32: its answer is compared by cosine
    batch: int = 0
    version: str = ""
    seconds: list[float] = field(default_factory=list)
    agreement: list[float] = field(default_factory=list)
    fault: str = ""

    def worst_agreement(self) -> str:
        """Say how far its answers were from what was expected."""
        if not self.agreement:
            return ""
        return f"cosine {min(self.agreement):.5f}" if self.rounded else f"{max(self.agreement):.1e}"

    def median_seconds(self) -> float:
        """Return the median of the rounds, NaN without any."""
        return statistics.median(self.seconds) if self.seconds and not self.fault else math.nan


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """What is scored: a smaller table to find the batch sizes on, the table itself, and the key of their rows."""

    title: str
    few: Path
    many: Path
    key: str


def race(course: Course, contenders: Sequence[Contender]) -> None:
    """Find each one's batch size, then run them in turn; the first one's answer is what the others' must equal.

    A contender that fails or answers otherwise keeps the reason as its fault, and is out, as is one that came with one.
    """
    expected: pl.DataFrame | None = None
    for contender in track(contenders, f"{course.title}: best batch sizes", console=console):
        if contender.fault:
            continue
        tried = {batch: _attempt(contender, course, course.few, batch) for batch in contender.batches}
        finished = {batch: answer for batch, answer in tried.items() if answer is not None}
        if finished:
            contender.batch = min(finished, key=lambda batch: finished[batch][0])
            contender.fault = ""
            expected = _agree(contender, expected, finished[contender.batch][1])
    for _ in track(range(ROUNDS), f"{course.title}: in turn", console=console):
        expected = None
        for contender in contenders:
            if contender.fault or (answer := _attempt(contender, course, course.many, contender.batch)) is None:
                continue
            contender.seconds.append(answer[0])
            expected = _agree(contender, expected, answer[1])


def _attempt(contender: Contender, course: Course, source: Path, batch: int) -> tuple[float, pl.DataFrame] | None:
    destination = FOLDER / "peers" / "out" / contender.name
    shutil.rmtree(destination.parent, ignore_errors=True)
    destination.parent.mkdir(parents=True)
    try:
        found = contender.run(source, destination, batch)
        answer = open_predictions(str(destination)) if contender.ours else pl.scan_parquet(destination / "*.parquet")
        columns = [course.key, next(name for name in answer.collect_schema() if name != course.key)]
        table = answer.select(columns).sort(course.key).collect()
    except Exception as error:  # noqa: BLE001 - whatever a contender fails with is what is said of it
        contender.fault = reason(error)
        return None
    contender.version = found.get("version", "")
    return found["seconds"], table


def reason(error: Exception) -> str:
    """Return the line that says why: the last one of a process that names an error, or its last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if re.search(r"error|exception", line, re.IGNORECASE)]
    return [repr(error), *lines, *named][-1]


def _agree(contender: Contender, expected: pl.DataFrame | None, answer: pl.DataFrame) -> pl.DataFrame:
    """Compare an answer with what is expected, and return what is expected of the next."""
    if expected is None:
        return answer
    if not expected.to_series(0).equals(answer.to_series(0)):
        contender.fault = f"must answer the {len(expected):,} rows, each once, got {len(answer):,} or others"
        return expected
    pair = _vectors(expected.to_series(1)), _vectors(answer.to_series(1))
    found = _cosine_min(*pair) if contender.rounded else _difference_max(*pair)
    contender.agreement.append(found)
    if not (found >= COSINE_MIN if contender.rounded else found <= DIFFERENCE_MAX):
        contender.fault = (
            f"must answer the same, got a {'cosine' if contender.rounded else 'difference'} of {found:.2g}"
        )
    return expected


def _vectors(values: pl.Series) -> np.ndarray[Any, Any]:
    if values.dtype == pl.List:
        values = values.list.to_array(int(values.list.len()[0]))
    return values.to_numpy().reshape(len(values), -1)


def _difference_max(a_ND: np.ndarray[Any, Any], b_ND: np.ndarray[Any, Any]) -> float:
    return float(np.abs(a_ND - b_ND).max())


def _cosine_min(a_ND: np.ndarray[Any, Any], b_ND: np.ndarray[Any, Any]) -> float:
    norms = np.linalg.norm(a_ND, axis=1) * np.linalg.norm(b_ND, axis=1)
    return float(((a_ND * b_ND).sum(axis=1) / norms).min())
