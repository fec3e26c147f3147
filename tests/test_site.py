"""The site of the documentation builds without a warning, loads nothing from elsewhere, and has the public API."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import flows
import serving.errors
from tests.pages import ROOT

pytestmark = pytest.mark.servers

# What a browser loads by itself; links that a reader may follow are no such thing.
LOADED = {("script", "src"), ("img", "src"), ("link", "href"), ("iframe", "src"), ("source", "src"), ("object", "data")}


class Page(HTMLParser):
    """What a page loads, and the names of its places."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.names: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [str(value) for name, value in attrs if (tag, name) in LOADED]
        self.names |= {str(value) for name, value in attrs if name == "id"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built with every warning an error, where no proxy lets a request out."""
    folder = tmp_path_factory.mktemp("site")
    closed = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mkdocs", "build", "--quiet"),
            *("--config-file", str(ROOT / "docs/site/mkdocs.yml"), "--site-dir", str(folder)),
        ],
        env={**os.environ, **closed, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert 0 == done.returncode, done.stderr
    return folder


def test_every_page_of_the_docs_is_in_the_site(site: Path) -> None:
    pages = {str(page.relative_to(ROOT / "docs").with_suffix(".html")) for page in (ROOT / "docs").rglob("*.md")}

    assert set() == {page for page in pages | {"index.html", "changelog.html"} if not (site / page).exists()}
    assert "<h2" in (site / "index.html").read_text()


def test_pages_load_nothing_from_another_host(site: Path) -> None:
    loaded = {
        address
        for page in site.rglob("*.html")
        for address in Page(page.read_text()).loaded
        if re.match(r"(https?:)?//", address)
    }
    styled = {
        found for sheet in site.rglob("*.css") for found in re.findall(r"url\(['\"]?(https?:[^)]*)", sheet.read_text())
    }

    assert set() == loaded | styled


def test_every_public_name_and_every_error_is_in_the_reference(site: Path) -> None:
    names = {name.rpartition(".")[2] for page in site.glob("reference/*.html") for name in Page(page.read_text()).names}
    kinds = {name: value for name, value in vars(serving.errors).items() if isinstance(value, type)}
    errors = {name for name, kind in kinds.items() if issubclass(kind, serving.errors.OvernightError)}

    assert set() == {*flows.__all__, *errors} - names


def test_options_are_described_with_their_defaults(site: Path) -> None:
    text = re.sub(r"<[^>]+>", "", (site / "reference/batch.html").read_text())

    assert "Columns of the dataset that name a row in the output." in text
    assert "Default: 'parquet'" in text


def test_diagrams_are_pictures_and_notebooks_have_their_output(site: Path) -> None:
    architecture, notebook = ((site / name).read_text() for name in ("architecture.html", "notebooks/first_run.html"))

    assert 2 == len(re.findall(r'<img [^>]*class="diagram"|class="diagram" [^>]*src', architecture))
    assert "flowchart LR" not in architecture
    assert "5,000 rows, 3 rejects" in notebook
    assert re.search(r'<img [^>]*src="first_run/[^"]*\.png"', notebook)
