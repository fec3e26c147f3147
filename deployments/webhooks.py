"""Receive MLflow's registry webhooks, and start a Prefect deployment when an alias moves.

A request counts where its signature is that of the shared secret, and it is fresh. The flow run is created under the id
of the delivery, which Prefect keeps: one delivery starts one run, however often it comes, and also after a restart.
A run asks the registry for its alias when it begins, so that it does not matter in which order events arrive.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import hashlib
import hmac
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any, Self

import httpx
import uvicorn
import yaml
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator, model_validator

from flows.runtime.parameters import refuse_secrets
from serving.errors import BadInput, BadRequest, Unanswered
from serving.extras import import_extra
from serving.gateway.request_body import BodyMemory, read_body
from serving.model.contract import Frozen
from serving.redaction import hide_secrets_in_logs

SECRET = "OVERNIGHT_WEBHOOK_SECRET"  # noqa: S105 - the name of a variable
PATH = "/mlflow"
_SECRET_LENGTH_MIN = 16
_BODIES_BYTES_MAX = 16 << 20
_DELIVERY = re.compile(r"[A-Za-z0-9_-]{1,64}")
_TIMESTAMP = re.compile(r"[0-9]{1,12}")
_PLACEHOLDER = re.compile(r"\{(name|alias)\}")
_SIGNATURE_VERSION = "v1"
_RETRY_AFTER_S = 5
_BODY_S_MAX = 10.0

logger = logging.getLogger("overnight.webhooks")


class AliasTrigger(Frozen):
    """Which deployment to start when an alias of a model moves."""

    model: str = Field(min_length=1, max_length=256, description="The registered model's name.")
    alias: str = Field(min_length=1, max_length=256, description="Its alias, such as champion.")
    deployment: str = Field(
        pattern=r"^[^/]+/[^/]+$", description="The deployment to start, FLOW/NAME, such as batch-inference/adhoc."
    )
    parameters: dict[str, JsonValue] = Field(
        default_factory=dict,
        description="Parameters of the run beside those of the deployment. {name} and {alias} in a text stand for "
        "those of the event.",
    )

    @field_validator("parameters")
    @classmethod
    def _check_no_version(cls, parameters: dict[str, JsonValue]) -> dict[str, JsonValue]:
        if "{version}" in json.dumps(parameters):
            message = (
                "Parameters must name the model by its alias, got {version}. Events may arrive in another order than "
                "the alias moved: give models:/{name}@{alias}, which the run asks the registry for when it begins."
            )
            raise ValueError(message)
        return parameters


class WebhookConfig(Frozen):
    """What the receiver listens for, and what it accepts."""

    triggers: tuple[AliasTrigger, ...] = Field(min_length=1, max_length=1000, description="What starts what.")
    fresh_seconds: float = Field(
        default=300.0, gt=0, le=3600, description="How old, or ahead of this machine's clock, a request may be."
    )
    bytes_max: int = Field(default=65_536, ge=1024, le=1 << 20, description="Maximum number of bytes of a request.")

    @model_validator(mode="after")
    def _check_distinct(self) -> Self:
        seen = [(each.model, each.alias, each.deployment) for each in self.triggers]
        if twice := {each for each in seen if seen.count(each) > 1}:
            message = f"A model's alias must start a deployment once, got {sorted(twice)} twice. Leave one out."
            raise ValueError(message)
        return self


class _Alias(BaseModel):
    # MLflow may add keys.
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    name: str = Field(min_length=1, max_length=1024)
    alias: str = Field(min_length=1, max_length=1024)
    version: str = Field(min_length=1, max_length=64)


class _Event(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    entity: str
    action: str
    data: dict[str, JsonValue]


StartRun = Callable[[str, Mapping[str, JsonValue], str], Any]


def sign(secret: str, delivery: str, timestamp: str, body: bytes) -> str:
    """Return the signature that MLflow sends with a request: HMAC-SHA256 of delivery, time and body."""
    signed = f"{delivery}.{timestamp}.".encode() + body
    return f"{_SIGNATURE_VERSION}," + base64.b64encode(hmac.digest(secret.encode(), signed, hashlib.sha256)).decode()


def check_request(secret: str, headers: Mapping[str, str], body: bytes, *, now: float, fresh_seconds: float) -> str:
    """Return the id of the delivery of a request that MLflow has signed.

    Raises BadRequest: 401 where the signature is missing or another, or where the request is not fresh.
    """
    delivery = headers.get("x-mlflow-delivery-id", "")
    timestamp = headers.get("x-mlflow-timestamp", "")
    if not _DELIVERY.fullmatch(delivery) or not _TIMESTAMP.fullmatch(timestamp):
        message = "A request must have X-MLflow-Delivery-Id and X-MLflow-Timestamp as MLflow sends them."
        raise BadRequest(message, status=HTTPStatus.UNAUTHORIZED)
    expected = sign(secret, delivery, timestamp, body)
    if not hmac.compare_digest(expected.encode(), headers.get("x-mlflow-signature", "").encode("latin-1", "replace")):
        message = f"X-MLflow-Signature must be that of the secret in {SECRET}. Give the webhook in MLflow the same one."
        raise BadRequest(message, status=HTTPStatus.UNAUTHORIZED)
    if abs(now - int(timestamp)) > fresh_seconds:
        message = (
            f"A request must be at most {fresh_seconds:g} s old, got {now - int(timestamp):.0f} s. Set the clocks."
        )
        raise BadRequest(message, status=HTTPStatus.UNAUTHORIZED)
    return delivery


async def start_run(deployment: str, parameters: Mapping[str, JsonValue], key: str) -> str:
    """Create a flow run of a deployment, or find the one that was created under this key; return its id.

    Raises Unanswered where Prefect does not answer or has no such deployment: MLflow sends the event again.
    """
    try:
        async with get_client() as client:
            found = await client.read_deployment_by_name(deployment)
            run = await client.create_flow_run_from_deployment(
                found.id, parameters=dict(parameters), idempotency_key=key, tags=["mlflow-webhook"]
            )
            return str(run.id)
    except ObjectNotFound:
        message = f"The deployment {deployment} must exist on the Prefect server, but does not: overnight deploy."
    except (PrefectHTTPStatusError, httpx.HTTPError) as error:
        message = f"The Prefect server must take a run of {deployment}, got {type(error).__name__}: {error}."
    raise Unanswered(message, retry_after_s=_RETRY_AFTER_S)


def build_app(
    config: WebhookConfig, secret: str, *, start: StartRun = start_run, clock: Callable[[], float] = time.time
) -> FastAPI:
    """Return the application: POST /mlflow takes MLflow's events, GET /health says that it runs.

    Args:
        config: What starts what, and what is accepted.
        secret: What MLflow's webhook was created with.
        start: Starts a run of a deployment with parameters, once a key.
        clock: Returns the time in seconds since 1970.
    """
    app = FastAPI(title="Overnight webhooks", openapi_url=None, docs_url=None, redoc_url=None)
    memory = BodyMemory(_BODIES_BYTES_MAX)

    @app.get("/health")
    async def health() -> dict[str, bool]:
        return {"live": True}

    @app.post(PATH)
    async def receive(request: Request) -> JSONResponse:
        try:
            body, now = await _read_body(request, memory, config.bytes_max), clock()
            delivery = check_request(secret, request.headers, body, now=now, fresh_seconds=config.fresh_seconds)
            started = await _start_runs(config, delivery, body, start)
        except (BadRequest, Unanswered) as error:
            logger.warning("Refused a webhook with %d: %s", error.status, error)
            retry = getattr(error, "retry_after_s", None)
            headers = {"Retry-After": str(retry)} if retry else None
            return JSONResponse({"error": str(error)}, status_code=error.status, headers=headers)
        return JSONResponse({"started": started})

    return app


async def _read_body(request: Request, memory: BodyMemory, bytes_max: int) -> bytes:
    try:
        async with asyncio.timeout(_BODY_S_MAX), read_body(request, memory, bytes_max=bytes_max) as body:
            return body
    except TimeoutError:
        message = f"The body must arrive within {_BODY_S_MAX:g} s, and has not."
        raise BadRequest(message, status=HTTPStatus.REQUEST_TIMEOUT) from None


async def _start_runs(config: WebhookConfig, delivery: str, body: bytes, start: StartRun) -> list[str]:
    """Start what an event starts, once for each delivery, and return the ids of the runs. Raises BadRequest."""
    alias = _read_alias(body)
    # Nothing is remembered here: a delivery that came again while Prefect hangs would else be taken for a started one.
    return [
        await start(each.deployment, _fill_in(each.parameters, alias), f"{delivery}:{each.deployment}")
        for each in config.triggers
        if alias is not None and (each.model, each.alias) == (alias.name, alias.alias)
    ]


def _read_alias(body: bytes) -> _Alias | None:
    """Return the alias that an event says has moved; None for other events. Raises BadRequest."""
    try:
        event = _Event.model_validate_json(body)
        if (event.entity, event.action) != ("model_version_alias", "created"):
            return None
        return _Alias.model_validate(event.data)
    except ValidationError as error:
        found = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()[:3])
        message = f"The body must be an event of MLflow's registry, got {found}."
        raise BadRequest(message, status=HTTPStatus.UNPROCESSABLE_ENTITY) from None


def _fill_in(value: Any, alias: _Alias | None) -> Any:
    """Return parameters with the event's name and alias in place of their placeholders."""
    if isinstance(value, str) and alias is not None:
        return _PLACEHOLDER.sub(lambda match: str(getattr(alias, match[1])), value)
    if isinstance(value, dict):
        return {key: _fill_in(inner, alias) for key, inner in value.items()}
    return [_fill_in(inner, alias) for inner in value] if isinstance(value, list) else value


def read_config(path: Path) -> WebhookConfig:
    """Read a config from a YAML or JSON file. Raises BadInput, also where a run would get a secret as a parameter."""
    try:
        config = WebhookConfig.model_validate(yaml.safe_load(path.read_text()))
    except (OSError, yaml.YAMLError, ValidationError) as error:
        found = " ".join(str(error).split())[:400]
        message = (
            f"{path} must hold the triggers of webhooks, got: {found}. For example: triggers: [{{model: churn, alias: "
            "champion, deployment: batch-inference/adhoc}]"
        )
        raise BadInput(message) from None
    # Prefect would keep it before the flow can refuse it.
    refuse_secrets({"triggers": config.triggers})
    return config


def read_secret(environment: Mapping[str, str] = os.environ) -> str:
    """Return the secret that is shared with MLflow. Raises BadInput where it is missing or short."""
    secret = environment.get(SECRET, "")
    if len(secret) < _SECRET_LENGTH_MIN:
        message = (
            f"The environment variable {SECRET} must hold the secret of the webhook in MLflow, of at least "
            f"{_SECRET_LENGTH_MIN} characters, got {len(secret)}. Make one with: openssl rand -hex 32"
        )
        raise BadInput(message)
    return secret


def run(config: Path, *, host: str = "127.0.0.1", port: int = 8085) -> None:
    """Receive webhooks until the process is told to stop.

    Args:
        config: A YAML or JSON file with a WebhookConfig.
        host: The address to listen on. MLflow itself sends only to public addresses by https, unless it is told
            otherwise: put a proxy with TLS in front, and leave this on loopback.
        port: The port; 0 for any free one.

    Raises:
        BadInput: The config can't be read, or the secret, the address of the Prefect server or a package is missing.
    """
    connection = import_extra("serving.protocol.connection", "serve")
    app = build_app(read_config(config), read_secret())
    if not PREFECT_API_URL.value():
        message = (
            "PREFECT_API_URL must name the Prefect server that runs are started on, got none: "
            "`prefect config set PREFECT_API_URL=http://HOST:4200/api`."
        )
        raise BadInput(message)
    hide_secrets_in_logs()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    protocol = connection.build_protocol(connection.ConnectionLimits(connections_max=256))
    uvicorn.run(app, host=host, port=port, http=protocol, access_log=False, server_header=False)


def main() -> None:
    """Run the receiver as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m deployments.webhooks", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="a YAML or JSON file with the triggers")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, default=8085, help="the port (8085)")
    given = parser.parse_args()
    try:
        run(given.config, host=given.host, port=given.port)
    except BadInput as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
