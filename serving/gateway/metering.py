"""The metering log: when requests came, how large they were, how they were answered. No payloads, no keys.

JSON lines below folder/metering, a new file whenever the gateway starts or a file is full, and the oldest deleted, so
that the log keeps some ten million requests in at most a gigabyte. A kill -9 costs at most the last second.
"""

from __future__ import annotations

import errno
import io
import os
import threading
from collections import deque
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import orjson

from serving.gateway.store import make_private_folder

if TYPE_CHECKING:
    # Only readers need it, and it takes a while to import.
    import polars as pl

FILE_BYTES_MAX = 16 << 20
FILES_MAX = 64
_BUFFERED_MAX = 10_000
_FOLDER = "metering"


@dataclass(frozen=True, slots=True, kw_only=True)
class Metered:
    """One request: `at_us` since 1970 in UTC, `size` its bytes, `version` none where no version was asked."""

    at_us: int
    endpoint: str
    version: str | None
    rows: int
    size: int
    status: int
    latency_ms: float


class Meter:
    """Writes the log; lines are kept until `flush`, which whoever owns it calls every second, from any thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / _FOLDER
        make_private_folder(self._folder)
        self._lines: deque[bytes] = deque()
        self._flushing = threading.Lock()
        self._file: BinaryIO | None = None
        self.lost = 0

    def add(self, request: Metered) -> None:
        """Take note of a request; where nothing could be written for long, it is lost and counted as such."""
        if len(self._lines) >= _BUFFERED_MAX:
            self.lost += 1
            return
        self._lines.append(orjson.dumps(request, option=orjson.OPT_APPEND_NEWLINE))

    def flush(self) -> None:
        """Write what there is. Raises OSError where that fails; the lines are kept for the next time."""
        with self._flushing:
            if not self._lines:
                return
            file = self._file or self._open()
            # Others add to the very same queue meanwhile.
            lines = [self._lines.popleft() for _ in range(len(self._lines))]
            before = file.tell()
            try:
                _write(file, b"".join(lines))
            except OSError:
                file.truncate(before)
                file.seek(before)
                self._lines.extendleft(reversed(lines))
                raise
            if file.tell() >= FILE_BYTES_MAX:
                self._close()

    def close(self) -> None:
        """Write what there is, and close the file."""
        self.flush()
        with self._flushing:
            self._close()

    def _open(self) -> BinaryIO:
        now = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%f")
        private = os.open(self._folder / f"{now}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        self._file = os.fdopen(private, "wb", buffering=0)
        for old in _files(self._folder)[:-FILES_MAX]:
            old.unlink(missing_ok=True)
        return self._file

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _write(file: BinaryIO, content: bytes) -> None:
    written = file.write(content)
    if written != len(content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_metering(folder: Path) -> pl.LazyFrame:
    """Return the metering log of the gateway with this folder, one row a request, in the order in which they ended.

    Columns: at (datetime in microseconds, UTC: when the request came), endpoint, version, rows, bytes, status,
    latency_ms. May be called while the gateway writes: a line that is not whole yet is left out.
    """
    import polars as pl  # noqa: PLC0415 - see above

    schema = {
        "at_us": pl.Int64,
        "endpoint": pl.String,
        "version": pl.String,
        "rows": pl.Int64,
        "size": pl.Int64,
        "status": pl.Int64,
        "latency_ms": pl.Float64,
    }
    whole = [content for path in _files(folder / _FOLDER) if (content := _whole_lines(path))]
    frames = [pl.scan_ndjson(io.BytesIO(content), schema=schema) for content in whole]
    log = pl.concat(frames) if frames else pl.LazyFrame(schema=schema)
    at = pl.col("at_us").cast(pl.Datetime("us", "UTC")).alias("at")
    rest = ("endpoint", "version", "rows", pl.col("size").alias("bytes"), "status", "latency_ms")
    return log.select(at, *rest)


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.jsonl"))


def _whole_lines(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        # It was the oldest, and is deleted by now.
        return b""
    return content[: content.rfind(b"\n") + 1]
