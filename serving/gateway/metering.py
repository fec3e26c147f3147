"""The metering log: the time, size, status and latency of each request. It holds no payloads and no keys.

The log is JSON lines in FOLDER/metering. A new file begins when the gateway starts and when a file is full, and the
oldest files are deleted: the log keeps some ten million requests in at most a gigabyte. A kill -9 loses at most the
requests of the last second.
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
    # Only readers need polars, which takes long to import.
    import polars as pl

FILE_BYTES_MAX = 16 << 20
FILES_MAX = 64
LINES_MAX = 10_000
_FOLDER = "metering"


@dataclass(frozen=True, slots=True, kw_only=True)
class MeteredRequest:
    """One request. The fields are those of the log.

    `at_us` counts microseconds since 1970 in UTC, `size` bytes; `version` is none where no version got the request.
    """

    at_us: int
    endpoint: str
    version: str | None
    rows: int
    size: int
    status: int
    latency_ms: float


class MeteringLog:
    """Writes the log. Lines stay in memory until `flush`, which the owner calls every second, from any thread.

    Args:
        folder: The gateway's folder.
        file_bytes_max: Size from which a file is full.
        files_max: Number of files that are kept.
        lines_max: Number of lines that stay in memory while they cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        *,
        file_bytes_max: int = FILE_BYTES_MAX,
        files_max: int = FILES_MAX,
        lines_max: int = LINES_MAX,
    ) -> None:
        self._folder = folder / _FOLDER
        make_private_folder(self._folder)
        self._file_bytes_max, self._files_max, self._lines_max = file_bytes_max, files_max, lines_max
        self._lines: deque[bytes] = deque()
        self._flush_lock = threading.Lock()
        self._file: BinaryIO | None = None
        self.lost = 0

    def add(self, request: MeteredRequest) -> None:
        """Add a request. Where too many lines could not be written, it is lost, and `lost` counts it."""
        if len(self._lines) >= self._lines_max:
            self.lost += 1
            return
        self._lines.append(orjson.dumps(request, option=orjson.OPT_APPEND_NEWLINE))

    def flush(self) -> None:
        """Write all lines. Raises OSError where that fails; the lines are kept for the next attempt."""
        with self._flush_lock:
            if not self._lines:
                return
            file = self._file or self._open()
            # Other threads add to the same queue meanwhile.
            lines = [self._lines.popleft() for _ in range(len(self._lines))]
            end = file.tell()
            try:
                _write_all(file, b"".join(lines))
            except OSError:
                file.truncate(end)
                file.seek(end)
                self._lines.extendleft(reversed(lines))
                raise
            if file.tell() >= self._file_bytes_max:
                self._close()

    def close(self) -> None:
        """Write all lines, and close the file."""
        self.flush()
        with self._flush_lock:
            self._close()

    def _open(self) -> BinaryIO:
        now = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%f")
        descriptor = os.open(self._folder / f"{now}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        self._file = os.fdopen(descriptor, "wb", buffering=0)
        for old in _list_files(self._folder)[: -self._files_max]:
            old.unlink(missing_ok=True)
        return self._file

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _write_all(file: BinaryIO, content: bytes) -> None:
    written = file.write(content)
    if written != len(content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_metering(folder: Path) -> pl.LazyFrame:
    """Return the metering log of the gateway with this folder, one row for each request, in the order they ended.

    It may be called while the gateway writes: an incomplete line is left out.

    Returns:
        A frame with the columns at (datetime in microseconds, UTC: when the request came), endpoint, version, rows,
        bytes, status and latency_ms.
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
    contents = [content for path in _list_files(folder / _FOLDER) if (content := _read_lines(path))]
    frames = [pl.scan_ndjson(io.BytesIO(content), schema=schema) for content in contents]
    log = pl.concat(frames) if frames else pl.LazyFrame(schema=schema)
    at = pl.col("at_us").cast(pl.Datetime("us", "UTC")).alias("at")
    rest = ("endpoint", "version", "rows", pl.col("size").alias("bytes"), "status", "latency_ms")
    return log.select(at, *rest)


def _list_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.jsonl"))


def _read_lines(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        # The gateway has deleted it: it was the oldest.
        return b""
    return content[: content.rfind(b"\n") + 1]
