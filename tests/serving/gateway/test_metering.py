from __future__ import annotations

import sys
import threading
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest

from serving.gateway import metering
from serving.gateway.metering import Meter, Metered, read_metering

ONE = Metered(at_us=1_767_225_600_000_001, endpoint="churn", version="3", rows=2, size=99, status=200, latency_ms=1.5)


def test_the_log_reads_back_as_a_table(tmp_path: Path) -> None:
    meter = Meter(tmp_path)
    meter.add(ONE)
    meter.add(replace(ONE, version=None, status=429))
    meter.close()
    table = read_metering(tmp_path).collect()

    assert [datetime(2026, 1, 1, 0, 0, 0, 1, UTC)] * 2 == table["at"].to_list()
    assert ["3", None] == table["version"].to_list()
    assert {"endpoint": "churn", "rows": 2, "bytes": 99, "status": 429, "latency_ms": 1.5}.items() <= table.row(
        1, named=True
    ).items()


def test_a_log_that_holds_nothing_yet_is_an_empty_table(tmp_path: Path) -> None:
    table = read_metering(tmp_path).collect()

    assert 0 == len(table)
    assert pl.Datetime("us", "UTC") == table.schema["at"]


def test_a_line_that_a_kill_tore_is_left_out(tmp_path: Path) -> None:
    meter = Meter(tmp_path)
    meter.add(ONE)
    meter.close()
    (log,) = (tmp_path / "metering").iterdir()
    with log.open("ab") as file:
        file.write(b'{"at_us":17672')
    again = Meter(tmp_path)
    again.add(ONE)
    again.close()

    assert 2 == len(read_metering(tmp_path).collect())


def test_full_files_are_followed_by_others_and_the_oldest_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metering, "FILE_BYTES_MAX", 1000)
    monkeypatch.setattr(metering, "FILES_MAX", 3)
    meter = Meter(tmp_path)
    for at in range(100):
        meter.add(replace(ONE, at_us=at))
        meter.flush()
    meter.close()
    kept = read_metering(tmp_path).collect()["at"].dt.timestamp("us").to_list()

    assert 3 == len(list((tmp_path / "metering").iterdir()))
    assert list(range(100))[-len(kept) :] == kept
    assert 10 < len(kept) < 40


def test_a_full_disk_loses_nothing_that_fits_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meter = Meter(tmp_path)
    meter.add(ONE)
    meter.flush()
    meter.add(replace(ONE, rows=5))
    with monkeypatch.context() as patch:
        patch.setattr(metering, "_write", _half_written)
        with pytest.raises(OSError, match="No space"):
            meter.flush()
    meter.add(replace(ONE, rows=6))
    meter.close()

    assert [2, 5, 6] == read_metering(tmp_path).collect()["rows"].to_list()


def test_no_line_is_lost_between_threads(tmp_path: Path) -> None:
    meter, over = Meter(tmp_path), threading.Event()

    def flush() -> None:
        while not over.is_set():
            meter.flush()

    flushing = threading.Thread(target=flush)
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    flushing.start()
    for _ in range(5000):
        meter.add(ONE)
    over.set()
    flushing.join()
    sys.setswitchinterval(interval_s)
    meter.close()

    assert (5000, 0) == (len(read_metering(tmp_path).collect()), meter.lost)


def _half_written(file: object, content: bytes) -> None:
    file.write(content[: len(content) // 2])  # type: ignore[attr-defined]
    message = "No space left on device"
    raise OSError(message)


def test_what_waits_in_memory_is_bounded_and_what_is_lost_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metering, "_BUFFERED_MAX", 3)
    meter = Meter(tmp_path)
    for _ in range(5):
        meter.add(ONE)

    assert 2 == meter.lost
