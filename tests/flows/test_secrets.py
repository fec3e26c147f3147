"""No secret comes out of a flow: none is taken in a parameter, and what fails says none."""

from __future__ import annotations

import logging
import threading
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from prefect import Flow
from pydantic import BaseModel, TypeAdapter, ValidationError

from flows.batch import batch_inference
from flows.endpoint import online_endpoint, retire_endpoint
from flows.nightly import nightly_inference
from flows.runtime import flow_decorator
from flows.runtime.own_process import prepare_call
from flows.runtime.parameters import refuse_secrets
from flows.scheduler import choose_mode
from flows.stream import stream_inference
from serving.errors import ModelNotFound, OvernightError, SecretExposed
from serving.model.registry import resolve_model
from tasks.storage import open_storage
from tasks.stream.connections import StreamAbandoned
from tasks.stream.kafka.client import KafkaErrorHandler, build_settings, find_topic
from tasks.stream.nats.connection import NatsConnection
from tasks.stream.options import FromKafka, FromNats, ToKafka, ToNats, ToParts

SECRET = "s3cr3t-0f-mine"  # noqa: S105 - of nothing
# Each by the way that a person may write one.
ADDRESSES = (
    f"nats://user:{SECRET}@127.0.0.1:4222",
    f"https://{SECRET}@127.0.0.1/x",
    f"s3://AKIA:{SECRET}@bucket/prefix",
    f"https://127.0.0.1/x?X-Amz-Signature={SECRET}",
    f"host=127.0.0.1 password={SECRET}",
)
FLOWS: tuple[Flow[..., Any], ...] = (
    *(batch_inference, nightly_inference, stream_inference, online_endpoint, retire_endpoint, choose_mode),
)


def places(kind: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the path of every text that a parameter of this type may hold."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        for name, field in kind.model_fields.items():
            if len(path) < 5:
                yield from places(field.annotation, (*path, name))
    elif kind is str:
        yield path
    else:
        for inner in typing.get_args(kind):
            yield from places(inner, path)


def nested(path: tuple[str, ...], value: str) -> Any:
    for name in reversed(path):
        value = {name: value}  # type: ignore[assignment]  # one level further out
    return value


def fields() -> list[Any]:
    found = []
    for flow in FLOWS:
        hints = typing.get_type_hints(flow.fn)
        hints.pop("return", None)
        paths = dict.fromkeys(path for name, kind in hints.items() for path in places(kind, (name,)))
        found += [pytest.param(flow, path, id=f"{flow.name}-{'.'.join(path)}") for path in paths]
    return found


@pytest.mark.parametrize(("flow", "path"), fields())
def test_no_text_of_any_parameter_of_any_flow_may_hold_a_secret(flow: Flow[..., Any], path: tuple[str, ...]) -> None:
    for address in ADDRESSES:
        with pytest.raises(SecretExposed, match=rf"The parameter {path[0]}.* must hold no password") as refused:
            flow.validate_parameters({path[0]: nested(path[1:], address)})

        assert SECRET not in str(refused.value)


@pytest.mark.parametrize("place", ["options", "spec"])
@pytest.mark.parametrize(
    "name", ["api_key", "OPENAI_API_KEY", "dbPassword", "password", "token", "auth_token", "secret"]
)
def test_a_parameter_of_the_model_that_is_named_as_a_secret_is_refused(name: str, place: str) -> None:
    with pytest.raises(SecretExposed, match=rf"The parameter {place}\.params\.{name} must hold no password") as refused:
        refuse_secrets({place: {"params": {"temperature": 0.5, name: "hunter2"}}})

    assert "hunter2" not in str(refused.value)


def test_a_parameter_that_is_named_as_a_secret_within_another_one_is_refused() -> None:
    nested = {"headers": [{"name": "x", "api_key": "hunter2"}]}
    with pytest.raises(SecretExposed, match=r"options\.params\.headers\.0\.api_key must hold no password") as refused:
        refuse_secrets({"options": {"params": nested}})

    assert "hunter2" not in str(refused.value)


def test_other_parameters_of_the_model_are_taken() -> None:
    refuse_secrets(
        {"options": {"params": {"max_tokens": 64, "pad_token": "[PAD]", "token": None, "key": "id", "secrets": 3}}}
    )


def test_a_call_with_a_secret_makes_no_flow_run_that_would_keep_it() -> None:
    with pytest.raises(SecretExposed) as refused:
        batch_inference("models:/any@champion", ADDRESSES[2], "out")

    assert SECRET not in str(refused.value)


@pytest.mark.parametrize("kind", [FromNats, FromKafka, ToNats, ToKafka, ToParts])
def test_an_end_of_a_stream_that_is_made_with_a_secret_does_not_say_it(kind: type[BaseModel]) -> None:
    fit = {"stream": "events", "topic": "events", "subject": "scores", "destination": "out"}
    for name in places_of_addresses(kind):
        for address in (*ADDRESSES, f"one:9092,user:{SECRET}@127.0.0.1"):
            with pytest.raises(ValidationError) as refused:
                TypeAdapter(kind).validate_python(
                    {key: value for key, value in fit.items() if key in kind.model_fields} | {name: address}
                )

            assert SECRET not in str(refused.value)


def places_of_addresses(kind: type[BaseModel]) -> list[str]:
    return [name for name in kind.model_fields if name in ("url", "servers", "destination")]


def test_what_servers_that_do_not_answer_are_said_to_be_has_no_secret(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, held_port: int
) -> None:
    caplog.set_level(logging.DEBUG)
    host = f"127.0.0.1:{held_port}"
    config = tmp_path / "kafka"
    config.write_text(
        f"security.protocol=SASL_PLAINTEXT\nsasl.mechanism=PLAIN\nsasl.username=me\nsasl.password={SECRET}\n"
    )
    settings = {
        "NATS_PASSWORD": SECRET,
        "NATS_USER": "me",
        "OVERNIGHT_KAFKA_CONFIG": str(config),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "AWS_ENDPOINT_URL": f"http://user:{SECRET}@{host}",
        "AWS_ACCESS_KEY_ID": "me",
        "AWS_SECRET_ACCESS_KEY": SECRET,
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    failures: dict[str, Callable[[Callable[[str], None]], object]] = {
        "registry": lambda _: _resolve(f"http://user:{SECRET}@{host}"),
        "registry with a token": lambda _: _resolve(f"http://{host}/x?token={SECRET}"),
        "storage": lambda _: open_storage("s3://bucket/prefix").read("a"),
        "NATS": lambda say: NatsConnection(f"nats://user:{SECRET}@{host}", say, threading.Event()),
        "Kafka": lambda say: _ask_kafka(host, say),
    }
    said: dict[str, str] = {}
    # As in a call.
    with prepare_call():
        for name, fail in failures.items():
            said[name] = _told_by(fail, name)

    assert [] == [name for name, words in said.items() if SECRET in words or not words]
    assert SECRET not in caplog.text


def test_while_a_call_runs_log_lines_of_any_library_hide_secrets(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def check(_: object) -> None:
        logging.getLogger("a.library").warning(f"Retrying https://user:{SECRET}@host/x")  # noqa: G004 - as libraries do
        message = "enough"
        raise ModelNotFound(message)

    monkeypatch.setattr(flow_decorator, "check_servers", check)
    with pytest.raises(ModelNotFound, match="enough"):
        batch_inference("models:/any/1", str(tmp_path), str(tmp_path))

    assert "Retrying https://***@host/x" in caplog.messages


class _Heard(Exception):
    """What was said is enough."""


def _told_by(fail: Callable[[Callable[[str], None]], object], name: str) -> str:
    log = logging.getLogger("prefect.flow_runs")
    heard: list[str] = []

    def say(words: str) -> None:
        log.warning(words)
        heard.append(log.makeRecord(log.name, logging.WARNING, "", 0, words, (), None).getMessage())
        raise _Heard

    try:
        fail(say)
    except OvernightError as error:
        heard.append(str(error))
    except (_Heard, StreamAbandoned):
        pass
    assert heard, f"{name} must fail"
    return " ".join(heard)


def _resolve(uri: str) -> None:
    mlflow.set_tracking_uri(uri)
    try:
        with pytest.raises(ModelNotFound) as failed:
            resolve_model("models:/any@champion")
    finally:
        mlflow.set_tracking_uri(None)
    raise failed.value


def _ask_kafka(host: str, say: Callable[[str], None]) -> None:
    from confluent_kafka import Producer

    give_up = threading.Event()

    def say_and_stop(words: str) -> None:
        give_up.set()
        say(words)

    errors = KafkaErrorHandler(f"user:{SECRET}@{host}", say_and_stop, give_up)
    find_topic(Producer(build_settings(host, errors)), "any", errors)
