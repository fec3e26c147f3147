"""What labels say of predictions, as sums that add up over rows: errors, accuracy, log loss and the area under ROC.

The figures are those of scikit-learn's functions of the same names, made of sums, so that no more than some rows are in
memory. Shapes: n rows, W classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from serving.errors import BadInput
from serving.model.contract import is_list, is_text
from tasks.batch.challenger_rules import LabelKind

Measures = dict[str, npt.NDArray[np.float64]]

# As long as there are no more rows, the area under ROC is exact; then scores are counted in as many ranges.
ROWS_EXACT, _RANGES = 1 << 20, 1 << 16
_HALF = 0.5
_TRUE, _FALSE = pa.array(["1", "true", "1.0"]), pa.array(["0", "false", "0.0"])


def measure_labels(kind: LabelKind, predicted: pa.Array, labels: pa.Array) -> Measures:
    """Return what each of n rows adds to the sums of its metrics; NaN where a prediction is no probability.

    Args:
        kind: What the labels are.
        predicted: Predictions: numbers, classes, or lists of W numbers, none null.
        labels: What the rows turned out to be, none null.

    Raises BadInput where labels are not of that kind.
    """
    if kind == "regression":
        error_n = _to_numbers(predicted) - _to_numbers(labels)
        return {"mae": np.abs(error_n), "rmse": np.square(error_n)}
    if is_list(predicted.type):
        return _measure_classes(predicted, labels)
    if pa.types.is_floating(predicted.type):
        return _measure_probabilities(predicted, labels)
    return {"accuracy": _equal_classes(predicted, labels).astype(np.float64)}


def _measure_probabilities(predicted: pa.Array, labels: pa.Array) -> Measures:
    """Measure the probability of true or 1."""
    chance_n, true_n = _to_numbers(predicted), find_positives(labels)
    is_chance = bool(((chance_n >= 0) & (chance_n <= 1)).all())
    hit_n = np.where(true_n, chance_n, 1 - chance_n)
    measured = {"accuracy": ((chance_n > _HALF) == true_n).astype(np.float64), "log_loss": _lose(hit_n, predicted.type)}
    return measured if is_chance else {name: np.full(len(chance_n), np.nan) for name in measured}


def _measure_classes(predicted: pa.Array, labels: pa.Array) -> Measures:
    """Measure lists of the probabilities of classes 0 to W - 1."""
    chance_nW = np.asarray(predicted.flatten().to_numpy(zero_copy_only=False), np.float64).reshape(len(predicted), -1)
    numbers_n = _to_numbers(labels)
    class_n = numbers_n.astype(np.int64)
    if ((class_n != numbers_n) | (class_n < 0) | (class_n >= chance_nW.shape[1])).any():
        message = (
            f"Labels must be classes from 0 to {chance_nW.shape[1] - 1}, as a prediction has {chance_nW.shape[1]} "
            f"numbers, got others between {numbers_n.min():g} and {numbers_n.max():g}. Number them so."
        )
        raise BadInput(message)
    hit_n = chance_nW[np.arange(len(class_n)), class_n]
    is_chance = bool(((chance_nW >= 0) & (chance_nW <= 1)).all())
    loss_n = _lose(hit_n, predicted.type.value_type) if is_chance else np.full(len(class_n), np.nan)
    return {"accuracy": (chance_nW.argmax(axis=1) == class_n).astype(np.float64), "log_loss": loss_n}


def _lose(hit_n: npt.NDArray[np.float64], given: pa.DataType) -> npt.NDArray[np.float64]:
    """Return the logarithmic loss of the probabilities of what happened, cut as scikit-learn does by their type."""
    least = float(np.finfo(given.to_pandas_dtype()).eps)
    return np.asarray(-np.log(np.clip(hit_n, least, 1 - least)))


def _equal_classes(predicted: pa.Array, labels: pa.Array) -> npt.NDArray[np.bool_]:
    """Return which of n classes are equal, as numbers where both are, else as text."""
    one, other = (value.cast(pa.int8()) if pa.types.is_boolean(value.type) else value for value in (predicted, labels))
    if is_text(one.type) or is_text(other.type):
        one, other = one.cast(pa.string()), other.cast(pa.string())
        return np.asarray(pc.equal(one, other).to_numpy(zero_copy_only=False))
    return np.asarray(_to_numbers(one) == _to_numbers(other))


def find_positives(labels: pa.Array) -> npt.NDArray[np.bool_]:
    """Return which of n labels are true or 1. Raises BadInput where one is neither that nor false or 0."""
    texts = labels.cast(pa.string())
    lower = pc.utf8_lower(texts)
    true, false = pc.is_in(lower, _TRUE), pc.is_in(lower, _FALSE)
    if (others := pc.invert(pc.or_(true, false))).true_count:
        found = texts.filter(others)[0].as_py()
        message = (
            f"Labels must be true or false, or 1 or 0, where a prediction is the probability of true, got "
            f"{str(found)[:60]!r}. Make them so, or say kind='regression'."
        )
        raise BadInput(message)
    return np.asarray(true.to_numpy(zero_copy_only=False))


def _to_numbers(values: pa.Array) -> npt.NDArray[np.float64]:
    """Return values as float64. Raises BadInput where a text is no number."""
    try:
        return np.asarray(values.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False))
    except pa.ArrowInvalid as error:
        message = f"Labels that are compared with numbers must be numbers, got: {str(error)[:120]}. Correct them."
        raise BadInput(message) from None


@dataclass(slots=True)
class RocArea:
    """The area under ROC of scores that come in pieces, in bounded memory.

    Up to 2^20 rows it is exact. Of more, scores are counted in 65,536 ranges that the first rows make equally
    frequent; `error_max` then says by how much the area may be off.
    """

    _scores: list[npt.NDArray[np.float64]] = field(default_factory=list)
    _positives: list[npt.NDArray[np.bool_]] = field(default_factory=list)
    _rows: int = 0
    _edges: npt.NDArray[np.float64] | None = None
    _counts: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros((2, 0), np.int64))

    def add(self, scores: npt.NDArray[np.float64], positives: npt.NDArray[np.bool_]) -> None:
        """Add n scores, and which of them are of positive rows."""
        if self._edges is not None:
            self._count(scores, positives)
            return
        self._scores.append(scores)
        self._positives.append(positives)
        self._rows += len(scores)
        if self._rows > ROWS_EXACT:
            kept, some = np.concatenate(self._scores), np.concatenate(self._positives)
            ordered = np.sort(kept)
            self._edges = np.unique(ordered[np.arange(1, _RANGES) * len(ordered) // _RANGES])
            self._counts = np.zeros((2, len(self._edges) + 1), np.int64)
            self._scores, self._positives = [], []
            self._count(kept, some)

    def _count(self, scores: npt.NDArray[np.float64], positives: npt.NDArray[np.bool_]) -> None:
        assert self._edges is not None  # noqa: S101 - the callers have made them
        places = np.searchsorted(self._edges, scores, side="right")
        for at, some in enumerate((~positives, positives)):
            self._counts[at] += np.bincount(places[some], minlength=self._counts.shape[1])

    def result(self) -> tuple[float, float]:
        """Return the area and by how much it may be off; NaN twice where only one class has rows."""
        if self._edges is None:
            if not self._rows:
                return math.nan, math.nan
            values, places = np.unique(np.concatenate(self._scores), return_inverse=True)
            positives = np.concatenate(self._positives)
            counts = np.stack([np.bincount(places[some], minlength=len(values)) for some in (~positives, positives)])
        else:
            counts = self._counts
        negative, positive = counts.astype(np.float64)
        pairs = negative.sum() * positive.sum()
        if not pairs:
            return math.nan, math.nan
        tied = float((negative * positive).sum()) * _HALF
        below = np.concatenate([[0.0], np.cumsum(negative)[:-1]])
        area = (float((positive * below).sum()) + tied) / pairs
        return area, 0.0 if self._edges is None else tied / pairs


def finish_metric(name: str, total: float, rows: int) -> Any:
    """Return a metric out of the sum of what rows add to it; None where it can't be told."""
    if not rows or math.isnan(total):
        return None
    return math.sqrt(total / rows) if name == "rmse" else total / rows
