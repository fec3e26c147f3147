"""Virtual environments for model servers that can't share one: made once from a requirements file, then kept.

They lie in the user's cache under the digest of their requirements, so that every checkout finds those that another
one has made, and requirements that change leave the environment of a running server alone. Needs pip, and what pip
needs: a registry, or files on disk that it is configured to find.
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
# How pip tells that a registry did not answer.
_UNREACHABLE = ("after connection broken by", "Max retries exceeded", "Temporary failure in name resolution")


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
    """An environment could not be made; what there is of it is not used, and the next call begins anew."""


class RegistryUnreachable(VenvFailed):
    """An environment could not be made since the registry that pip asks did not answer."""


def make_venv(requirements: Path, folder: Path | None = None) -> Path:
    """Return a virtual environment that holds what a requirements file pins, in `folder`, else in the user's cache.

    Its interpreter is bin/python in it, of the version that runs this. Atomic: an environment counts once its stamp,
    the digest of the requirements, is written last; of several callers one makes it and the others wait. In a
    `folder` of the caller's, other requirements replace what is there, and a server that runs out of it loses its
    files.

    Args:
        requirements: What to install, as pip takes it.
        folder: Where to make it; by default `venv_folder(requirements)`.

    Raises:
        RegistryUnreachable: pip could not reach its registry.
        VenvFailed: Anything else was wrong, with what pip says.
    """
    digest = _digest(requirements)
    venv = (folder or venv_folder(requirements)).absolute()
    if _stamp(venv) == digest:
        return venv
    venv.mkdir(parents=True, exist_ok=True)
    # The folder itself is the lock, so that it is emptied and never removed.
    with _alone(venv):
        if _stamp(venv) != digest:
            # The pip of this interpreter installs there; one in each environment would take seconds more.
            _run(requirements, "-m", "venv", "--clear", "--without-pip", str(venv))
            pip = ("-m", "pip", "--python", str(venv / "bin/python"), "--disable-pip-version-check", "--no-input")
            _run(requirements, *pip, "install", "--quiet", "-r", str(requirements.absolute()))
            _run(requirements, *pip, "check")
            (venv / _STAMP).write_text(digest)
    return venv


def venv_folder(requirements: Path) -> Path:
    """Return where the environment of a requirements file lies by default: by its name and digest in the cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "overnight" / "venvs" / f"{requirements.stem}-{_digest(requirements)[:_DIGEST_LENGTH]}"


def _digest(requirements: Path) -> str:
    """Return what tells an environment from others: what it installs, and the interpreter that it links to."""
    interpreter = f"{platform.machine()} {sys.version_info[:2]} {sys.base_prefix}\0"
    return hashlib.sha256(interpreter.encode() + _read(requirements)).hexdigest()


def _read(requirements: Path) -> bytes:
    try:
        return requirements.read_bytes()
    except OSError as error:
        message = f"An environment is made from a requirements file, got {requirements}: {error.strerror}. Name one."
        raise VenvFailed(message) from None


def _stamp(venv: Path) -> str | None:
    try:
        return (venv / _STAMP).read_text()
    except OSError:
        return None


@contextmanager
def _alone(folder: Path) -> Generator[None]:
    """Hold a lock on a folder, which the system lets go of when its holder dies and which leaves no file."""
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


def _run(requirements: Path, *arguments: str) -> None:
    # With PYTHONPATH pip would take the packages there for installed ones.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = (sys.executable, *arguments)
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        output = done.stdout + done.stderr
        told = "\n".join(output.strip().splitlines()[-_LINES_SHOWN:]) or "nothing"
        message = (
            f"What {requirements} pins must install for Python {sys.version_info[0]}.{sys.version_info[1]}, but "
            f"`{' '.join(command)}` ended with exit code {done.returncode}. Mend what it says, then call again:\n{told}"
        )
        unreachable = any(phrase in output for phrase in _UNREACHABLE)
        raise (RegistryUnreachable if unreachable else VenvFailed)(message)


if __name__ == "__main__":
    main()
