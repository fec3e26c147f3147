"""Python environments of models: made by uv from what MLflow stored with a model, once, then kept and shared by runs.

An environment is a folder under `~/.cache/overnight/environments`, or under $OVERNIGHT_ENVIRONMENTS, named by a digest
of all that it is made from. It is made beside its place and moved there when it is complete, so that no reader sees
half of one. Of several processes one makes it, and the others wait. `environment_use` keeps what uses which.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from filelock import FileLock, Timeout
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

from serving.errors import EnvironmentUnusable, ModelUnfit, list_shortly, shorten_error
from serving.model.environment_use import MARKER, NAME_LENGTH, UNFINISHED, hold_environment
from serving.model.requirements import ModelEnvironment
from serving.model.uv import PackageSource, Uv
from serving.option_words import give_option

_log = logging.getLogger(__name__)

# What reads tables and models in the environment, beside what the model asks for. Without pandas MLflow's pyfunc does
# not import, and mlflow-skinny does not bring it. pyarrow 26 needs NumPy 2 and does not say so in its metadata, while
# many models were logged with NumPy 1.
EXTRA_REQUIREMENTS = ("pyarrow<26", "mlflow-skinny<4", "pandas<4")
_BRING_MLFLOW = {"mlflow", "mlflow-skinny"}
_MODULES = {"mlflow-skinny": "mlflow.pyfunc"}
_FORMAT_VERSION = 1
_START_S_MAX = 60.0
_LINES_SHOWN = 5


def make_environment(
    environment: ModelEnvironment,
    *,
    packages: PackageSource,
    folder: Path | None = None,
    extra_requirements: Sequence[str] = EXTRA_REQUIREMENTS,
    timeout_s: float = 1800.0,
    model: str | None = None,
) -> Path:
    """Return the interpreter of a Python environment with what a model was logged with.

    It is made where there is none, or where files of it are lost. Atomic, idempotent, and safe for several processes.
    An exact version of Python is preferred, and another patch of the same minor version is taken where it is missing.
    Until this process ends the environment counts as in use, and `remove_environments` leaves it.

    Args:
        environment: What the model asks for.
        packages: Where packages come from. An environment is made once for each index and each folder of wheels; the
            password of an index does not count, and neither do uv's own settings.
        folder: Where environments are kept; by default `find_environments()`.
        extra_requirements: Packages to install where the model does not name them; each must import by its name.
        timeout_s: How long it may take, in seconds, waiting for another process included.
        model: The model and its digest, by which the list of environments says what each is for.

    Raises:
        ModelUnfit: What the model asks for can't be installed, or not with the extra packages.
        EnvironmentUnusable: uv, a version of Python, the index, the folder or the time is missing.
    """
    _refuse_unfit(environment, packages)
    deadline = time.monotonic() + timeout_s
    folder = (folder or find_environments()).expanduser().absolute()
    contents = _describe_contents(environment, packages, extra_requirements)
    digest = hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()
    place = folder / digest[:NAME_LENGTH]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        hold_environment(place, model)
        if place.exists() and _find_damage(place, digest) is None:
            return place / "bin/python"
        with FileLock(folder / f".{place.name}.lock", timeout=timeout_s):
            if not _is_kept(place, digest):
                _refuse_missing_wheels(packages)
                uv = Uv(packages, folder, deadline=deadline)
                _replace_environment(uv, place, contents | {"digest": digest}, environment.wheels, extra_requirements)
    except Timeout:
        message = (
            f"Another process must finish {place} within {timeout_s:g} s, got none finished. Call again when it is, "
            "or end that process."
        )
        raise EnvironmentUnusable(message) from None
    except OSError as error:
        message = (
            f"Environments of models must be writable in {folder}, got {type(error).__name__}: "
            f"{shorten_error(error)}. Free space or allow it, or name another folder by the environment variable "
            "OVERNIGHT_ENVIRONMENTS."
        )
        raise EnvironmentUnusable(message) from error
    return place / "bin/python"


def find_environments() -> Path:
    """Return the folder where environments of models are kept by default."""
    if named := os.environ.get("OVERNIGHT_ENVIRONMENTS"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "overnight" / "environments"


def _refuse_unfit(environment: ModelEnvironment, packages: PackageSource) -> None:
    if environment.refused:
        message = (
            "The environment of a model must be made of packages by name and of wheels in its folder, got:\n"
            f"{list_shortly(environment.refused, _LINES_SHOWN)}\nLog the model again with pip_requirements of packages "
            "that an index or a folder of wheels has, or run it in an environment of yours."
        )
        raise ModelUnfit(message)
    if environment.sources and packages.index is None and packages.wheels is None:
        message = (
            "Where packages come from must be said by the caller, not by the model, got a model with:\n"
            f"{list_shortly(environment.sources, _LINES_SHOWN)}\nName the index or folder that you trust: "
            f"{give_option('packages', {'index': 'https://...'})}."
        )
        raise ModelUnfit(message)


def _refuse_missing_wheels(packages: PackageSource) -> None:
    if packages.wheels is not None and not packages.wheels.expanduser().is_dir():
        message = f"Wheels must be in a folder, got {packages.wheels}, which is none. Correct its path."
        raise EnvironmentUnusable(message)


def _describe_contents(
    environment: ModelEnvironment, packages: PackageSource, extra_requirements: Sequence[str]
) -> dict[str, Any]:
    """Return what an environment is made from, as its digest covers it: in one order, and without passwords."""
    return {
        "format_version": _FORMAT_VERSION,
        "python": environment.python or platform.python_version(),
        "platform": " ".join([sysconfig.get_platform(), *platform.libc_ver()]).strip(),
        "requirements": [*_normalize_lines(environment.requirements), *_choose_extra(environment, extra_requirements)],
        "constraints": _normalize_lines(environment.constraints),
        "wheels": sorted([path.name, _digest_file(path)] for path in environment.wheels),
        "index": _hide_login(packages.index),
        "folder_of_wheels": None if packages.wheels is None else str(packages.wheels.expanduser().resolve()),
    }


def _normalize_lines(lines: Sequence[str]) -> list[str]:
    parted = (line.partition(" --hash") for line in lines)
    return sorted({f"{_normalize(asked)}{separator}{hashes}" for asked, separator, hashes in parted})


def _normalize(line: str) -> str:
    asked = Requirement(line)
    asked.name = canonicalize_name(asked.name)
    return str(asked)


def _choose_extra(environment: ModelEnvironment, extra_requirements: Sequence[str]) -> list[str]:
    """Return the extra packages that a model does not name, or names for some machines only."""
    asked = (Requirement(line.partition(" --hash")[0]) for line in environment.requirements)
    named: set[str] = {canonicalize_name(each.name) for each in asked if each.marker is None}
    named |= {parse_wheel_filename(path.name)[0] for path in environment.wheels}
    if named & _BRING_MLFLOW:
        named |= _BRING_MLFLOW
    return [line for line in extra_requirements if canonicalize_name(Requirement(line).name) not in named]


def _digest_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hide_login(index: str | None) -> str | None:
    """Return the address of an index without user, password and query: a new password makes no new environment."""
    if index is None:
        return None
    parts = urlsplit(index)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def _is_kept(place: Path, digest: str) -> bool:
    """Return whether a complete environment is at its place, and log why one that is there does not count."""
    if not place.exists():
        return False
    damage = _find_damage(place, digest)
    if damage is not None:
        _log.warning("The environment %s is damaged and is made again: %s.", place, damage)
    return damage is None


def _find_damage(place: Path, digest: str) -> str | None:
    """Return what is wrong with an environment, None where it is complete: marker, files and interpreter are looked at.

    Files are those of each package's own list, by their sizes: caches are cleaned file by file, and a disk that was
    full leaves empty ones.
    """
    try:
        marker = json.loads((place / MARKER).read_text())
        if marker["digest"] != digest:
            return f"{MARKER} has another digest"
        lost = sorted(set(marker["packages"]) - set(_list_packages(place)))
        differing = set(marker["differing"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MARKER} can't be read"
    if lost:
        return f"{lost[0]} is lost"
    if (missing := next((each for each in _iter_lost_files(place) if each not in differing), None)) is not None:
        return f"{missing} is lost or of another size"
    try:
        done = subprocess.run(  # noqa: S603 - the interpreter that was made here, on a program of ours
            [place / "bin/python", "-I", "-S", "-c", "pass"], capture_output=True, check=False, timeout=_START_S_MAX
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"its interpreter does not start ({type(error).__name__})"
    return None if done.returncode == 0 else f"its interpreter ends with exit code {done.returncode}"


def _list_packages(place: Path) -> list[str]:
    """Return the folders that describe the packages of an environment, such as numpy-2.4.0.dist-info."""
    return sorted(path.name for path in place.glob("lib/python*/site-packages/*.dist-info"))


def _iter_lost_files(place: Path) -> Iterator[str]:
    """Yield each file that is not there, or not of the size, that its package's list says."""
    for record in place.glob("lib/python*/site-packages/*.dist-info/RECORD"):
        packages = record.parents[1]
        with record.open(newline="") as file:
            for name, *_, size in (row for row in csv.reader(file) if len(row) > 1):
                if name.endswith(".dist-info/RECORD"):
                    continue
                try:
                    found = os.stat(f"{packages}/{name}").st_size  # noqa: PTH116 - a path for each file takes longer
                except OSError:
                    found = -1
                if found < 0 or (size.isdigit() and int(size) != found):
                    yield name


def _replace_environment(
    uv: Uv,
    place: Path,
    contents: dict[str, Any],
    wheels: Sequence[Path],
    extra_requirements: Sequence[str],
) -> None:
    """Make an environment beside its place and move it there; the caller holds its lock."""
    prefix = f"{UNFINISHED}{place.name}-"
    for left in place.parent.glob(f"{prefix}*"):
        # Of a process that was killed: the lock is ours.
        shutil.rmtree(left, ignore_errors=True)
    started = time.monotonic()
    _log.info("Making the environment %s with Python %s.", place, contents["python"])
    beside = Path(tempfile.mkdtemp(prefix=prefix, dir=place.parent))
    try:
        made = beside / "new"
        _install(uv, made, contents, wheels)
        uv.import_modules(made / "bin/python", [_name_module(line) for line in extra_requirements])
        # Two packages may have a file of one name, and a list may name files that its wheel lacks.
        marker = contents | {"packages": _list_packages(made), "differing": sorted(set(_iter_lost_files(made)))}
        (made / MARKER).write_text(json.dumps(marker, indent=2))
        if place.exists():
            place.rename(beside / "damaged")
        made.rename(place)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    _log.info("The environment %s is complete after %.1f s.", place, time.monotonic() - started)


def _install(uv: Uv, made: Path, contents: dict[str, Any], wheels: Sequence[Path]) -> None:
    uv.make_venv(made, contents["python"])
    requirements, constraints = made / "requirements.txt", made / "constraints.txt"
    local = (f"{parse_wheel_filename(path.name)[0]} @ {path.as_uri()}" for path in wheels)
    requirements.write_text("".join(f"{line}\n" for line in (*contents["requirements"], *local)))
    constraints.write_text("".join(f"{line}\n" for line in contents["constraints"]))
    uv.install(made / "bin/python", requirements, constraints)
    if (lost := next(_iter_lost_files(made), None)) is not None:
        # Files of an environment are those of the cache, by hard links: what wrote into one wrote into the other.
        _log.warning("%s differs from its package's list: all is installed again without uv's cache.", lost)
        uv.install(made / "bin/python", requirements, constraints, use_cache=False)


def _name_module(requirement: str) -> str:
    name = canonicalize_name(Requirement(requirement).name)
    return _MODULES.get(name, name.replace("-", "_"))
