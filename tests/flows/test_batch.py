"""The batch flow as its users call it: complete, exact, published once, and clear about what is wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import numpy as np
import polars as pl
import pytest
import torch
from deltalake import DeltaTable
from prefect.settings import PREFECT_LOGGING_LEVEL, temporary_settings

import flows
from serving.errors import (
    DestinationUnusable,
    KeysUnfit,
    ModelFailed,
    PublishRefused,
    RunNameTaken,
    SchemaMismatch,
    SourceChanged,
    SourceCorrupt,
    StorageDenied,
    StorageFull,
    TooManyRejects,
)
from serving.machine import find_release
from tasks.batch import resolve
from tasks.batch.manifest import open_predictions, open_rejects
from tasks.batch.options import BatchOptions
from tasks.batch.plan import Plan
from tasks.batch.publish import Audit
from tasks.batch.report import BatchReport
from tasks.storage import LocalStorage, open_storage
from tests.eventually import eventually
from tests.overwriting_store import overwriting_store
from tests.support import register_network, write_customers

if TYPE_CHECKING:
    from infra.local.prefect_server import PrefectServer
    from infra.local.s3 import S3Server

pytestmark = pytest.mark.usefixtures("serverless")

OPTIONS = BatchOptions(key_columns=("customer",), batch_size=128, rows_per_chunk=1024, experiment=None)


def infer(model: str, source: Path | str, destination: Path | str, options: BatchOptions = OPTIONS) -> BatchReport:
    from flows.batch import batch_inference

    return batch_inference(model, str(source), str(destination), options)


def run_parts(destination: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in destination.glob("run=*/*")}


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} if folder.exists() else set()


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


class TestARun:
    @pytest.mark.whole
    def test_scores_every_row_as_the_model_itself_does(self, linear: str, customers: Path, tmp_path: Path) -> None:
        report = infer(linear, customers, tmp_path / "scores")

        table = open_predictions(str(tmp_path / "scores")).collect().sort("customer")
        rows = pl.read_parquet(customers / "*.parquet").sort("customer")
        direct = mlflow.pytorch.load_model(linear)(rows.select("a", "b", "c").to_torch(dtype=pl.Float32))
        assert rows["customer"].to_list() == table["customer"].to_list()
        torch.testing.assert_close(direct[:, 0], table["score"].to_torch(), rtol=1e-6, atol=1e-6)
        assert ("scored", 10_000, 10_000, 0, 0) == (
            report.status,
            report.rows,
            report.rows_scored,
            report.rows_recomputed,
            report.rows_rejected,
        )

    def test_called_again_finds_itself_complete_and_scores_nothing(
        self, linear: str, customers: Path, tmp_path: Path
    ) -> None:
        infer(linear, customers, tmp_path / "scores")
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "scores").rglob("*")}
        read: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            inner = LocalStorage.read
            patch.setattr(LocalStorage, "read", lambda self, path: (read.append(path), inner(self, path))[1])
            again = infer(linear, customers, tmp_path / "scores")

        assert ["manifest.json", "plan.json"] == sorted(Path(path).name for path in read if again.run in path)
        assert ("already complete", 0, 10_000) == (again.status, again.rows_scored, again.rows)
        assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "scores").rglob("*")}

    def test_a_new_file_in_the_source_is_another_run_and_the_newest_is_opened(
        self, linear: str, customers: Path, tmp_path: Path
    ) -> None:
        first = infer(linear, customers, tmp_path / "scores")
        write_customers(customers / "more", rows=500, files=1, rows_per_group=500)
        second = infer(linear, customers, tmp_path / "scores")

        assert first.run != second.run
        assert 10_500 == open_predictions(str(tmp_path / "scores")).collect().height
        assert 10_000 == open_predictions(str(tmp_path / "scores"), first.run).collect().height

    def test_rows_that_were_corrected_do_not_take_the_place_of_the_whole_table_unasked(
        self, linear: str, customers: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        infer(linear, customers, tmp_path / "scores")
        corrected = write_customers(tmp_path / "corrected", rows=70, files=1, rows_per_group=70)
        with pytest.raises(
            DestinationUnusable, match=f"predictions of, {customers}, got {corrected}: readers would have"
        ):
            infer(linear, corrected, tmp_path / "scores")
        assert 10_000 == open_predictions(str(tmp_path / "scores")).collect().height

        replacing = infer(
            linear, corrected, tmp_path / "scores", OPTIONS.model_copy(update={"other_source": "replace"})
        )
        assert 70 == open_predictions(str(tmp_path / "scores")).collect().height
        assert "already complete" == infer(linear, customers, tmp_path / "scores").status
        assert f"get run {replacing.run}, which was planned after this one" in caplog.text

    def test_without_keys_a_row_is_named_by_file_and_number(self, linear: str, customers: Path, tmp_path: Path) -> None:
        infer(linear, customers, tmp_path / "scores", OPTIONS.model_copy(update={"key_columns": ()}))

        table = open_predictions(str(tmp_path / "scores")).collect()
        expected = {(f"customers-{file:02d}.parquet", row) for file in range(4) for row in range(2_500)}
        assert expected == set(table.select("source_file", "source_row").iter_rows())

    def test_chooses_sizes_by_itself(self, linear: str, customers: Path, tmp_path: Path) -> None:
        report = infer(linear, customers, tmp_path / "scores", BatchOptions(experiment=None))

        assert 10_000 == open_predictions(str(tmp_path / "scores")).collect().height
        assert report.slots == len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else report.slots
        assert report.parts >= 8

    def test_puts_torch_threads_and_the_switch_interval_back(
        self, linear: str, customers: Path, tmp_path: Path
    ) -> None:
        before = torch.get_num_threads(), sys.getswitchinterval()
        infer(linear, customers, tmp_path / "scores")

        assert before == (torch.get_num_threads(), sys.getswitchinterval())

    def test_reads_csv_json_lines_arrow_and_avro_as_it_reads_parquet(
        self, linear: str, customers: Path, tmp_path: Path
    ) -> None:
        table = pl.read_parquet(customers / "*.parquet")
        writers: dict[str, Callable[[Path], object]] = {
            "csv": table.write_csv,
            "jsonl": table.write_ndjson,
            "arrow": table.write_ipc,
            "avro": table.write_avro,
        }
        for kind, write in writers.items():
            (tmp_path / kind).mkdir()
            write(tmp_path / kind / f"customers.{kind}")
        infer(linear, customers, tmp_path / "scores")
        expected = open_predictions(str(tmp_path / "scores")).collect().sort("customer")["score"]

        for kind in writers:
            infer(linear, tmp_path / kind, tmp_path / f"scores-{kind}")
            got = open_predictions(str(tmp_path / f"scores-{kind}")).collect()
            got = got.with_columns(pl.col("customer").cast(pl.Int64)).sort("customer")
            np.testing.assert_allclose(expected.to_numpy(), got["score"].to_numpy(), rtol=0, atol=1e-6)
            assert not list((tmp_path / f"scores-{kind}").rglob("staged/**/*.parquet")), (
                "copies go when all is published"
            )

    def test_reads_hive_partitions_and_can_key_by_them(self, linear: str, tmp_path: Path) -> None:
        for country in ("at", "be"):
            write_customers(tmp_path / "lake" / f"country={country}", rows=300, files=1, rows_per_group=100)
        infer(
            linear,
            tmp_path / "lake",
            tmp_path / "scores",
            OPTIONS.model_copy(update={"key_columns": ("country", "customer")}),
        )

        table = open_predictions(str(tmp_path / "scores")).collect()
        assert {"at": 300, "be": 300} == dict(table.group_by("country").len().iter_rows())

    def test_runs_from_s3_to_s3(self, linear: str, customers: Path, s3: S3Server, tmp_path: Path) -> None:
        import boto3

        prefix = uuid.uuid4().hex
        client = boto3.client("s3")
        for path in customers.iterdir():
            client.upload_file(str(path), "lake", f"{prefix}/customers/{path.name}")
        report = infer(linear, f"s3://lake/{prefix}/customers/", f"s3://lake/{prefix}/scores/")
        again = infer(linear, f"s3://lake/{prefix}/customers/", f"s3://lake/{prefix}/scores/")
        infer(linear, customers, tmp_path / "scores")

        remote = open_predictions(f"s3://lake/{prefix}/scores/").collect().sort("customer")
        assert ("scored", "already complete") == (report.status, again.status)
        assert open_predictions(str(tmp_path / "scores")).collect().sort("customer").equals(remote)

    @pytest.mark.parametrize("mode", ["append", "replace"])
    def test_delta_gets_the_same_parts_in_one_commit(
        self, mode: str, linear: str, customers: Path, tmp_path: Path
    ) -> None:
        options = OPTIONS.model_copy(update={"output": "delta", "delta_mode": mode})
        destination = tmp_path / "table"
        infer(linear, customers, destination, options)
        infer(linear, customers, destination, options)
        assert (0, 10_000) == (DeltaTable(destination).version(), pl.read_delta(str(destination)).height)

        write_customers(customers / "more", rows=500, files=1, rows_per_group=500)
        infer(linear, customers, destination, options)
        assert (1, {"append": 20_500, "replace": 10_500}[mode]) == (
            DeltaTable(destination).version(),
            pl.read_delta(str(destination)).height,
        )


class TestUpsert:
    def test_rows_are_replaced_by_their_keys_and_doubled_keys_are_refused(
        self, linear: str, customers: Path, tmp_path: Path
    ) -> None:
        options = OPTIONS.model_copy(update={"output": "delta", "delta_mode": "upsert"})
        destination = tmp_path / "table"
        infer(linear, customers, destination, options)
        later = write_customers(tmp_path / "later", rows=500, files=1, rows_per_group=500)
        report = infer(linear, later, destination, options)
        assert (1, 10_000) == (DeltaTable(destination).version(), pl.read_delta(str(destination)).height)
        assert 0 == report.keys_doubled
        assert "check keys" in report.seconds

        write_customers(customers / "more", rows=500, files=1, rows_per_group=500)
        with pytest.raises(KeysUnfit, match=r"500 keys occur more than once in customer: .* \(2 rows\)"):
            infer(linear, customers, destination, options)
        assert (1, 10_000) == (DeltaTable(destination).version(), pl.read_delta(str(destination)).height)
        # Rows that are only added may have any keys.
        added = infer(linear, customers, tmp_path / "scores")
        assert 500 == added.keys_doubled
        assert {"": "keys that occur more than once", "value": "500"} in added.table()
        unchecked = infer(linear, customers, tmp_path / "fast", OPTIONS.model_copy(update={"check_keys": False}))
        assert (None, False) == (unchecked.keys_doubled, "check keys" in unchecked.seconds)


class TestTheSameRun:
    @pytest.mark.usefixtures("prefect")
    def test_a_retry_stays_with_the_version_it_began_with(
        self, customers: Path, registry: Path, tmp_path: Path
    ) -> None:
        from flows.batch import batch_inference

        name = f"retried-{uuid.uuid4().hex[:8]}"
        first = register_network(name, seed=1)
        client = mlflow.MlflowClient()
        client.set_registered_model_alias(name, "champion", "1")
        source, seen = str(customers), []

        def promote_and_add_a_file(*_: object) -> None:
            if not seen:
                seen.append(1)
                register_network(name, seed=2)
                client.set_registered_model_alias(name, "champion", "2")
                write_customers(customers / "late", rows=100, files=1, rows_per_group=100)
                message = "the machine went away"
                raise ConnectionError(message)

        with pytest.MonkeyPatch.context() as patch:
            import flows.batch

            inner = flows.batch.audit_parts
            patch.setattr(flows.batch, "audit_parts", lambda *args: (promote_and_add_a_file(), inner(*args))[1])
            retried = batch_inference.with_options(retries=1)
            report = retried(f"models:/{name}@champion", source, str(tmp_path / "scores"), OPTIONS)

        assert (first, 10_000) == (report.model, report.rows)

    def test_options_that_do_not_change_the_output_resume_the_same_run(
        self, linear: str, customers: Path, tmp_path: Path
    ) -> None:
        first = infer(linear, customers, tmp_path / "scores", OPTIONS.model_copy(update={"slots": 1}))
        second = infer(linear, customers, tmp_path / "scores", OPTIONS.model_copy(update={"slots": 2}))

        assert ("already complete", first.run) == (second.status, second.run)

    def test_the_bytes_do_not_depend_on_the_slots(self, linear: str, customers: Path, tmp_path: Path) -> None:
        report = infer(linear, customers, tmp_path / "one", OPTIONS.model_copy(update={"slots": 1}))
        plan = Path("_overnight") / report.run / "plan.json"
        (tmp_path / "three" / plan).parent.mkdir(parents=True)
        shutil.copy(tmp_path / "one" / plan, tmp_path / "three" / plan)
        shutil.copytree(tmp_path / "one" / "_overnight" / "order", tmp_path / "three" / "_overnight" / "order")
        infer(linear, customers, tmp_path / "three", OPTIONS.model_copy(update={"slots": 3}))

        assert run_parts(tmp_path / "one") == run_parts(tmp_path / "three")

    @pytest.mark.parametrize("deleted", ["_overnight", "_overnight/{run}", "_overnight/{run}/plan.json"])
    @pytest.mark.parametrize("published", [True, False])
    def test_parts_of_another_plan_are_never_counted_whatever_records_were_deleted(
        self, linear: str, customers: Path, tmp_path: Path, deleted: str, *, published: bool
    ) -> None:
        options = BatchOptions(key_columns=("customer",), rows_per_chunk=500, batch_size=100, experiment=None)
        first = infer(linear, customers, tmp_path / "scores", options.model_copy(update={"slots": 2}))
        if not published:
            (tmp_path / "scores" / "_overnight" / first.run / "manifest.json").unlink()
        before = run_parts(tmp_path / "scores")
        records = tmp_path / "scores" / deleted.format(run=first.run)
        records.unlink() if records.is_file() else shutil.rmtree(records)
        again = infer(linear, customers, tmp_path / "scores", options.model_copy(update={"slots": 3}))

        table = open_predictions(str(tmp_path / "scores")).collect().sort("customer")
        rows = pl.read_parquet(customers / "*.parquet").sort("customer")
        direct = mlflow.pytorch.load_model(linear)(rows.select("a", "b", "c").to_torch(dtype=pl.Float32))
        assert first.run == again.run
        assert rows["customer"].to_list() == table["customer"].to_list()
        torch.testing.assert_close(direct[:, 0], table["score"].to_torch(), rtol=1e-6, atol=1e-6)
        assert before == {name: data for name, data in run_parts(tmp_path / "scores").items() if name in before}
        assert 10_000 == eval(again.read_with, {"pl": pl, "flows": flows}).height  # noqa: S307 - the line that the report tells people to run
        assert "already complete" == infer(linear, customers, tmp_path / "scores", options).status

    def test_a_delta_table_whose_records_were_deleted_does_not_get_its_run_twice(
        self, linear: str, customers: Path, tmp_path: Path
    ) -> None:
        options = OPTIONS.model_copy(update={"output": "delta"})
        infer(linear, customers, tmp_path / "scores", options)
        shutil.rmtree(tmp_path / "scores" / "_overnight")
        with pytest.raises(DestinationUnusable, match="Its rows are in the table, once: there is nothing to do"):
            infer(linear, customers, tmp_path / "scores", options.model_copy(update={"slots": 3}))

        assert 10_000 == pl.read_delta(str(tmp_path / "scores"))["customer"].n_unique()
        assert 10_000 == pl.read_delta(str(tmp_path / "scores")).height

    def test_an_explicit_name_holds_one_plan_only(self, linear: str, customers: Path, tmp_path: Path) -> None:
        named = OPTIONS.model_copy(update={"name": "tonight"})
        infer(linear, customers, tmp_path / "scores", named)
        before = files_of(tmp_path / "scores")

        assert any(path.startswith("run=tonight/") for path in before)
        with pytest.raises(RunNameTaken, match="'tonight' already holds a run of another plan"):
            infer(linear, customers, tmp_path / "scores", named.model_copy(update={"batch_size": 64}))
        assert before == files_of(tmp_path / "scores")

    def test_a_part_that_is_cut_short_is_set_aside_and_scored_again(
        self, linear: str, customers: Path, tmp_path: Path
    ) -> None:
        report = infer(linear, customers, tmp_path / "scores")
        whole = run_parts(tmp_path / "scores")
        (tmp_path / "scores" / "_overnight" / report.run / "manifest.json").unlink()
        torn = next((tmp_path / "scores").glob("run=*/part-*"))
        torn.write_bytes(torn.read_bytes()[:-100])
        again = infer(linear, customers, tmp_path / "scores")

        parts = run_parts(tmp_path / "scores")
        assert whole == {name: data for name, data in parts.items() if name.startswith("part-")}
        assert 1 == sum(name.endswith(".aside") for name in parts)
        assert again.rows_scored == again.rows_recomputed > 0

    @pytest.mark.parametrize("output", ["parquet", "csv"])
    def test_published_parts_that_are_gone_or_cut_short_are_scored_again_to_the_same_bytes(
        self, output: str, linear: str, customers: Path, tmp_path: Path
    ) -> None:
        if output == "csv":
            table = pl.read_parquet(customers / "*.parquet")
            shutil.rmtree(customers)
            customers.mkdir()
            table.write_csv(customers / "customers.csv")
        report = infer(linear, customers, tmp_path / "scores")
        manifest = tmp_path / "scores" / "_overnight" / report.run / "manifest.json"
        whole, said = run_parts(tmp_path / "scores"), manifest.read_bytes()
        gone, cut = sorted((tmp_path / "scores").glob("run=*/part-*"))[1:3]
        gone.unlink()
        cut.write_bytes(cut.read_bytes()[:-100])
        restored = infer(linear, customers, tmp_path / "scores")
        again = infer(linear, customers, tmp_path / "scores")

        parts = run_parts(tmp_path / "scores")
        assert whole == {name: data for name, data in parts.items() if name.startswith("part-")}
        assert ("scored", "already complete") == (restored.status, again.status)
        assert 0 < restored.rows_scored < 10_000
        assert said == manifest.read_bytes()
        assert not list((tmp_path / "scores").rglob("staged"))

    def test_published_parts_that_can_not_be_scored_again_say_why(
        self, linear: str, customers: Path, tmp_path: Path
    ) -> None:
        import flows.batch

        infer(linear, customers, tmp_path / "scores")
        next((tmp_path / "scores").glob("run=*/part-*")).unlink()

        def changed(*_: object) -> int:
            for path in customers.iterdir():
                path.touch()
            return 1

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(flows.batch, "choose_slots", changed)
            with pytest.raises(SourceChanged, match="must be the file that the plan was made for"):
                infer(linear, customers, tmp_path / "scores")

    def test_a_source_file_that_changes_while_the_run_goes_on_fails_by_name(
        self, linear: str, customers: Path, tmp_path: Path
    ) -> None:
        inner = resolve.save_start

        def changed_after_the_plan(*args: object) -> object:
            (customers / "customers-01.parquet").touch()
            return inner(*args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(resolve, "save_start", changed_after_the_plan)
            with pytest.raises(
                SourceChanged, match=r"customers-01\.parquet must be the file that the plan was made for"
            ):
                infer(linear, customers, tmp_path / "scores")
        assert not list((tmp_path / "scores").rglob("manifest.json"))
        assert 12 == len(run_parts(tmp_path / "scores")), "the parts of the three other files are there"

    def test_a_source_file_that_can_not_be_decoded_fails_by_name_and_the_other_parts_stay(
        self, linear: str, customers: Path, tmp_path: Path
    ) -> None:
        report = infer(linear, customers, tmp_path / "scores")
        (tmp_path / "scores" / "_overnight" / report.run / "manifest.json").unlink()
        start = next((tmp_path / "scores" / "_overnight" / "starts").iterdir())
        assert json.loads(start.read_text()) == {"run": report.run, "key": report.run, "release": find_release()}
        for part in (tmp_path / "scores").glob("run=*/part-00000-*"):
            part.unlink()
        kept = run_parts(tmp_path / "scores")
        source = customers / "customers-00.parquet"
        data = bytearray(source.read_bytes())
        data[4:120] = b"\0" * 116
        stat = source.stat()
        source.write_bytes(data)
        os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns))

        with pytest.raises(SourceCorrupt, match=r"customers-00\.parquet"):
            infer(linear, customers, tmp_path / "scores")
        assert kept.items() <= run_parts(tmp_path / "scores").items()


class TestHowACallMayBeWritten:
    def test_paths_and_texts_a_list_of_one_and_options_as_a_mapping_are_the_same_run(
        self, linear: str, customers: Path, tmp_path: Path
    ) -> None:
        from flows.batch import batch_inference

        first = infer(linear, customers, tmp_path / "scores")
        options: Any = {"key_columns": "customer", "batch_size": 128, "rows_per_chunk": 1024, "experiment": None}
        second = batch_inference(linear, customers, tmp_path / "scores", options)
        third = batch_inference(linear, [customers], str(tmp_path / "scores"), options)

        assert first.run == second.run == third.run
        assert {"already complete"} == {second.status, third.status}

    def test_a_list_of_files_is_scored_as_their_folder_is(self, linear: str, customers: Path, tmp_path: Path) -> None:
        from flows.batch import batch_inference

        batch_inference(linear, sorted(customers.iterdir()), tmp_path / "scores", OPTIONS)
        infer(linear, customers, tmp_path / "folder")

        listed, folder = (open_predictions(str(tmp_path / name)).collect() for name in ("scores", "folder"))
        assert folder.equals(listed)

    def test_a_destination_with_files_of_others_is_warned_about_once(
        self, linear: str, customers: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "scores").mkdir()
        for name in ("a.csv", "b.parquet", ".hidden"):
            (tmp_path / "scores" / name).touch()
        # Prefect sets the levels once a process, by what the first flow of any test asked for.
        caplog.set_level("WARNING", logger="prefect.overnight")
        with temporary_settings({PREFECT_LOGGING_LEVEL: "WARNING"}):
            infer(linear, customers, tmp_path / "scores")
            infer(linear, customers, tmp_path / "scores")

        warnings = [line.getMessage() for line in caplog.records if "files that are not Overnight's" in line.msg]
        assert 1 == len(warnings)
        assert "such as a.csv, b.parquet:" in warnings[0]


class TestBadRows:
    def test_each_is_in_the_output_with_its_reason_and_can_be_opened(self, linear: str, tmp_path: Path) -> None:
        def edit(table: pl.DataFrame) -> pl.DataFrame:
            return table.with_columns(
                a=pl.when(pl.col("customer") % 50 == 0).then(None).otherwise("a"),
                b=pl.when(pl.col("customer") % 50 == 1).then(float("nan")).otherwise(pl.col("b")).cast(pl.Float32),
            )

        source = write_customers(tmp_path / "customers", rows=3_000, files=2, rows_per_group=500)
        bad = write_customers(tmp_path / "bad", rows=3_000, files=2, rows_per_group=500, edit=edit)
        infer(linear, source, tmp_path / "good-scores")
        report = infer(linear, bad, tmp_path / "scores")

        rejects = open_rejects(str(tmp_path / "scores")).collect().sort("customer")
        table = open_predictions(str(tmp_path / "scores")).collect().sort("customer")
        good = open_predictions(str(tmp_path / "good-scores")).collect().sort("customer")
        assert 3_000 == table.height
        nulls = rejects.filter(pl.col("customer") % 50 == 0)
        assert {("a", "null")} == set(nulls.select("reject_column", "reject_reason").iter_rows())
        not_finite = rejects.filter(pl.col("customer") % 50 == 1)
        assert {("score", "prediction is not finite")} == set(
            not_finite.select("reject_column", "reject_reason").iter_rows()
        )
        assert 120 == report.rows_rejected == rejects.height == nulls.height + not_finite.height
        kept = pl.col("customer") % 50 > 1
        assert good.filter(kept).equals(table.filter(kept)), "their neighbours have the very same bits"

    def test_too_many_of_them_end_the_run_unpublished_and_a_higher_limit_resumes_it(
        self, linear: str, tmp_path: Path
    ) -> None:
        source = write_customers(
            *(tmp_path / "customers",),
            rows=4_000,
            files=2,
            rows_per_group=500,
            edit=lambda table: table.with_columns(a=pl.when(pl.col("customer") % 2 == 0).then("a")),
        )

        with pytest.raises(TooManyRejects, match="raise max_reject_fraction"):
            infer(linear, source, tmp_path / "scores")
        assert not list((tmp_path / "scores").rglob("manifest.json"))
        run = next((tmp_path / "scores").glob("run=*")).name.removeprefix("run=")
        assert open_rejects(str(tmp_path / "scores"), run).collect().height > 0

        report = infer(linear, source, tmp_path / "scores", OPTIONS.model_copy(update={"max_reject_fraction": 0.5}))
        assert 2_000 == report.rows_rejected

    def test_a_model_that_fails_on_every_row_ends_the_run_at_once(self, failing: str, tmp_path: Path) -> None:
        source = write_customers(tmp_path / "customers", rows=500, files=1, rows_per_group=500)

        with pytest.raises(ModelFailed, match="got none of 128: ValueError: no row is good enough"):
            infer(failing, source, tmp_path / "scores")
        assert not list((tmp_path / "scores").glob("run=*/*"))


class TestBadInput:
    """A clear error before any scoring; test_wrong_calls has a table of others."""

    def test_columns_missing_and_of_the_wrong_type_are_all_named_at_once(self, linear: str, tmp_path: Path) -> None:
        (tmp_path / "customers").mkdir()
        table = pl.DataFrame({"customer": [1], "a": [1.0], "b": [[1]]})
        table.write_parquet(tmp_path / "customers" / "0.parquet")

        with pytest.raises(SchemaMismatch) as raised:
            infer(linear, tmp_path / "customers", tmp_path / "scores")
        assert all(
            words in str(raised.value)
            for words in ("'a' must be float32, got double", "'b' must", "'c' (float32) is missing")
        )
        assert set() == files_of(tmp_path / "scores")

    def test_a_store_that_overwrites(
        self, linear: str, customers: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        place = f"s3://lake/{uuid.uuid4().hex}"
        with overwriting_store(s3) as endpoint:
            monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
            for _ in range(2):
                with pytest.raises(DestinationUnusable, match="the store ignores `If-None-Match: \\*`"):
                    infer(linear, customers, place)

            assert ["_overnight/create-only.json"] == [entry.path for entry in open_storage(place).entries()]

    def test_s3_access_denied(self, linear: str, customers: Path, s3: S3Server) -> None:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in s3.read_only_environment.items():
                patch.setenv(name, value)
            with pytest.raises(StorageDenied, match="s3://lake/denied"):
                infer(linear, customers, "s3://lake/denied/scores")

    def test_a_full_disk_ends_the_run_and_space_resumes_it(self, linear: str, customers: Path, tmp_path: Path) -> None:
        disk = tmp_path / "disk"
        disk.mkdir()
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=140k", "tmpfs", str(disk)], check=False)
        if mounted.returncode:
            pytest.skip("a small disk needs the right to mount: run as root")
        try:
            with pytest.raises(StorageFull, match="Free some, then call again"):
                infer(linear, customers, disk / "scores")
            kept = run_parts(disk / "scores")
            subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
            infer(linear, customers, disk / "scores")
            infer(linear, customers, tmp_path / "scores")

            assert kept.items() <= run_parts(disk / "scores").items()
            assert run_parts(tmp_path / "scores") == run_parts(disk / "scores")
        finally:
            subprocess.run(["umount", str(disk)], check=True)


def test_a_page_that_can_not_be_written_does_not_end_a_run_that_is_published(
    linear: str, customers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put_new = LocalStorage.put_new
    caplog.set_level("WARNING", logger="prefect.overnight")

    def put_all_but_the_page(self: LocalStorage, path: str, data: Any) -> bool:
        if path.endswith("report.html"):
            message = "No space is left."
            raise StorageFull(message)
        return put_new(self, path, data)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStorage, "put_new", put_all_but_the_page)
        report = infer(linear, customers, tmp_path / "scores")
    page = Path(report.report)
    lacked = not page.exists()
    again = infer(linear, customers, tmp_path / "scores")

    assert "is published, but its page could not be written: No space is left." in caplog.text
    assert ("scored", "already complete") == (report.status, again.status)
    assert lacked
    assert page.exists()
    assert 10_000 == open_predictions(str(tmp_path / "scores")).collect().height


class TestReports:
    def test_the_flow_run_has_progress_table_markdown_and_plot(
        self, linear: str, customers: Path, tmp_path: Path, prefect: PrefectServer
    ) -> None:
        import httpx

        from flows.batch import batch_inference

        state = batch_inference(linear, str(customers), str(tmp_path / "scores"), OPTIONS, return_state=True)

        found = httpx.post(
            f"{prefect.api_url}/artifacts/filter",
            json={"flow_runs": {"id": {"any_": [str(state.state_details.flow_run_id)]}}},
        ).json()
        by_type = {artifact["type"]: artifact["data"] for artifact in found}
        assert {"progress", "table", "markdown", "image"} == set(by_type)
        assert 100.0 == by_type["progress"]
        assert "rows a second" in by_type["markdown"]
        assert 10 == len(json.loads(by_type["table"]))
        assert str(by_type["image"]).startswith("data:image/svg+xml;base64,")

    def test_the_flow_run_shows_its_steps_by_name(
        self, linear: str, customers: Path, tmp_path: Path, prefect: PrefectServer
    ) -> None:
        import httpx

        from flows.batch import batch_inference

        state = batch_inference(linear, str(customers), str(tmp_path / "scores"), OPTIONS, return_state=True)
        asked = {"flow_runs": {"id": {"any_": [str(state.state_details.flow_run_id)]}}}
        steps = {"resolve", "plan", "load", "score", "check keys", "publish", "report"}

        def read_states() -> dict[str, str]:
            runs = httpx.post(f"{prefect.api_url}/task_runs/filter", json=asked).json()
            return {run["name"]: run["state_type"] for run in runs if not run["name"].startswith("shard ")}

        # Prefect's client sends the states of task runs from a thread of its own.
        eventually(read_states, lambda states: states == dict.fromkeys(steps, "COMPLETED"))

    def test_mlflow_has_one_run_with_the_lineage(self, linear: str, customers: Path, tmp_path: Path) -> None:
        options = OPTIONS.model_copy(update={"experiment": "overnight"})
        report = infer(linear, customers, tmp_path / "scores", options)
        (tmp_path / "scores" / "_overnight" / report.run / "manifest.json").unlink()
        infer(linear, customers, tmp_path / "scores", options)

        client = mlflow.MlflowClient()
        experiment = client.get_experiment_by_name("overnight")
        assert experiment is not None
        runs = client.search_runs([experiment.experiment_id], f"tags.`overnight.run_key` = '{report.run}'")
        assert 1 == len(runs)
        run = client.get_run(runs[0].info.run_id)
        assert (linear, 10_000.0) == (run.data.tags["overnight.model"], run.data.metrics["rows"])
        assert str(customers) == run.inputs.dataset_inputs[0].dataset.name
        assert 1 == len(run.inputs.model_inputs)

    def test_mlflows_run_ends_as_the_run_did_and_is_gone_on_with(
        self, linear: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import flows.batch

        source = write_customers(
            *(tmp_path / "customers",),
            rows=1_000,
            files=1,
            rows_per_group=500,
            edit=lambda table: table.with_columns(a=pl.when(pl.col("customer") % 2 == 0).then("a")),
        )
        options = OPTIONS.model_copy(update={"experiment": "overnight", "name": f"n{uuid.uuid4().hex[:8]}"})
        scores = tmp_path / "scores"

        def ended() -> tuple[str, str]:
            client = mlflow.MlflowClient()
            experiment = client.get_experiment_by_name("overnight")
            assert experiment is not None
            by_place = f"tags.`overnight.destination` = '{scores}'"
            (run,) = client.search_runs([experiment.experiment_id], by_place)
            return run.info.status, run.data.tags.get("overnight.error", "")

        with pytest.raises(TooManyRejects):
            infer(linear, source, scores, options)
        status, reason = ended()
        assert ("FAILED", True) == (status, "may be rejects" in reason)
        assert not list(scores.rglob("report.html"))

        options = options.model_copy(update={"max_reject_fraction": 0.5})
        with monkeypatch.context() as patch:
            patch.setattr(flows.batch, "publish", interrupt)
            with pytest.raises(KeyboardInterrupt):
                infer(linear, source, scores, options)
        assert "KILLED" == ended()[0]
        assert not list(scores.rglob("report.html"))

        infer(linear, source, scores, options)
        assert ("FINISHED", "") == ended()

    def test_a_run_that_was_published_by_a_call_that_was_ended_then_is_recorded_by_the_next(
        self, linear: str, customers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import flows.batch

        with monkeypatch.context() as patch:
            patch.setattr(flows.batch, "draw_progress", interrupt)
            with pytest.raises(KeyboardInterrupt):
                infer(linear, customers, tmp_path / "scores")
        assert 10_000 == open_predictions(str(tmp_path / "scores")).collect().height
        report = infer(linear, customers, tmp_path / "scores")

        assert "already complete" == report.status
        assert report.run in Path(report.report).read_text()

    def test_parts_that_stay_missing_end_the_run_by_name_and_nothing_is_reported(
        self, linear: str, customers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import flows.batch

        inner = flows.batch.audit_parts

        def lose_a_part(storage: LocalStorage, plan: Plan) -> Audit:
            next((tmp_path / "scores").glob("run=*/part-*")).unlink()
            return inner(storage, plan)

        monkeypatch.setattr(flows.batch, "audit_parts", lose_a_part)
        with pytest.raises(PublishRefused, match=r"1 parts missing\. Nothing was published; call again"):
            infer(linear, customers, tmp_path / "scores")

        assert {"plan.json"} == {
            path.name for path in (tmp_path / "scores" / "_overnight").glob("*/*.*") if len(path.parent.name) == 32
        }

    def test_the_page_and_the_line_of_polars_work(self, linear: str, customers: Path, tmp_path: Path) -> None:
        report = infer(linear, customers, tmp_path / "scores")

        page = Path(report.report).read_text()
        assert report.run in page
        assert "data:image/svg+xml;base64," in page
        assert 10_000 == eval(report.read_with, {"pl": pl}).height  # noqa: S307 - the line that the report tells people to run
