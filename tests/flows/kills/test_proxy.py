"""The proxy passes on what it is asked, signatures and all, and counts the bytes."""

from __future__ import annotations

import pytest

from infra.local.s3 import S3Server
from serving.errors import SourceChanged
from tasks.storage import Entry, open_storage
from tests.benchmarks.kills.proxy import counting_proxy


def test_reads_through_the_proxy_are_counted_by_object_and_place(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytes(range(256)) * 40
    with counting_proxy(s3.endpoint_url) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        storage = open_storage("s3://lake/proxied here")
        written = storage.put_new("a", data), storage.put_new("a", b"other")
        (entry,) = storage.entries()
        with storage.open_pinned(entry) as stream:
            stream.seek(100)
            middle = stream.read(50)
        whole, none = storage.read("a"), storage.read("b")
        with pytest.raises(SourceChanged), storage.open_pinned(Entry(path="a", size=9, tag='"0"')) as stream:
            stream.read(4)

    assert (True, False) == written
    assert (data[100:150], data, None) == (middle, whole, none)
    assert [("s3://lake/proxied here/a", 100, 50), ("s3://lake/proxied here/a", 0, len(data))] == [
        (read.address, read.start, read.size) for read in proxy.reads
    ]
    # The last read was refused: whether its object is gone, or another, is asked once.
    assert {"GET": 4, "HEAD": 1, "LIST": 1, "PUT": 2} == proxy.requests
