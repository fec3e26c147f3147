"""Model servers that run in a process of their own, out of a folder that a controller watches: BentoML, KServe, Seldon.

A release lies in FOLDER/<endpoint>/<version>/, with two files for the controller that watches FOLDER:

- serve.json, which a target writes and the controller reads: `argv` and `environment` of the server, the `ready_path`
  that answers 2xx once it serves, and `ready_s_max`, the seconds within which it must. In argv and environment {folder}
  stands for the folder of the release, and {port}, {port2} and so on for free ports on loopback.
- status.json, which the controller writes and `FolderHost` reads: the fields of `Status`.

FOLDER/<endpoint>/kubernetes is no release. It has the endpoint's manifests for a cluster, where those are asked for.

infra/local/controller.py is a controller for one machine. Its `Serve` is the schema of serve.json.
"""

from __future__ import annotations

import dis
import errno
import fcntl
import functools
import json
import shutil
import tempfile
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Literal

from pydantic import Field, ValidationError

import serving
from serving.errors import EndpointFailed
from serving.model.contract import Frozen
from serving.model.release import MODEL_FOLDER, RELEASE_FILE, Release
from serving.targets import Address, ReleaseFiles, Target

SERVE_FILE, STATUS_FILE = "serve.json", "status.json"
_CLUSTER_FOLDER, ROLLOUT_FILE = "kubernetes", "rollout.yaml"
_LOCK_FILE = ".controller.lock"
_POLL_S = 0.05
_END_S_MAX = 30.0
# What a controller may need beyond the time that a server has.
_MARGIN_S = 30.0
_READY_S_MAX = 300.0
_ATTEMPTS_MAX = 100
_PAUSE_S = 0.02
_PACKAGE = Path(serving.__file__).parent


class Status(Frozen):
    """What became of a release, as a controller writes it."""

    state: Literal["starting", "ready", "failed", "ended"] = Field(description="Whether its server serves.")
    url: str | None = Field(default=None, description="Where it answers, if it does.")
    error: str | None = Field(default=None, description="What was wrong last, with the end of its log.")
    starts: int = Field(default=0, description="How often its server was started.")
    pid: int | None = Field(default=None, description="The process of the server.")


def render_folder(
    release: Release,
    model: Path,
    files: Mapping[str, bytes],
    *,
    argv: tuple[str, ...],
    environment: Mapping[str, str],
    ready_path: str,
    ready_s_max: float = _READY_S_MAX,
) -> ReleaseFiles:
    """Return the folder of a release: release.json, serve.json, model/, `files`, and the modules that they import.

    Args:
        release: The release.
        model: The folder of the model's files.
        files: Files that the server needs besides, by their path; those in Python may import this package.
        argv: The server's program and arguments.
        environment: Its environment variables, beside a few that it inherits.
        ready_path: The path that answers 2xx once it serves.
        ready_s_max: Seconds within which it must be ready.
    """
    serve = {
        "argv": argv,
        "environment": {**_PYTHON_ENVIRONMENT, **environment},
        "ready_path": ready_path,
        "ready_s_max": ready_s_max,
    }
    programs = tuple(content for name, content in files.items() if name.endswith(".py"))
    return ReleaseFiles(
        files={
            RELEASE_FILE: release.model_dump_json(indent=2).encode(),
            SERVE_FILE: json.dumps(serve, indent=2).encode(),
            **read_imported_modules(programs),
            **files,
        },
        trees={MODEL_FOLDER: model},
    )


# The package out of the folder of the release, and no telemetry.
_PYTHON_ENVIRONMENT = {
    "PYTHONPATH": "{folder}",
    "PYTHONUNBUFFERED": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@functools.cache
def read_imported_modules(programs: tuple[bytes, ...]) -> Mapping[str, bytes]:
    """Return the modules of this package that programs import, directly or through each other, by their path.

    A release brings them along: it then answers with the code that it was verified with, and with no more than that.
    Imports inside of functions count, and so do those for type checkers.
    """
    modules: dict[str, bytes] = {}
    names = [name for program in programs for name in _imported_names(program)]
    while names:
        name = names.pop()
        path = _find_module(name)
        key = path.relative_to(_PACKAGE.parent).as_posix() if path else ""
        if path and key not in modules:
            modules[key] = path.read_bytes()
            names += [name.rpartition(".")[0], *_imported_names(modules[key])]
    return dict(sorted(modules.items()))


def _imported_names(program: bytes) -> Iterator[str]:
    """Yield the names that a program imports: of modules, and of what it takes from them, which may be modules too."""
    # By its bytecode, since ast.parse may fail in Python 3.11 where two threads parse at a time (SystemError).
    codes = [compile(program, "<release>", "exec", dont_inherit=True)]
    while codes:
        code = codes.pop()
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
        module = ""
        for instruction in dis.get_instructions(code):
            if instruction.opname == "IMPORT_NAME":
                module = instruction.argval
                yield module
            elif instruction.opname == "IMPORT_FROM":
                yield f"{module}.{instruction.argval}"


def _find_module(name: str) -> Path | None:
    """Return the file of a module of this package, None where the name is not one."""
    if name.split(".", maxsplit=1)[0] != _PACKAGE.name:
        return None
    path = _PACKAGE.parent.joinpath(*name.split("."))
    return next((file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()), None)


def resolve_interpreter(python: Path, requirements: str) -> str:
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
        down first; one that does not come up is taken away again. Raises EndpointFailed with what its server logged
        last, or where no controller watches the folder.
        """
        self._check_watched()
        folder, rendered = self._release_folder(release), self.target.render(release, model)
        status = _read_status(folder)
        if not _has_files(folder, rendered) or (status is not None and status.state in ("failed", "ended")):
            self._take_down(folder)
            write_folder(rendered, folder)
        try:
            return Address(url=self._wait_until_ready(folder, release), model=release.endpoint, version=None)
        except EndpointFailed:
            self._take_down(folder)
            raise

    def remove(self, release: Release) -> None:
        """Take a release down: its server ends what it has begun, then its files are removed. Idempotent.

        With the last release of an endpoint go its manifests.
        """
        folder = self._release_folder(release)
        self._take_down(folder)
        manifests = folder.parent / _CLUSTER_FOLDER
        with suppress(OSError):
            if [manifests] == list(folder.parent.iterdir()):
                remove_folder(manifests)
                folder.parent.rmdir()

    def _take_down(self, folder: Path) -> None:
        """Have the server in a folder end, and remove the folder."""
        with suppress(NotADirectoryError):
            (folder / SERVE_FILE).unlink(missing_ok=True)
        # Another call that removed serve.json may still wait for the server to end, which needs its files until then.
        deadline = time.monotonic() + _END_S_MAX
        while not _has_ended(folder) and self._is_watched() and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        remove_folder(folder)
        with suppress(OSError):  # Other versions may be there, or on their way: write_folder makes it again.
            folder.parent.rmdir()

    def read_release(self, endpoint: str, version: str) -> Release | None:
        """Return a release of the folder, None where it is not there. Raises EndpointFailed where it is damaged."""
        path = self.folder / endpoint / version / RELEASE_FILE
        try:
            return Release.model_validate_json(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValidationError as error:
            message = f"{path} must be a release that this package wrote, got {error}. Deploy the version again."
            raise EndpointFailed(message) from None

    def write_rollout(self, endpoint: str, manifests: bytes) -> None:
        """Put the manifests of an endpoint's rollout beside its releases; others than these are replaced at once."""
        folder, rendered = self.folder / endpoint / _CLUSTER_FOLDER, ReleaseFiles(files={ROLLOUT_FILE: manifests})
        if not _has_files(folder, rendered):
            write_folder(rendered, folder)

    def status(self, release: Release) -> Status | None:
        """Return what the controller wrote of a release, None where it wrote nothing yet."""
        return _read_status(self._release_folder(release))

    def _release_folder(self, release: Release) -> Path:
        return self.folder / release.endpoint / release.version

    def _wait_until_ready(self, folder: Path, release: Release) -> str:
        name = f"Version {release.version} of {release.endpoint}"
        removed = f"{name} must stay until it answers, but was removed meanwhile. Deploy it again if it is needed."
        try:
            ready_s_max = json.loads((folder / SERVE_FILE).read_bytes())["ready_s_max"]
        except FileNotFoundError:
            raise EndpointFailed(removed) from None
        deadline = time.monotonic() + ready_s_max + _MARGIN_S
        while time.monotonic() < deadline:
            if not (folder / SERVE_FILE).exists():
                raise EndpointFailed(removed)
            status = _read_status(folder)
            if status is not None and status.url is not None:
                return status.url
            if status is not None and status.state == "failed":
                message = f"{name} must come up, and is taken away again, got: {status.error}"
                raise EndpointFailed(message)
            self._check_watched()
            time.sleep(_POLL_S)
        message = f"{name} must be ready within {ready_s_max:g} s, and is taken away again. Raise ready_s_max."
        raise EndpointFailed(message)

    def _check_watched(self) -> None:
        if not self._is_watched():
            message = (
                f"A controller must watch {self.folder}, got none. Start one: "
                f"python -m infra.local.controller --folder {self.folder}"
            )
            raise EndpointFailed(message)

    def _is_watched(self) -> bool:
        """Whether a controller holds the lock of the folder."""
        try:
            with (self.folder / _LOCK_FILE).open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False


def _has_files(folder: Path, rendered: ReleaseFiles) -> bool:
    """Whether a release is there with exactly these files. The digest of the model's files is in release.json."""
    try:
        return all((folder / name).read_bytes() == content for name, content in rendered.files.items())
    except OSError:
        return False


def _has_ended(folder: Path) -> bool:
    status = _read_status(folder)
    return status is None or status.state == "ended"


def _read_status(folder: Path) -> Status | None:
    try:
        return Status.model_validate_json((folder / STATUS_FILE).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValidationError as error:
        message = (
            f"{folder / STATUS_FILE} must be a status that a controller wrote, got {error}. Look whether another "
            "program writes there."
        )
        raise EndpointFailed(message) from None


def write_folder(rendered: ReleaseFiles, folder: Path) -> None:
    """Put what a target rendered into a folder, which appears at once or not at all; an older one is replaced.

    Others may write into the same parent meanwhile, and remove it while it is empty. Raises EndpointFailed where the
    folder can't be written.
    """
    try:
        with _staging_folder(folder.parent) as staging:
            new = staging / "new"
            _write_files(rendered, new)
            _replace_folder(new, folder, staging)
    except OSError as error:
        message = f"A release must be written to {folder}, got: {error}. Free space or give access, then call again."
        raise EndpointFailed(message) from error


def remove_folder(folder: Path) -> None:
    """Remove a folder that may be gone already, or into which its controller still writes a last status."""
    for _ in range(_ATTEMPTS_MAX):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(_PAUSE_S)


@contextmanager
def _staging_folder(parent: Path) -> Generator[Path]:
    """Make a folder inside of a parent, which is made too and stays as long as this one is in it."""
    for attempt in range(_ATTEMPTS_MAX):
        try:
            parent.mkdir(parents=True, exist_ok=True)
            # The name begins with a dot, so that no half of a release is taken for one.
            staging = tempfile.TemporaryDirectory(prefix=".writing-", dir=parent)
            break
        except (FileNotFoundError, FileExistsError):
            # Another call that removed the last release in the parent may have removed the parent in between. mkdir
            # raises FileExistsError where the parent is removed between its two checks.
            if attempt == _ATTEMPTS_MAX - 1:
                raise
    with staging as path:
        yield Path(path)


def _replace_folder(new: Path, folder: Path, staging: Path) -> None:
    """Rename a new folder to its final name, and an older one of that name into `staging`."""
    while True:
        with suppress(FileNotFoundError):
            folder.rename(tempfile.mkdtemp(prefix="before-", dir=staging))
        try:
            new.rename(folder)
        except OSError as error:
            # Another call wrote one there meanwhile: the last one stays.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            return


def _write_files(rendered: ReleaseFiles, folder: Path) -> None:
    folder.mkdir(mode=0o755)
    for name, tree in rendered.trees.items():
        shutil.copytree(tree, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name, content in rendered.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
