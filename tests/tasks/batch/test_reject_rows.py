"""Rejected rows are written as the source has them, so that a person can correct them and score the file again."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from serving.errors import BadInput, NoCompleteRun, RunDamaged, SourceChanged
from tasks.batch.manifest import open_rejects
from tasks.batch.parts import part_path
from tasks.batch.reject_rows import list_rejects, write_rejects
from tasks.batch.run_records import save_plan
from tasks.storage import open_storage
from tests.tasks.batch.small import a_contract, a_plan, put, put_parts
from tests.tasks.batch.test_part_proof import list_files
from tests.tasks.batch.test_reuse import OPTIONS, call, plan_call, score_plan, write


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three files of one partition, the second without a row that the model can't take."""
    for at, (start, rows) in enumerate([(100, 24), (1, 6), (200, 24)]):
        write(tmp_path / f"in/store=007/f{at}.parquet", start, rows, group=12)
    return tmp_path / "in"


def test_rejects_have_the_columns_of_the_source_in_its_types_and_order_keys_first(source: Path, tmp_path: Path) -> None:
    out, file = tmp_path / "out", tmp_path / "rejects.parquet"
    plan, _ = call(source, out, OPTIONS.model_copy(update={"key_columns": ("store", "id")}))
    # Nothing of it is read: no row of it was rejected.
    (source / "store=007/f1.parquet").unlink()
    written = write_rejects(str(out), file)
    ids = [each for start in (100, 200) for each in range(start, start + 24) if each % 7 == 0]
    types = {"store": pa.string(), "id": pa.int64(), "a": pa.float64(), "b": pa.float64()}
    types |= {"reject_column": pa.string(), "reject_reason": pa.string()}

    assert pa.schema(types) == pq.read_schema(file)
    assert [("007", at, None, at / 8, "a", "null") for at in ids] == pl.read_parquet(file).rows()
    assert written == len(ids) == list_rejects(str(out)).rows_rejected
    assert list_rejects(str(out)) == list_rejects(str(out), plan.run)


def test_a_source_that_was_changed_or_is_gone_is_told_by_name_and_nothing_is_left(source: Path, tmp_path: Path) -> None:
    call(source, tmp_path / "out")
    (tmp_path / "written").mkdir()
    write(source / "store=007/f0.parquet", 300, 24, group=12)
    for words in ("f0.parquet must be the file", "f0.parquet must be there"):
        with pytest.raises(SourceChanged, match=words):
            write_rejects(str(tmp_path / "out"), tmp_path / "written/rejects.parquet")
        (source / "store=007/f0.parquet").unlink(missing_ok=True)

    assert not list_files(tmp_path / "written")


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_rows_of_text_files_are_read_again_and_named_by_file_and_row(tmp_path: Path, kind: str) -> None:
    texts = {
        "csv": {"f0": "a,b\n1.50,2\n,3\n4,five\n", "f1": "a,b\n1,1\n2,2\n3,3\n", "f2": "b,a\n07,nil\n"},
        "jsonl": {
            "f0": '{"a":1.50,"b":2}\n{"b":3}\n{"a":4,"b":"five"}\n',
            "f1": '{"a":1,"b":1}\n' * 3,
            "f2": '{"c":1}\n',
        },
    }
    for name, text in texts[kind].items():
        put(str(tmp_path / "in"), {f"{name}.{kind}": text.encode()})
    call(tmp_path / "in", tmp_path / "out", OPTIONS.model_copy(update={"key_columns": (), "rows_per_chunk": 3}))
    before = list_files(tmp_path / "out")
    (tmp_path / f"in/f1.{kind}").unlink()
    written = write_rejects(str(tmp_path / "out"), tmp_path / "rejects.csv")
    found = pl.read_csv(tmp_path / "rejects.csv", infer_schema=False)
    last = ("07", "nil") if kind == "csv" else (None, None)

    assert ["source_file", "source_row", "a", "b", "reject_column", "reject_reason"] == found.columns
    assert [
        (f"f0.{kind}", "1", None, "3", "a", "null"),
        (f"f0.{kind}", "2", "4", "five", "b"),
        (f"f2.{kind}", "0", *reversed(last), "a"),
    ] == [row[: 6 if at == 0 else 5] for at, row in enumerate(found.rows())]
    assert 3 == written
    assert before == list_files(tmp_path / "out")


def test_corrected_rows_are_scored_into_the_same_delta_table_in_place_of_the_rejects(
    source: Path, tmp_path: Path
) -> None:
    out, file = str(tmp_path / "out"), tmp_path / "new/rejects.parquet"
    first, _ = call(source, Path(out), OPTIONS.model_copy(update={"output": "delta"}))
    file.parent.mkdir()
    write_rejects(out, file)
    pl.read_parquet(file).with_columns(a=1.5).write_parquet(file)
    second, _ = call(file, Path(out), OPTIONS.model_copy(update={"output": "delta", "delta_mode": "upsert"}))
    table = pl.read_delta(out).sort("id")

    assert (54, 0) == (table.height, table["reject_reason"].drop_nulls().len())
    assert 1.5 + 105 / 8 == table.row(by_predicate=pl.col("id") == 105, named=True)["y"]
    assert (second.run, 0) == (list_rejects(out).run, write_rejects(out, tmp_path / "none.parquet"))
    assert not (tmp_path / "none.parquet").exists()
    with pytest.raises(NoCompleteRun, match="must have the 5 parts of run"):
        write_rejects(out, tmp_path / "none.parquet", first.run)


def test_a_run_that_is_not_complete_gives_the_rejects_that_it_has_so_far(source: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    plan = plan_call(source, Path(out)).plan
    with pytest.raises(NoCompleteRun, match="must hold parts of run"):
        list_rejects(out, plan.run)
    score_plan(plan, open_storage(out))
    (tmp_path / "out" / part_path(plan, next(iter(plan.chunks)))).unlink()
    written = write_rejects(out, tmp_path / "rejects.parquet", plan.run)
    found = list_rejects(out, plan.run)

    assert (plan.run, 42, written) == (found.run, found.rows, found.rows_rejected)
    assert open_rejects(out, plan.run).collect()["id"].equals(pl.read_parquet(tmp_path / "rejects.parquet")["id"])
    with pytest.raises(NoCompleteRun, match="must hold a run that is complete, got none"):
        write_rejects(out, tmp_path / "more.parquet")


def test_a_csv_file_that_can_not_hold_a_column_leaves_nothing_and_parquet_holds_it(tmp_path: Path) -> None:
    out, storage = str(tmp_path / "out"), open_storage(str(tmp_path / "out"))
    lists = pa.array([[1.0, 2.0], None, [3.0, 4.0]], pa.list_(pa.float32()))
    plan = a_plan(put(f"{tmp_path}/in", {"a.parquet": pa.table({"x": lists})}), out, contract=a_contract(x=(2,)))
    save_plan(storage, plan)
    put_parts(plan, storage, rejects=(1, 2))
    (tmp_path / "written").mkdir()
    with pytest.raises(BadInput, match=r"A CSV file must hold plain values, got .* nested data"):
        write_rejects(out, tmp_path / "written/rejects.csv", plan.run)
    left = list_files(tmp_path / "written")
    write_rejects(out, tmp_path / "written/rejects.parquet", plan.run)

    assert {} == left
    assert lists[1:] == pq.read_table(tmp_path / "written/rejects.parquet").column("x").combine_chunks()


def test_parts_and_plan_of_a_run_must_be_as_they_were_written(source: Path, tmp_path: Path) -> None:
    plan, _ = call(source, tmp_path / "out")
    part = tmp_path / "out" / part_path(plan, next(iter(plan.chunks)))
    part.write_bytes(part.read_bytes()[:-7])
    for kind, words in ((RunDamaged, f"1 are gone or others by now, the first {part}"), (BadInput, "has none: it is")):
        with pytest.raises(kind, match=words):
            write_rejects(str(tmp_path / "out"), tmp_path / "rejects.csv")
        (tmp_path / f"out/_overnight/{plan.run}/plan.json").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("there.csv", "must be a new one, but .*there.csv is there already"),
        ("rejects.txt", r"must end in \.parquet or \.csv, got .*rejects.txt"),
        ("nowhere/rejects.csv", "must lie in a folder that is there"),
    ],
)
def test_a_file_that_can_not_be_written_is_refused_by_name(source: Path, tmp_path: Path, name: str, words: str) -> None:
    call(source, tmp_path / "out")
    (tmp_path / "there.csv").write_text("precious")
    with pytest.raises(BadInput, match=words):
        write_rejects(str(tmp_path / "out"), tmp_path / name)

    assert "precious" == (tmp_path / "there.csv").read_text()
