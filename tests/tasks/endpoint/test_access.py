from __future__ import annotations

import pytest

from serving.errors import BadInput
from tasks.endpoint import access
from tasks.endpoint.access import read_admin_key, read_keys
from tasks.endpoint.spec import Access

KEY = "k" * 32


def test_keys_are_read_where_they_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHURN_KEY", KEY)
    monkeypatch.setattr(access, "read_secret", {"churn-key": KEY[::-1] + "2"}.get)

    wanted = Access(environment=("CHURN_KEY",), secrets=("churn-key",))

    assert {"CHURN_KEY": KEY, "churn-key": KEY[::-1] + "2"} == read_keys(wanted)


def test_a_key_that_is_missing_or_short_is_named_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CHURN_KEY", raising=False)
    with pytest.raises(BadInput, match=r"'CHURN_KEY' must hold a key .*got nothing"):
        read_keys(Access(environment=("CHURN_KEY",)))

    monkeypatch.setenv("CHURN_KEY", "hunter2")
    with pytest.raises(BadInput, match="got 7 characters") as caught:
        read_keys(Access(environment=("CHURN_KEY",)))

    assert "hunter2" not in str(caught.value)


def test_the_administrators_key_is_that_of_the_environment_or_of_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVERNIGHT_ADMIN_KEY", KEY)
    monkeypatch.setattr(access, "read_secret", {"admin": KEY + "2"}.get)

    assert KEY == read_admin_key(None)
    assert KEY + "2" == read_admin_key("admin")
    with pytest.raises(BadInput, match="Prefect Secret block 'nobody' must hold"):
        read_admin_key("nobody")
