"""The commands that show environments of models and remove them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deployments.command_line import app

NAME = "0123456789abcdef"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one environment, which was used for four models."""
    place = tmp_path / NAME
    place.mkdir()
    (place / "environment.json").write_text('{"python": "3.12.1", "packages": ["a-1.dist-info"]}')
    (tmp_path / f".{NAME}.use").write_text("".join(f"models:/churn/{at} 0a1b\n" for at in range(1, 5)))
    monkeypatch.setenv("OVERNIGHT_ENVIRONMENTS", str(tmp_path))
    return tmp_path


def run(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["environments", *arguments])
    assert 0 == done.exit_code, done.output
    return done.output


def test_the_list_has_each_environment_with_its_models(folder: Path) -> None:
    shown = " ".join(run("list").split())
    (found,) = json.loads(run("list", "--json"))["environments"]

    assert "1 more, models:/churn/2 0a1b" in shown
    assert "1 environment of 51 bytes" in shown
    assert (NAME, "3.12.1", 4, False) == (
        found["name"],
        found["python"],
        len(found["models"]),
        found["is_in_use"],
    )


def test_nothing_is_removed_unless_asked_and_then_what_nothing_has_used(folder: Path) -> None:
    recent = run("remove")
    shown = run("remove", "--unused-for", "0")
    is_there = (folder / NAME).exists()
    removed = json.loads(run("remove", "--unused-for", "0", "--delete", "--json"))

    assert f"Nothing in {folder} is to be deleted." in " ".join(recent.split())
    assert "Nothing was deleted: --delete does it." in shown
    assert is_there
    assert (True, [NAME]) == (removed["is_deleted"], [each["name"] for each in removed["environments"]])
    assert [] == list(folder.iterdir())
    assert "0 environments" in run("list", "--folder", str(folder))
