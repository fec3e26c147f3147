"""The bucket of a stack: the releases that machines install, and its end."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from botocore.exceptions import ClientError

from infra.aws.session import Aws, AwsRefused, explain_refusals

_DELETE_AT_ONCE = 1000
_SHA256 = "sha256"


def name_wheel(release: str) -> str:
    """Return where the wheel of a release lies in the bucket."""
    return f"releases/{release}/overnight-{release}-py3-none-any.whl"


def put_wheel(aws: Aws, bucket: str, wheel: Path, release: str) -> bool:
    """Put the wheel of a release into the bucket, create-only; return whether it was not there yet.

    Raises AwsRefused where another wheel of the same release is there: workers of one release must be the same.
    """
    data = wheel.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    s3, key = aws.client("s3"), name_wheel(release)
    with explain_refusals("uploaded"):
        try:
            s3.put_object(Bucket=bucket, Key=key, Body=data, Metadata={_SHA256: digest}, IfNoneMatch="*")
        except ClientError as error:
            if error.response["Error"]["Code"] not in ("PreconditionFailed", "ConditionalRequestConflict"):
                raise
        else:
            return True
        standing = s3.head_object(Bucket=bucket, Key=key)["Metadata"].get(_SHA256)
    if standing != digest:
        message = (
            f"The wheel of release {release} must be the one that s3://{bucket}/{key} holds, got another: workers of "
            "one release must run one code. Raise the version in pyproject.toml and build the wheel again, or delete "
            "that object while no run is in progress."
        )
        raise AwsRefused(message)
    return False


def has_wheel(aws: Aws, bucket: str, release: str) -> bool:
    """Return whether the bucket has the wheel of a release."""
    with explain_refusals("looked up"):
        try:
            aws.client("s3").head_object(Bucket=bucket, Key=name_wheel(release))
        except ClientError as error:
            if error.response["Error"]["Code"] in ("404", "NoSuchKey", "NotFound"):
                return False
            raise
    return True


def count_objects(aws: Aws, bucket: str) -> int:
    """Return how many objects a bucket has, 0 where there is no such bucket."""
    with explain_refusals("counted"):
        try:
            pages = aws.client("s3").get_paginator("list_objects_v2").paginate(Bucket=bucket)
            return sum(page.get("KeyCount", 0) for page in pages)
        except ClientError as error:
            if error.response["Error"]["Code"] == "NoSuchBucket":
                return 0
            raise


def delete_bucket(aws: Aws, bucket: str) -> int:
    """Delete a bucket with every version of every object in it; return how many versions there were."""
    s3, deleted = aws.client("s3"), 0
    with explain_refusals("deleted"):
        for page in s3.get_paginator("list_object_versions").paginate(Bucket=bucket):
            versions: list[Any] = [*page.get("Versions", []), *page.get("DeleteMarkers", [])]
            for first in range(0, len(versions), _DELETE_AT_ONCE):
                some = versions[first : first + _DELETE_AT_ONCE]
                objects = [{"Key": each["Key"], "VersionId": each["VersionId"]} for each in some]
                answer = s3.delete_objects(Bucket=bucket, Delete={"Objects": objects, "Quiet": True})
                if errors := answer.get("Errors"):
                    message = (
                        f"Every object of s3://{bucket} must be deleted, but {errors[0]['Key']} is not: "
                        f"{errors[0].get('Message', errors[0].get('Code'))}. {deleted:,} versions are gone. Correct "
                        "that, and call again."
                    )
                    raise AwsRefused(message)
                deleted += len(some)
        s3.delete_bucket(Bucket=bucket)
    return deleted
