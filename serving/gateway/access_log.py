"""Envoy's access log, which meters every request: its lines as records, read while Envoy writes, and its rotation.

The log is JSON lines: access.jsonl while Envoy writes it, FOLDER/metering once it is full, of which the oldest are
deleted. It keeps some five million requests in at most a gigabyte, and holds no payloads and no keys. Envoy writes it
every 100 ms, so that a kill -9 of Envoy loses the lines of that time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Self

import orjson

from serving.gateway.envoy.admin import EnvoyAdmin, EnvoyGone
from serving.gateway.store import make_private_folder

FILE_BYTES_MAX = 16 << 20
FILES_MAX = 64
METERING_FOLDER = "metering"
ACCESS_LOG = "access.jsonl"
_POSITION_FILE = "access.position"
_READ_BYTES_MAX = 4 << 20
# The HTTP status of each status of gRPC that is an error, by its number.
GRPC_STATUSES = {1: 499, 3: 400, 4: 504, 5: 404, 7: 403, 8: 429, 12: 501, 13: 500, 14: 503, 16: 401}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedRequest:
    """One request to an endpoint, as the access log has it.

    `at_us` counts microseconds since 1970 in UTC until the request came, `size` the bytes of its body. `version` is the
    one that answered, and `rows` what the start of the body says; both may be unknown. `is_canary` says that the
    canary was asked first, and `attempts` how many versions were asked.
    """

    at_us: int
    endpoint: str
    version: str | None
    rows: int | None
    size: int
    status: int
    latency_ms: float
    is_canary: bool = False
    attempts: int = 1

    @property
    def ended_s(self) -> float:
        """Seconds since 1970 until the request was answered."""
        return self.at_us / 1e6 + self.latency_ms / 1000

    @classmethod
    def from_line(cls, line: bytes) -> LoggedRequest:
        """Return the request of a line. Raises ValueError where it is no such line."""
        fields: dict[str, Any] = orjson.loads(line)
        try:
            grpc, rows = fields.get("grpc_status"), fields.get("rows")
            return cls(
                at_us=int(fields["at_us"]),
                endpoint=fields["endpoint"],
                version=fields.get("version"),
                rows=None if rows is None else int(rows),
                size=int(fields["size"]),
                status=GRPC_STATUSES.get(grpc, 500) if grpc else int(fields["status"]),
                latency_ms=int(fields.get("latency_us") or 0) / 1000,
                is_canary=bool(fields.get("is_canary")),
                attempts=int(fields.get("attempts") or 1),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(str(error)) from None


class AccessLogReader:
    """Reads the lines that Envoy adds, and goes on where an earlier control plane stopped.

    Args:
        folder: The gateway's folder.
        admin: Envoy's administration, which opens a new file after a rotation.
        file_bytes_max: Size from which a file is full.
        files_max: Number of full files that are kept.
    """

    def __init__(
        self, folder: Path, admin: EnvoyAdmin, *, file_bytes_max: int = FILE_BYTES_MAX, files_max: int = FILES_MAX
    ) -> None:
        self._path, self._folder = folder / ACCESS_LOG, folder / METERING_FOLDER
        self._position_file = folder / _POSITION_FILE
        make_private_folder(self._folder)
        self._admin = admin
        self._file_bytes_max, self._files_max = file_bytes_max, files_max
        self._file: BinaryIO | None = None
        self._rest = b""
        self.unreadable = 0

    def __enter__(self) -> Self:
        """Return the reader."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close the file."""
        self.close()

    def read(self) -> list[LoggedRequest]:
        """Return the requests that were logged since the last call, at most those of some megabytes."""
        file = self._file or self._open()
        if file is None:
            return []
        found = list(self._read_from(file))
        if not found and self._is_replaced(file):
            # Envoy has opened the next file, and this one is read to its end.
            file.close()
            self._file = None
            self._rest = b""
        return found

    def save_position(self) -> None:
        """Write down how far the log is read. Raises OSError."""
        if self._file is None:
            return
        position = {"inode": os.fstat(self._file.fileno()).st_ino, "offset": self._file.tell() - len(self._rest)}
        self._position_file.write_bytes(orjson.dumps(position))

    def rotate(self) -> None:
        """Put a full file aside, have Envoy begin another, and delete the oldest. Raises OSError."""
        if not self._path.exists() or self._path.stat().st_size < self._file_bytes_max:
            return
        now = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%f")
        self._path.rename(self._folder / f"{now}.jsonl")
        try:
            self._admin.reopen_logs()
        except EnvoyGone:
            # It opens the file when it is started again.
            self._path.touch(mode=0o600)
        for old in sorted(self._folder.glob("*.jsonl"))[: -self._files_max]:
            old.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> BinaryIO | None:
        position = self._read_position()
        for path in (*sorted(self._folder.glob("*.jsonl")), self._path):
            # A file that was put aside while no control plane ran.
            if position is not None and path.exists() and path.stat().st_ino == position["inode"]:
                self._file = path.open("rb")
                self._file.seek(position["offset"])
                break
        else:
            if not self._path.exists():
                return None
            self._file = self._path.open("rb")
        self._position_file.unlink(missing_ok=True)
        return self._file

    def _read_position(self) -> dict[str, int] | None:
        try:
            position = orjson.loads(self._position_file.read_bytes())
            return {"inode": int(position["inode"]), "offset": int(position["offset"])}
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def _read_from(self, file: BinaryIO) -> Iterator[LoggedRequest]:
        *lines, self._rest = (self._rest + file.read(_READ_BYTES_MAX)).split(b"\n")
        for line in lines:
            try:
                yield LoggedRequest.from_line(line)
            except ValueError:
                self.unreadable += 1

    def _is_replaced(self, file: BinaryIO) -> bool:
        try:
            return self._path.stat().st_ino != os.fstat(file.fileno()).st_ino
        except FileNotFoundError:
            return False
