"""Servers are asked side by side, once, and soon."""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import mlflow
import pytest

from serving.errors import BadInput, DestinationUnusable, OvernightError, ServerUnreachable, StorageDenied
from tasks.common import server_checks
from tasks.common.server_checks import ServerCheck, ask_http, check_servers, list_checks
from tasks.storage import LocalStorage
from tests.eventually import eventually

if TYPE_CHECKING:
    from infra.local.s3 import S3Server


def refuse(error: Exception) -> ServerCheck:
    def ask() -> None:
        raise error

    return ServerCheck(server=f"The server of {type(error).__name__}", advice="Start it.", ask=ask)


def wait(over: Callable[[], object]) -> ServerCheck:
    def ask() -> None:
        over()

    return ServerCheck(server="The slow one", advice="Wake it.", ask=ask)


def test_all_are_asked_at_once() -> None:
    # None of them answers before all are asked.
    met = threading.Barrier(8, timeout=60)
    check_servers([wait(met.wait) for _ in range(8)], seconds_max=60)

    assert (0, False) == (met.n_waiting, met.broken)


def test_one_that_fails_is_raised_as_it_is() -> None:
    with pytest.raises(BadInput, match=r"^no$"):
        check_servers([wait(bool), refuse(BadInput("no"))])
    with pytest.raises(ServerUnreachable, match=r"^The server of OSError must answer, got: away\. Start it\.$"):
        check_servers([refuse(OSError("away."))])


def test_several_that_fail_are_named_together_and_one_that_waits_too() -> None:
    over, times = threading.Event(), iter([0.0])

    def read_clock() -> float:
        """Say that the time is up once all but the slow one have answered."""
        if (now := next(times, None)) is not None:
            return now
        eventually(lambda: [each.name for each in threading.enumerate()].count("check-server") == 1)
        return 9.0

    with pytest.raises(ServerUnreachable) as refused:
        check_servers([refuse(OSError("away")), wait(over.wait), refuse(BadInput("no"))], clock=read_clock)
    over.set()

    assert [
        "Every server that the call needs must answer, got 3 that do not:",
        "  - The server of OSError must answer, got: away. Start it.",
        "  - The slow one must answer, got: no answer within 9 s. Wake it.",
        "  - no",
    ] == str(refused.value).split("\n")


def test_a_server_that_says_no_answers(s3: S3Server) -> None:
    assert 400 <= ask_http(s3.endpoint_url) < 500


def test_a_server_that_accepts_and_is_silent_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_checks, "_ANSWER_SECONDS", 0.2)
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        pytest.raises(TimeoutError, match=r"no answer within 0\.2 s"),
    ):
        ask_http(f"http://127.0.0.1:{listener.getsockname()[1]}/x")


def test_bytes_that_are_no_http_are_no_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"SSH-2.0-OpenSSH\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(OSError, match=r".+"):
            ask_http(f"http://127.0.0.1:{listener.getsockname()[1]}/x")
        thread.join()


def test_stores_are_asked_once_and_list_nothing(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(LocalStorage, "entries", fail)
    parameters = {"destination": "s3://lake/out", "source": ("s3://lake/a", "s3://other/b", str(tmp_path))}
    checks = list_checks(parameters, uses_registry=False)

    assert [f"The store at {s3.endpoint_url}", f"The store of {tmp_path}"] == [check.server for check in checks]
    check_servers(checks)


def test_a_registry_that_is_named_twice_is_asked_once(registry: Path) -> None:
    assert [f"The MLflow registry at sqlite:///{registry}/mlflow.db"] == [
        check.server for check in list_checks({}, uses_registry=True)
    ]


@pytest.mark.parametrize(
    "uri",
    [
        "http://me:pa55word@127.0.0.1:{port}",
        "http://127.0.0.1:{port}/x?token=pa55word",
        "mysql://me:pa55word@127.0.0.1:{port}/m",
    ],
)
def test_a_registry_that_does_not_run_is_named_without_its_password(uri: str, registry: Path, held_port: int) -> None:
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri.format(port=held_port))
    try:
        with pytest.raises(ServerUnreachable, match="set MLFLOW_TRACKING_URI") as refused:
            check_servers(list_checks({}, uses_registry=True))
    finally:
        mlflow.set_tracking_uri(before)

    assert "pa55word" not in str(refused.value)


@pytest.mark.parametrize(
    ("below", "expected"),
    [("new/folder", None), ("", None), ("file", DestinationUnusable), ("file/x", DestinationUnusable)],
)
def test_a_destination_must_be_a_folder_or_become_one(
    below: str, expected: type[OvernightError] | None, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    checks = list_checks({"destination": str(tmp_path / below)}, uses_registry=False)
    if expected is None:
        check_servers(checks)
    else:
        with pytest.raises(expected, match="Choose another path"):
            check_servers(checks)

    assert ["file"] == [path.name for path in tmp_path.iterdir()]


def test_a_folder_that_may_not_be_written_to_is_no_destination(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse_file(**_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    # A test that runs as root may write everywhere.
    monkeypatch.setattr(server_checks.tempfile, "TemporaryFile", refuse_file)
    with pytest.raises(StorageDenied) as refused:
        check_servers(list_checks({"destination": str(tmp_path)}, uses_registry=False))

    assert str(refused.value) == (
        f"The destination {tmp_path} must be accessible for writing, but {tmp_path} does not let this user write. Give "
        "this user the right to write there, or choose another path."
    )


def test_a_file_system_that_is_read_only_is_no_destination(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse_file(**_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(server_checks.tempfile, "TemporaryFile", refuse_file)
    with pytest.raises(StorageDenied, match=r"is on a read-only file system\. Mount it for writing, or choose another"):
        check_servers(list_checks({"destination": str(tmp_path / "new")}, uses_registry=False))
