"""What S3 adds: ETags held in the middle of a read, credentials, buckets, and marks of folders."""

from __future__ import annotations

import io
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from botocore.credentials import RefreshableCredentials

from infra.local.s3 import S3Server
from serving.errors import BadInput, SourceChanged, StorageDenied, StorageFault
from tasks.storage import Entry, Storage, open_storage, s3_options
from tasks.storage.s3 import _open_prefix

pytestmark = pytest.mark.servers


@pytest.fixture
def store(s3: S3Server) -> Storage:
    assert s3.endpoint_url
    return open_storage(f"s3://lake/{uuid.uuid4().hex}")


def entry_of(store: Storage, path: str) -> Entry:
    found = store.find(path)
    assert found is not None
    return found


def parquet(seed: int) -> bytes:
    sink = io.BytesIO()
    table = pa.table({name: np.random.default_rng(seed).random(20_000) for name in "abcd"})
    pq.write_table(table, sink, row_group_size=10_000, data_page_size=4096)
    return sink.getvalue()


def replaced(store: Storage) -> None:
    store.delete(["a.parquet"])
    store.put_new("a.parquet", parquet(2))


def deleted(store: Storage) -> None:
    store.delete(["a.parquet"])


@pytest.mark.parametrize("pre_buffer", [False, True])
@pytest.mark.parametrize("change", [replaced, deleted])
def test_an_object_that_changes_in_the_middle_of_a_read_is_source_changed_and_no_arrow_error(
    store: Storage,
    change: Callable[[Storage], None],
    pre_buffer: bool,  # noqa: FBT001
) -> None:
    store.put_new("a.parquet", parquet(1))
    stream = store.open_pinned(entry_of(store, "a.parquet"))
    file = pq.ParquetFile(stream, pre_buffer=pre_buffer)
    first = next(file.iter_batches(batch_size=100, row_groups=[0]))
    change(store)

    assert first.num_rows == 100
    with pytest.raises(SourceChanged, match=r"s3://lake/.*/a\.parquet must be "):
        list(file.iter_batches(batch_size=100, row_groups=[1]))


def test_a_footer_that_changed_is_source_changed(store: Storage) -> None:
    store.put_new("a.parquet", parquet(1))
    entry = entry_of(store, "a.parquet")
    replaced(store)
    with pytest.raises(SourceChanged, match="its ETag is another by now"):
        pq.read_metadata(store.open_pinned(entry))


def test_text_that_changes_in_the_middle_of_a_read_is_source_changed(store: Storage) -> None:
    store.put_new("a.csv", b"a,b\n" + b"1,2\n" * 100_000)
    stream = store.open_pinned(entry_of(store, "a.csv"))
    assert b"a,b\n1,2" == stream.read(7)
    store.delete(["a.csv"])
    store.put_new("a.csv", b"a,b\n" + b"1,3\n" * 100_000)
    with pytest.raises(SourceChanged, match=r"a\.csv"):
        stream.read()


def test_any_range_of_an_object_is_read(store: Storage) -> None:
    store.put_new("a", b"0123456789")
    stream = store.open_pinned(entry_of(store, "a"))

    assert stream.size() == 10
    assert (b"3456", 7) == (stream.read_at(4, 3), stream.seek(7))
    assert b"78" == stream.read(2)
    assert (b"9", b"") == (stream.read(), stream.read())
    assert (8, b"89") == (stream.seek(-2, 2), stream.read(100))


def test_an_identity_that_may_only_read_is_denied_every_write(
    store: Storage, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put_new("a", b"data")
    entry = entry_of(store, "a")
    for name, value in s3.read_only_environment.items():
        monkeypatch.setenv(name, value)
    reader = open_storage(store.url)

    assert reader.read("a") == b"data"
    assert [entry] == reader.entries()
    for refused in (
        lambda: reader.put_new("b", b"data"),
        lambda: reader.set_aside(entry),
        lambda: reader.delete(["a"]),
    ):
        with pytest.raises(StorageDenied, match=r"s3://lake/.* must be allowed to these credentials, got: .*AccessDen"):
            refused()
    assert store.read("a") == b"data"


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_keys_are_storage_denied(store: Storage, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "wrong")
    stranger = open_storage(store.url)
    for refused in (
        stranger.entries,
        lambda: stranger.read("a"),
        lambda: stranger.find("a"),
        lambda: stranger.put_new("a", b""),
    ):
        with pytest.raises(StorageDenied, match="must be allowed to these credentials"):
            refused()


@pytest.fixture
def nothing_known(s3: S3Server, tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """No credentials anywhere: not in the environment, not in the home folder, not from the machine."""
    for name in s3.environment:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", f"{tmp_path}/none")
    monkeypatch.setenv("AWS_CONFIG_FILE", f"{tmp_path}/none")


@pytest.mark.usefixtures("nothing_known")
def test_missing_credentials_are_storage_denied() -> None:
    with pytest.raises(StorageDenied, match=r"s3://lake/x needs AWS credentials, and the boto3 chain finds none\. Set"):
        open_storage("s3://lake/x")


@pytest.mark.usefixtures("nothing_known")
def test_an_unknown_profile_is_storage_denied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(StorageDenied, match=r"boto3 chain fails: .*nobody"):
        open_storage("s3://lake/x")


@pytest.mark.parametrize("minutes", [1, 9, 11, 14, 16, 20, 29, 59])
def test_credentials_of_a_role_are_never_used_beyond_their_end(minutes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store takes a key until the time that it is given with; that may not come after the role's own end."""

    def make(key: str, lifetime: timedelta) -> dict[str, str]:
        ends[key] = datetime.now(UTC) + lifetime
        return {"access_key": key, "secret_key": "s", "token": "t", "expiry_time": ends[key].isoformat()}

    ends: dict[str, datetime] = {}
    role = RefreshableCredentials.create_from_metadata(
        make("old", timedelta(minutes=minutes)), lambda: make("new", timedelta(hours=1)), "sts"
    )
    session = boto3.Session()
    monkeypatch.setattr(session, "get_credentials", lambda: role)
    given: Any = _open_prefix("lake", f"minutes-{minutes}", session, None).credential_provider

    found = given()

    assert ends[found["access_key_id"]] >= found["expires_at"]


@pytest.mark.usefixtures("s3")
def test_a_bucket_that_is_not_there_is_bad_input_by_name() -> None:
    missing = open_storage("s3://no-such-bucket/x")
    for refused in (lambda: missing.put_new("a", b""), missing.entries):
        with pytest.raises(BadInput, match=r"The bucket of s3://no-such-bucket/x.* must exist, got: NoSuchBucket"):
            refused()
    assert missing.read("a") is None
    assert missing.find("a") is None


@pytest.mark.usefixtures("s3")
def test_an_endpoint_without_a_scheme_is_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:9000")
    with pytest.raises(BadInput, match="must start with http:// or https://, got 'localhost:9000'"):
        open_storage("s3://lake/x")


@pytest.mark.usefixtures("s3")
def test_a_server_that_does_not_answer_is_a_storage_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    # Port 9 is discard's, and nobody listens there.
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageFault, match=r"s3://lake/x must answer, got: .* Call again once it does"):
        open_storage("s3://lake/x").entries()


def test_the_marks_that_consoles_make_of_folders_are_no_objects(store: Storage) -> None:
    client = boto3.client("s3")
    prefix = store.url.removeprefix("s3://lake/")
    for key in ("", "sales/", "lone/"):
        client.put_object(Bucket="lake", Key=f"{prefix}/{key}", Body=b"")
    store.put_new("sales/a.parquet", b"x")
    store.put_new("sales/empty.csv", b"")

    assert ["sales/a.parquet", "sales/empty.csv"] == [entry.path for entry in store.entries()]


def test_more_objects_than_one_page_are_all_listed(store: Storage) -> None:
    names = [f"{at:04d}" for at in range(1100)]
    for name in names:
        store.put_new(name, b"x")

    assert names == [entry.path for entry in store.entries()]


def test_options_for_other_readers_name_the_endpoint_and_no_credentials(s3: S3Server) -> None:
    assert s3_options() == {
        "aws_region": "us-east-1",
        "aws_endpoint_url": s3.endpoint_url,
        "aws_allow_http": "true",
    }


@pytest.mark.usefixtures("s3")
def test_the_endpoint_for_s3_alone_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "https://s3.example")

    assert s3_options() == {
        "aws_region": "us-east-1",
        "aws_endpoint_url": "https://s3.example",
        "aws_allow_http": "false",
    }


@pytest.mark.parametrize("mark", ["\t", "\n", "\r", "\x7f", "\x01", "\x1f"])
def test_an_object_whose_name_has_a_control_character_is_bad_input_by_name(store: Storage, mark: str) -> None:
    prefix = store.url.removeprefix("s3://lake/")
    store.put_new("good", b"x")
    boto3.client("s3").put_object(Bucket="lake", Key=f"{prefix}/sub/a{mark}b.parquet", Body=b"x")
    with pytest.raises(BadInput, match=r"must have no control characters, .* got '.*sub/a.*b\.parquet'\. Rename it"):
        store.entries()


def test_a_replacement_character_of_a_names_own_is_fine(store: Storage) -> None:
    store.put_new("a\ufffdb", b"x")

    assert ["a\ufffdb"] == [entry.path for entry in store.entries()]


def test_more_objects_than_one_page_at_one_level_are_all_listed(store: Storage) -> None:
    names = [f"run=a/{at:04d}" for at in range(1100)]
    for name in names:
        store.put_new(name, b"x")
    store.put_new("run=a/deep/x", b"x")

    assert names == [entry.path for entry in store.entries("run=a", depth=1)]
    assert names[50:1060] == [entry.path for entry in store.entries_after("run=a", "0049", 1010)]
