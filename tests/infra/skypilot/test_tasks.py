"""The tasks of infra/skypilot: what they start, and what SkyPilot itself plans of them without a network."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.apply import make_work_pools
from infra.worker import parse_arguments
from tests.servers import python_or_skip

ROOT = Path(__file__).parents[3]
TASKS = sorted((ROOT / "infra/skypilot").glob("*.yaml"))
CHILD = Path(__file__).with_name("plan_child.py")
ENVS = {"PREFECT_API_URL": "https://prefect.example/api", "MLFLOW_TRACKING_URI": "https://mlflow.example"}
SECRETS = {"PREFECT_API_AUTH_STRING": "user:hunter2"}
# Prices of these tests, not of AWS. No instance is the cheapest in both columns.
VMS = """\
InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,GpuInfo,Price,SpotPrice,Region,AvailabilityZone,Arch
m6i.large,,,2,8,,0.05,0.01,us-east-1,use1-az1,x86_64
m6i.xlarge,,,4,16,,0.18,0.08,us-east-1,use1-az1,x86_64
m6i.xlarge,,,4,16,,0.20,0.06,us-west-2,usw2-az1,x86_64
m6i.2xlarge,,,8,32,,0.40,0.10,us-east-1,use1-az1,x86_64
g6.xlarge,L4,1,4,16,,0.50,0.30,us-east-1,use1-az1,x86_64
g4dn.xlarge,T4,1,4,16,,0.52,0.20,us-east-1,use1-az1,x86_64
"""


def read_task(path: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize("path", TASKS, ids=lambda path: path.stem)
def test_a_task_starts_a_worker_of_a_pool_that_is_there_as_the_process_that_is_told_to_end(path: Path) -> None:
    task = read_task(path)
    *_, last = task["run"].strip().splitlines()
    values = {**task["envs"], "(hostname)": "machine"}
    for name, value in values.items():
        last = last.replace(f"${name}", str(value))
    program, *arguments = shlex.split(last)
    options = parse_arguments(arguments[2:])

    assert "exec" == program, "SIGTERM must reach the worker and no shell before it"
    assert ["worker"] == arguments[1:2]
    assert options.pool in {pool.name for pool in make_work_pools()}
    assert options.grace < 30, "the shortest notice of a cloud"


@pytest.mark.parametrize("path", TASKS, ids=lambda path: path.stem)
def test_a_task_is_one_spot_machine_that_is_replaced_and_holds_no_secret(path: Path) -> None:
    task = read_task(path)

    assert (True, 1) == (task["resources"]["use_spot"], task["num_nodes"])
    assert "EAGER_NEXT_REGION" == task["resources"]["job_recovery"]["strategy"]
    assert {"PREFECT_API_AUTH_STRING": None} == task["secrets"]
    assert {"PREFECT_API_URL", "MLFLOW_TRACKING_URI"} == {name for name, value in task["envs"].items() if value is None}


def test_the_tasks_differ_in_their_machines_alone() -> None:
    machines, others = [], []
    for task in map(read_task, TASKS):
        machines.append({key: task["resources"].pop(key, None) for key in ("accelerators", "disk_size")})
        others.append({key: value for key, value in task.items() if key != "name"})

    assert others[0] == others[1]
    assert machines[0] != machines[1]


@pytest.fixture(scope="module")
def python() -> Path:
    """The interpreter of an environment with SkyPilot, made where it is not there yet."""
    return python_or_skip("skypilot")


def write_catalog(folder: Path, vms: str) -> Path:
    files = {
        "aws/vms.csv": vms,
        "aws/images.csv": "Tag,Region,OS,OSVersion,ImageId,CreationDate,BaseImageId\n",
        "aws/instance_quota_mapping.csv": "InstanceType,QuotaCode,SpotInstanceCode,OnDemandInstanceCode\n",
        "common/accelerators.csv": "AcceleratorName,Clouds\nL4,\"{'AWS'}\"\nT4,\"{'AWS'}\"\nA10G,\"{'AWS'}\"\n",
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


def plan(
    python: Path, task: str, folder: Path, *, vms: str = VMS, envs: dict[str, str] = ENVS
) -> subprocess.CompletedProcess[str]:
    catalog = write_catalog(folder / "catalog", vms)
    (folder / "home").mkdir()
    return subprocess.run(
        [python, CHILD, ROOT / f"infra/skypilot/{task}.yaml", catalog],
        input=json.dumps({"envs": envs, "secrets": SECRETS}),
        # Its `workdir` is the folder it is called in: an empty one, since it is looked through.
        cwd=folder / "home",
        env={"HOME": str(folder / "home"), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.machines
@pytest.mark.parametrize(
    ("task", "instance", "region", "usd", "accelerators"),
    [
        ("worker", "m6i.xlarge", "us-west-2", 0.06, None),
        ("gpu-worker", "g4dn.xlarge", "us-east-1", 0.20, {"T4": 1}),
    ],
)
def test_skypilot_plans_the_cheapest_spot_machine_that_is_large_enough(
    python: Path, task: str, instance: str, region: str, usd: float, accelerators: Any, tmp_path: Path
) -> None:
    done = plan(python, task, tmp_path)
    assert 0 == done.returncode, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])

    assert (instance, region, True, 1) == (found["instance"], found["region"], found["spot"], found["nodes"])
    assert usd == pytest.approx(found["usd_an_hour"])
    assert accelerators == found["accelerators"]
    assert "EAGER_NEXT_REGION" == found["recovery"]["strategy"]
    assert ENVS.items() <= found["envs"].items()


@pytest.mark.machines
def test_skypilot_refuses_a_task_without_the_address_of_prefect(python: Path, tmp_path: Path) -> None:
    done = plan(python, "worker", tmp_path, envs={"MLFLOW_TRACKING_URI": "https://mlflow.example"})

    assert done.returncode
    assert "Environment variable 'PREFECT_API_URL' is None" in done.stderr


@pytest.mark.machines
def test_skypilot_finds_no_machine_where_all_are_too_small(python: Path, tmp_path: Path) -> None:
    done = plan(python, "worker", tmp_path, vms="".join(VMS.splitlines(keepends=True)[:2]))

    assert done.returncode
    assert "ResourcesUnavailableError" in done.stderr
