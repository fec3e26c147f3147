"""Virtual environments for model servers that cannot share one: created once from a requirements file, then kept.

They are in the user's cache under the digest of their requirements. Every checkout finds those that another one has
created, and changed requirements do not touch the environment of a running server. Needs pip, and a registry or files
on disk that pip is configured to use.
"""

import argparse
import fcntl
import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

_STAMP = ".complete"
_DIGEST_LENGTH = 12
_LINES_SHOWN = 12
# How pip reports that a registry did not answer, and how uv does.
_UNREACHABLE = (
    *("after connection broken by", "Max retries exceeded", "Temporary failure in name resolution"),
    *("Failed to fetch", "error sending request"),
)
# Settings of pip that uv knows by other names.
_SETTINGS = {"PIP_FIND_LINKS": "UV_FIND_LINKS", "PIP_INDEX_URL": "UV_DEFAULT_INDEX"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the environment of a requirements file, and print its interpreter."""
    parser = argparse.ArgumentParser(prog="python -m infra.local.venv", description=__doc__)
    parser.add_argument("requirements", type=Path, help="what to install, such as infra/local/kserve.txt")
    try:
        venv = make_venv(parser.parse_args(arguments).requirements)
    except VenvFailed as failure:
        sys.exit(str(failure))
    sys.stdout.write(f"{venv / 'bin/python'}\n")


class VenvFailed(RuntimeError):
    """An environment could not be created; the next call starts again."""


class RegistryUnreachable(VenvFailed):
    """An environment could not be created since the registry of pip did not answer."""


def make_venv(requirements: Path, folder: Path | None = None, *, uv: str | None = None) -> Path:
    """Return a virtual environment that holds what a requirements file pins, in `folder`, else in the user's cache.

    Its interpreter is bin/python in it, of the version that runs this. Atomic: an environment counts once its stamp,
    the digest of the requirements, is written last; of several callers one makes it and the others wait. In a
    `folder` of the caller's, other requirements replace what is there, and a server that runs out of it loses its
    files.

    Args:
        requirements: What to install, as pip takes it.
        folder: Where to make it; by default `venv_folder(requirements)`.
        uv: The program uv, to install with it in a tenth of the time; by default pip installs.

    Raises:
        RegistryUnreachable: The registry could not be reached.
        VenvFailed: Anything else failed; the message has the output of pip or uv.
    """
    digest = _digest_requirements(requirements)
    venv = (folder or venv_folder(requirements)).absolute()
    if _read_stamp(venv) == digest:
        return venv
    venv.mkdir(parents=True, exist_ok=True)
    # The folder itself is the lock, so it is emptied and never removed.
    with _lock_folder(venv):
        if _read_stamp(venv) != digest:
            # The pip of this interpreter installs there; one in each environment takes seconds more.
            python, listed = str(venv / "bin/python"), str(requirements.absolute())
            _run(requirements, sys.executable, "-m", "venv", "--clear", "--without-pip", str(venv))
            if uv is not None:
                _run(requirements, uv, "pip", "install", "--quiet", "--python", python, "-r", listed)
                _run(requirements, uv, "pip", "check", "--python", python)
            else:
                pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", "--no-input")
                # Most modules are never imported: those that are get compiled then.
                _run(requirements, *pip, "install", "--no-compile", "--quiet", "-r", listed)
                _run(requirements, *pip, "check")
            (venv / _STAMP).write_text(digest)
    return venv


def venv_folder(requirements: Path) -> Path:
    """Return where the environment of a requirements file lies by default: by its name and digest in the cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "overnight" / "venvs" / f"{requirements.stem}-{_digest_requirements(requirements)[:_DIGEST_LENGTH]}"


def _digest_requirements(requirements: Path) -> str:
    """Return what identifies an environment: what it installs, and the interpreter that it links to."""
    interpreter = f"{platform.machine()} {sys.version_info[:2]} {sys.base_prefix}\0"
    try:
        content = requirements.read_bytes()
    except OSError as error:
        message = f"An environment is made from a requirements file, got {requirements}: {error.strerror}. Name one."
        raise VenvFailed(message) from None
    return hashlib.sha256(interpreter.encode() + content).hexdigest()


def _read_stamp(venv: Path) -> str | None:
    try:
        return (venv / _STAMP).read_text()
    except OSError:
        return None


@contextmanager
def _lock_folder(folder: Path) -> Generator[None]:
    """Hold a lock on a folder, which the system releases when its holder dies and which leaves no file."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _run(requirements: Path, *command: str) -> None:
    # With PYTHONPATH pip takes the packages there for installed ones.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment = {_SETTINGS[name]: value for name, value in os.environ.items() if name in _SETTINGS} | environment
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        output = done.stdout + done.stderr
        tail = "\n".join(output.strip().splitlines()[-_LINES_SHOWN:]) or "nothing"
        message = (
            f"What {requirements} pins must install for Python {sys.version_info[0]}.{sys.version_info[1]}, but "
            f"`{' '.join(command)}` ended with exit code {done.returncode}. Fix the cause, then call again:\n{tail}"
        )
        unreachable = any(phrase in output for phrase in _UNREACHABLE)
        raise (RegistryUnreachable if unreachable else VenvFailed)(message)


if __name__ == "__main__":
    main()
