"""What a Kubernetes controller does for an endpoint, on this machine: `python -m infra.local.controller --folder F`.

Each F/<endpoint>/<version>/ that has a serve.json is a release, and has one server process as long as it is there.
A server that dies is started again, on its own port, ever later if it keeps dying. What became of it stands in
status.json beside serve.json, which is replaced as a whole. No server outlives the controller, however that ends.
"""

import argparse
import fcntl
import os
import signal
import sys
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from infra.local.keeper import SERVE_FILE, STATUS_FILE, Identity, Keeper
from infra.local.process import Running, ServerCommand, ServerProcess, base_environment

_LOCK_FILE = ".controller.lock"
_POLL_S = 0.1
_LOCK_S_MAX = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Controller(Running):
    """A running controller; a context manager that stops it and every server of it."""

    process: ServerProcess
    folder: Path

    def stop(self) -> None:
        """Stop the servers and the controller, and return when they are gone. Idempotent."""
        self.process.stop()


def local_controller(folder: Path) -> Controller:
    """Start a controller that watches `folder`, and return once it does. Raises ServerFailed."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    log_path = folder / ".controller.log"
    log_start = log_path.stat().st_size if log_path.exists() else 0
    command = ServerCommand(
        argv=(sys.executable, "-m", "infra.local.controller", "--folder", str(folder)),
        environment={**base_environment(), "PYTHONPATH": str(Path(__file__).parents[2])},
        folder=folder,
        log_path=log_path,
        ready=lambda: b"watching" in log_path.read_bytes()[log_start:],
        # Servers are ended side by side, each within its own grace.
        grace_s=20.0,
    )
    return Controller(process=ServerProcess(command), folder=folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """Watch a folder until SIGTERM or Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m infra.local.controller", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="watch this folder, which is made if need be")
    folder: Path = parser.parse_args(arguments).folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    over = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: over.set())
    with _only_one(folder):
        sys.stdout.write(f"watching {folder}\n")
        sys.stdout.flush()
        control(folder, over)


def control(folder: Path, over: threading.Event) -> None:
    """Keep one server running for each release below `folder` until `over`, then end them all."""
    keepers: dict[Path, Keeper] = {}
    # What an earlier controller left here of servers that went with it.
    for version in _version_folders(folder):
        (version / STATUS_FILE).unlink(missing_ok=True)
    try:
        while not over.wait(_POLL_S):
            wanted = dict(_find_releases(folder))
            for path in [path for path, keeper in keepers.items() if wanted.get(path) != keeper.identity]:
                keepers.pop(path).end()
            for path in wanted.keys() - keepers.keys():
                # It may be gone since it was found.
                with suppress(FileNotFoundError):
                    keepers[path] = Keeper(path, wanted[path])
    finally:
        for keeper in keepers.values():
            keeper.over.set()
        for keeper in keepers.values():
            keeper.end()


def _find_releases(folder: Path) -> Generator[tuple[Path, Identity]]:
    """Yield each folder of a release with what tells it from another one of its name."""
    for version in _version_folders(folder):
        # It may be gone between the listing and the look.
        with suppress(OSError):
            found = (version / SERVE_FILE).stat()
            yield version, (version.stat().st_ino, found.st_ino, found.st_mtime_ns)


def _version_folders(folder: Path) -> Generator[Path]:
    """Yield each <endpoint>/<version> below a folder, but those that are still written; any may go meanwhile."""
    for endpoint in _visible_folders(folder):
        # Path.glob would raise here.
        with suppress(FileNotFoundError):
            yield from _visible_folders(endpoint)


def _visible_folders(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        return [Path(entry) for entry in entries if not entry.name.startswith(".") and entry.is_dir()]


@contextmanager
def _only_one(folder: Path) -> Generator[None]:
    """Hold the folder's lock, by which others know that it is watched. Exits where another controller holds it."""
    with (folder / _LOCK_FILE).open("w") as lock:
        attempts = threading.Event()
        waited_s = 0.0
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                # Somebody who only looks whether the folder is watched holds it for a moment.
                if waited_s >= _LOCK_S_MAX:
                    sys.exit(f"One controller may watch {folder}, and another one does; stop it first.")
                attempts.wait(_POLL_S)
                waited_s += _POLL_S
        yield


if __name__ == "__main__":
    main()
