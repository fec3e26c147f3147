"""Every recipe of docs/recipes and every notebook, run as it stands on the page."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from infra.local.nats import NatsServer
from infra.local.prefect_server import PrefectServer
from tests.child_environment import add_project
from tests.eventually import eventually
from tests.pages import ROOT, Block, read_blocks
from tests.servers import triton_or_skip

RECIPES = ROOT / "docs" / "recipes"
NATS = "nats://127.0.0.1:4222"
SECONDS_MAX = 180.0
# Variables of the session's own servers, which a shell of the reader's does not have.
OF_THE_SESSION = {"PREFECT_API_URL", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_ID", "MLFLOW_RUN_ID"}

# Advice of MLflow, scikit-learn and their like to those who log models.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


def read_sections(page: Path) -> dict[str, list[Block]]:
    """Return the blocks of each section of a page, by its title."""
    sections: dict[str, list[Block]] = {}
    for part in page.read_text().split("\n## ")[1:]:
        title, _, text = part.partition("\n")
        sections[title] = read_blocks(page, text)
    return sections


def run_python(blocks: Sequence[Block], capsys: pytest.CaptureFixture[str], **names: Any) -> None:
    """Run Python blocks as one program, and hold what each prints against the text that follows it."""
    space: dict[str, Any] = {"__name__": "recipe", **names}
    for block, following in itertools.pairwise([*blocks, None]):
        if block is None or block.language != "python":
            continue
        capsys.readouterr()
        exec(compile(block.text.replace(NATS, names.get("url", NATS)), block.page.name, "exec"), space)  # noqa: S102 - the page is the project's own
        if following is not None and following.language == "text":
            assert following.text.strip() in capsys.readouterr().out


@pytest.fixture
def folder(registry: Path, server: PrefectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which a recipe runs; its registry and its Prefect server are those of the session."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


MODELS = read_sections(RECIPES / "models.md")


@pytest.mark.parametrize("title", MODELS)
def test_a_model_is_registered_and_scored_as_its_recipe_says(
    title: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_python(MODELS[title], capsys, **({"classifier": make_classifier()} if title == "transformers" else {}))


def make_classifier() -> Any:
    """Return a tiny pipeline with random weights: no weights are downloaded."""
    from tests.serving.model.test_text import tiny_bert

    return tiny_bert("right")


def test_a_delta_table_is_replaced_and_its_schedule_is_there(
    folder: Path, deployed: PrefectServer, capsys: pytest.CaptureFixture[str]
) -> None:
    from prefect.client.orchestration import get_client

    for blocks in read_sections(RECIPES / "tables.md").values():
        run_python(blocks, capsys)
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name("batch-inference/nightly-spend")

    assert ["0 1 * * *"] == [each.schedule.cron for each in deployment.schedules]
    assert ("models:/spend@champion", str(folder / "lake/scores")) == (
        deployment.parameters["model"],
        deployment.parameters["destination"],
    )


def test_events_of_a_stream_are_scored(folder: Path, nats: NatsServer, capsys: pytest.CaptureFixture[str]) -> None:
    (blocks,) = read_sections(RECIPES / "stream.md").values()
    run_python(blocks, capsys, url=nats.url)


@pytest.fixture
def shell(tmp_path: Path) -> dict[str, str]:
    """The environment of a shell that has the program `overnight`, in a folder of its own."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, module in {"overnight": "-m deployments.command_line", "mlflow": "-m mlflow", "python": ""}.items():
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} {module} "$@"\n')
        (programs / name).chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if name not in OF_THE_SESSION}
    return {**add_project(kept), "PATH": f"{programs}:{os.environ['PATH']}"}


BUDGET = "--latency-ms 50"


@pytest.mark.machines
def test_an_endpoint_answers_as_its_recipe_says(shell: dict[str, str], tmp_path: Path) -> None:
    with triton_or_skip(tmp_path / "probe"):
        pass
    start, *blocks = [block for each in read_sections(RECIPES / "endpoint.md").values() for block in each]
    lines = [f"python - <<'END'\n{each.text}END" if each.language == "python" else each.text for each in blocks]
    with start_servers(start.text, shell, tmp_path):
        script = "\n".join(["set -e", *lines])
        # A machine that is busy with other tests keeps no budget of 50 ms, and the recipe would be refused.
        assert 1 == script.count(BUDGET)
        script = script.replace(BUDGET, "--latency-ms 5000")
        done = subprocess.run(
            ["bash", "-c", script], cwd=tmp_path, env=shell, capture_output=True, text=True, timeout=300, check=False
        )

    assert 0 == done.returncode, done.stderr
    assert '"model_name":"churn"' in done.stdout.replace(" ", "")
    assert '"predictions":[' in done.stdout.replace(" ", "")
    assert "churn is retired" in done.stdout


@contextmanager
def start_servers(command: str, shell: dict[str, str], folder: Path) -> Iterator[None]:
    """Run the command of the first shell until the body ends."""
    with (folder / "log").open("wb") as log, subprocess.Popen(
        ["bash", "-c", f"exec {command}"], cwd=folder, env=shell, stdout=log, stderr=log
    ) as child:  # fmt: skip
        try:
            eventually((folder / "servers" / "env.sh").exists, process=child)
            yield
        finally:
            child.terminate()


@pytest.mark.machines
@pytest.mark.parametrize("notebook", sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_still_prints_what_it_shows(
    notebook: Path, server: PrefectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nbformat

    from tests.benchmarks.notebook import run_notebook

    monkeypatch.setenv("PYTHONPATH", add_project()["PYTHONPATH"])
    monkeypatch.delenv("MLFLOW_EXPERIMENT_ID", raising=False)

    assert printed(nbformat.read(notebook, as_version=4)) == printed(run_notebook(notebook))


def printed(notebook: Any) -> list[str]:
    """Return the texts that the cells of a notebook print or show, without the decimals of numbers."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    texts = [str(each.get("text") or each["data"].get("text/plain")) for each in outputs]
    return [re.sub(r"(\.\d\d)\d*", r"\1", text) for text in texts]
