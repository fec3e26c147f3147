"""The comparison finds what it is there to find: rows missing, doubled and altered."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from infra.local.prefect_server import PrefectServer
from tasks.batch.options import BatchOptions
from tasks.storage import open_storage
from tests.benchmarks.kills.compare import Difference, Output, compare, read_keys, read_output
from tests.support import write_customers

SAME = Difference(rows_missing=0, rows_doubled=0, parts_differing=(), leftovers=())
OUTPUT = Output(digests={"run=r/a": "1", "run=r/b": "2"}, keys=np.arange(6), published=("run=r/a", "run=r/b"))


def test_equal_outputs_differ_in_nothing() -> None:
    assert SAME == compare(np.arange(6), OUTPUT, OUTPUT)
    assert SAME.kept


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"keys": np.array([0, 1, 2, 3, 5])}, {"rows_missing": 1}),
        ({"keys": np.array([0, 1, 2, 2, 2, 3, 4, 5])}, {"rows_doubled": 2}),
        ({"keys": np.array([0, 1, 2, 3, 4, 9])}, {"rows_missing": 1, "rows_doubled": 1}),
        ({"digests": {"run=r/a": "1", "run=r/b": "3"}}, {"parts_differing": ("run=r/b",)}),
        ({"digests": {"run=r/a": "1"}}, {"parts_differing": ("run=r/b",)}),
        ({"digests": {**OUTPUT.digests, "run=r/c": "3"}}, {"parts_differing": ("run=r/c",)}),
        ({"published": ("run=r/a",)}, {"parts_differing": ("run=r/b",)}),
    ],
)
def test_each_difference_is_found_and_breaks_the_promise(
    changed: dict[str, object], expected: dict[str, object]
) -> None:
    found = compare(np.arange(6), OUTPUT, replace(OUTPUT, **changed))  # type: ignore[arg-type]

    assert replace(SAME, **expected) == found  # type: ignore[arg-type]
    assert not found.kept


def test_a_torn_write_is_a_leftover_and_breaks_nothing() -> None:
    found = compare(np.arange(6), OUTPUT, replace(OUTPUT, digests={**OUTPUT.digests, "run=r/.b.tmp": "3"}))

    assert replace(SAME, leftovers=("run=r/.b.tmp",)) == found
    assert found.kept


def lost(parts: list[Path]) -> None:
    parts[1].unlink()


def twice(parts: list[Path]) -> None:
    shutil.copy(parts[1], parts[1].with_name("part-00099-0000.parquet"))


def altered(parts: list[Path]) -> None:
    table = pl.read_parquet(parts[1])
    table.with_columns(pl.col("score") + 1e-6).write_parquet(parts[1])


@pytest.mark.parametrize(
    ("spoil", "missing", "doubled", "differing"), [(lost, 500, 0, 1), (twice, 0, 500, 1), (altered, 0, 0, 1)]
)
def test_a_published_run_that_is_spoilt_by_hand_is_found_out(
    spoil: Callable[[list[Path]], None],
    missing: int,
    doubled: int,
    differing: int,
    linear: str,
    prefect: PrefectServer,
    tmp_path: Path,
) -> None:
    from flows.batch import batch_inference

    source = write_customers(tmp_path / "customers", rows=2_000, files=2, rows_per_group=500)
    options = BatchOptions(key_columns=("customer",), batch_size=100, rows_per_chunk=500, experiment=None)
    run = batch_inference(linear, str(source), str(tmp_path / "out"), options).run
    storage = open_storage(str(tmp_path / "out"))
    keys = read_keys(open_storage(str(source)), ["customers-00.parquet", "customers-01.parquet"], "customer")
    whole = read_output(storage, run, "customer")

    assert SAME == compare(keys, whole, whole)

    spoil(sorted((tmp_path / "out" / f"run={run}").iterdir()))
    found = compare(keys, whole, read_output(storage, run, "customer"))

    assert (missing, doubled, differing) == (found.rows_missing, found.rows_doubled, len(found.parts_differing))
