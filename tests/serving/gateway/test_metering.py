from __future__ import annotations

import sys
import threading
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest

from serving.gateway import metering
from serving.gateway.metering import MeteredRequest, MeteringLog, read_metering

ONE = MeteredRequest(
    at_us=1_767_225_600_000_001, endpoint="churn", version="3", rows=2, size=99, status=200, latency_ms=1.5
)


def test_the_log_is_read_as_a_table(tmp_path: Path) -> None:
    meter = MeteringLog(tmp_path)
    meter.add(ONE)
    meter.add(replace(ONE, version=None, status=429))
    meter.close()
    table = read_metering(tmp_path).collect()

    assert [datetime(2026, 1, 1, 0, 0, 0, 1, UTC)] * 2 == table["at"].to_list()
    assert ["3", None] == table["version"].to_list()
    assert {"endpoint": "churn", "rows": 2, "bytes": 99, "status": 429, "latency_ms": 1.5}.items() <= table.row(
        1, named=True
    ).items()


def test_an_empty_log_is_an_empty_table(tmp_path: Path) -> None:
    table = read_metering(tmp_path).collect()

    assert 0 == len(table)
    assert pl.Datetime("us", "UTC") == table.schema["at"]


def test_a_line_that_a_kill_cut_off_is_left_out(tmp_path: Path) -> None:
    meter = MeteringLog(tmp_path)
    meter.add(ONE)
    meter.close()
    (log,) = (tmp_path / "metering").iterdir()
    with log.open("ab") as file:
        file.write(b'{"at_us":17672')
    restarted = MeteringLog(tmp_path)
    restarted.add(ONE)
    restarted.close()

    assert 2 == len(read_metering(tmp_path).collect())


def test_a_new_file_follows_a_full_one_and_the_oldest_is_deleted(tmp_path: Path) -> None:
    meter = MeteringLog(tmp_path, file_bytes_max=1000, files_max=3)
    for at_us in range(100):
        meter.add(replace(ONE, at_us=at_us))
        meter.flush()
    meter.close()
    kept = read_metering(tmp_path).collect()["at"].dt.timestamp("us").to_list()

    assert 3 == len(list((tmp_path / "metering").iterdir()))
    assert list(range(100))[-len(kept) :] == kept
    assert 10 < len(kept) < 40


def test_a_full_disk_loses_nothing_that_fits_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meter = MeteringLog(tmp_path)
    meter.add(ONE)
    meter.flush()
    meter.add(replace(ONE, rows=5))
    with monkeypatch.context() as patch:
        patch.setattr(metering, "_write_all", _write_half)
        with pytest.raises(OSError, match="No space"):
            meter.flush()
    meter.add(replace(ONE, rows=6))
    meter.close()

    assert [2, 5, 6] == read_metering(tmp_path).collect()["rows"].to_list()


def test_no_line_is_lost_between_threads(tmp_path: Path) -> None:
    meter, over = MeteringLog(tmp_path), threading.Event()

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


def _write_half(file: object, content: bytes) -> None:
    file.write(content[: len(content) // 2])  # type: ignore[attr-defined]
    message = "No space left on device"
    raise OSError(message)


def test_lines_in_memory_are_limited_and_lost_ones_counted(tmp_path: Path) -> None:
    meter = MeteringLog(tmp_path, lines_max=3)
    for _ in range(5):
        meter.add(ONE)

    assert 2 == meter.lost
