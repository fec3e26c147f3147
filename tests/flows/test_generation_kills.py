"""Text generation through the batch flow: a run that is killed is completed by the next call, to the same bytes."""

from __future__ import annotations

import os
from pathlib import Path

import polars as pl
import pytest

from tasks.batch.manifest import open_predictions, open_rejects
from tasks.batch.options import BatchOptions
from tests.flows.children import call, score, start_child
from tests.generators import CONTEXT, make_prompts, make_tiny_generator, register_generator
from tests.support import digests

pytest.importorskip("transformers", reason="pip install -e '.[dev]' brings transformers")

ROWS, TOO_LONG = 150, 70
# Some five batches a chunk, so that the kill comes within one.
OPTIONS = BatchOptions(
    key_columns=("row",),
    batch_size=512,
    rows_per_chunk=30,
    slots=2,
    params={"do_sample": True, "temperature": 1.2, "seed": 7},
    experiment=None,
)


@pytest.fixture(scope="module")
def generator(registry: Path) -> str:
    return register_generator("killed-generator", make_tiny_generator())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    prompts = make_prompts(ROWS)
    prompts[TOO_LONG] = "a" * CONTEXT
    pl.DataFrame({"row": range(ROWS), "prompt": prompts}).write_parquet(folder / "prompts.parquet")
    return folder


@pytest.mark.machines
def test_a_run_killed_within_a_chunk_is_completed_to_the_same_bytes(
    generator: str, source: Path, serverless: None, tmp_path: Path
) -> None:
    expected = score(generator, source, tmp_path / "undisturbed", OPTIONS)
    with start_child(
        *("kill_child.py", "before a batch", "9", *call(generator, source, tmp_path / "killed", OPTIONS)),
        environment={**os.environ, "PREFECT_LOGGING_LEVEL": "CRITICAL"},
    ) as child:
        child.communicate(timeout=240)
    left = len([name for name in digests(tmp_path / "killed") if name.endswith(".parquet")])
    found = score(generator, source, tmp_path / "killed", OPTIONS)

    assert -9 == child.returncode
    assert left < 5
    assert expected == found
    table = open_predictions(str(tmp_path / "killed")).collect().sort("row")
    assert list(range(ROWS)) == table["row"].to_list()
    assert {"completion", "prompt_tokens", "completion_tokens", "finish_reason"} < set(table.columns)
    assert {"stop", "length"} == set(table["finish_reason"].drop_nulls())
    assert 1 == table["completion"].null_count()
    rejects = open_rejects(str(tmp_path / "killed")).collect()
    assert [(TOO_LONG, "prompt")] == rejects.select("row", "reject_column").rows()
