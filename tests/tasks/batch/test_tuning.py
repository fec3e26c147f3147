from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from serving.model.interface import Engine, Tunable
from serving.model.loading import load_model
from serving.model.processes import ProcessOptions
from serving.model.registry import Resolved, resolve_model
from serving.model.tuner import Tuning, read_tuning
from tasks.batch import tuning
from tasks.batch.chunk_layout import Sizes
from tasks.batch.dataset import Dataset, open_dataset
from tasks.batch.options import BatchOptions
from tasks.batch.scoring_result import ScoringResult
from tasks.batch.source import pin_source
from tasks.batch.tuning import forget_slow_tuning
from tests.generators import make_tiny_generator, register_generator
from tests.support import register_network, register_script, write_customers
from tests.tasks.batch.small import a_contract, a_plan

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


def test_a_model_without_a_choice_is_timed_and_not_tuned_and_its_batches_are_counted_in_rows(
    registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers", reason="pip install -e '.[dev]' brings transformers")
    resolved = resolve_model(register_generator("without-a-choice", make_tiny_generator()))
    (tmp_path / "in").mkdir()
    prompts = pl.DataFrame({"prompt": ["a" * 8, "b" * 24] * 50, "customer": range(100)})
    prompts.write_parquet(tmp_path / "in" / "a.parquet")
    dataset = open_dataset(pin_source(str(tmp_path / "in"), str(tmp_path / "out")), ["prompt"], ("customer",))
    monkeypatch.setattr(tuning, "_WORK_SECONDS_MIN", 0.0)
    sizes = settle(resolved, dataset)

    assert ("tokens", None) == (sizes.batch_unit, sizes.tuning)
    # A prompt of 16 tokens on average, and 24 more.
    assert 8192 / 40 == sizes.rows_per_pass
    assert sizes.rows_per_second is not None


def test_a_tuning_that_a_run_is_far_slower_than_is_measured_again(
    model_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, resolved = dataset_of(tmp_path), resolve_model(model_uri)
    options = OPTIONS.model_copy(update={"slots": 1})
    monkeypatch.setattr(tuning, "_WORK_SECONDS_MIN", 0.0)
    sizes = settle(resolved, dataset, options)
    assert sizes.tuning is not None
    plan = a_plan(str(tmp_path / "in"), str(tmp_path / "out")).model_copy(
        update={"tuning": sizes.tuning, "model": resolved.pin}
    )
    rows = int(10 * sizes.tuning.rows_per_second)
    near, busy, far = (ScoringResult(rows=int(rows * part)) for part in (0.9, 0.7, 0.8))
    for result in (near, busy, far):
        result.seconds["forward"] = 10.0
    # Reading took a quarter of the cores' time, which the tuner had for passes.
    busy.seconds["read"] = 2.5
    kept = forget_slow_tuning(plan, near) or forget_slow_tuning(plan, busy)
    before = read_kept(model_uri, sizes.tuning)
    words = forget_slow_tuning(plan, far)

    assert (kept, before) == (None, sizes.tuning)
    assert words is not None
    assert words.endswith(f"{sizes.tuning.rows_per_second:,.0f} when it was tuned")
    assert read_kept(model_uri, sizes.tuning) is None


def read_kept(model_uri: str, made: Tuning) -> Tuning | None:
    return read_tuning(resolve_model(model_uri).tags, made.machine, made.limits)


@pytest.mark.parametrize(
    ("rates", "chosen"),
    [({4096: 1e5, 16_384: 1e6}, 16_384), ({4096: 1e6, 16_384: 1e5}, 4096)],
    ids=["larger", "smaller"],
)
def test_a_short_run_of_a_model_of_python_measures_two_batch_sizes_and_takes_the_faster(
    registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rates: dict[int, float], chosen: int
) -> None:
    source = write_customers(tmp_path / "in", rows=40_000, files=2, rows_per_group=20_000)
    dataset = open_dataset(pin_source(str(source), str(tmp_path / "out")), ["a", "b", "c"], ("customer",))
    resolved = resolve_model(register_script("quick", "pass"))
    contract = resolved.contract({}, OPTIONS.policies)
    model: Tunable = load_model(resolved, contract, processes=ProcessOptions())
    # What each takes depends on the machine.
    monkeypatch.setattr(tuning, "measure_throughput", lambda _model, _contract, _sample, size, *_, **__: rates[size])
    sizes = tuning.choose_sizes(resolved, model, contract, OPTIONS, dataset)

    assert (chosen, rates[chosen], None) == (sizes.batch_size, sizes.rows_per_second, sizes.tuning)


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
