"""What becomes of one value, said as plainly as Python allows: the measure for serving's arrays."""

from __future__ import annotations

import math
from decimal import Decimal, InvalidOperation
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


def parse_one(text: str, dtype: str, cast: str) -> Any:
    """One text as a number, or LOST; made for texts on which Python and the project's parser agree."""
    wanted, text = np.dtype(dtype), text.strip()
    if wanted.kind == "b":
        return {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), LOST)
    try:
        if wanted.kind in "iu":
            return whole_one(Decimal(text), wanted, cast)
        number = float(text)
    except (ValueError, InvalidOperation):
        return LOST
    held = as_float(number, wanted)
    return LOST if math.isinf(held) and "inf" not in text.lower() else held


def whole_one(number: Decimal, dtype: np.dtype[Any], cast: str) -> Any:
    """One decimal number as an integer of a dtype, every digit of it counted, or LOST."""
    if not number.is_finite() or (number and number.adjusted() > 30):
        return LOST
    # What is smaller still is rounded as a tenth is.
    value = Fraction(number) if number and number.adjusted() > -30 else Fraction(int(number != 0), 10)
    whole = round(value) if cast == "round" else value
    low, high = limits(dtype)
    return int(whole) if whole == int(whole) and low <= whole <= high else LOST
