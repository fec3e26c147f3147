"""What of a message goes into headers, and what comes out of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.stream.message import (
    HEADER_COLUMN,
    HEADER_REASON,
    Poison,
    build_poison_headers,
    choose_event_time,
    format_header,
)
from tests.tasks.stream.messages import message


@pytest.mark.parametrize("told", [None, "", "now", "nan", "inf", "-inf", b"nan", b"\xff", "1e999"])
def test_a_header_that_is_no_finite_time_is_ignored(told: str | bytes | None) -> None:
    assert 7.0 == choose_event_time(told, 7.0)


@pytest.mark.parametrize("told", ["1.5", b"1.5", " 1.5 "])
def test_a_producer_may_set_the_time_of_its_event(told: str | bytes) -> None:
    assert 1.5 == choose_event_time(told, 7.0)


@given(st.text(alphabet=st.characters(codec=None), max_size=2000))
def test_any_text_fits_into_a_header(text: str) -> None:
    line = format_header(text)

    assert len(line) <= 1000
    assert len(line.splitlines()) <= 1
    assert line == line.encode().decode()


def test_a_dead_letter_has_its_reason_and_its_column_as_headers() -> None:
    poison = Poison(message=message(b""), column="", reason="no", detail="it\n  is\tnot")

    assert {HEADER_REASON: "no: it is not"} == build_poison_headers(poison)
    assert "a b" == build_poison_headers(Poison(message=message(b""), column="a\nb", reason="no"))[HEADER_COLUMN]
