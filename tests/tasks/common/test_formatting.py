from __future__ import annotations

import math

import pytest

from tasks.common.formatting import in_words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (0.44, "0.4 s"),
        (12.3, "12 s"),
        (59.6, "1 min"),
        (200, "3 min 20 s"),
        (3599.7, "1 h"),
        (7500, "2 h 5 min"),
        (90 * 3600, "90 h"),
        (-200, "-3 min 20 s"),
        (math.inf, "an endless time"),
    ],
)
def test_a_span_is_read_in_at_most_two_units(seconds: float, words: str) -> None:
    assert words == in_words(seconds)
