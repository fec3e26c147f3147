from __future__ import annotations

from pathlib import Path

import pytest

from serving.errors import BadRequest, EndpointFailed
from serving.gateway.keys import Keys, digest

KEY, OTHER = "0123456789abcdef", "fedcba9876543210"


def refused(keys: Keys, authorization: str | None, *allowed: str) -> int:
    with pytest.raises(BadRequest) as caught:
        keys.check(authorization, allowed)
    return caught.value.status


def test_a_key_opens_what_allows_it_and_nothing_else(tmp_path: Path) -> None:
    keys = Keys(tmp_path, {"OVERNIGHT_API_KEYS": f"app:{KEY} batch:{OTHER}"})
    keys.check(f"Bearer {KEY}", ("app",))
    keys.check(f"bearer  {KEY}", ("batch", "app"))

    assert 403 == refused(keys, f"Bearer {KEY}", "batch")
    assert 401 == refused(keys, f"Bearer {KEY}x", "app")
    assert 401 == refused(keys, f"Basic {KEY}", "app")
    assert 401 == refused(keys, KEY, "app")
    assert 401 == refused(keys, "", "app")
    assert 401 == refused(keys, None, "app")


def test_keys_that_are_put_outlive_the_process_and_only_as_digests(tmp_path: Path) -> None:
    Keys(tmp_path, {}).put("app", digest(KEY))
    keys = Keys(tmp_path, {})
    keys.check(f"Bearer {KEY}", ("app",))
    kept = tmp_path / "keys.json"

    assert 0o600 == kept.stat().st_mode & 0o777
    assert KEY not in kept.read_text()

    keys.delete("app")
    assert 401 == refused(Keys(tmp_path, {}), f"Bearer {KEY}", "app")


def test_the_administrators_key_is_made_once_and_readable_by_its_owner_alone(tmp_path: Path) -> None:
    keys = Keys(tmp_path, {})
    made = (tmp_path / "admin.key").read_text()
    keys.check_admin(f"Bearer {made}")
    Keys(tmp_path, {}).check_admin(f"Bearer {made}")

    assert 0o600 == (tmp_path / "admin.key").stat().st_mode & 0o777
    with pytest.raises(BadRequest, match="administrator's key"):
        keys.check_admin(f"Bearer {made}x")


def test_the_environment_may_have_the_administrators_key(tmp_path: Path) -> None:
    Keys(tmp_path, {"OVERNIGHT_ADMIN_KEY": KEY}).check_admin(f"Bearer {KEY}")

    assert not (tmp_path / "admin.key").exists()
    with pytest.raises(EndpointFailed, match="OVERNIGHT_ADMIN_KEY must hold a key of at least 16 characters, got 5"):
        Keys(tmp_path, {"OVERNIGHT_ADMIN_KEY": "short"})


@pytest.mark.parametrize("held", ["", " \n", "short"])
def test_a_file_that_holds_no_administrators_key_opens_to_nobody(tmp_path: Path, held: str) -> None:
    (tmp_path / "admin.key").write_text(held)

    with pytest.raises(EndpointFailed, match=r"admin\.key must hold a key of at least 16 characters"):
        Keys(tmp_path, {})


@pytest.mark.parametrize("stated", [KEY, "app:short", f"app:{KEY} app:{OTHER}", f":{KEY}", f"a/b:{KEY}"])
def test_keys_that_are_no_pairs_of_name_and_key_are_refused_without_being_shown(tmp_path: Path, stated: str) -> None:
    with pytest.raises(EndpointFailed, match="must be NAME:KEY pairs") as caught:
        Keys(tmp_path, {"OVERNIGHT_API_KEYS": stated})

    assert KEY not in str(caught.value)
