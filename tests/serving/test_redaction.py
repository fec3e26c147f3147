"""Secrets in messages and log lines: hidden however they are written, and nothing else is."""

from __future__ import annotations

import logging
import pickle
import string
from functools import partial
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.errors import BadInput, BadRequest, ModelNotFound, OvernightError
from serving.redaction import (
    hide_secrets,
    hide_secrets_in_exception,
    hide_secrets_in_logs,
    hide_secrets_in_logs_meanwhile,
    holds_secret,
)

SECRET = "s3cr3t-0f-mine"  # noqa: S105 - of nothing


@pytest.mark.parametrize(
    "written",
    [
        "postgresql://user:{}@host/db must answer",
        "mysql+pymysql://user:{}@host:3306/db?charset=utf8",
        "postgresql://user:a/b@{}@host/db",
        "https://{}@host/path",
        "https://user:{}@host:443/path?x=1",
        "nats://{}@127.0.0.1:4222",
        "nats://a:{}@h1:4222,nats://b:{}@h2:4222 is gone",
        "s3://AKIA:{}@bucket/prefix",
        "bootstrap.servers user:{}@broker:9092",
        "'user:{}@broker:9092' must answer",
        "postgresql%3A%2F%2Fuser%3A{}%40host%2Fdb",
        "https://bucket/key?X-Amz-Credential=me&X-Amz-Signature={}&X-Amz-Expires=60",
        "https://bucket/key?X-Amz-Security-Token={}",
        "s3://lake/token=7/x.parquet?token={}",
        "https://account.blob.core.windows.net/c?sv=1&sig={}",
        "Max retries exceeded with url: /x?token={}&name=x (Caused by NewConnectionError)",
        "host=127.0.0.1 user=me password={} dbname=x",
        "sasl.password={}",
        "sasl.jaas.config={}",
        "{{'password': '{}', 'user': 'me'}}",
        '{{"api_key": "{}"}}',
        "AWS_SECRET_ACCESS_KEY={} must be set",
        "Authorization: Bearer {}",
        "headers={{'authorization': 'Basic {}'}}",
        "with Bearer {} it was refused",
        "PGPASSWORD={} psql",
        "psql --password {} -h db",
        "user: me\npassword: {}\nhost: db",
        "{{user: me, password: {}}}",
    ],
)
def test_a_secret_is_hidden_however_it_is_written(written: str) -> None:
    text = written.format(SECRET, SECRET)

    assert SECRET not in hide_secrets(text)
    assert "***" in hide_secrets(text)
    assert hide_secrets(text) == hide_secrets(hide_secrets(text))
    assert holds_secret(text)


@pytest.mark.parametrize(
    "text",
    [
        "models:/churn@champion must name a version",
        "s3://lake/scores/day@2/part.parquet must answer",
        "http://127.0.0.1:8000/v2/models/churn@champion/infer",
        "postgresql://user@host/db"[:11] + "//host:5432/db must answer",
        "max_tokens=512 and tokenizer=fast, key=value",
        "Set OVERNIGHT_KAFKA_CONFIG, NATS_USER and NATS_PASSWORD, NATS_TOKEN or NATS_CREDS",
        "The token of the cluster: it is a Prefect Secret block",
        "Basic authentication and bearer tokens are taken",
        "T1f3@Y69uoy1MTki54JNxFm1Yhw/1/4",
        "key_columns=('customer',), topic_id='Y69uoy1MTki54JNxFm1Yhw'",
        "someone@example.com wrote at 12:30",
        "/data/token=abc/x.parquet must be readable",
        "s3://lake/country=DE/api_key=7/signature=v1/*.parquet",
        "data/session_token=7/",
        "mlflow.log_model(model, name=..., signature=signature, input_example=inputs)",
        "must hold no password, token or key: parameters are kept with the flow run",
        "give --api-key in the environment",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert text == hide_secrets(text)
    assert not holds_secret(text)


@given(
    user=st.text(string.ascii_letters, min_size=1, max_size=8),
    secret=st.text(string.ascii_letters + string.digits + "!$%&()*+,-./:;=?@[]^_{|}~ ", min_size=8, max_size=40),
)
def test_no_password_that_is_encoded_in_an_address_is_left(user: str, secret: str) -> None:
    address = f"https://{user}:{quote(secret, safe='')}@host.example/path"

    assert "https://***@host.example/path" == hide_secrets(address)


def test_what_the_environment_names_as_a_secret_is_hidden_wherever_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NATS_PASSWORD", "correct horse")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:battery%20staple@host/db")

    assert "refused ***, then *** and ***" == hide_secrets(
        "refused correct horse, then battery staple and battery%20staple"
    )


def test_every_error_of_ours_hides_secrets_and_keeps_the_rest() -> None:
    for kind in kinds(OvernightError):
        error = kind(f"postgresql://user:{SECRET}@host/db must answer")

        assert "postgresql://***@host/db must answer" == str(error)
        assert SECRET not in repr(error)
    assert 422 == BadRequest("x", status=422).status
    assert ("https://***@host",) == pickle.loads(pickle.dumps(BadInput(f"https://{SECRET}@host"))).args  # noqa: S301


def kinds(kind: type[OvernightError]) -> list[type[OvernightError]]:
    return [kind, *(each for below in kind.__subclasses__() for each in kinds(below))]


def test_log_lines_of_any_library_hide_secrets_their_arguments_and_tracebacks_too(
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = logging.getLogRecordFactory()
    try:
        hide_secrets_in_logs()
        hide_secrets_in_logs()
        caplog.set_level(logging.WARNING)
        log = logging.getLogger("a.library")
        log.warning("Retrying %s, %d left", f"https://user:{SECRET}@host/x", 3)
        log.warning(f"sasl.password={SECRET}")  # noqa: G004 - as libraries do
        failed = ModelNotFound("no model")
        failed.__cause__ = ValueError(f"postgresql://user:{SECRET}@host/db")
        log.error("failed", exc_info=failed)
    finally:
        logging.setLogRecordFactory(before)

    assert SECRET not in caplog.text
    assert "Retrying https://***@host/x, 3 left" in caplog.text
    assert "ValueError: postgresql://***@host/db" in caplog.text


def test_while_blocks_overlap_log_lines_hide_secrets_and_afterwards_they_are_made_as_before(
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = logging.getLogRecordFactory()
    log = logging.getLogger("a.library")
    first, second = hide_secrets_in_logs_meanwhile(), hide_secrets_in_logs_meanwhile()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    log.warning(f"password={SECRET} while one runs")  # noqa: G004 - as libraries do
    second.__exit__(None, None, None)

    assert before is logging.getLogRecordFactory()
    assert ["password=*** while one runs"] == caplog.messages


def test_a_factory_of_others_that_came_in_between_stays_and_hides_nothing_afterwards(
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = logging.getLogRecordFactory()
    # Another test of this process may have had it hide secrets for good.
    logging.setLogRecordFactory(logging.LogRecord)
    try:
        with hide_secrets_in_logs_meanwhile():
            logging.setLogRecordFactory(partial(logging.getLogRecordFactory()))
        logging.getLogger("a.library").warning("password=of-a-test")
    finally:
        logging.setLogRecordFactory(before)

    assert ["password=of-a-test"] == caplog.messages


def test_the_exceptions_that_one_came_from_hide_them_too() -> None:
    inner = ValueError(f"https://user:{SECRET}@host")
    outer = RuntimeError(f"got token={SECRET}", 7)
    outer.__cause__, inner.__context__ = inner, outer
    hide_secrets_in_exception(outer)

    assert ("got token=***", 7) == outer.args
    assert "https://***@host" == str(inner)
