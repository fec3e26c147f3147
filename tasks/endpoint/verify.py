"""Hold a release against its model: the same rows must get the same answers, before anybody else's do."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from pydantic import Field

from serving.errors import VerifyFailed
from serving.model.contract import Contract, Frozen, Output
from tasks.endpoint.resolve import Subject
from tasks.endpoint.samples import Arrays, Sample

Ask = Callable[[Arrays], Arrays]


class Verification(Frozen):
    """What a release's answers were held against, and how far they were off."""

    rows_example: int = Field(description="Rows of the model's input example.")
    rows_random: int = Field(description="Random rows.")
    difference_max: float = Field(description="The largest difference, relative to the largest answer or to 1.")
    tolerance: float = Field(description="What it may be at most.")


def verify(ask: Ask, subject: Subject, *, size: int, tolerance: float) -> Verification:
    """Ask for every row of the model's example and of random ones, alone and in requests of `size` rows, and compare.

    Raises VerifyFailed with the first row that differs by more than the tolerance, and what comes through from `ask`.
    """
    worst = 0.0
    for sample in filter(None, (subject.example, subject.random)):
        for rows in dict.fromkeys((1, size)):
            for piece in sample.pieces(rows):
                worst = max(worst, compare(subject.contract, piece, ask(piece.inputs), tolerance))
    return Verification(
        rows_example=subject.example.rows if subject.example else 0,
        rows_random=subject.random.rows if subject.random else 0,
        difference_max=worst,
        tolerance=tolerance,
    )


def compare(contract: Contract, expected: Sample, got: Arrays, tolerance: float) -> float:
    """Return how far answers are from the model's, relative to the largest of its answers or to 1.

    Raises VerifyFailed where that is more than the tolerance, or where what is no float is not the same.
    """
    return max(_compare(output, expected.outputs[output.name], got, tolerance) for output in contract.outputs)


def _compare(output: Output, wanted: npt.NDArray[np.generic], got: Arrays, tolerance: float) -> float:
    found = got.get(output.name)
    if found is None or found.shape != wanted.shape:
        shape = None if found is None else found.shape
        message = f"Output {output.name!r} must be there in the shape {wanted.shape}, got {shape} from the endpoint."
        raise VerifyFailed(message)
    if wanted.dtype.kind != "f":
        if not np.array_equal(wanted, found):
            raise _differs(
                output, wanted, found, int(np.argmax((wanted != found).reshape(len(wanted), -1).any(axis=1)))
            )
        return 0.0
    off_N = np.abs(wanted.astype(np.float64) - found.astype(np.float64)).reshape(len(wanted), -1).max(axis=1, initial=0)
    off_N /= max(1.0, float(np.abs(wanted).max(initial=0)))
    # Not-a-number is no answer that is near enough.
    if not (off_N <= tolerance).all():
        raise _differs(output, wanted, found, int(np.argmax(~(off_N <= tolerance))), tolerance)
    return float(off_N.max(initial=0))


def _differs(
    output: Output,
    wanted: npt.NDArray[np.generic],
    found: npt.NDArray[np.generic],
    row: int,
    tolerance: float | None = None,
) -> VerifyFailed:
    within = "" if tolerance is None else f" within {tolerance:g}"
    return VerifyFailed(
        f"The endpoint must answer {output.name!r} as the model itself does{within}, {_shown(wanted[row])}, got "
        f"{_shown(found[row])}. A model that answers differently each time does this, and so do other libraries on the "
        "server than here: mend the model, or the server's environment. Where it is rounding alone, raise tolerance."
    )


def _shown(value: object) -> str:
    return np.array2string(np.asarray(value), threshold=6, precision=9)
