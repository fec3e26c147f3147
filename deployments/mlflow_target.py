"""The target `overnight` of mlflow.deployments: a deployment is an endpoint of this project.

MLflow loads this module by its entry point. The gateway and the keys come from the environment, never from a config.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow import MlflowClient, MlflowException
from mlflow.deployments import BaseDeploymentClient, PredictionsResponse
from mlflow.entities.model_registry import RegisteredModel
from mlflow.models import Model as MLmodel
from mlflow.protos.databricks_pb2 import (
    INVALID_PARAMETER_VALUE,
    RESOURCE_ALREADY_EXISTS,
    RESOURCE_DOES_NOT_EXIST,
    TEMPORARILY_UNAVAILABLE,
)
from pydantic import ValidationError

from deployments.mlflow_inputs import encode_inputs, round_floats
from serving.errors import BadInput, EndpointFailed, OvernightError
from serving.extras import import_extra
from serving.gateway.client import GatewayClient
from serving.gateway.keys import ADMIN_KEY
from serving.gateway.route import EndpointState
from serving.machine import set_variable
from serving.model.contract import Contract, Frozen
from serving.targets import Address

if TYPE_CHECKING:
    from tasks.endpoint.spec import EndpointSpec

GATEWAY = "OVERNIGHT_GATEWAY"
API_KEY = "OVERNIGHT_API_KEY"
TARGET = "OVERNIGHT_TARGET"
TAG = "overnight.deployment"
FLAVOR = "python_function"
_FROM_ELSEWHERE = {"name": "the deployment's name", "model": "the model's URI", "gateway": f"the variable {GATEWAY}"}
_MODEL = re.compile(r"models:/(?P<name>[^/@]+)[/@][^/@]+")

Config = Mapping[str, Any]


class _Record(Frozen):
    """How the inputs of a deployment are laid out, as a tag of its registered model: callers can't ask the gateway.

    Nothing is deployed by it: who may set a tag would then choose what runs.
    """

    model: str
    input_columns: dict[str, tuple[str, ...]]


class OvernightDeploymentClient(BaseDeploymentClient):
    """Creates, updates, asks and deletes endpoints behind the gateway that OVERNIGHT_GATEWAY names.

    Every method raises MlflowException, with the message of what went wrong.
    """

    def __init__(self, target_uri: str) -> None:
        super().__init__(target_uri)  # type: ignore[no-untyped-call] # MLflow's own has no types
        if target_uri not in ("overnight", "overnight:", "overnight:/"):
            message = f"The target must be `overnight`, got {target_uri!r}. The gateway's URL goes into {GATEWAY}."
            raise MlflowException(message, INVALID_PARAMETER_VALUE)

    def create_deployment(
        self,
        name: str,
        model_uri: str,
        flavor: str | None = None,
        config: Config | None = None,
        endpoint: str | None = None,
    ) -> dict[str, Any]:
        """Put a registered model online, and return once the gateway answers with it.

        Args:
            name: The endpoint's name.
            model_uri: models:/NAME@ALIAS or models:/NAME/VERSION.
            flavor: None: the model's own flavour runs.
            config: Fields of EndpointSpec, such as target, budget, rollout and access. Texts may be JSON.
            endpoint: None.
        """
        with _as_mlflow_errors():
            _check_unused(flavor, endpoint)
            with _open_gateway() as gateway:
                if gateway.get(name) is not None:
                    message = f"The name of a deployment must be free, but {name!r} serves already. Update it instead."
                    raise MlflowException(message, RESOURCE_ALREADY_EXISTS)
            return _deploy(name, model_uri, {**_read_default_target(), **_read_config(config)})

    def update_deployment(
        self,
        name: str,
        model_uri: str | None = None,
        flavor: str | None = None,
        config: Config | None = None,
        endpoint: str | None = None,
    ) -> dict[str, Any]:
        """Change the model or parts of the config of a deployment; what is not given stays as the gateway has it.

        The rollout of the config says how a new version gets its traffic. `allow_pickle` alone never stays: each call
        says which model it trusts. The arguments are those of create_deployment.
        """
        with _as_mlflow_errors():
            _check_unused(flavor, endpoint)
            with _open_gateway() as gateway:
                state = gateway.get(name)
            if state is None:
                raise _make_missing(name)
            kept = state.route.spec
            model = model_uri or kept.get("model")
            if not isinstance(model, str):
                message = f"The model must be given: the gateway knows none that {name!r} was deployed with."
                raise MlflowException(message, INVALID_PARAMETER_VALUE)
            rollout = {"rollout": kept["rollout"]} if "rollout" in kept else {}
            return _deploy(name, model, {**rollout, **_read_config(config)})

    def delete_deployment(self, name: str, config: Config | None = None, endpoint: str | None = None) -> None:
        """Take a deployment out of service and its versions off their model server. Idempotent.

        `config` gives the target where the gateway does not know it: for an endpoint that an earlier release deployed.
        """
        with _as_mlflow_errors():
            _check_unused(None, endpoint)
            from flows import retire_endpoint  # noqa: PLC0415 - the same

            with _open_gateway() as gateway:
                state = gateway.get(name)
            if state is None:
                return
            given = {"target": state.route.spec.get("target"), **_read_config(config)}
            if given["target"] is None:
                message = f"The gateway must know the target of {name!r}, and does not; give config={{'target': ...}}."
                raise MlflowException(message, INVALID_PARAMETER_VALUE)
            # The name of the model does not matter: all of its versions go.
            spec = _make_spec(name, "models:/any/1", given)
            retire_endpoint(name, spec.target, spec.gateway, spec.admin_secret)
            _delete_records(name)

    def list_deployments(self, endpoint: str | None = None) -> list[dict[str, Any]]:
        """Return every endpoint of the gateway, as get_deployment does."""
        with _as_mlflow_errors():
            _check_unused(None, endpoint)
            with _open_gateway() as gateway:
                states = [(name, gateway.get(name)) for name in gateway.list_endpoints()]
            return [_describe(name, state) for name, state in states if state is not None]

    def get_deployment(self, name: str, endpoint: str | None = None) -> dict[str, Any]:
        """Return name, URL, versions with their shares of the traffic, who may call, model and config."""
        with _as_mlflow_errors():
            _check_unused(None, endpoint)
            with _open_gateway() as gateway:
                state = gateway.get(name)
            if state is None:
                raise _make_missing(name)
            return _describe(name, state)

    def predict(
        self, deployment_name: str | None = None, inputs: Any = None, endpoint: str | None = None
    ) -> PredictionsResponse:
        """Return a deployment's predictions for a DataFrame, a mapping of columns, rows or an array, by the gateway.

        The key of the variable OVERNIGHT_API_KEY is sent with the request. Floats are rounded to the model's types. A
        row of a table is refused where these do not have its value, or where it has a null of text, as no request has.
        """
        with _as_mlflow_errors():
            from tasks.endpoint.client import InferClient  # noqa: PLC0415 - pandas and others, for this alone

            _check_unused(None, endpoint)
            if deployment_name is None or inputs is None:
                message = "deployment_name and inputs must be given, got one of them at most."
                raise MlflowException(message, INVALID_PARAMETER_VALUE)
            contract = _find_contract(deployment_name)
            arrays = encode_inputs(contract, inputs)
            address = Address(url=_find_gateway(), model=deployment_name, version=None)
            key = os.environ.get(API_KEY)
            with InferClient(address, contract, {"Authorization": f"Bearer {key}"} if key else {}) as client:
                outputs = client(arrays)
            values = {name: value.tolist() for name, value in outputs.items()}
            return PredictionsResponse({"predictions": next(iter(values.values())) if len(values) == 1 else values})


def run_local(name: str, model_uri: str, flavor: str | None = None, config: Config | None = None) -> None:
    """Serve a model on a Triton and a gateway of this machine, for a test; returns on Ctrl-C, and stops everything."""
    with _as_mlflow_errors(), serve_locally(name, model_uri, flavor, config) as url:
        print(f"{name} answers at {url}. Ctrl-C stops it.")  # noqa: T201 - what `mlflow deployments run-local` shows
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            return


@contextmanager
def serve_locally(name: str, model_uri: str, flavor: str | None = None, config: Config | None = None) -> Generator[str]:
    """Serve a model on servers of this machine for the block; yields the URL of the endpoint."""
    from flows import online_endpoint  # noqa: PLC0415 - servers and Prefect, for this alone
    from infra.local.gateway import gateway_server  # noqa: PLC0415 - the same
    from infra.local.triton import triton_server  # noqa: PLC0415 - the same

    _check_unused(flavor, None)
    # Raises where a package is missing, before a server is started that lacks it.
    import_extra("serving.gateway.server", "serve")
    given = _read_config(config)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="overnight-")))
        triton = stack.enter_context(triton_server(folder / "repository", folder / "triton"))
        gateway = stack.enter_context(gateway_server(folder / "gateway"))
        target = {"kind": "triton", "repository": str(triton.repository), "url": triton.url, "grpc": triton.grpc}
        given = {"target": target, **given}
        stack.enter_context(set_variable(GATEWAY, gateway.url))
        stack.enter_context(set_variable("OVERNIGHT_ADMIN_KEY", gateway.admin_key))
        spec = _make_spec(name, model_uri, given)
        try:
            url = online_endpoint(spec).url
        except OvernightError:
            if not triton.has_crashed():
                raise
            # It is the Triton of this very block: nobody else starts it again.
            stack.enter_context(triton.restart())
            url = online_endpoint(spec).url
        yield url


def target_help() -> str:
    """Return what `mlflow deployments help -t overnight` shows."""
    return f"""The target `overnight` serves registered models behind the gateway of Overnight.

Environment:
  {GATEWAY}      the gateway's URL (http://127.0.0.1:8080)
  {TARGET}       the model server of what is created, as JSON or @FILE, where the config gives none
  OVERNIGHT_ADMIN_KEY    the gateway's administrator key, to create, update, list and delete, and to ask an endpoint
                         that was not made by `create`
  {API_KEY}      the key that is sent with requests for predictions
  MLFLOW_TRACKING_URI    the registry; models are models:/NAME@ALIAS or models:/NAME/VERSION
  PREFECT_API_URL        the Prefect server that shows each change as a flow run

Config: the fields of EndpointSpec but name, model and gateway; a text may be JSON. For example
  mlflow deployments create -t overnight --name churn -m models:/churn@champion \\
    -C 'target={{"kind": "triton"}}' -C 'budget={{"latency_ms": 20, "rate": 500}}' -C 'rollout={{"kind": "canary"}}' \\
    -C 'access={{"environment": ["CHURN_API_KEY"]}}'
  mlflow deployments update -t overnight --name churn -m models:/churn/4
  mlflow deployments predict -t overnight --name churn -I rows.json
An update keeps what it does not give, but for allow_pickle, which each call gives for its own model. Without access a
new deployment is open to all who reach the gateway, and access={{"anyone": true}} takes the keys of one off. Keys are
never part of a config: access names the variables or Prefect Secret blocks that hold them.
"""


@contextmanager
def _as_mlflow_errors() -> Generator[None]:
    """Raise the errors of this project as MLflow's clients expect them."""
    try:
        yield
    except OvernightError as error:
        code = INVALID_PARAMETER_VALUE if isinstance(error, BadInput) else TEMPORARILY_UNAVAILABLE
        raise MlflowException(str(error), code) from error


def _check_unused(flavor: str | None, endpoint: str | None) -> None:
    if endpoint is not None:
        message = f"endpoint must be left out, got {endpoint!r}: a deployment is an endpoint here."
        raise MlflowException(message, INVALID_PARAMETER_VALUE)
    if flavor not in (None, FLAVOR):
        message = f"flavor must be left out, got {flavor!r}: a model runs by the flavour that it was logged with."
        raise MlflowException(message, INVALID_PARAMETER_VALUE)


def _find_gateway() -> str:
    from tasks.endpoint.spec import GATEWAY as DEFAULT  # noqa: PLC0415 - one constant of a module that few calls need

    return os.environ.get(GATEWAY) or DEFAULT


def _open_gateway() -> GatewayClient:
    from tasks.endpoint.spec import read_admin_key  # noqa: PLC0415 - the same

    return GatewayClient(_find_gateway(), read_admin_key(None))


def _make_missing(name: str) -> MlflowException:
    message = f"The deployment {name!r} must exist, but does not. List those that there are, or create it."
    return MlflowException(message, RESOURCE_DOES_NOT_EXIST)


def _read_config(config: Config | None) -> dict[str, Any]:
    """Return a config with its texts parsed, as the command line gives them. Raises MlflowException."""
    if taken := sorted(set(config or {}) & set(_FROM_ELSEWHERE)):
        listed = ", ".join(f"{name} is {_FROM_ELSEWHERE[name]}" for name in taken)
        message = f"The config must hold fields of EndpointSpec but those that come from elsewhere: {listed}."
        raise MlflowException(message, INVALID_PARAMETER_VALUE)
    return {key: _parse_text(value) for key, value in (config or {}).items()}


def _read_default_target() -> dict[str, Any]:
    """Return the target that OVERNIGHT_TARGET names, as `overnight endpoint` takes it. Raises BadInput."""
    target = os.environ.get(TARGET)
    if not target:
        return {}
    from deployments.command_line.console import read_document  # noqa: PLC0415 - one function of the command line

    return {"target": read_document(target, TARGET)}


def _parse_text(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _deploy(name: str, model: str, config: Config) -> dict[str, Any]:
    from flows import online_endpoint  # noqa: PLC0415 - Prefect, which asking a deployment does not need

    registered = _read_name(model)
    made = online_endpoint(_make_spec(name, model, config))
    with _open_gateway() as gateway:
        state = gateway.get(name)
    columns: Any = state.route.spec.get("input_columns", {}) if state else {}
    record = _Record(model=model, input_columns=columns)
    MlflowClient().set_registered_model_tag(registered, f"{TAG}.{name}", record.model_dump_json())
    _delete_records(name, but=registered)
    answer = made.model_dump(mode="json", include={"url", "model", "version", "callers"})
    return {"name": name, "flavor": FLAVOR, **answer}


def _make_spec(name: str, model: str, config: Config) -> EndpointSpec:
    from tasks.endpoint.spec import EndpointSpec  # noqa: PLC0415 - the same

    try:
        return EndpointSpec.model_validate({**config, "name": name, "model": model, "gateway": _find_gateway()})
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False, include_input=False)[:5]
        found = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in problems)
        message = f"The config must be fields of EndpointSpec, got {found}. `mlflow deployments help -t overnight`."
        raise MlflowException(message, INVALID_PARAMETER_VALUE) from None


def _read_name(model_uri: str) -> str:
    """Return the name of a registered model. Raises MlflowException for any other URI."""
    match = _MODEL.fullmatch(model_uri)
    if match is None:
        message = (
            f"The model must be models:/NAME@ALIAS or models:/NAME/VERSION, got {model_uri!r}. Register it first: "
            "mlflow.register_model(uri, name)."
        )
        raise MlflowException(message, INVALID_PARAMETER_VALUE)
    return match["name"]


def _find_tagged(name: str) -> list[RegisteredModel]:
    """Return the registered models that have the tag of a deployment."""
    return list(MlflowClient().search_registered_models(f"tags.`{TAG}.{name}` LIKE '%'"))


def _find_record(name: str) -> _Record | None:
    """Return how the inputs of a deployment are laid out, None where no registered model says it."""
    for model in _find_tagged(name):
        try:
            return _Record.model_validate_json(model.tags[f"{TAG}.{name}"])
        except ValidationError:
            return None
    return None


def _delete_records(name: str, but: str | None = None) -> None:
    for model in _find_tagged(name):
        if model.name != but:
            MlflowClient().delete_registered_model_tag(model.name, f"{TAG}.{name}")


def _describe(name: str, state: EndpointState) -> dict[str, Any]:
    from tasks.endpoint.traffic import describe_callers  # noqa: PLC0415 - the same

    config = dict(state.route.spec)
    model = {"model_uri": config.pop("model", None), "config": config} if config else {}
    return {
        "name": name,
        "flavor": FLAVOR,
        "url": f"{_find_gateway().rstrip('/')}/v2/models/{name}/infer",
        "versions": {served.version: served.weight for served in state.route.versions},
        "models": state.models,
        "callers": describe_callers(state.route.keys),
        **model,
    }


def _find_contract(name: str) -> Contract:
    """Return the contract of a deployment, by which floats are rounded to the model's types.

    The administrator has it from the gateway, for any endpoint. Other callers have it from the registry, where
    `create` has noted the model.
    """
    if os.environ.get(ADMIN_KEY):
        with _open_gateway() as gateway:
            state = gateway.get(name)
        if state is None:
            raise _make_missing(name)
        return round_floats(state.route.contract)
    record = _find_record(name)
    if record is None:
        message = (
            f"The deployment {name!r} must have been made by `mlflow deployments create` for a caller without "
            f"{ADMIN_KEY}, but the registry knows none of that name. Set that variable, or create it."
        )
        raise MlflowException(message, RESOURCE_DOES_NOT_EXIST)
    return _read_contract(record)


def _read_contract(record: _Record) -> Contract:
    """Return the contract of the model, by its description in the registry; floats are rounded to its types."""
    from serving.model.signature import read_contract  # noqa: PLC0415 - for predictions alone

    try:
        mlmodel = MLmodel.load(record.model)
    except OSError as error:
        message = f"The description of {record.model} must be readable, got: {error}. Check the artifact store."
        raise EndpointFailed(message) from error
    stack = "pytorch" in mlmodel.flavors
    return round_floats(read_contract(mlmodel, stack=stack, columns=record.input_columns, policies={}))
