"""Blocks of Prefect that keep an address together with its credentials: of a source, a destination, a registry.

A flow is given `block:NAME` in place of an address. It loads the block, and sets the block's variables in its own
environment while it runs, as a person would export them: every library that reads or writes finds them there. So the
credentials are in the block alone, encrypted by Prefect, and never among the parameters of a flow run.

A process has one environment. Calls of one process that want other variables than the calls that run wait for their
end, and so do calls without a block, which would read a block's registry in place of their own. Backfills do, and
streams and endpoints while they load their model.
"""

from __future__ import annotations

import os
import threading
from abc import ABC
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from prefect.blocks.core import Block
from prefect.client.orchestration import get_client
from prefect.types import SecretDict
from pydantic import Field, SecretStr, field_validator

from serving.errors import BadInput
from serving.machine import set_variable
from serving.redaction import holds_secret
from tasks.common.artifacts import Logger
from tasks.common.names import BLOCK
from tasks.common.prefect_server import require_prefect_server

_TRACKING_URI = "MLFLOW_TRACKING_URI"
_NAMES_SHOWN = 10

_ENVIRONMENT: Any = Field(
    default=SecretDict({}),
    description="Further environment variables that the libraries take, as a JSON object by name: "
    "GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_ACCOUNT_NAME and the like.",
)


class _CredentialsBlock(Block, ABC):
    """What all of these blocks have in common: environment variables with the credentials."""

    variables_by_field: ClassVar[Mapping[str, str]] = {}

    if TYPE_CHECKING:
        # A field of each kind of block, since a form shows the fields of a base class first.
        environment: SecretDict

    def read_variables(self) -> dict[str, str]:
        """Return the environment variables that the block stands for, with their secrets in plain text."""
        fields = {name: getattr(self, field) for field, name in type(self).variables_by_field.items()}
        given = {name: value for name, value in fields.items() if value is not None}
        plain = {name: v.get_secret_value() if isinstance(v, SecretStr) else str(v) for name, v in given.items()}
        return plain | {str(name): str(value) for name, value in self.environment.get_secret_value().items()}


class _StorageBlock(_CredentialsBlock, ABC):
    """An address of files, and how S3 is signed in to."""

    variables_by_field: ClassVar[Mapping[str, str]] = {
        "aws_access_key_id": "AWS_ACCESS_KEY_ID",
        "aws_secret_access_key": "AWS_SECRET_ACCESS_KEY",
        "aws_session_token": "AWS_SESSION_TOKEN",
        "aws_region": "AWS_REGION",
        "aws_endpoint_url": "AWS_ENDPOINT_URL_S3",
    }

    address: str = Field(description="Where the files are, such as s3://lake/customers/ or /data/customers.")
    aws_access_key_id: SecretStr | None = Field(
        default=None, description="For s3://. Without: what the machine has, such as its role."
    )
    aws_secret_access_key: SecretStr | None = Field(default=None, description="The secret of that key.")
    aws_session_token: SecretStr | None = Field(default=None, description="The token of temporary credentials.")
    aws_region: str | None = Field(default=None, description="The region of the bucket.")
    aws_endpoint_url: str | None = Field(default=None, description="For an S3 server other than AWS's own.")
    environment: SecretDict = _ENVIRONMENT


class OvernightSource(_StorageBlock):
    """A dataset to score, with the credentials to read it. `block:NAME` as a flow's source means the block NAME."""

    _block_type_name = "Overnight Source"
    _block_type_slug = "overnight-source"


class OvernightDestination(_StorageBlock):
    """Where predictions go, with the credentials to write there. `block:NAME` as a flow's destination means it."""

    _block_type_name = "Overnight Destination"
    _block_type_slug = "overnight-destination"


class OvernightRegistry(_CredentialsBlock):
    """An MLflow registry, with its credentials. The model `block:NAME/churn@champion` is looked up there."""

    _block_type_name = "Overnight Registry"
    _block_type_slug = "overnight-registry"

    variables_by_field: ClassVar[Mapping[str, str]] = {
        "tracking_uri": _TRACKING_URI,
        "username": "MLFLOW_TRACKING_USERNAME",
        "password": "MLFLOW_TRACKING_PASSWORD",
        "token": "MLFLOW_TRACKING_TOKEN",
    }

    tracking_uri: str = Field(description="The address of the MLflow server, such as https://mlflow.example.com.")
    username: str | None = Field(default=None, description="The user's name, where the server asks for one.")
    password: SecretStr | None = Field(default=None, description="The user's password.")
    token: SecretStr | None = Field(default=None, description="A bearer token instead of name and password.")
    environment: SecretDict = _ENVIRONMENT

    @field_validator("tracking_uri")
    @classmethod
    def _holds_no_secret(cls, value: str) -> str:
        if holds_secret(value):
            message = "tracking_uri must hold no password, since it is shown. Put it into password or environment."
            raise ValueError(message)
        return value


BLOCKS: tuple[type[Block], ...] = (OvernightSource, OvernightDestination, OvernightRegistry)

B = TypeVar("B", bound=_CredentialsBlock)


@dataclass(frozen=True, slots=True, kw_only=True)
class Addresses:
    """The addresses of a call, none of them a block's name."""

    model: str
    source: str | tuple[str, ...]
    destination: str


@contextmanager
def open_addresses(model: str, source: str | tuple[str, ...], destination: str, logger: Logger) -> Generator[Addresses]:
    """Yield the addresses of a call. Variables of the blocks that it names are in the environment while the block runs.

    Waits for the calls of this process that have other variables there.

    Raises:
        BadInput: There is no such block, or two of them want different values of one variable.
    """
    variables: dict[str, str] = {}
    if model.startswith(BLOCK):
        name, model = _split(model)
        _add_variables(variables, f"model={BLOCK}{name}", _load(OvernightRegistry, "model", name))
        model = f"models:/{model}"
    if isinstance(source, str) and source.startswith(BLOCK):
        name, below = _split(source)
        found = _load(OvernightSource, "source", name)
        _add_variables(variables, f"source={BLOCK}{name}", found)
        source = _join(found.address, below)
    if destination.startswith(BLOCK):
        name, below = _split(destination)
        to = _load(OvernightDestination, "destination", name)
        _add_variables(variables, f"destination={BLOCK}{name}", to)
        destination = _join(to.address, below)
    with _PROCESS.share(variables, logger):
        yield Addresses(model=model, source=source, destination=destination)


@contextmanager
def keep_own_variables(logger: Logger) -> Generator[None]:
    """Have the environment of this process without variables of blocks while the block runs.

    Waits for the calls of this process that have some there, which wait for the block in turn.
    """
    with _PROCESS.share({}, logger):
        yield


def _split(address: str) -> tuple[str, str]:
    name, _, below = address.removeprefix(BLOCK).partition("/")
    return name, below


def _join(address: str, below: str) -> str:
    return f"{address.rstrip('/')}/{below}" if below else address


def _load(kind: type[B], parameter: str, name: str) -> B:
    """Return a block of this kind by its name. Raises BadInput where there is none."""
    require_prefect_server(f"The block {BLOCK}{name}")
    try:
        found: Any = kind.load(name)
    except ValueError as error:
        slug = kind.get_block_type_slug()
        with get_client(sync_client=True) as client:
            names = [str(each.name) for each in client.read_block_documents_by_type(slug)]
        more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
        message = (
            f"{parameter} must name a block of the type {kind.get_block_type_name()}, got {BLOCK}{name}. "
            + (f"The Prefect server has {', '.join(names[:_NAMES_SHOWN])}{more}." if names else "The server has none.")
            + f" Save it in the UI under Blocks (`overnight deploy` puts the type there), or by {kind.__name__}.save."
        )
        raise BadInput(message) from error
    return found  # type: ignore[no-any-return]  # load is typed for both ways to call it


def _add_variables(variables: dict[str, str], place: str, block: _CredentialsBlock) -> None:
    for name, value in block.read_variables().items():
        if variables.setdefault(name, value) != value:
            message = (
                f"The blocks of one call must agree on {name}, since a process has one value of it, but {place} has "
                "another than those before it. Give both the same credentials, or ones that may use both addresses."
            )
            raise BadInput(message)


class _ProcessVariables:
    """The variables of blocks in the environment of this process: the calls that run all want the same."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._calls, self._variables, self._restore = 0, dict[str, str](), ExitStack()

    @contextmanager
    def share(self, variables: Mapping[str, str], logger: Logger) -> Generator[None]:
        """Have these variables set while the block runs, beside calls that want the same and no others."""
        with self._changed:
            if not self._may_start(variables):
                logger.info("This call waits for another one of this process, whose blocks hold other credentials.")
                self._changed.wait_for(lambda: self._may_start(variables))
            if not self._calls:
                self._variables = dict(variables)
                for name, value in variables.items():
                    one = _use_registry(value) if name == _TRACKING_URI else set_variable(name, value)
                    self._restore.enter_context(one)
            self._calls += 1
        try:
            yield
        finally:
            with self._changed:
                self._calls -= 1
                if not self._calls:
                    self._restore.close()
                    self._changed.notify_all()

    def _may_start(self, variables: Mapping[str, str]) -> bool:
        return not self._calls or self._variables == variables


_PROCESS = _ProcessVariables()


@contextmanager
def _use_registry(uri: str) -> Generator[None]:
    """Have MLflow use a registry while the block runs. It sets the variable itself, and unsets it for None."""
    import mlflow  # noqa: PLC0415 - Prefect's server loads this module for its blocks, and needs no MLflow

    before, registry = os.environ.get(_TRACKING_URI), mlflow.get_registry_uri()
    is_apart = registry != mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    # Else a registry that the process has named would be asked in place of the block's.
    mlflow.set_registry_uri("")
    try:
        yield
    finally:
        mlflow.set_registry_uri(registry if is_apart else None)  # type: ignore[arg-type]  # as below
        mlflow.set_tracking_uri(before)  # type: ignore[arg-type]  # None is meant, and not in the annotation
