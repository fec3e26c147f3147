"""A variable holds inside the block alone."""

from __future__ import annotations

import os

import pytest

from serving.environment import variable

NAME = "OVERNIGHT_TEST_VARIABLE"


@pytest.mark.parametrize("before", [None, "old"])
def test_a_variable_is_put_back_also_after_an_error(before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(NAME, raising=False)
    if before is not None:
        monkeypatch.setenv(NAME, before)

    with pytest.raises(RuntimeError, match="new"), variable(NAME, "new"):
        raise RuntimeError(os.environ[NAME])

    assert os.environ.get(NAME) == before
