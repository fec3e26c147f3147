"""Servers of their own process, by a folder that a controller watches: BentoML's, KServe's and Seldon's alike.

A release lies in <folder>/<endpoint>/<version>/. Its serve.json says how its server is run; in its argv and
environment {folder} stands for that folder and {port}, {port2} and so on for free ports on loopback. What became of
it the controller writes to status.json. infra/local/controller.py is one, for this machine.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

import serving
from serving.errors import EndpointFailed
from serving.model.contract import Frozen
from serving.model.release import MODEL_FOLDER, RELEASE_FILE, Release
from serving.targets import Address, Rendered, Target
from serving.targets.written import remove_folder, write_folder

SERVE_FILE, STATUS_FILE = "serve.json", "status.json"
_LOCK_FILE = ".controller.lock"
_POLL_S = 0.05
_END_S_MAX = 30.0
# What a controller may need beyond the time that a server has.
_MARGIN_S = 30.0


class Serve(Frozen):
    """How the server of a release is run, as a controller reads it."""

    argv: tuple[str, ...] = Field(min_length=1, description="The program and its arguments.")
    environment: dict[str, str] = Field(default={}, description="Its variables, beside a few that it inherits.")
    ready_path: str = Field(pattern="^/", description="Answers 2xx once it serves.")
    ready_s_max: float = Field(default=300.0, gt=0, description="Seconds within which it must be ready.")


class Status(Frozen):
    """What became of a release, as a controller writes it."""

    state: Literal["starting", "ready", "failed", "ended"] = Field(description="Whether its server serves.")
    url: str | None = Field(default=None, description="Where it answers, if it does.")
    error: str | None = Field(default=None, description="What was wrong last, with the end of its log.")
    starts: int = Field(default=0, description="How often its server was started.")
    pid: int | None = Field(default=None, description="The process of the server.")


def rendered(release: Release, model: Path, serve: Serve, files: Mapping[str, bytes]) -> Rendered:
    """Return a release as its server needs it: release.json, model/, this package, and the files given."""
    about = {RELEASE_FILE: release.model_dump_json(indent=2), SERVE_FILE: serve.model_dump_json(indent=2)}
    return Rendered(
        files={**{name: text.encode() for name, text in about.items()}, **files},
        trees={MODEL_FOLDER: model, "serving": Path(serving.__file__).parent},
    )


def python_environment() -> dict[str, str]:
    """Return what a server in Python needs that loads a release out of its folder: the package there, no telemetry."""
    return {
        "PYTHONPATH": "{folder}",
        "PYTHONUNBUFFERED": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def interpreter(python: Path, requirements: str) -> str:
    """Return an interpreter as a server runs it out of its own folder; a bare name is looked up on the PATH there.

    Raises EndpointFailed where it is missing, with the command that makes its environment.
    """
    if len(python.parts) == 1:
        return str(python)
    if not python.exists():
        message = (
            f"The interpreter of the model server must be there, got no {python}. Make its environment: "
            f"python -m infra.local.venv {requirements}"
        )
        raise EndpointFailed(message)
    return str(python.absolute())


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderHost:
    """A Host over a folder that a controller watches."""

    folder: Path
    target: Target

    def deploy(self, release: Release, model: Path) -> Address:
        """Put a release up and wait until it answers.

        Promises: a release that is up, or on its way, with the same files stays as it is; one with others is taken
        down first; one that does not come up is taken away again. Raises EndpointFailed with what its server said
        last, or where no controller watches the folder.
        """
        self._check_watched()
        place, wanted = self._place(release), self.target.render(release, model)
        status = _read_status(place)
        if not _holds(place, wanted) or (status is not None and status.state in ("failed", "ended")):
            self.remove(release)
            write_folder(wanted, place)
        try:
            return Address(url=self._wait(place, release), model=release.endpoint, version=None)
        except EndpointFailed:
            self.remove(release)
            raise

    def remove(self, release: Release) -> None:
        """Take a release down: its server ends what it has begun, then its files go. Idempotent."""
        place = self._place(release)
        with suppress(NotADirectoryError):
            (place / SERVE_FILE).unlink(missing_ok=True)
        # Whoever took serve.json away may still wait for the server to end, which needs its files as long.
        deadline = time.monotonic() + _END_S_MAX
        while not _ended(place) and self._watched() and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        remove_folder(place)
        with suppress(OSError):  # Other versions may be there, or on their way: write_folder makes it again.
            place.parent.rmdir()

    def status(self, release: Release) -> Status | None:
        """Return what the controller says of a release, None where it said nothing yet."""
        return _read_status(self._place(release))

    def _place(self, release: Release) -> Path:
        return self.folder / release.endpoint / release.version

    def _wait(self, place: Path, release: Release) -> str:
        who = f"Version {release.version} of {release.endpoint}"
        gone = f"{who} must stay until it answers, but was removed meanwhile. Deploy it again if it is still wanted."
        try:
            serve = Serve.model_validate_json((place / SERVE_FILE).read_bytes())
        except FileNotFoundError:
            raise EndpointFailed(gone) from None
        deadline = time.monotonic() + serve.ready_s_max + _MARGIN_S
        while time.monotonic() < deadline:
            if not (place / SERVE_FILE).exists():
                raise EndpointFailed(gone)
            status = _read_status(place)
            if status is not None and status.url is not None:
                return status.url
            if status is not None and status.state == "failed":
                message = f"{who} must come up, and is taken away again, got: {status.error}"
                raise EndpointFailed(message)
            self._check_watched()
            time.sleep(_POLL_S)
        message = f"{who} must be ready within {serve.ready_s_max:g} s, and is taken away again; raise ready_s_max."
        raise EndpointFailed(message)

    def _check_watched(self) -> None:
        if not self._watched():
            message = (
                f"A controller must watch {self.folder}, got none. Start one: "
                f"python -m infra.local.controller --folder {self.folder}"
            )
            raise EndpointFailed(message)

    def _watched(self) -> bool:
        """Whether a controller holds the lock of the folder."""
        try:
            with (self.folder / _LOCK_FILE).open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False


def _holds(place: Path, wanted: Rendered) -> bool:
    """Whether a release is there with these very files; its model and code are told by their digest in them."""
    try:
        return all((place / name).read_bytes() == content for name, content in wanted.files.items())
    except OSError:
        return False


def _ended(place: Path) -> bool:
    status = _read_status(place)
    return status is None or status.state == "ended"


def _read_status(place: Path) -> Status | None:
    try:
        return Status.model_validate_json((place / STATUS_FILE).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValidationError as error:
        message = f"{place / STATUS_FILE} must be a controller's word, got {error}. Is another program writing there?"
        raise EndpointFailed(message) from None
