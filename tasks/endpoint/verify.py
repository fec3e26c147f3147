"""Compare the answers of a release with those of its model, before it gets any traffic."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from pydantic import Field

from serving.errors import VerifyFailed
from serving.model.contract import Contract, Frozen, Output
from tasks.endpoint.resolve import Arrays, Loaded, Sample

Ask = Callable[[Arrays], Arrays]


class Verification(Frozen):
    """The rows that a release was asked for, and the largest difference from the model's own answers."""

    rows_example: int = Field(description="Rows of the model's input example.")
    rows_random: int = Field(description="Random rows.")
    difference_max: float = Field(description="The largest difference, relative to the largest answer or to 1.")
    tolerance: float = Field(description="What it may be at most.")


def verify_endpoint(ask: Ask, loaded: Loaded, *, rows_max: int, tolerance: float) -> Verification:
    """Ask for every row of the samples, alone and in requests of `rows_max` rows, and compare with the model's answers.

    Raises VerifyFailed with the first row that differs by more than the tolerance, and whatever `ask` raises.
    """
    difference_max = 0.0
    for sample in filter(None, (loaded.example, loaded.random)):
        for rows in dict.fromkeys((1, rows_max)):
            for part in sample.split(rows):
                difference_max = max(
                    difference_max, compare_answers(loaded.contract, part, ask(part.inputs), tolerance)
                )
    return Verification(
        rows_example=loaded.example.rows if loaded.example else 0,
        rows_random=loaded.random.rows if loaded.random else 0,
        difference_max=difference_max,
        tolerance=tolerance,
    )


def compare_answers(contract: Contract, expected: Sample, answers: Arrays, tolerance: float) -> float:
    """Return how far answers are from the model's, relative to the largest of its answers or to 1.

    Raises VerifyFailed where that is more than the tolerance, or where values that are no floats differ at all.
    """
    return max(
        _compare_output(output, expected.outputs[output.name], answers, tolerance) for output in contract.outputs
    )


def _compare_output(output: Output, expected: npt.NDArray[np.generic], answers: Arrays, tolerance: float) -> float:
    answer = answers.get(output.name)
    if answer is None or answer.shape != expected.shape:
        shape = None if answer is None else answer.shape
        message = f"Output {output.name!r} must be there in the shape {expected.shape}, got {shape} from the endpoint."
        raise VerifyFailed(message)
    if expected.dtype.kind != "f":
        if not np.array_equal(expected, answer):
            raise _make_difference_error(
                output, expected, answer, int(np.argmax((expected != answer).reshape(len(expected), -1).any(axis=1)))
            )
        return 0.0
    off_N = (
        np.abs(expected.astype(np.float64) - answer.astype(np.float64))
        .reshape(len(expected), -1)
        .max(axis=1, initial=0)
    )
    off_N /= max(1.0, float(np.abs(expected).max(initial=0)))
    # NaN fails this comparison, as it must.
    if not (off_N <= tolerance).all():
        raise _make_difference_error(output, expected, answer, int(np.argmax(~(off_N <= tolerance))), tolerance)
    return float(off_N.max(initial=0))


def _make_difference_error(
    output: Output,
    expected: npt.NDArray[np.generic],
    answer: npt.NDArray[np.generic],
    row: int,
    tolerance: float | None = None,
) -> VerifyFailed:
    within = "" if tolerance is None else f" within {tolerance:g}"
    return VerifyFailed(
        f"The endpoint must answer {output.name!r} as the model itself does{within}, {_format_value(expected[row])}, "
        f"got {_format_value(answer[row])}. A model that answers differently each time does this, and so do other "
        "libraries on the server than here: repair the model, or the server's environment. Where it is only rounding, "
        "raise tolerance."
    )


def _format_value(value: object) -> str:
    return np.array2string(np.asarray(value), threshold=6, precision=9)
