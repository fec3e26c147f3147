"""What errors look like: short, and with the name that was meant."""

from __future__ import annotations

import pytest

from serving.errors import BadInput, describe_error, list_shortly, suggest_name


@pytest.mark.parametrize(
    ("name", "expected"),
    [("custommer", "customer"), ("CUSTOMER", "customer"), ("ammount", "Amount"), ("zebra", None), ("", None)],
)
def test_the_nearest_name_is_suggested(name: str, expected: str | None) -> None:
    found = suggest_name(name, ["customer", "Amount", "id"])

    assert (f"; did you mean {expected!r}?" if expected else "") == found


def test_a_long_list_says_how_many_more_there_are() -> None:
    assert "  - a\n  - b\n  - and 2 more" == list_shortly(["a", "b", "c", "d"], 2)
    assert "  - a" == list_shortly(["a"])


def test_an_error_is_its_kind_and_the_first_lines_of_its_message() -> None:
    assert "BadInput: no" == describe_error(BadInput("no"))
    assert 9 == len(describe_error(BadInput("x\n" * 50)).split("\n"))
    assert ["BadInput: no"] == BadInput("no")._render_traceback_(), "as a notebook shows it"
