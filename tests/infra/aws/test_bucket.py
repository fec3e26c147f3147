"""The bucket of a stack has the releases that machines install, and goes only when it is told to."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra.aws.bucket import count_objects, delete_bucket, has_wheel, put_wheel
from infra.aws.session import Aws, AwsRefused
from infra.aws.stack import Stack
from tests.aws_server import AwsServer


def test_a_wheel_is_put_once_and_another_of_its_release_is_refused(stack: Stack, aws: Aws, wheel: Path) -> None:
    bucket = stack.resource("DataBucket")

    assert not has_wheel(aws, bucket, "0.1.0")
    assert [True, False] == [put_wheel(aws, bucket, wheel, "0.1.0") for _ in range(2)]
    assert has_wheel(aws, bucket, "0.1.0")

    wheel.write_bytes(b"other code of 0.1.0")
    with pytest.raises(AwsRefused, match=r"The wheel of release 0\.1\.0 must be the one that s3://.*got another"):
        put_wheel(aws, bucket, wheel, "0.1.0")


def test_a_bucket_is_deleted_with_every_version_of_its_objects(stack: Stack, aws: Aws, server: AwsServer) -> None:
    bucket, s3 = stack.resource("DataBucket"), server.client("s3")
    # moto leaves the versions of a stack's bucket out.
    s3.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    for key in ("scores/a", "scores/a", "scores/b"):
        s3.put_object(Bucket=bucket, Key=key, Body=b"1")
    s3.delete_object(Bucket=bucket, Key="scores/b")

    assert 1 == count_objects(aws, bucket)
    # Two of a, one of b, and the mark of its deletion.
    assert 4 == delete_bucket(aws, bucket)
    assert [] == s3.list_buckets()["Buckets"]
    assert 0 == count_objects(aws, bucket)


def test_the_bucket_is_encrypted(stack: Stack, server: AwsServer) -> None:
    bucket, s3 = stack.resource("DataBucket"), server.client("s3")
    rule = s3.get_bucket_encryption(Bucket=bucket)["ServerSideEncryptionConfiguration"]["Rules"][0]

    assert "AES256" == rule["ApplyServerSideEncryptionByDefault"]["SSEAlgorithm"]
