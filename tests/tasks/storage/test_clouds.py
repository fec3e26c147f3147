"""What Google Cloud Storage and Azure add: credentials, buckets, and settings that messages name."""

from __future__ import annotations

import io
import uuid
from pathlib import Path

import polars as pl
import pytest

from serving.errors import BadInput, DestinationUnusable, SourceChanged, StorageDenied, StorageFault, StorageFull
from tasks.storage import Storage, check_create_only, open_storage, reader_options
from tests.azurite import AzuriteServer
from tests.gcs_server import GcsServer

GOOGLE = ("GOOGLE_BEARER_TOKEN", "GOOGLE_APPLICATION_CREDENTIALS")
AZURE = ("AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_SAS_TOKEN")


@pytest.fixture(params=["gcs", "azure"])
def cloud(request: pytest.FixtureRequest) -> Storage:
    """An empty prefix of each cloud."""
    request.getfixturevalue(request.param)
    return open_storage(f"{'gs' if request.param == 'gcs' else 'az'}://lake/{uuid.uuid4().hex}")


def test_the_tag_of_a_listing_is_that_of_a_look_up(cloud: Storage) -> None:
    cloud.put_new("a/b", b"x")

    assert cloud.entries() == [cloud.find("a/b")]


def test_a_read_is_held_against_the_tag_of_a_listing(cloud: Storage) -> None:
    cloud.put_new("a", b"0123456789")
    (entry,) = cloud.entries()

    assert b"345" == cloud.open_pinned(entry).read_at(3, 3)
    cloud.delete(["a"])
    cloud.put_new("a", b"9876543210")
    with pytest.raises(SourceChanged, match="its ETag is another by now"):
        cloud.open_pinned(entry).read()


def test_a_read_is_held_against_the_tag_where_a_store_ignores_the_condition(
    gcs: GcsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gcs, "ignores_conditions", True)
    store = open_storage(f"gs://lake/{uuid.uuid4().hex}")
    store.put_new("a", b"0123456789")
    (entry,) = store.entries()
    store.delete(["a"])
    store.put_new("a", b"9876543210")
    with pytest.raises(SourceChanged, match="its ETag is another by now"):
        store.open_pinned(entry).read_at(3, 3)


def test_a_bucket_or_container_that_is_not_there_is_bad_input_by_name(cloud: Storage) -> None:
    missing = open_storage(f"{cloud.url.partition('://')[0]}://no-such-one/x")
    for refused in (lambda: missing.put_new("a", b""), missing.entries):
        with pytest.raises(BadInput, match=r"The (bucket|container) of .*no-such-one/x.* must exist, got: "):
            refused()


def test_polars_reads_by_what_the_environment_and_the_options_say(cloud: Storage) -> None:
    frame, stream = pl.DataFrame({"a": [1, 2, 3]}), io.BytesIO()
    frame.write_parquet(stream)
    cloud.put_new("a.parquet", stream.getvalue())
    read = pl.scan_parquet(cloud.address("a.parquet"), storage_options=reader_options(cloud), credential_provider=None)

    assert frame.equals(read.collect())


def test_an_identity_that_may_only_read_is_denied_every_write(gcs: GcsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_storage(f"gs://lake/{uuid.uuid4().hex}")
    store.put_new("a", b"data")
    monkeypatch.setenv("GOOGLE_BEARER_TOKEN", gcs.reader)
    reader = open_storage(store.url)

    assert reader.read("a") == b"data"
    for refused in (lambda: reader.put_new("b", b"data"), lambda: reader.delete(["a"])):
        with pytest.raises(
            StorageDenied, match=r"gs://lake/.* must be allowed .*AccessDenied.*GOOGLE_APPLICATION_CRED"
        ):
            refused()


def test_a_wrong_token_or_key_is_storage_denied(cloud: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOGLE_BEARER_TOKEN", "wrong")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "d3Jvbmc=")
    stranger = open_storage(cloud.url)
    for refused in (stranger.entries, lambda: stranger.put_new("a", b"")):
        with pytest.raises(StorageDenied, match=r"must be allowed to these credentials.* They are those of ") as caught:
            refused()
        assert "d3Jvbmc=" not in str(caught.value)


@pytest.mark.parametrize("address", ["gs://lake/x", "az://lake/x"])
def test_missing_credentials_are_storage_denied_with_the_settings(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*GOOGLE, *AZURE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "someone")
    settings = "GOOGLE_APPLICATION_CREDENTIALS" if address.startswith("gs") else "AZURE_STORAGE_ACCOUNT_KEY"
    with pytest.raises(StorageDenied, match=rf"{address} needs .* credentials, and there are none.*{settings}"):
        open_storage(address)


def test_a_server_that_does_not_answer_is_a_storage_fault(gcs: GcsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    # Port 9 is discard's, and nobody listens there.
    monkeypatch.setenv("GOOGLE_BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageFault, match=r"gs://lake/x must answer, got: "):
        open_storage("gs://lake/x").entries()


def test_a_store_that_overwrites_is_refused(gcs: GcsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gcs, "ignores_conditions", True)
    with pytest.raises(DestinationUnusable, match=r"gs://lake/.* must create an object only where none"):
        check_create_only(open_storage(f"gs://lake/{uuid.uuid4().hex}"))


def test_a_quota_that_is_used_up_is_storage_full(gcs: GcsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gcs, "full", True)
    with pytest.raises(StorageFull, match="needs space, got: QuotaExceeded"):
        open_storage("gs://lake/x").put_new("a", b"x")


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("gs://", "must be gs://bucket/prefix"),
        ("gs:///x", "must be gs://bucket/prefix"),
        ("gs://user@bucket/x", "must hold no credentials"),
        ("az://", "must be az://container/prefix, or abfss://"),
        ("az://lake@elsewhere.example/x", "must be az://container/prefix, or abfss://"),
        ("az://lake/x?sv=2020&sig=c2VjcmV0", "must hold no credentials, got one with a signature"),
        ("abfss://lake:c2VjcmV0@someone.dfs.core.windows.net/x", "must hold no credentials, got one with a colon"),
    ],
)
def test_an_address_names_a_bucket_and_no_secret(address: str, told: str) -> None:
    with pytest.raises(BadInput, match=told) as caught:
        open_storage(address)

    assert "c2VjcmV0" not in str(caught.value)


def test_an_account_is_named_by_the_address_or_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "c2VjcmV0")
    with pytest.raises(BadInput, match=r"must be in a storage account, got none\. Set AZURE_STORAGE_ACCOUNT_NAME"):
        open_storage("az://lake/x")
    named = open_storage("abfss://lake@someone.dfs.core.windows.net/x/")

    assert "abfss://lake@someone.dfs.core.windows.net/x/a" == named.address("a")
    assert {"account_name": "someone"} == {
        name: value for name, value in (reader_options(named) or {}).items() if name == "account_name"
    }


def test_a_container_by_the_name_of_its_account_is_the_same(azure: AzuriteServer) -> None:
    name = uuid.uuid4().hex
    open_storage(f"az://lake/{name}").put_new("a", b"x")

    assert b"x" == open_storage(f"abfss://lake@overnight.dfs.core.windows.net/{name}").read("a")
