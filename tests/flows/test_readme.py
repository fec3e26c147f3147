"""The example of the README, run as it stands."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import mlflow
import pytest

from infra.local.prefect_server import PrefectServer
from tests.pages import ROOT, read_blocks
from tests.support import register_network, write_customers


def test_the_example_of_the_readme_prints_what_the_readme_shows(
    registry: Path,
    prefect: PrefectServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    version = register_network("churn", seed=0).rpartition("/")[2]
    mlflow.MlflowClient().set_registered_model_alias("churn", "champion", version)
    write_customers(tmp_path / "customers", rows=10_000, files=4, rows_per_group=700)
    monkeypatch.chdir(tmp_path)
    blocks = itertools.pairwise(read_blocks(ROOT / "README.md"))
    example, output = next(pair for pair in blocks if pair[0].language == "python")

    assert "text" == output.language
    exec(compile(example.text, "README.md", "exec"), {})  # noqa: S102 - the README is the project's own
    printed = capsys.readouterr().out
    for line in filter(str.strip, output.text.splitlines()):
        assert re.search(without_last_digits(line), printed), (line, printed)


def without_last_digits(line: str) -> str:
    """Return a pattern for a line whose decimals may differ in the last places, as they do between processors."""
    pieces = re.split(r"(\d+\.\d{4,})", line)
    return "".join(rf"{piece[:5]}\d*" if re.fullmatch(r"\d+\.\d{4,}", piece) else re.escape(piece) for piece in pieces)
