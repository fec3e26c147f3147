"""Envoy's access log: read while it grows, from where an earlier reader stopped, through rotations."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest

from serving.gateway.access_log import AccessLogReader, LoggedRequest
from serving.gateway.envoy.admin import EnvoyAdmin
from serving.gateway.metering import read_metering
from tests.serving.gateway.support import write_access_line

# An Envoy that does not run: nobody opens the next file.
NOBODY = EnvoyAdmin(Path("/nonexistent/admin.sock"))


@pytest.fixture
def make_reader(tmp_path: Path) -> Generator[Callable[..., AccessLogReader]]:
    """Opens readers of the folder, and closes them."""
    with ExitStack() as stack:
        yield lambda **limits: stack.enter_context(AccessLogReader(tmp_path, NOBODY, **limits))


def read_all(reader: AccessLogReader) -> list[int]:
    """Read until there is nothing left, also of the file after a rotation."""
    found: list[int] = []
    empty = 0
    while empty < 2:
        requests = reader.read()
        found += [request.at_us for request in requests]
        empty = 0 if requests else empty + 1
    return found


def test_a_line_becomes_a_request(tmp_path: Path, make_reader: Callable[..., AccessLogReader]) -> None:
    write_access_line(tmp_path, at_us=5, version="3", rows=2, status=200, latency_us=1500, is_canary=True, attempts=2)
    (request,) = make_reader().read()

    assert (
        LoggedRequest(
            at_us=5,
            endpoint="churn",
            version="3",
            rows=2,
            size=99,
            status=200,
            latency_ms=1.5,
            is_canary=True,
            attempts=2,
        )
        == request
    )


@pytest.mark.parametrize(("grpc_status", "status"), [(0, 200), (3, 400), (8, 429), (14, 503), (99, 500)])
def test_an_error_of_grpc_has_the_status_of_http(
    tmp_path: Path, make_reader: Callable[..., AccessLogReader], grpc_status: int, status: int
) -> None:
    write_access_line(tmp_path, status=200, grpc_status=grpc_status)
    (request,) = make_reader().read()

    assert status == request.status
    assert [status] == read_metering(tmp_path).collect()["status"].to_list()


def test_a_line_is_read_once_it_is_complete(tmp_path: Path, make_reader: Callable[..., AccessLogReader]) -> None:
    reader = make_reader()
    write_access_line(tmp_path, at_us=1)
    log = tmp_path / "access.jsonl"
    whole = log.read_bytes()
    log.write_bytes(whole + whole[:30])

    assert [1] == read_all(reader)
    with log.open("ab") as file:
        file.write(whole[30:])
    assert [1] == read_all(reader)


def test_a_line_that_a_kill_cut_off_is_counted_and_left_out(
    tmp_path: Path, make_reader: Callable[..., AccessLogReader]
) -> None:
    write_access_line(tmp_path, at_us=1)
    with (tmp_path / "access.jsonl").open("ab") as file:
        file.write(b'{"at_us":"17\n')
    write_access_line(tmp_path, at_us=2)
    reader = make_reader()

    assert [1, 2] == read_all(reader)
    assert 1 == reader.unreadable


def test_a_reader_goes_on_where_the_earlier_one_stopped_even_after_a_rotation(
    tmp_path: Path, make_reader: Callable[..., AccessLogReader]
) -> None:
    first = make_reader(file_bytes_max=1)
    write_access_line(tmp_path, at_us=1)
    assert [1] == read_all(first)
    first.save_position()
    first.close()
    write_access_line(tmp_path, at_us=2)
    make_reader(file_bytes_max=1).rotate()
    write_access_line(tmp_path, at_us=3)

    assert [2, 3] == read_all(make_reader())


def test_a_full_file_is_put_aside_and_the_oldest_is_deleted(
    tmp_path: Path, make_reader: Callable[..., AccessLogReader]
) -> None:
    reader = make_reader(file_bytes_max=1000, files_max=3)
    found = []
    for at_us in range(100):
        write_access_line(tmp_path, at_us=at_us)
        found += read_all(reader)
        reader.rotate()
    kept = read_metering(tmp_path).collect()["at"].dt.timestamp("us").to_list()

    assert list(range(100)) == found
    assert 3 == len(list((tmp_path / "metering").glob("*.jsonl")))
    assert list(range(100))[-len(kept) :] == kept
    assert 10 < len(kept) < 40


def test_the_log_is_read_as_a_table(tmp_path: Path) -> None:
    write_access_line(tmp_path, at_us=1_767_225_600_000_001, version="3", rows=2, latency_us=1500)
    write_access_line(tmp_path, at_us=1_767_225_600_000_001, status=429, latency_us=1500)
    table = read_metering(tmp_path).collect()

    assert [datetime(2026, 1, 1, 0, 0, 0, 1, UTC)] * 2 == table["at"].to_list()
    assert ["3", None] == table["version"].to_list()
    assert [2, None] == table["rows"].to_list()
    assert {"endpoint": "churn", "bytes": 99, "status": 429, "latency_ms": 1.5}.items() <= table.row(
        1, named=True
    ).items()


def test_what_earlier_releases_metered_is_read_too(tmp_path: Path) -> None:
    (tmp_path / "metering").mkdir()
    line = '{"at_us":1,"endpoint":"churn","version":"3","rows":2,"size":99,"status":200,"latency_ms":1.5}\n'
    (tmp_path / "metering" / "20260101T000000.000000.jsonl").write_text(line)
    write_access_line(tmp_path, at_us=2)

    assert [1.5, 2.0] == read_metering(tmp_path).collect()["latency_ms"].to_list()


def test_an_empty_log_is_an_empty_table(tmp_path: Path) -> None:
    table = read_metering(tmp_path).collect()

    assert 0 == len(table)
    assert pl.Datetime("us", "UTC") == table.schema["at"]
