"""What a team says of a stack is checked before AWS is asked to change anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from infra.aws.session import Aws, AwsRefused
from infra.aws.settings import Settings, check_stack_name, make_parameters, read_release
from infra.aws.stack import read_template
from tests.aws_server import AwsServer


def test_every_setting_is_a_parameter_of_the_template_and_every_parameter_is_set(aws: Aws, server: AwsServer) -> None:
    given: dict[str, Any] = {name: f"https://{name}.example.com" for name in Settings.model_fields}
    given |= {"subnets": tuple(server.list_subnets()), "instance_types": ("a", "b", "c"), "machines": "gpu"}
    given |= dict.fromkeys(("volume_gib", "spot_workers_max", "on_demand_workers_max", "budget_usd"), 20)
    parameters = make_parameters(aws, Settings(**given), "0.1.0", None)

    assert set(parameters) | {"CpuInstanceTypes", "CpuImage"} == _read_parameters()
    assert "a,b,c" == parameters["GpuInstanceTypes"]


def _read_parameters() -> set[str]:
    class Loader(yaml.SafeLoader):
        """Reads the template without what its tags do."""

    Loader.add_multi_constructor("!", lambda *_: None)
    return set(yaml.load(read_template(), Loader=Loader)["Parameters"])  # noqa: S506 - it is a SafeLoader


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("prefect_api_url", "http://127.0.0.1:4200/api", "must be an address that machines in AWS reach"),
        ("prefect_api_url", "http://localhost:4200/api", "known to this machine alone"),
        ("mlflow_tracking_uri", "sqlite:///mlflow.db", "known to this machine alone"),
        ("mlflow_tracking_uri", "https://me:secret@mlflow.example.com", "no user and no password"),
        ("index_url", "https://me:secret@packages.example.com/simple", "no user and no password"),
        ("instance_types", ("c7i.xlarge", "m7i.xlarge"), "must be 3 different types"),
        ("instance_types", ("c7i.xlarge",) * 3, "must be 3 different types"),
        ("machines", "tpu", "Input should be 'cpu' or 'gpu'"),
        ("subnets", (), "at least 1 item"),
        ("subnet", "subnet-1", "Extra inputs are not permitted"),
    ],
)
def test_a_setting_that_can_not_be_is_refused(field: str, value: object, words: str) -> None:
    with pytest.raises(ValidationError) as refused:
        Settings(**{field: value})  # type: ignore[arg-type]

    assert words in str(refused.value)


def test_a_registry_of_databricks_is_reached_from_aws() -> None:
    assert "databricks" == Settings(mlflow_tracking_uri="databricks").mlflow_tracking_uri


def test_a_new_stack_names_all_that_is_missing(aws: Aws) -> None:
    with pytest.raises(AwsRefused, match=r"must have subnets, mlflow_tracking_uri, as the machines reach them"):
        make_parameters(aws, Settings(prefect_api_url="https://prefect.example.com/api"), "0.1.0", None)


def test_subnets_must_be_there_and_of_one_network(aws: Aws, server: AwsServer, settings: Settings) -> None:
    ec2 = server.client("ec2")
    vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
    other = ec2.create_subnet(VpcId=vpc, CidrBlock="10.0.1.0/24")["Subnet"]["SubnetId"]

    for subnets, words in (
        (("subnet-00000000",), r"It must be looked up, but AWS answers InvalidSubnetID\.NotFound"),
        (
            (*server.list_subnets()[:1], other),
            r"All subnets must be of one network \(VPC\), got subnets of vpc-.*, vpc-",
        ),
    ):
        with pytest.raises(AwsRefused, match=words):
            make_parameters(aws, settings.model_copy(update={"subnets": subnets}), "0.1.0", None)


@pytest.mark.parametrize("name", ["", "9lives", "a_b", "a b", "x" * 129])
def test_a_name_that_no_stack_can_have_is_refused(name: str) -> None:
    with pytest.raises(AwsRefused, match=r"letters, digits and hyphens.*--stack"):
        check_stack_name(name)


def test_the_release_of_a_wheel_is_in_its_name(wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "other-1.0-py3-none-any.whl").write_bytes(b"")

    assert "0.1.0" == read_release(wheel)
    with pytest.raises(AwsRefused, match=r"--wheel must be a wheel of Overnight.*where there is no file.*pip wheel"):
        read_release(tmp_path / "overnight-9.9-py3-none-any.whl")
    with pytest.raises(AwsRefused, match=r"--wheel must be a wheel of Overnight"):
        read_release(tmp_path / "other-1.0-py3-none-any.whl")
