"""Virtual environments for model servers that can't share one: made once from a requirements file, then kept.

Each is the only one of its name; a requirements file with other contents makes it anew. Needs pip, and
what pip needs: a registry, or files on disk that it is configured to find.
"""

import argparse
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

_PROJECT = Path(__file__).parents[2]
_STAMP = ".complete"
_LINES_SHOWN = 12


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


def make_venv(requirements: Path, folder: Path | None = None) -> Path:
    """Return a virtual environment that holds what a requirements file pins, in `folder`, else in `venv_folder`.

    Its interpreter is bin/python in it, of the version that runs this. Atomic: an environment counts once its stamp,
    the digest of the requirements, is written last; of several callers one makes it and the others wait. A server
    that runs out of an environment whose requirements change loses its files. Raises VenvFailed with what pip says.
    """
    wanted = _read(requirements)
    venv = (folder or venv_folder(requirements.stem)).absolute()
    digest = hashlib.sha256(f"{sys.version_info[:2]} ".encode() + wanted).hexdigest()
    if _stamp(venv) == digest:
        return venv
    venv.parent.mkdir(parents=True, exist_ok=True)
    with _alone(venv.parent):
        if _stamp(venv) != digest:
            shutil.rmtree(venv, ignore_errors=True)
            # The pip of this interpreter installs there; one in each environment would take seconds more.
            _run(requirements, "-m", "venv", "--without-pip", str(venv))
            pip = ("-m", "pip", "--python", str(venv / "bin/python"), "--disable-pip-version-check", "--no-input")
            _run(requirements, *pip, "install", "--quiet", "-r", str(requirements.absolute()))
            _run(requirements, *pip, "check")
            (venv / _STAMP).write_text(digest)
    return venv


def venv_folder(name: str) -> Path:
    """Return where an environment lies by default: `.venv-NAME` in a checkout, else in the user's cache."""
    if (_PROJECT / "pyproject.toml").is_file():
        return _PROJECT / f".venv-{name}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "overnight" / "venvs" / name


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
        told = "\n".join((done.stdout + done.stderr).strip().splitlines()[-_LINES_SHOWN:]) or "nothing"
        message = (
            f"What {requirements} pins must install for Python {sys.version_info[0]}.{sys.version_info[1]}, but "
            f"`{' '.join(command)}` ended with exit code {done.returncode}. Mend what it says, then call again:\n{told}"
        )
        raise VenvFailed(message)


if __name__ == "__main__":
    main()
