from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from serving.model.interface import Engine, Tunable
from serving.model.loading import load_model
from serving.model.registry import Resolved, resolve_model
from tasks.batch import tuning
from tasks.batch.chunk_layout import Sizes
from tasks.batch.dataset import Dataset, open_dataset
from tasks.batch.options import BatchOptions
from tasks.batch.source import pin_source
from tests.support import register_network, write_customers
from tests.tasks.batch.small import a_contract

OPTIONS = BatchOptions(key_columns=("customer",))


@pytest.fixture(scope="module")
def model_uri(registry: Path) -> str:
    return register_network("to-be-tuned", 3)


@pytest.fixture
def resolved(model_uri: str) -> Resolved:
    return resolve_model(model_uri)


def dataset_of(folder: Path, **options: object) -> Dataset:
    source = write_customers(folder / "in", rows=5000, files=2, rows_per_group=1000, **options)  # type: ignore[arg-type]
    return open_dataset(pin_source(str(source), str(folder / "out")), ["a", "b", "c"], ("customer",))


def settle(resolved: Resolved, dataset: Dataset, options: BatchOptions = OPTIONS) -> Sizes:
    contract = resolved.contract({}, options.policies)
    model: Tunable = load_model(resolved, contract)
    return tuning.choose_sizes(resolved, model, contract, options, dataset)


def test_little_work_is_not_tuned_for(resolved: Resolved, tmp_path: Path) -> None:
    sizes = settle(resolved, dataset_of(tmp_path))

    assert sizes.tuning is None
    assert (1024, Engine()) == (sizes.batch_size, sizes.engine)
    assert sizes.rows_per_second is not None
    assert sizes.rows_per_second > 0


def test_nothing_is_measured_where_the_caller_has_said_all(resolved: Resolved, tmp_path: Path) -> None:
    options = OPTIONS.model_copy(update={"batch_size": 100, "rows_per_chunk": 500})
    sizes = settle(resolved, dataset_of(tmp_path), options)

    assert (100, None, None) == (sizes.batch_size, sizes.rows_per_second, sizes.tuning)


def test_nothing_is_measured_on_rows_that_are_all_rejects(resolved: Resolved, tmp_path: Path) -> None:
    nulls = lambda table: table.with_columns(a=pl.lit(None, pl.Float32))
    sizes = settle(resolved, dataset_of(tmp_path, edit=nulls))

    assert sizes.rows_per_second is None


def test_much_work_is_tuned_for_once_and_kept_with_the_model_version(
    model_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = dataset_of(tmp_path)
    monkeypatch.setattr(tuning, "_WORK_SECONDS_MIN", 0.0)
    first = settle(resolve_model(model_uri), dataset)
    monkeypatch.setattr(tuning, "tune", lambda *_, **__: pytest.fail("it must not be measured again"))
    second = settle(resolve_model(model_uri), dataset)

    assert first.tuning is not None
    assert first == second
    assert first.tuning.batch_size == first.batch_size
    assert np.isclose(first.tuning.rows_per_second, first.rows_per_second * first.slots)


def test_rows_that_get_larger_after_the_first_count_by_every_footer(tmp_path: Path) -> None:
    table = pl.DataFrame({"a": np.zeros(5000, np.float32), "customer": ["x"] * 5000})
    large = pl.DataFrame({"a": np.zeros(50, np.float32), "customer": [f"{at:0100000d}" for at in range(50)]})
    (tmp_path / "in").mkdir()
    table.write_parquet(tmp_path / "in" / "a.parquet")
    even = open_dataset(pin_source(str(tmp_path / "in"), str(tmp_path / "out")), ["a"], ("customer",))
    large.write_parquet(tmp_path / "in" / "b.parquet")
    uneven = open_dataset(pin_source(str(tmp_path / "in"), str(tmp_path / "out")), ["a"], ("customer",))
    first = tuning.read_first_rows(a_contract("a"), OPTIONS, even)

    assert tuning.SAMPLE_ROWS == first.num_rows
    assert first.nbytes / first.num_rows == tuning.measure_row_bytes(first, even)
    assert 50 * 100_000 / 5050 == pytest.approx(tuning.measure_row_bytes(first, uneven), rel=0.2)


def test_the_first_rows_are_few_where_they_are_large(tmp_path: Path) -> None:
    large = pl.DataFrame({"a": np.zeros(500, np.float32), "customer": [f"{at:0200000d}" for at in range(500)]})
    (tmp_path / "in").mkdir()
    large.write_parquet(tmp_path / "in" / "a.parquet")
    dataset = open_dataset(pin_source(str(tmp_path / "in"), str(tmp_path / "out")), ["a"], ("customer",))
    first = tuning.read_first_rows(a_contract("a"), OPTIONS, dataset)

    assert 20 << 20 < first.nbytes < 40 << 20
