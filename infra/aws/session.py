"""AWS, opened: a region, credentials, clients; and what AWS refuses, in words that say what to do."""

from __future__ import annotations

import os
import re
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,  # noqa: A004 - botocore's own, of which Python's is no base
    CredentialRetrievalError,
    HTTPClientError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    SSOError,
    TokenRetrievalError,
)

_CONFIG = Config(connect_timeout=5, read_timeout=30, retries={"mode": "standard", "total_max_attempts": 4})
_CREDENTIALS_MISSING = (
    *(NoCredentialsError, PartialCredentialsError, ProfileNotFound),
    *(CredentialRetrievalError, TokenRetrievalError, SSOError),
)
_CREDENTIALS_REFUSED = {
    *("AuthFailure", "ExpiredToken", "ExpiredTokenException", "InvalidAccessKeyId", "InvalidClientTokenId"),
    *("SignatureDoesNotMatch", "UnrecognizedClientException", "OptInRequired"),
}
_PERMISSION_MISSING = {"AccessDenied", "AccessDeniedException", "UnauthorizedOperation"}
_QUOTA = re.compile(
    r"LimitExceeded|TooManyBuckets|QuotaExceed|MaxSpotInstanceCount|(exceeded|reached).{0,40}(quota|limit)"
    r"|(quota|limit).{0,40}(exceed|reached)|vCPU (capacity|limit)",
    re.IGNORECASE,
)
_MESSAGE_MAX = 400


class AwsRefused(RuntimeError):
    """AWS refuses, or what it has is not what the call needs. The message says what to do."""


@dataclass(slots=True, kw_only=True)
class Aws:
    """One region of one account; its clients are made when they are first asked for."""

    session: boto3.Session
    region: str
    _clients: dict[str, Any] = field(default_factory=dict)

    def client(self, service: str) -> Any:
        """Return the client of a service."""
        if service not in self._clients:
            self._clients[service] = self.session.client(service, region_name=self.region, config=_CONFIG)
        return self._clients[service]

    @property
    def cloudformation(self) -> Any:
        """The client for stacks."""
        return self.client("cloudformation")

    @property
    def autoscaling(self) -> Any:
        """The client for Auto Scaling groups."""
        return self.client("autoscaling")


def open_aws(region: str | None = None, profile: str | None = None) -> Aws:
    """Return a region of the account that the credentials of boto3's chain are for. Nothing is asked of AWS yet.

    Args:
        region: Without it, that of AWS_REGION, AWS_DEFAULT_REGION or the profile.
        profile: A profile of the AWS configuration; without it, that of AWS_PROFILE.

    Raises:
        AwsRefused: There is no region, AWS has none of that name, or credentials are missing.
    """
    with explain_refusals("opened"):
        session = boto3.Session(profile_name=profile)
        region = region or os.environ.get("AWS_REGION") or session.region_name
        if not region:
            message = "A region must be given, got none. Name it by --region, or set AWS_REGION: eu-central-1, for one."
            raise AwsRefused(message)
        _check_region(session, region)
        if session.get_credentials() is None:
            raise NoCredentialsError
    return Aws(session=session, region=region)


def _check_region(session: boto3.Session, region: str) -> None:
    known = sorted(
        each
        for partition in session.get_available_partitions()
        for each in session.get_available_regions("cloudformation", partition_name=partition)
    )
    if region not in known:
        near = [each for each in known if each.startswith(region.split("-", maxsplit=1)[0])] or known
        message = (
            f"The region must be one that AWS has, got {region!r}. Near it are {', '.join(near[:12])}. Correct "
            "--region or AWS_REGION; a newer region needs a newer boto3."
        )
        raise AwsRefused(message)


def is_quota(text: str) -> bool:
    """Return whether a reason that AWS gives is that a quota is used up."""
    return bool(_QUOTA.search(text))


@contextmanager
def explain_refusals(what: str) -> Generator[None]:
    """Turn what AWS refuses in the block into AwsRefused; `what` says in a word what was to be done to AWS's side."""
    try:
        yield
    except _CREDENTIALS_MISSING as error:
        message = (
            f"AWS must be given credentials, got: {_shorten(error)}. Set AWS_PROFILE, or AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or sign in by `aws sso login`."
        )
        raise AwsRefused(message) from None
    except ClientError as error:
        raise AwsRefused(explain_error(error, what)) from None
    except (ConnectionError, HTTPClientError) as error:
        message = (
            f"AWS must answer, got: {_shorten(error)}. Check the network, the region, and AWS_ENDPOINT_URL where it is "
            "set. Then call again."
        )
        raise AwsRefused(message) from None
    except BotoCoreError as error:
        message = f"The stack must be {what} as boto3 takes it, got: {_shorten(error)}. Correct that, and call again."
        raise AwsRefused(message) from None


def explain_error(error: ClientError, what: str) -> str:
    """Return what a person reads of an answer of AWS that refuses."""
    code, told = str(error.response["Error"].get("Code")), _shorten(error.response["Error"].get("Message", ""))
    if code in _CREDENTIALS_REFUSED:
        return (
            f"The credentials must be valid in this region, but AWS answers {code}: {told}. Renew them, or choose "
            "others by AWS_PROFILE."
        )
    if code in _PERMISSION_MISSING:
        return (
            f"The credentials must allow {error.operation_name}, but AWS answers {code}: {told}. Have it allowed, or "
            "choose others by AWS_PROFILE."
        )
    if is_quota(code) or is_quota(told):
        return (
            f"The quotas of the account must allow what is asked for, but AWS answers {code}: {told}. Have the quota "
            "raised (Service Quotas, in this region), or ask for less, and call again."
        )
    return f"It must be {what}, but AWS answers {code} to {error.operation_name}: {told}. Correct that, and call again."


def _shorten(text: object) -> str:
    return " ".join(str(text).split())[:_MESSAGE_MAX].rstrip(".")
