"""A destination has the predictions of one source: those of another take their place only where that is asked for."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from serving.errors import DestinationUnusable, PublishRefused
from tasks.batch.destination_source import check_source, claim_source, is_edition, list_addresses
from tasks.batch.options import BatchOptions
from tasks.batch.plan import Plan, manifest_path
from tasks.storage import LocalStorage, Storage, open_storage
from tests.tasks.batch.iceberg_tables import configure, open_lake
from tests.tasks.batch.test_reuse import OPTIONS, call, plan_call, write

REPLACES = BatchOptions(other_source="replace")
UPSERT = {"output": "delta", "delta_mode": "upsert", "key_columns": ("customer",)}


@pytest.mark.parametrize(
    ("source", "earlier"),
    [
        ("/lake/in/", "/lake/in"),
        ("s3://lake/in/2026-11-29.parquet", "s3://lake/in/2026-11-28.parquet"),
        ("s3://lake/in/dt=2026-11-29/", "s3://lake/in/dt=2026-11-28"),
        ("s3://lake/in/year=2026/month=12/*.csv", "s3://lake/in/year=2026/month=11/*.csv"),
        ("/lake/2026/11/29/customers.csv", "/lake/2026/11/28/customers.csv"),
        ("/lake/export_20261129_030207.csv", "/lake/export_20261128_030000.csv"),
        ("/lake/export-20261129T0302Z.csv", "/lake/export-20261128T0300Z.csv"),
        ("/lake/scores/run=monday", "/lake/scores/run=sunday"),
        ("/lake/t/metadata/00002-b.metadata.json", "/lake/t/metadata/00001-a.metadata.json"),
        ("iceberg:lake.sales.customers", "iceberg:lake.sales.customers"),
        (["/lake/north.csv", "/lake/south.csv"], "/lake/north.csv"),
        (["/lake/2026-11-29.csv"], ["/lake/2026-11-27.csv", "/lake/2026-11-28.csv"]),
    ],
)
def test_the_same_address_at_another_date_is_an_edition_of_the_source(
    source: str | list[str], earlier: str | list[str]
) -> None:
    assert is_edition(list_addresses(source), list_addresses(earlier))


@pytest.mark.parametrize(
    ("source", "earlier"),
    [
        ("/lake/corrected.csv", "/lake/customers.csv"),
        ("/lake/customers-2026-11-29-corrected.csv", "/lake/customers-2026-11-29.csv"),
        ("/lake/customers-2.csv", "/lake/customers-1.csv"),
        ("s3://lake/in/country=de", "s3://lake/in/country=fr"),
        ("s3://lake/in/a.csv", "s3://other/in/a.csv"),
        ("/lake/in/*.csv", "/lake/in"),
        ("/lake/north.csv", ["/lake/north.csv", "/lake/south.csv"]),
        ("iceberg:lake.sales.corrected", "iceberg:lake.sales.customers"),
    ],
)
def test_any_other_address_is_another_source(source: str | list[str], earlier: str | list[str]) -> None:
    assert not is_edition(list_addresses(source), list_addresses(earlier))


def test_a_local_address_is_the_same_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    assert list_addresses("in/a.csv") == list_addresses(f"file://{tmp_path}/in/a.csv") == (f"{tmp_path}/in/a.csv",)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    write(tmp_path / "in" / "a.parquet", 0, 24)
    return plan_call(tmp_path / "in", tmp_path / "planned", OPTIONS).plan


def claim(storage: Storage, plan: Plan, address: str, options: BatchOptions = OPTIONS) -> None:
    """Claim a destination for a run over one address."""
    made = plan.model_copy(update={"run": address.strip("/"), "addresses": (address,), "options": options})
    claim_source(storage, made, options)


def test_a_run_over_another_source_is_refused_when_it_is_planned_and_when_it_is_published(
    place: str, plan: Plan
) -> None:
    storage = open_storage(place)
    check_source(storage, OPTIONS, ["/in"])
    claim(storage, plan, "/in")

    check_source(storage, OPTIONS, ["/in"])
    claim(storage, plan, "/in")
    with pytest.raises(DestinationUnusable, match=r"predictions of, /in, got /corrected: .*other_source='replace'"):
        check_source(storage, OPTIONS, ["/corrected"])
    with pytest.raises(PublishRefused, match=r"got /corrected: .* Nothing was published\."):
        claim(storage, plan, "/corrected")


def test_a_run_that_is_to_replace_another_source_is_the_one_that_others_are_held_against(
    tmp_path: Path, plan: Plan
) -> None:
    storage = open_storage(str(tmp_path / "out"))
    claim(storage, plan, "/in")
    check_source(storage, REPLACES, ["/corrected"])
    claim(storage, plan, "/corrected", REPLACES)

    check_source(storage, OPTIONS, ["/corrected"])
    with pytest.raises(DestinationUnusable, match="predictions of, /corrected, got /in"):
        check_source(storage, OPTIONS, ["/in"])


def test_a_run_that_is_to_replace_two_sources_by_one_of_them_is_the_one_that_others_are_held_against(
    tmp_path: Path, plan: Plan
) -> None:
    storage = open_storage(str(tmp_path / "out"))
    both = plan.model_copy(update={"addresses": ("/north", "/south")})
    claim_source(storage, both, OPTIONS)
    claim(storage, plan, "/north", REPLACES)

    claim(storage, plan, "/north")
    check_source(storage, OPTIONS, ["/north"])


def test_of_runs_over_many_sources_that_are_published_at_once_one_is_published(place: str, plan: Plan) -> None:
    def publish(number: int) -> bool:
        try:
            claim(open_storage(place), plan, f"/{number}")
        except PublishRefused:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert 1 == sum(pool.map(publish, range(16)))


class ForgetfulStorage(LocalStorage):
    """Says that it has stored the first object, and has not."""

    puts = 0

    def put_new(self, path: str, data: bytes | memoryview) -> bool:
        self.puts += 1
        return self.puts == 1 or super().put_new(path, data)


def test_a_claim_that_storage_has_lost_is_made_again(tmp_path: Path, plan: Plan) -> None:
    storage = ForgetfulStorage(tmp_path / "out")
    claim(storage, plan, "/in")

    with pytest.raises(DestinationUnusable, match="predictions of, /in, got /corrected"):
        check_source(storage, OPTIONS, ["/corrected"])


def test_a_published_run_that_has_lost_parts_is_scored_again_whoever_has_followed(tmp_path: Path, plan: Plan) -> None:
    storage = open_storage(str(tmp_path / "out"))
    claim(storage, plan, "/in")
    claim(storage, plan, "/corrected", REPLACES)
    storage.put_new(manifest_path("in"), b"{}")

    claim(storage, plan, "/in")


@pytest.mark.parametrize(
    ("options", "is_checked"),
    [
        ({"output": "delta", "delta_mode": "append"}, False),
        (UPSERT, False),
        ({**UPSERT, "missing_keys": "mark"}, True),
        ({**UPSERT, "missing_keys": "delete"}, True),
        ({"output": "delta", "delta_mode": "replace"}, True),
    ],
)
def test_a_run_that_leaves_the_rows_of_others_in_a_table_may_have_any_source(
    options: dict[str, Any], *, is_checked: bool, tmp_path: Path, plan: Plan
) -> None:
    storage, chosen = open_storage(str(tmp_path / "out")), BatchOptions(**options)
    claim(storage, plan, "/in")
    if is_checked:
        with pytest.raises(DestinationUnusable):
            check_source(storage, chosen, ["/corrected"])
    else:
        check_source(storage, chosen, ["/corrected"])
        claim(storage, plan, "/corrected", chosen)
    check_source(storage, OPTIONS, ["/in"])


def test_an_iceberg_table_has_one_source_whichever_destinations_feed_it(
    tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(monkeypatch, str(tmp_path))
    open_lake(str(tmp_path))
    table = {"output": "iceberg", "iceberg_table": "lake.sales.scores", "iceberg_mode": "replace"}
    options = OPTIONS.model_copy(update=table)
    call(tmp_path / "in", tmp_path / "one", options)
    claim(open_storage(str(tmp_path / "one")), plan, "/in", options)

    with pytest.raises(DestinationUnusable, match="predictions of, /in, got /corrected"):
        check_source(open_storage(str(tmp_path / "two")), options, ["/corrected"])
