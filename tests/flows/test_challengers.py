"""A run with challengers, on a real Prefect server: one read, the same table, a comparison, and an alias that moves."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import httpx
import mlflow
import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from deployments.command_line import app
from infra.local.prefect_server import PrefectServer
from serving.errors import BadInput, ModelNotFound, SchemaMismatch
from tasks.batch.challenger_rules import Labels, PromoteIf
from tasks.batch.comparison_records import open_challenger
from tasks.batch.feature_table import FeatureTable
from tasks.batch.gate_rules import Gate
from tasks.batch.manifest import open_predictions
from tasks.batch.options import BatchOptions
from tasks.batch.report import BatchReport
from tests.eventually import PROCESS_SECONDS
from tests.flows.children import call, start_child
from tests.prefect_events import find_events
from tests.support import register_network, register_script, write_customers

pytestmark = pytest.mark.usefixtures("serverless")

OPTIONS = BatchOptions(key_columns=("customer",), batch_size=128, rows_per_chunk=1024, experiment=None)


def infer(model: str, source: Path, destination: Path, options: BatchOptions = OPTIONS) -> BatchReport:
    from flows.batch import batch_inference

    return batch_inference(model, str(source), str(destination), options)


def challenge(*challengers: str, **options: Any) -> BatchOptions:
    return OPTIONS.model_copy(update={"challengers": challengers, **options})


@pytest.fixture(scope="module")
def networks(registry: Path) -> list[str]:
    """Three versions of a network."""
    return [register_network("versions", seed) for seed in range(3)]


@pytest.fixture(scope="module")
def scripts(registry: Path) -> list[str]:
    """Three versions of a model that runs Python, which a process loads sooner than torch."""
    return [register_script("scripts", f"time.sleep({at} / 1000)") for at in range(3)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6,000 customers with a region, and a label that is nearer to the second network than to the first.

    One of the files holds the region in another layout, so that it is read in another type than it has.
    """

    def edit(table: pl.DataFrame) -> pl.DataFrame:
        regions = pl.Series([f"r{row % 4}" for row in range(table.height)])
        return table.with_columns(region=regions, spent=pl.col("a").cast(pl.Float64) * 0.1)

    folder = tmp_path_factory.mktemp("challengers") / "customers"
    write_customers(folder, rows=6_000, files=3, rows_per_group=900, edit=edit)
    file = sorted(folder.glob("*.parquet"))[1]
    table = pq.read_table(file)
    at = table.column_names.index("region")
    pq.write_table(table.set_column(at, "region", table["region"].dictionary_encode()), file, row_group_size=900)
    return folder


def digest_parts(destination: Path, pattern: str = "run=*/part-*") -> list[str]:
    return sorted(hashlib.sha256(path.read_bytes()).hexdigest() for path in destination.glob(pattern))


def test_a_run_with_challengers_has_the_same_table_and_what_each_of_them_scores_alone(
    networks: list[str], source: Path, tmp_path: Path, prefect: PrefectServer
) -> None:
    one, two, three = networks
    plain = infer(one, source, tmp_path / "plain")
    report = infer(one, source, tmp_path / "scores", challenge(two, three, segment_columns=("region",)))
    alone = infer(two, source, tmp_path / "alone")
    theirs = open_predictions(str(tmp_path / "alone"), alone.run).collect()
    keys = {"key": {"any_": ["batch-challengers", "batch-challengers-plot"]}}
    artifacts = httpx.post(f"{prefect.api_url}/artifacts/filter", json={"limit": 100, "artifacts": keys}).json()
    shown = {each["key"] for each in artifacts if "versions/1 and its challengers" in (each["description"] or "")}

    assert digest_parts(tmp_path / "plain") == digest_parts(tmp_path / "scores")
    assert plain.rows == report.rows == report.rows_scored
    assert open_challenger(str(tmp_path / "scores"), two).select(theirs.columns).collect().equals(theirs)
    assert [two, three] == [each.model for each in report.challengers]
    assert [6_000, 6_000] == [each.rows for each in report.challengers]
    assert 4 == len(report.challengers[0].segments)
    assert f"| challenger versions v{two[-1]} | 6,000 rows compared; " in report.summary()
    assert {"batch-challengers", "batch-challengers-plot"} == shown
    assert "the model and its challengers" in Path(report.report).read_text()
    (record,) = (tmp_path / "scores" / "_overnight" / report.run).glob("comparison-*.json")
    kept = json.loads(record.read_text())
    assert report.challengers[0].outputs[0].difference_max == kept["challengers"][0]["outputs"][0]["difference_max"]

    again = infer(one, source, tmp_path / "scores", challenge(two, three, segment_columns=("region",)))
    assert ("already complete", report.challengers) == (again.status, again.challengers)


def test_parts_of_an_earlier_run_are_taken_for_the_model_and_scored_for_the_challenger(
    networks: list[str], source: Path, tmp_path: Path
) -> None:
    first = infer(networks[0], source, tmp_path / "scores")
    second = infer(networks[0], source, tmp_path / "scores", challenge(networks[1]))

    assert (6_000, 0, 6_000) == (first.rows_scored, second.rows_scored, second.rows_reused)
    assert 6_000 == second.challengers[0].rows
    assert 0 == second.thread_seconds["forward"]


def test_the_alias_moves_to_the_challenger_that_a_rule_holds_for(
    networks: list[str], source: Path, tmp_path: Path, prefect: PrefectServer
) -> None:
    client = mlflow.MlflowClient()
    versions = [address.rpartition("/")[2] for address in networks]
    client.set_registered_model_alias("versions", "champion", versions[0])
    client.set_registered_model_alias("versions", "challenger", versions[1])
    rule = PromoteIf(metric="rmse", by=0.01)
    options = challenge("models:/versions@challenger", labels=Labels(column="spent"), promote_if=rule)
    promoted = infer("models:/versions@champion", source, tmp_path / "scores", options)
    names = str(client.get_model_version_by_alias("versions", "champion").version)
    events = find_events(prefect, "overnight.model.promoted", "overnight.model.versions")
    # The next night: both aliases name one version.
    alone = infer("models:/versions@champion", source, tmp_path / "scores", options)
    refused = challenge(networks[1], labels=Labels(column="spent"), promote_if=rule)
    with pytest.raises(BadInput, match=rf"'champion' of 'versions' must name version {versions[0]}, which the run"):
        infer(networks[0], source, tmp_path / "other", refused)

    assert (networks[1], (), None) == (alone.model, alone.challengers, alone.promotion)
    assert promoted.promotion is not None
    assert ("promoted", networks[1], versions[1]) == (promoted.promotion.outcome, promoted.promotion.to, names)
    assert promoted.challengers[0].labels is not None
    assert promoted.challengers[0].labels.challenger["rmse"] < promoted.challengers[0].labels.champion["rmse"]
    assert promoted.run == events[0]["payload"]["run"]
    assert not (tmp_path / "other" / "_overnight").exists()


def test_labels_that_come_later_are_compared_by_the_command_line(
    networks: list[str], source: Path, tmp_path: Path
) -> None:
    infer(networks[0], source, tmp_path / "scores", challenge(networks[1]))
    files = [pl.read_parquet(file, columns=["customer", "spent"]) for file in sorted(source.glob("*.parquet"))]
    spent = pl.concat(files).sample(fraction=0.5, seed=1)
    (tmp_path / "later").mkdir()
    spent.write_parquet(tmp_path / "later" / "spent.parquet")
    command = ["compare", str(tmp_path / "scores"), "--labels", str(tmp_path / "later"), "--label", "spent"]
    done = CliRunner().invoke(app, [*command, "--json"])
    doubled = pl.concat([spent, spent])
    doubled.write_parquet(tmp_path / "later" / "spent.parquet")
    refused = CliRunner().invoke(app, command)
    joined = spent.join(open_challenger(str(tmp_path / "scores"), networks[1]).collect(), on="customer")
    found = json.loads(done.stdout)["comparison"]["challengers"][0]["labels"]

    assert 0 == done.exit_code, done.output
    assert 3_000 == found["rows"]
    error = (joined["spent"] - joined["score"]).to_numpy()
    assert np.sqrt(np.mean(error**2)) == pytest.approx(found["challenger"]["rmse"])
    assert (1, True) == (refused.exit_code, "must hold one label for each key" in refused.output)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"challengers": ("models:/versions@nobody",)}, ModelNotFound, "must name a version or an alias of 'versions'"),
        ({"segment_columns": ("regoin",)}, SchemaMismatch, r"the column 'regoin' of a segment once.*mean 'region'"),
        ({"labels": Labels(column="paid")}, SchemaMismatch, "the column 'paid' of the labels once"),
    ],
)
def test_what_can_not_be_compared_is_refused_before_anything_is_scored(
    options: dict[str, Any], error: type[Exception], match: str, networks: list[str], source: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=match):
        infer(networks[0], source, tmp_path / "scores", challenge(**{"challengers": (networks[1],), **options}))

    assert not list((tmp_path / "scores").glob("run=*"))


def test_models_of_python_have_processes_of_their_own_and_text_files_are_read_once(
    scripts: list[str], tmp_path: Path
) -> None:
    champion, challenger, _ = scripts
    table = pl.DataFrame({"customer": np.arange(500), "a": np.arange(500.0), "kind": ["x", "y"] * 250})
    table.write_csv(tmp_path / "customers.csv")
    options = challenge(challenger, segment_columns=("kind",), labels=Labels(column="a", kind="regression"))
    report = infer(champion, tmp_path / "customers.csv", tmp_path / "scores", options)
    compared = report.challengers[0]

    assert (500, 500) == (compared.rows, compared.outputs[0].equal)
    assert {"x": 250, "y": 250} == {each.value: each.rows for each in compared.segments}
    assert compared.labels is not None
    assert np.mean(np.arange(500.0)) == compared.labels.champion["mae"]
    assert 0 == compared.outputs[0].rows_decile_changed


def test_a_call_names_fields_of_structs_wherever_it_names_a_column(networks: list[str], tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    rows = pl.DataFrame({"id": np.arange(200), **{name: random.random(200, np.float32) for name in "abc"}})
    day = dt.datetime(2024, 2, 29, tzinfo=dt.UTC)
    rows = rows.with_columns(kind=pl.col("id").mod(2).cast(pl.String), spent=pl.col("a"), at=day, known=day)
    tables = {
        "in": rows.select(customer=pl.struct("id", "a", "b", "kind"), seen=pl.struct("at")),
        "features": rows.select(customer=pl.struct("id"), profile=pl.struct("c", "known")),
        "labels": rows[:150].select(customer=pl.struct("id"), outcome=pl.struct("spent")),
    }
    for name, table in tables.items():
        (tmp_path / name).mkdir()
        table.write_parquet(tmp_path / name / "a.parquet", row_group_size=70)
    labels = Labels(column="outcome.spent", source=str(tmp_path / "labels"))
    nested = {
        "key_columns": ("customer.id",),
        "input_columns": {"x": ("customer.a", "customer.b", "profile.c")},
        "features": [FeatureTable(source=str(tmp_path / "features"), join_keys=("customer.id",), time="profile.known")],
        "spine_time": "seen.at",
        "gate": Gate(),
    }
    challenging = challenge(networks[1], segment_columns=("customer.kind",), labels=labels)
    options = BatchOptions.model_validate({**challenging.model_dump(), **nested})
    report = infer(networks[0], tmp_path / "in", tmp_path / "scores", options)
    scored = pl.read_parquet(tmp_path / "scores" / f"run={report.run}" / "*.parquet").sort("customer.id")
    direct = mlflow.pytorch.load_model(networks[0])(rows.select("a", "b", "c").to_torch())
    compared = report.challengers[0]

    assert rows["id"].to_list() == scored["customer.id"].to_list()
    torch.testing.assert_close(direct[:, 0], scored["score"].to_torch(), rtol=1e-6, atol=1e-6)
    assert {"0": 100, "1": 100} == {each.value: each.rows for each in compared.segments}
    assert compared.labels is not None
    assert 150 == compared.labels.rows


PATTERNS = ("run=*/part-*", "_overnight/*/challengers/1/part-*", "_overnight/*/challengers/2/part-*")


def test_a_run_killed_with_a_part_of_one_model_alone_resumes_with_the_same_versions(
    scripts: list[str], source: Path, tmp_path: Path
) -> None:
    options = challenge(scripts[1], scripts[2], slots=1)
    environment = {**os.environ, "PREFECT_LOGGING_LEVEL": "CRITICAL"}
    arguments = call(scripts[0], source, tmp_path / "scores", options)
    with start_child(
        "kill_child.py", "after a part", "8", *arguments, environment=environment, stdout=subprocess.PIPE
    ) as child:
        child.communicate(timeout=PROCESS_SECONDS)
    found = [len(list((tmp_path / "scores").glob(pattern))) for pattern in PATTERNS]
    report = infer(scripts[0], source, tmp_path / "scores", options)
    infer(scripts[0], source, tmp_path / "undisturbed", options)
    one, other = ([digest_parts(tmp_path / name, each) for each in PATTERNS] for name in ("scores", "undisturbed"))

    assert -9 == child.returncode
    assert [2, 3, 3] == found
    assert report.rows_scored < 6_000
    assert one == other
    assert {len(each) for each in one} == {report.parts}
