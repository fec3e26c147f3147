"""The settings of a stack: what a team says of it, checked before AWS is asked to change anything."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator

from infra.aws.session import Aws, AwsRefused, explain_refusals

_STACK_NAME = re.compile(r"[A-Za-z][A-Za-z0-9-]{0,127}")
_WHEEL = re.compile(r"overnight-(?P<release>[A-Za-z0-9.+!]+)-py3-none-any\.whl")
_TYPES = 3
_SERVERS = ("prefect_api_url", "mlflow_tracking_uri")
_ADDRESSES = (*_SERVERS, "index_url", "extra_index_url")
# The parameters of the template by the fields that are given to them as they are.
_PARAMETERS = {
    "prefect_api_url": "PrefectApiUrl",
    "mlflow_tracking_uri": "MlflowTrackingUri",
    "secret_arn": "SecretArn",
    "spot_pool": "SpotPool",
    "on_demand_pool": "OnDemandPool",
    "index_url": "IndexUrl",
    "extra_index_url": "ExtraIndexUrl",
    "machines": "Machines",
    "spot_workers_max": "SpotWorkersMax",
    "on_demand_workers_max": "OnDemandWorkersMax",
    "volume_gib": "VolumeGiB",
    "bucket_name": "BucketName",
    "source_bucket": "SourceBucket",
    "budget_usd": "BudgetUsd",
    "budget_email": "BudgetEmail",
}


class Settings(BaseModel):
    """What a team says of a stack. What is not given stays as the stack has it; a new one has the defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    subnets: tuple[str, ...] | None = Field(
        default=None, min_length=1, description="The subnets of the machines, of one network, best in every zone."
    )
    prefect_api_url: str | None = Field(default=None, description="The Prefect server, as machines in AWS reach it.")
    mlflow_tracking_uri: str | None = Field(default=None, description="The MLflow server, as machines in AWS reach it.")
    secret_arn: str | None = Field(
        default=None,
        description="A secret of Secrets Manager, whose lines NAME=VALUE go into the workers' environment.",
    )
    index_url: str | None = Field(
        default=None, description="The package index that has Overnight, instead of a wheel in the bucket."
    )
    extra_index_url: str | None = Field(
        default=None, description="One more package index, such as one with torch for machines without a GPU."
    )
    machines: Literal["cpu", "gpu"] | None = Field(
        default=None, description="The launch template that both groups use."
    )
    instance_types: tuple[str, ...] | None = Field(
        default=None, description="Three instance types with the same processor and as many cores, the cheapest first."
    )
    image: str | None = Field(
        default=None, description="The image of the machines: its id, or resolve:ssm:NAME of a parameter."
    )
    volume_gib: int | None = Field(default=None, ge=20, description="The disk of a machine.")
    spot_workers_max: int | None = Field(default=None, ge=0, description="The most spot machines at a time.")
    on_demand_workers_max: int | None = Field(default=None, ge=0, description="The most on-demand machines at a time.")
    spot_pool: str | None = Field(default=None, description="The Prefect work pool that spot machines serve.")
    on_demand_pool: str | None = Field(default=None, description="The Prefect work pool that on-demand machines serve.")
    bucket_name: str | None = Field(default=None, description="The bucket's name. Without it, AWS makes one.")
    source_bucket: str | None = Field(default=None, description="One more bucket, which workers may only read.")
    budget_usd: int | None = Field(default=None, ge=1, description="US dollars a month that a mail warns of.")
    budget_email: str | None = Field(default=None, description="Who gets that mail. Without it there is no budget.")

    @field_validator("instance_types")
    @classmethod
    def _are_three(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None and not len(value) == len(set(value)) == _TYPES:
            message = f"must be {_TYPES} different types, so that spot is bought where there is most of it, got {value}"
            raise ValueError(message)
        return value

    @field_validator(*_ADDRESSES)
    @classmethod
    def _holds_no_password(cls, value: str | None) -> str | None:
        if value is not None and "@" in urlsplit(value).netloc:
            message = (
                "must hold no user and no password, which everybody reads who can see the stack. Put the line "
                "NAME=VALUE (MLFLOW_TRACKING_URI, PREFECT_API_AUTH_STRING, PIP_INDEX_URL) into a secret of Secrets "
                "Manager, and name it as secret_arn"
            )
            raise ValueError(message)
        return value

    @field_validator(*_SERVERS)
    @classmethod
    def _is_reached_from_aws(cls, value: str | None) -> str | None:
        if value is not None and _is_local(value):
            message = (
                f"must be an address that machines in AWS reach, such as https://prefect.example.com/api, got {value}, "
                "which is known to this machine alone"
            )
            raise ValueError(message)
        return value


def _is_local(address: str) -> bool:
    """Return whether an address is of this machine: a path, a file, or a server on loopback."""
    parts = urlsplit(address)
    if "databricks" in (parts.scheme, address):
        return False
    host = parts.hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return not host or host == "localhost" or host.endswith(".localhost")


def check_stack_name(name: str) -> str:
    """Return a name that a stack can have; raises AwsRefused for any other."""
    if not _STACK_NAME.fullmatch(name):
        message = (
            f"The name of a stack must be letters, digits and hyphens, a letter first, got {name!r}. Choose another by "
            "--stack."
        )
        raise AwsRefused(message)
    return name


def read_release(wheel: Path) -> str:
    """Return the release of a wheel of Overnight by its name; raises AwsRefused where it is no such file."""
    match = _WHEEL.fullmatch(wheel.name)
    if match is None or not wheel.is_file():
        message = (
            f"--wheel must be a wheel of Overnight, overnight-VERSION-py3-none-any.whl, got {wheel}"
            f"{'' if wheel.is_file() else ', where there is no file'}. `pip wheel --no-deps -w dist .` in a clone "
            "makes one."
        )
        raise AwsRefused(message)
    return match["release"]


def make_parameters(aws: Aws, given: Settings, release: str, standing: Mapping[str, str] | None) -> dict[str, str]:
    """Return the parameters that a stack is given: what the settings say, else what it has, else none.

    Args:
        aws: Where the subnets are looked up.
        given: The settings.
        release: The release of Overnight that machines install.
        standing: The parameters that the stack has, None where there is none yet.

    Raises:
        AwsRefused: Something that a new stack needs is missing, or the subnets are of several networks.
    """
    said = {name: str(value) for field, name in _PARAMETERS.items() if (value := getattr(given, field)) is not None}
    kind = (given.machines or (standing or {}).get("Machines") or "cpu").capitalize()
    if given.instance_types is not None:
        said[f"{kind}InstanceTypes"] = ",".join(given.instance_types)
    if given.image is not None:
        said[f"{kind}Image"] = given.image
    if given.subnets is not None:
        said |= _find_network(aws, given.subnets)
    found = {**(standing or {}), **said, "Release": release}
    needed = {"subnets": "SubnetIds", **{field: _PARAMETERS[field] for field in _SERVERS}}
    if missing := [field for field, name in needed.items() if not found.get(name)]:
        message = (
            f"The settings of a new stack must have {', '.join(missing)}, as the machines reach them, got none. Write "
            "them into a file, and name it: overnight aws plan aws.yaml."
        )
        raise AwsRefused(message)
    return found


def _find_network(aws: Aws, subnets: Sequence[str]) -> dict[str, str]:
    """Return the parameters of a network by its subnets, which must be there and of one network."""
    with explain_refusals("looked up"):
        found = aws.client("ec2").describe_subnets(SubnetIds=list(subnets))["Subnets"]
    networks = sorted({each["VpcId"] for each in found})
    if len(networks) != 1:
        message = (
            f"All subnets must be of one network (VPC), got subnets of {', '.join(networks)}. Give those of one, in as "
            "many zones as it has."
        )
        raise AwsRefused(message)
    return {"VpcId": networks[0], "SubnetIds": ",".join(dict.fromkeys(subnets))}
