"""Plain words: metaphors and private words that were once here must not come back."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.language import find_bare_names, find_private_words
from tests.test_architecture import ROOT, list_tracked_files

PACKAGES = ("flows", "tasks", "serving", "deployments", "infra")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *(ROOT / "docs").rglob("*.md")]
SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def test_private_words_are_found() -> None:
    assert ["anew", "door", "as it comes"] == find_private_words("It begins anew at the door, as it comes; doorway.")


def test_bare_names_are_found() -> None:
    assert ["_gone", "Each"] == find_bare_names("def _gone(): ...\ndef is_gone(): ...\nclass Each: ...")


@pytest.mark.parametrize("path", [*SOURCES, *PAGES], ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_has_private_words(path: Path) -> None:
    assert [] == find_private_words(path.read_text())


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_and_classes_have_names_that_say_what_they_are(path: Path) -> None:
    assert [] == find_bare_names(path.read_text())


def test_the_project_names_no_folder_beside_itself() -> None:
    tracked = list_tracked_files()
    texts = [ROOT / name for name in tracked if (ROOT / name).suffix in {".py", ".md", ".yaml", ".yml", ".toml", ""}]
    beside = "../" + "shared"

    assert [] == [path for path in texts if beside in path.read_text()]
