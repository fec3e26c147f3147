"""What becomes of one value, said as plainly as Python allows: the measure for serving's arrays."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np

LOST = object()


def limits(dtype: np.dtype[Any]) -> tuple[int, int]:
    return (0, 1) if dtype.kind == "b" else (int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))


def as_float(value: float, dtype: np.dtype[Any]) -> float:
    """The nearest float of a dtype, by numpy's array cast."""
    given = np.array([value])
    with np.errstate(all="ignore"):
        return float(given.astype(dtype)[0])


def cast_one(value: float, dtype: str, cast: str) -> Any:
    """One number under a policy: its value as `dtype`, or LOST."""
    wanted = np.dtype(dtype)
    if wanted.kind == "f":
        held = as_float(value, wanted)
        if not math.isfinite(value):
            return held
        if not math.isfinite(held) or (cast == "exact" and Fraction(held) != Fraction(value)):
            return LOST
        return held
    if not math.isfinite(value):
        return LOST
    whole = round(value) if cast == "round" else value
    low, high = limits(wanted)
    return int(whole) if whole == int(whole) and low <= whole <= high else LOST


def parse_one(text: str, dtype: str) -> Any:
    """One text as a number, or LOST; made for texts on which Python and the project's parser agree."""
    wanted, text = np.dtype(dtype), text.strip()
    if wanted.kind == "b":
        return {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), LOST)
    try:
        if wanted.kind in "iu":
            low, high = limits(wanted)
            return int(text) if low <= int(text) <= high else LOST
        number = float(text)
    except ValueError:
        return LOST
    held = as_float(number, wanted)
    return LOST if math.isinf(held) and "inf" not in text.lower() else held
