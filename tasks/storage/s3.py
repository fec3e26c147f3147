"""An S3 prefix as storage."""

from __future__ import annotations

import os
from typing import Any, ClassVar

from boto3 import Session
from botocore.exceptions import BotoCoreError
from obstore.auth.boto3 import Boto3CredentialProvider
from obstore.store import S3Store

from serving.errors import BadInput, StorageDenied
from tasks.storage.objects import ObjectStorage, split_bucket


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
        session = _session(self.url)
        endpoint = s3_endpoint()
        options: dict[str, Any] = {"endpoint": endpoint} if endpoint else {}
        return S3Store(
            bucket,
            prefix=prefix or None,
            region=session.region_name or "us-east-1",
            credential_provider=Boto3CredentialProvider(session),
            client_options={"allow_http": bool(endpoint and endpoint.startswith("http://"))},
            **options,
        )


def _session(url: str) -> Session:
    try:
        session = Session()
        found = session.get_credentials()
    except BotoCoreError as error:
        message = f"{url} needs AWS credentials, and the boto3 chain fails: {error}. Mend the profile or the role."
        raise StorageDenied(message) from error
    if found is None:
        message = (
            f"{url} needs AWS credentials, and the boto3 chain finds none. Set AWS_ACCESS_KEY_ID, a profile or a role."
        )
        raise StorageDenied(message)
    return session


def s3_endpoint() -> str | None:
    """Return the S3 endpoint that the environment names, None for AWS itself."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None
    if endpoint and not endpoint.startswith(("http://", "https://")):
        message = f"The S3 endpoint in AWS_ENDPOINT_URL must start with http:// or https://, got {endpoint!r}."
        raise BadInput(message)
    return endpoint


def s3_options() -> dict[str, str]:
    """Return where S3 is, as polars and Delta take it; no credentials, which they ask boto3 for."""
    options = {"aws_region": Session().region_name or "us-east-1"}
    if endpoint := s3_endpoint():
        options |= {"aws_endpoint_url": endpoint, "aws_allow_http": str(endpoint.startswith("http://")).lower()}
    return options
