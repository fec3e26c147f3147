"""Names of the output are held against each other before anything is read."""

from __future__ import annotations

import pytest

from serving.errors import BadInput
from tasks.stream.opener import check_column_names
from tests.tasks.stream.messages import CONTRACT


@pytest.mark.parametrize(
    ("keys", "parts", "twice"),
    [
        (("score",), False, "score"),
        (("id", "id"), False, "id"),
        (("reject_reason",), False, "reject_reason"),
        (("source_number",), True, "source_number"),
    ],
)
def test_two_columns_of_one_name_are_refused(keys: tuple[str, ...], parts: bool, twice: str) -> None:  # noqa: FBT001
    with pytest.raises(BadInput, match=f"must have different names, got \\['{twice}'\\] twice"):
        check_column_names(CONTRACT, keys, parts=parts)


def test_names_of_a_table_are_free_where_there_is_none() -> None:
    check_column_names(CONTRACT, ("source_number",), parts=False)
