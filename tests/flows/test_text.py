"""Texts through the batch flow: real glosses of WordNet, embedded by the real MiniLM."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from serving.errors import ModelUnfit
from tasks.batch.manifest import open_predictions, open_rejects
from tasks.batch.options import BatchOptions
from tasks.batch.run_records import load_plan
from tasks.storage import open_storage
from tests.support import load_minilm, register_minilm

pytestmark = pytest.mark.usefixtures("serverless")

OPTIONS = BatchOptions(key_columns=("noun",), experiment=None)


def write_glosses(folder: Path, glosses: list[str | None], rows_per_group: int = 90) -> str:
    folder.mkdir()
    table = pl.DataFrame({"noun": range(len(glosses)), "gloss": glosses}, schema_overrides={"gloss": pl.String})
    table.write_parquet(folder / "glosses.parquet", row_group_size=rows_per_group)
    return str(folder)


def embeddings(table: pl.DataFrame) -> np.ndarray:
    return np.array(table["prediction"].to_list(), dtype=np.float32)


def test_every_gloss_is_embedded_as_encode_does_in_the_order_of_the_rows(
    minilm: str, glosses: list[str], tmp_path: Path
) -> None:
    from flows.batch import batch_inference

    source = write_glosses(tmp_path / "glosses", list(glosses))
    report = batch_inference(minilm, source, str(tmp_path / "scores"), OPTIONS)

    table = open_predictions(str(tmp_path / "scores")).collect().sort("noun")
    assert list(range(len(glosses))) == table["noun"].to_list()
    np.testing.assert_allclose(load_minilm().encode(glosses), embeddings(table), rtol=0, atol=1e-5)
    plan = load_plan(open_storage(str(tmp_path / "scores")), report.run)
    assert plan is not None
    assert "tokens" == plan.batch_unit
    assert {True} == {chunk.rows <= 90 for chunk in plan.chunks.values()}


def test_the_same_plan_gives_the_same_bytes_with_any_slots(minilm: str, glosses: list[str], tmp_path: Path) -> None:
    from flows.batch import batch_inference

    source = write_glosses(tmp_path / "glosses", list(glosses[:200]))
    found = []
    for slots in (1, 2):
        options = OPTIONS.model_copy(update={"slots": slots, "rows_per_chunk": 50, "batch_size": 512, "name": "run"})
        batch_inference(minilm, source, str(tmp_path / f"scores-{slots}"), options)
        parts = sorted((tmp_path / f"scores-{slots}").glob("run=*/*.parquet"))
        found.append([embeddings(pl.read_parquet(part)).tobytes() for part in parts])

    # The slots decide the shards, which the names of parts have in them, but not the chunks.
    assert 5 == len(found[0])
    assert sorted(found[0]) == sorted(found[1])


def test_a_null_gloss_is_a_reject_and_every_other_has_its_embedding(
    minilm: str, glosses: list[str], tmp_path: Path
) -> None:
    from flows.batch import batch_inference

    some: list[str | None] = [*glosses[:60]]
    some[7] = None
    source = write_glosses(tmp_path / "glosses", some)
    report = batch_inference(minilm, source, str(tmp_path / "scores"), OPTIONS)

    rejects = open_rejects(str(tmp_path / "scores")).collect()
    assert 1 == report.rows_rejected
    assert [(7, "gloss", "null")] == rejects.select("noun", "reject_column", "reject_reason").rows()
    table = open_predictions(str(tmp_path / "scores")).filter(pl.col("noun") != 7).collect().sort("noun")
    expected = load_minilm().encode([gloss for gloss in some if gloss is not None])
    np.testing.assert_allclose(expected, embeddings(table), rtol=0, atol=1e-5)


def test_a_model_that_is_not_told_its_column_is_told_by_the_call(
    glosses: list[str], tmp_path: Path, registry: Path
) -> None:
    from flows.batch import batch_inference

    model = register_minilm("untold", metadata=None)
    source = write_glosses(tmp_path / "glosses", list(glosses[:20]))
    with pytest.raises(ModelUnfit, match=r"needs the one column that feeds it, got \{\}"):
        batch_inference(model, source, str(tmp_path / "scores"), OPTIONS)
    options = OPTIONS.model_copy(update={"input_columns": {"text": ("gloss",)}})

    assert 20 == batch_inference(model, source, str(tmp_path / "scores"), options).rows_scored
