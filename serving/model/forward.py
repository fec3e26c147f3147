"""Score N encoded rows in batches: bad rows keep their place, and their neighbours keep their bits.

A row that can't be scored is overwritten with a copy of a good row of its batch. So every batch keeps its shape and its
other values, and the bits of the neighbours do not change.
"""

from __future__ import annotations

import itertools
import logging
import random
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from serving.errors import DependencyFault, DeviceLost, ModelFailed, OvernightError
from serving.faults import describe_error, is_dependency_fault, is_device_lost, is_out_of_memory, is_own_exit
from serving.model.contract import Contract
from serving.model.encoding import Encoded, Flags, copy_array
from serving.model.interface import Arrays, Halted, Isolated, Model, Overlapping, Predictions
from serving.model.outputs import find_missing

T = TypeVar("T")
R = TypeVar("R")

# About 39 s in all: long enough for a service to restart.
_DELAYS_SECONDS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0)
_CHECK_SECONDS = 0.1

_log = logging.getLogger(__name__)


class ModelExit(Exception):
    """The model tried to end the process; this is treated as any other error of the model."""


def iter_retry_delays() -> Iterator[float]:
    """Yield the seconds to wait before each of eight retries of a pass whose dependencies fail.

    Each is varied at random, so that workers that one outage has stopped do not all retry at the same moment.
    """
    for seconds in _DELAYS_SECONDS:
        yield seconds * random.uniform(0.75, 1.25)  # noqa: S311 - spreads the tries; nothing depends on its values


def iter_endless_retry_delays() -> Iterator[float]:
    """Yield the same without end, for callers that nobody would start again."""
    yield from iter_retry_delays()
    while True:
        yield _DELAYS_SECONDS[-1] * random.uniform(0.75, 1.25)  # noqa: S311 - the same


@dataclass(slots=True)
class Forward:
    """One stream of forward passes over a model, and what it has learnt of the model.

    Attributes:
        batch_size: Rows of a pass; tokens with padding, where rows have lengths.
        safe_batch_size: The largest batch that fits in memory, in the same unit. None until a batch did not fit.
        proven: Whether a row has had a prediction. Until then a batch whose rows all fail raises ModelFailed.
        may_continue: Called before each batch and while waiting; where it returns False, scoring ends with Halted.
        keeps_inputs: Whether each pass is made over a copy of its inputs, so that others find them as they were.
        delays: Gives the seconds to wait before each retry of a pass that failed by a dependency (serving.faults).
    """

    model: Model
    contract: Contract
    batch_size: int
    safe_batch_size: int | None = None
    proven: bool = field(default=False)
    may_continue: Callable[[], bool] = field(default=lambda: True, repr=False)
    keeps_inputs: bool = False
    delays: Callable[[], Iterator[float]] = field(default=iter_retry_delays, repr=False)
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False)
    _overlapping: Overlapping | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._overlapping = self.model if isinstance(self.model, Overlapping) else None

    def score(self, encoded: Encoded) -> Predictions:
        """Predict N rows in batches of `batch_size`, counted from the first row.

        Rows that have lengths are passed in order of length, in batches of at most `batch_size` tokens with padding.
        Predictions and flags are returned in the order of the rows. Flags the rows that the model fails on, and those
        whose predictions are not finite. The inputs of every flagged row are overwritten, unless they are kept.

        Raises:
            ModelFailed: Every row of the first batch fails, or a batch fails whose rows are good.
            DependencyFault: What the model calls or runs on fails for longer than the delays.
            DeviceLost: The device failed.
            Halted: `may_continue` returned False.
        """
        if encoded.length_N is None:
            return self._score_batches(_Batch(encoded.inputs), encoded.flags)
        order_N = np.argsort(encoded.length_N, kind="stable")
        flags = Flags(encoded.flags.code_N[order_N], encoded.flags.reasons)
        inputs = {name: value[order_N] for name, value in encoded.inputs.items()}
        in_order = self._score_batches(_Batch(inputs, encoded.length_N[order_N]), flags)
        encoded.flags.code_N[order_N] = flags.code_N
        out = {name: np.empty_like(value) for name, value in in_order.items()}
        for name, value in in_order.items():
            out[name][order_N] = value
        return out

    def _score_batches(self, rows: _Batch, flags: Flags) -> Predictions:
        out = self._make_empty(rows.rows)
        waiting: deque[_PendingBatch] = deque()
        # Once memory ran out, no pass is begun ahead of another.
        ahead = self._overlapping.passes_ahead if self._overlapping and self.safe_batch_size is None else 0
        for start, stop in itertools.pairwise(rows.find_edges(self.batch_size)):
            if not self.may_continue():
                raise Halted
            batch = rows.cut(start, stop)
            waiting.append(self._begin_batch(batch.copy() if self.keeps_inputs else batch, flags, start))
            if len(waiting) > ahead:
                self._finish_batch(waiting.popleft(), flags, out)
        for each in waiting:
            self._finish_batch(each, flags, out)
        return out

    def _begin_batch(self, batch: _Batch, flags: Flags, start: int) -> _PendingBatch:
        """Fill bad rows and, where the model overlaps passes, begin this one."""
        bad_n = flags.code_N[start : start + batch.rows] != 0
        if bad_n.any() and not bad_n.all():
            batch.fill(bad_n, int(np.argmin(bad_n)))
        pending = None
        if self._overlapping and self.safe_batch_size is None and not bad_n.all():
            # An error here occurs again in the pass that is then made alone.
            with suppress(Exception):
                pending = _call_model(self._overlapping.begin, batch.inputs)
        return _PendingBatch(batch, start, pending)

    def _finish_batch(self, waiting: _PendingBatch, flags: Flags, out: Predictions) -> None:
        batch, start = waiting.batch, waiting.start
        code_n = flags.code_N[start : start + batch.rows]
        good = np.flatnonzero(code_n == 0)
        if not len(good):
            return
        try:
            predictions = self._finish_pass(waiting)
        except (OvernightError, Halted):
            raise
        except Exception as error:  # noqa: BLE001 - the model is somebody else's code
            predictions = self._score_without_bad_rows(batch, flags, start, error)
        self._flag_invalid_predictions(predictions, flags, start)
        for name, value in predictions.items():
            if value.dtype.kind == "O" and out[name].dtype.kind != "O":
                # Nulls of an output that must have none, which are flagged by now.
                value = np.where(find_missing(value), 0, value)  # noqa: PLW2901 - the same predictions
            out[name][start : start + batch.rows] = value
        if not self.proven and code_n.all():
            raise _every_row_failed(flags, start + int(good[0]), len(good))
        self.proven = True

    def _finish_pass(self, waiting: _PendingBatch) -> Predictions:
        if waiting.pending is not None and self._overlapping:
            with suppress(Exception):
                return _call_model(self._overlapping.finish, waiting.pending)
        return self._run_pass(waiting.batch)

    def _score_without_bad_rows(self, batch: _Batch, flags: Flags, start: int, error: Exception) -> Predictions:
        """Find the bad rows by bisection, then pass the whole batch with those replaced."""
        bad: dict[int, str] = {}
        rows = batch.rows
        self._find_bad_rows(batch, 0, rows, error, bad)
        code_n = flags.code_N[start : start + rows]
        good = np.flatnonzero(code_n == 0)
        for row, reason in bad.items():
            flags.mark_row(start + row, "", reason)
        if code_n.all():
            if not self.proven:
                raise _every_row_failed(flags, start + int(good[0]), len(good))
            return self._make_empty(rows)
        batch.fill(code_n != 0, int(np.argmin(code_n != 0)))
        try:
            return self._run_pass(batch)
        except (OvernightError, Halted):
            raise
        except Exception as again:
            message = (
                "A batch must pass once its failing rows are replaced, got "
                f"{describe_error(again)} with {len(bad)} of {rows} rows replaced. "
                "The model fails on batches, not on rows."
            )
            raise ModelFailed(message) from again

    def _find_bad_rows(self, batch: _Batch, low: int, high: int, error: Exception, bad: dict[int, str]) -> None:
        """Add to `bad` each failing row of [low, high), which fails as a whole with `error`."""
        if high - low == 1:
            bad[low] = describe_error(error)
            return
        middle = (low + high) // 2
        for start, stop in ((low, middle), (middle, high)):
            try:
                self._run_pass(batch.cut(start, stop))
            except (OvernightError, Halted):
                raise
            except Exception as inner:  # noqa: BLE001 - the model's own exception, on fewer rows
                self._find_bad_rows(batch, start, stop, inner, bad)

    def _run_pass(self, batch: _Batch) -> Predictions:
        """Make one forward pass; where memory runs out, halve the batch and remember the size that fits."""
        if self.safe_batch_size is not None and batch.size > self.safe_batch_size and batch.rows > 1:
            return self._predict_in_pieces(batch, self.safe_batch_size)
        try:
            return self._predict(batch)
        except (OvernightError, Halted):
            raise
        except Exception as error:
            if is_device_lost(error):
                message = (
                    f"The device must answer, got {describe_error(error)}. This process ends; call again to resume."
                )
                raise DeviceLost(message) from error
            if not is_out_of_memory(error) or batch.rows == 1:
                raise
        # What fits is known once all of it has: where one row alone does not, it is the row's fault, not the batch's.
        size = max(1, batch.size // 2)
        predictions = self._predict_in_pieces(batch, size)
        self.safe_batch_size = min(size, self.safe_batch_size or size)
        return predictions

    def _predict(self, batch: _Batch) -> Predictions:
        """Call the model, and again after each delay where a dependency fails.

        The model gets a copy each time, since it may write to its inputs; one in another process gets its own anyway.
        """
        delays: Iterator[float] | None = None
        tries = 0
        while True:
            tries += 1
            try:
                if isinstance(self.model, Isolated):
                    return self.model.predict_while(batch.inputs, self.may_continue)
                inputs = {name: value.copy(order="K") for name, value in batch.inputs.items()}
                return _call_model(self.model.predict, inputs)
            except OvernightError:
                raise
            except Exception as error:
                if is_out_of_memory(error) or is_device_lost(error) or not is_dependency_fault(error):
                    raise
                delays = delays or self.delays()
                seconds = next(delays, None)
                if seconds is None:
                    raise _make_dependency_fault(error, tries) from error
                # Its message may quote a row; where no try passes, it is that of the run.
                _log.warning("The model failed with %s. It is called again in %.1f s.", type(error).__name__, seconds)
            self._wait(seconds)

    def _wait(self, seconds: float) -> None:
        """Wait, in steps short enough to notice soon that scoring must stop."""
        while seconds > 0:
            if not self.may_continue():
                raise Halted
            step = min(seconds, _CHECK_SECONDS)
            self.sleep(step)
            seconds -= step

    def _predict_in_pieces(self, batch: _Batch, size: int) -> Predictions:
        pieces = [self._run_pass(batch.cut(start, stop)) for start, stop in itertools.pairwise(batch.find_edges(size))]
        return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}

    def _make_empty(self, rows: int) -> Predictions:
        return {output.name: output.make_empty(rows) for output in self.contract.outputs}

    def _flag_invalid_predictions(self, predictions: Predictions, flags: Flags, start: int) -> None:
        for output in self.contract.outputs:
            value = predictions[output.name]
            is_float = value.dtype.kind in "fc"
            if not output.required and not is_float:
                continue
            invalid = find_missing(value) if output.required else np.isinf(value)
            if invalid.any():
                reason = "prediction is not finite" if is_float else "prediction is null"
                flags.mark(np.asarray(invalid.reshape(len(value), -1).any(axis=1)), output.name, reason, start)


@dataclass(frozen=True, slots=True)
class _Batch:
    """The inputs of n rows, and their lengths in ascending order where rows have lengths."""

    inputs: Arrays
    length_n: npt.NDArray[np.int64] | None = None

    @property
    def rows(self) -> int:
        return len(next(iter(self.inputs.values())))

    @property
    def size(self) -> int:
        """Its size in the unit of `batch_size`: rows, or tokens with padding."""
        return self.rows if self.length_n is None else self.rows * int(self.length_n[-1])

    def find_edges(self, size: int) -> list[int]:
        """Return the edges of batches of at most that size."""
        if self.length_n is None:
            return [*range(0, self.rows, size), self.rows]
        return find_token_edges(self.length_n, size)

    def cut(self, start: int, stop: int) -> _Batch:
        length_n = None if self.length_n is None else self.length_n[start:stop]
        return _Batch({name: value[start:stop] for name, value in self.inputs.items()}, length_n)

    def copy(self) -> _Batch:
        """Return the batch in memory of its own: small enough for the cache, where the pass then finds it."""
        return _Batch({name: copy_array(value) for name, value in self.inputs.items()}, self.length_n)

    def fill(self, bad_n: npt.NDArray[np.bool_], good: int) -> None:
        """Replace bad rows by copies of a good one, in place; nothing else in the batch changes."""
        for value in self.inputs.values():
            value[bad_n] = value[good : good + 1]


@dataclass(frozen=True, slots=True)
class _PendingBatch:
    """A batch that starts at row `start`, and its pass where the model has begun it already."""

    batch: _Batch
    start: int
    pending: Any


def find_token_edges(length_N: npt.NDArray[np.int64], tokens: int) -> list[int]:
    """Return the edges of batches over rows in order of length: at most `tokens` with padding, or one row."""
    edges = [0]
    for row, length in enumerate(length_N.tolist()):
        if row > edges[-1] and (row - edges[-1] + 1) * length > tokens:
            edges.append(row)
    return [*edges, len(length_N)] if len(length_N) else edges


def _every_row_failed(flags: Flags, row: int, rows: int) -> ModelFailed:
    """Return the error for a first batch whose rows all failed; `row` is one of them."""
    column, reason = flags.reasons[flags.code_N[row] - 1]
    where = f" (output {column!r})" if column else ""
    return ModelFailed(
        f"At least one row of the first batch must get a prediction, got none of {rows}: {reason}{where}. "
        "That is the model, not the rows: call it on a few of them by hand, and log a version that works."
    )


def _call_model(call: Callable[[T], R], argument: T) -> R:
    """Call into the model. Raises ModelExit where the model would end the process."""
    try:
        return call(argument)
    except (SystemExit, KeyboardInterrupt) as error:
        if not is_own_exit(error):
            raise
        message = f"it must return, got {describe_error(error)}"
        raise ModelExit(message) from None
    except BaseException as error:
        # Libraries in Rust raise this where they panic; it is not an Exception.
        if type(error).__name__ != "PanicException":
            raise
        raise ModelExit(describe_error(error)) from None


def _make_dependency_fault(error: Exception, tries: int) -> DependencyFault:
    return DependencyFault(
        f"What the model calls and runs on must answer, got {describe_error(error)} (tries: {tries}). No row is "
        "rejected for that. Fix the connection, the service or the file and call again; the run resumes. Where the "
        "error is about a row, have the model raise ValueError(...) from None."
    )
