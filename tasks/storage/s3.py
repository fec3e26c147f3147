"""An S3 prefix as storage."""

from __future__ import annotations

import os
from contextlib import suppress
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from botocore.exceptions import BotoCoreError, NoCredentialsError
from obstore.store import S3Store

from serving.errors import BadInput, StorageDenied
from tasks.storage.objects import ObjectStorage, split_bucket

if TYPE_CHECKING:
    from boto3 import Session

# boto3 renews those of a role ten minutes before they end at the latest
# (https://github.com/boto/botocore/blob/1.40.0/botocore/credentials.py, _mandatory_refresh_timeout).
_CREDENTIALS_KEPT = timedelta(minutes=9)
_NEEDED = "needs AWS credentials, and the boto3 chain"


class S3Storage(ObjectStorage):
    """An S3 prefix, written with If-None-Match and read with If-Match."""

    scheme: ClassVar[str] = "s3"
    credentials_hint: ClassVar[str] = "They are those of the boto3 chain: AWS_ACCESS_KEY_ID, AWS_PROFILE or a role."

    def __init__(self, url: str) -> None:
        super().__init__("s3://" + url.removeprefix("s3://"))

    def _open_store(self) -> Any:
        bucket, prefix = split_bucket(self.url)
        if not bucket:
            message = f"An S3 address must be s3://bucket/prefix, got {self.url!r}."
            raise BadInput(message)
        settings = _find_settings()
        try:
            session = _open_session(settings)
        except NoCredentialsError as error:
            message = f"{self.url} {_NEEDED} finds none. Set AWS_ACCESS_KEY_ID, a profile or a role."
            raise StorageDenied(message) from error
        except BotoCoreError as error:
            message = f"{self.url} {_NEEDED} fails: {error}. Correct the profile or the role."
            raise StorageDenied(message) from error
        return _open_prefix(bucket, prefix, session, s3_endpoint())


def _find_settings() -> tuple[tuple[str, str], ...]:
    """Return what decides what boto3 finds: its variables, and when its files were written."""
    settings = [(name, value) for name, value in os.environ.items() if name.startswith("AWS_") or name == "HOME"]
    for variable, name in (("AWS_SHARED_CREDENTIALS_FILE", "credentials"), ("AWS_CONFIG_FILE", "config")):
        file = Path(os.environ.get(variable) or f"~/.aws/{name}").expanduser()
        with suppress(OSError):
            settings.append((str(file), str(file.stat().st_mtime_ns)))
    return tuple(sorted(settings))


@lru_cache(maxsize=4)
def _open_session(settings: tuple[tuple[str, str], ...]) -> Session:  # noqa: ARG001 - what boto3 finds goes by them
    """Open one session for the same settings: each takes boto3 10 ms. Raises BotoCoreError where credentials lack."""
    from boto3 import Session  # noqa: PLC0415 - a tenth of a second that other storage does not need

    session = Session()
    if session.get_credentials() is None:
        raise NoCredentialsError
    return session


@lru_cache(maxsize=64)
def _open_prefix(bucket: str, prefix: str, session: Session, endpoint: str | None) -> S3Store:
    """Open a prefix, once for the same session: its client reads the machine's certificates, for some 5 ms."""
    from obstore.auth.boto3 import Boto3CredentialProvider  # noqa: PLC0415 - imports boto3

    options: dict[str, Any] = {"endpoint": endpoint} if endpoint else {}
    return S3Store(
        bucket,
        prefix=prefix or None,
        region=session.region_name or "us-east-1",
        credential_provider=Boto3CredentialProvider(session, ttl=_CREDENTIALS_KEPT),
        client_options={"allow_http": bool(endpoint and endpoint.startswith("http://"))},
        **options,
    )


def s3_endpoint() -> str | None:
    """Return the S3 endpoint that the environment names, None for AWS itself."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None
    if endpoint and not endpoint.startswith(("http://", "https://")):
        message = f"The S3 endpoint in AWS_ENDPOINT_URL must start with http:// or https://, got {endpoint!r}."
        raise BadInput(message)
    return endpoint


def s3_options() -> dict[str, str]:
    """Return where S3 is, as polars and Delta take it; no credentials, which they ask boto3 for."""
    from boto3 import Session  # noqa: PLC0415 - as above

    options = {"aws_region": Session().region_name or "us-east-1"}
    if endpoint := s3_endpoint():
        options |= {"aws_endpoint_url": endpoint, "aws_allow_http": str(endpoint.startswith("http://")).lower()}
    return options
