"""A night starts its machines itself: workers on this machine, and those of a stack in AWS on loopback."""

from __future__ import annotations

import os
import threading
import tomllib
from collections.abc import Generator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from infra.aws.settings import Settings, make_parameters
from infra.aws.stack import carry_out, plan_stack
from infra.local.prefect_server import PrefectServer, PrefectWorker, prefect_worker
from infra.worker import list_children
from serving.errors import NightFailed
from serving.machine import find_release
from tasks.batch.manifest import open_predictions
from tasks.batch.options import BatchOptions
from tasks.spot.purchase import AwsMachines, LocalMachines, PurchaseOptions
from tests.aws_server import AwsServer, aws_server, use_aws

pytestmark = pytest.mark.machines

ROOT = Path(__file__).parents[2]
OPTIONS = BatchOptions(
    key_columns=("customer",), batch_size=50, rows_per_chunk=50, slots=2, max_reject_fraction=1, experiment=None
)
BUYING = PurchaseOptions(spot_price=1, on_demand_price=3, changeover_seconds=20, interval_seconds=1, start_seconds=60)


def soon(seconds: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()


@pytest.fixture(autouse=True)
def _entry_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The entry points of pyproject.toml, whatever is installed."""
    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["overnight.capacity"]
    folder = tmp_path / "site" / "machines-1.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: machines\nVersion: 1\n")
    lines = ["[overnight.capacity]", *(f"{name} = {where}" for name, where in named.items())]
    (folder / "entry_points.txt").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(str(folder.parent))


@contextmanager
def start_machines(away: AwsServer, deployed: PrefectServer, groups: dict[str, str], folder: Path) -> Generator[None]:
    """Have a real worker for each machine of the groups, by its id, while the machine is there: group by pool."""
    over = threading.Event()
    workers: dict[str, PrefectWorker] = {}
    environment = {
        "MLFLOW_TRACKING_URI": os.environ["MLFLOW_TRACKING_URI"],
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PREFECT_WORKER_HEARTBEAT_SECONDS": "10",
    }

    def follow() -> None:
        client: Any = away.client("autoscaling")
        while not over.wait(0.5):
            found = client.describe_auto_scaling_groups(AutoScalingGroupNames=list(groups.values()))
            there = {
                machine["InstanceId"]: pool
                for group in found["AutoScalingGroups"]
                for pool, name in groups.items()
                if name == group["AutoScalingGroupName"]
                for machine in group["Instances"]
            }
            for machine in there.keys() - workers.keys():
                workers[machine] = prefect_worker(deployed, there[machine], folder / machine, environment=environment)
            for machine in workers.keys() - there.keys():
                workers.pop(machine).stop()

    thread = threading.Thread(target=follow)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        for worker in workers.values():
            worker.stop()


@pytest.fixture
def away() -> Generator[AwsServer]:
    with aws_server() as server, use_aws(server):
        yield server


def test_a_night_buys_spot_machines_in_aws_and_gives_them_back(
    deployed: PrefectServer, away: AwsServer, sleepy: str, customers: Path, tmp_path: Path
) -> None:
    from flows.nightly import nightly_inference
    from infra.aws.session import open_aws

    aws = open_aws()
    settings = Settings(
        subnets=tuple(away.list_subnets()),
        prefect_api_url="https://prefect.example.com/api",
        mlflow_tracking_uri="https://mlflow.example.com",
    )
    plan = plan_stack(aws, "overnight", make_parameters(aws, settings, find_release(), None))
    stack = carry_out(aws, plan, lambda _: None, poll_seconds=0)
    groups = {
        "overnight-spot": stack.resource("SpotGroup"),
        "overnight-on-demand": stack.resource("OnDemandGroup"),
    }
    destination = tmp_path / "scores"
    buying = BUYING.model_copy(update={"machines": AwsMachines()})
    with start_machines(away, deployed, groups, tmp_path / "machines"):
        report = nightly_inference(sleepy, str(customers), str(destination), soon(900), buying, OPTIONS)
    found = away.client("autoscaling").describe_auto_scaling_groups()["AutoScalingGroups"]

    assert list(range(10_000)) == sorted(open_predictions(str(destination)).collect()["customer"])
    assert ["spot"] == [move.to for move in report.moves if move.to != "nowhere"]
    assert [("spot", 1, 1), ("spot", 0, 0)] == [(each.kind, each.wanted, each.standing) for each in report.purchases]
    assert report.spot_seconds_bought > report.spot_seconds > 0
    assert 0 == report.on_demand_seconds_bought
    assert [0, 0] == [len(group["Instances"]) for group in found]
    assert [] == away.client("autoscaling").describe_scheduled_actions()["ScheduledUpdateGroupActions"]


def test_a_night_starts_workers_on_this_machine_and_ends_them(
    deployed: PrefectServer, sleepy: str, customers: Path, tmp_path: Path
) -> None:
    from flows.nightly import nightly_inference

    destination = tmp_path / "scores"
    buying = BUYING.model_copy(update={"machines": LocalMachines()})
    report = nightly_inference(sleepy, str(customers), str(destination), soon(900), buying, OPTIONS)

    assert 10_000 == open_predictions(str(destination)).collect().height
    assert [("spot", 1), ("spot", 0)] == [(each.kind, each.wanted) for each in report.purchases]


def test_a_night_whose_run_fails_gives_its_machines_back(
    deployed: PrefectServer, failing: str, customers: Path, tmp_path: Path
) -> None:
    from flows.nightly import nightly_inference

    before = list_children(os.getpid())
    buying = BUYING.model_copy(update={"machines": LocalMachines()})
    with pytest.raises(NightFailed):
        nightly_inference(failing, str(customers), str(tmp_path / "scores"), soon(900), buying, OPTIONS)

    assert before == list_children(os.getpid())
