"""Calls of uv, which makes Python environments, and what to do where one fails."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from packaging.version import Version
from pydantic import Field, model_validator

from serving.errors import BadInput, EnvironmentUnusable, ModelUnfit
from serving.extras import import_extra
from serving.model.contract import Frozen
from serving.option_words import give_option

_REASON_LINES, _REASON_CHARACTERS = 3, 600
_UNREACHABLE = re.compile(r"Failed to fetch|error sending request|Request failed after|dns error|could not be queried")
_NO_SPACE = re.compile(r"No space left|Permission denied|Read-only file system|quota exceeded|Operation not permitted")
_TOO_OLD = re.compile(r"3\.[0-5](\D|$)")
# How older versions of uv draw the causes of an error.
_DECORATION = str.maketrans("", "", "\u00d7\u2502\u2570\u2500\u25b6\u251c")
_STATEMENT = re.compile(r"\s*(error|cause|warning|hint):")
_SAYS_NOTHING = re.compile("error: No solution found")
# What would have uv look at another environment, interpreter or index than the one that it is told.
_SETTINGS_LEFT_OUT = {"CONDA_PREFIX", "VIRTUAL_ENV", "UV_PROJECT", "UV_PYTHON", "UV_SYSTEM_PYTHON", "UV_WORKING_DIR"}
_SETTINGS_OF_INDEXES = {"UV_DEFAULT_INDEX", "UV_EXTRA_INDEX_URL", "UV_INDEX", "UV_INDEX_URL", "UV_NO_INDEX"}


class PackageSource(Frozen):
    """Where the packages of a model's environment come from; by default, where uv's own settings say."""

    index: str | None = Field(
        default=None, repr=False, description="URL of the index of packages, in place of those that uv's settings name."
    )
    wheels: Path | None = Field(default=None, description="A folder of wheels, whose packages are taken too.")
    offline: bool = Field(
        default=False, description="Ask no network: packages are those in `wheels`, without it those in uv's cache."
    )
    download_python: bool = Field(
        default=False, description="Whether uv may download a version of Python that is not installed."
    )

    @model_validator(mode="after")
    def _check_offline(self) -> Self:
        if self.offline and (self.index is not None or self.download_python):
            message = "offline=True asks no network, so it goes with neither index nor download_python. Leave one out."
            raise ValueError(message)
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class _Done:
    """How a program ended: its exit code and what it wrote."""

    code: int
    output: str
    errors: str


class Uv:
    """The program uv, on packages of one source and for a bounded time."""

    def __init__(self, packages: PackageSource, folder: Path, *, deadline: float) -> None:
        """Find uv.

        Args:
            packages: Where packages come from.
            folder: Where it runs; the project that the caller is in has no say in a model's environment.
            deadline: When all must be done, by `time.monotonic()`.

        Raises EnvironmentUnusable where there is no uv.
        """
        self._program = _find_uv()
        self._packages = packages
        self._folder = folder
        self._deadline = deadline
        self._settings = _make_settings(os.environ, packages.index)

    def make_venv(self, place: Path, python: str) -> None:
        """Make an environment without packages, with a version of Python or another patch of it.

        Raises EnvironmentUnusable where no such version is installed and none may be downloaded, or the folder takes
        none.
        """
        found = self._find_python(python)
        if found is None and not self._packages.download_python:
            raise self._refuse_python(python)
        downloads = [] if self._packages.download_python else ["--no-python-downloads"]
        done = self._run(
            "venv", "--quiet", "--no-project", "--relocatable", "--python", found or python, *downloads, str(place)
        )
        if done.code:
            raise _explain_failure(done.errors, f"a Python environment with Python {python}", self._folder)

    def install(self, interpreter: Path, requirements: Path, constraints: Path, *, use_cache: bool = True) -> None:
        """Install what a file names, within the bounds of another; without uv's cache all that is there is replaced.

        Raises ModelUnfit where it can't be installed, EnvironmentUnusable where the index or the folder fails.
        """
        where = ("--python", str(interpreter), "-r", str(requirements), "-c", str(constraints))
        cache = () if use_cache else ("--no-cache", "--reinstall")
        done = self._run("pip", "install", "--quiet", *where, *cache, *_list_options(self._packages))
        if done.code:
            raise _explain_failure(done.errors, "the packages that a model was logged with", self._folder)

    def import_modules(self, interpreter: Path, modules: Sequence[str]) -> None:
        """Import modules in an environment once, which also compiles them. Raises ModelUnfit where one fails."""
        if not modules:
            return
        done = self._call(str(interpreter), "-I", "-c", f"import {', '.join(modules)}")
        if done.code:
            message = (
                f"In the environment of a model {' and '.join(modules)} must import, got:\n"
                f"{_shorten_reason(done.errors.strip().splitlines()[-1:])}\nLog the model again with pip_requirements "
                "whose versions fit each other."
            )
            raise ModelUnfit(message)

    def _find_python(self, python: str) -> str | None:
        """Return an installed interpreter of a version, or of another patch of it."""
        for asked in dict.fromkeys((python, _cut_patch(python))):
            done = self._run("python", "find", "--system", "--no-python-downloads", asked)
            if not done.code:
                return done.output.strip()
        return None

    def _refuse_python(self, python: str) -> EnvironmentUnusable:
        done = self._run("python", "list", "--only-installed", "--output-format", "json")
        found = {each["version"] for each in json.loads(done.output)} if not done.code else set()
        here = ", ".join(sorted(found, key=Version)) or "none"
        allow = give_option("packages", {"download_python": True})
        return EnvironmentUnusable(
            f"The model was logged with Python {python}, and an interpreter of Python {_cut_patch(python)} must be "
            f"installed to run it, got these: {here}. Install one (apt, pyenv, or `uv python install "
            f"{_cut_patch(python)}`), or let uv download it: {allow}."
        )

    def _run(self, *arguments: str) -> _Done:
        return self._call(self._program, *arguments, "--no-progress")

    def _call(self, *command: str) -> _Done:
        """Run a program to its end, or end it and all that it started when the time is over."""
        # Its own session: what it starts ends with it.
        with subprocess.Popen(  # noqa: S603 - uv, or the interpreter that it made, with arguments of ours
            command,
            cwd=self._folder,
            env=self._settings,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as child:
            try:
                output, errors = child.communicate(timeout=max(0.0, self._deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                message = (
                    f"The environment of a model must be made in the time allowed for it, got none when it was over: "
                    f"`{' '.join(Path(word).name for word in command[:3])}` was still running. Call again, which goes "
                    "on with the packages that uv has in its cache, or name a source of packages that is nearer."
                )
                raise EnvironmentUnusable(message) from None
            finally:
                if child.poll() is None:
                    os.killpg(child.pid, signal.SIGKILL)
        return _Done(code=child.returncode, output=output, errors=errors)


def _find_uv() -> str:
    """Return the program uv: that of the extra, else one on the PATH."""
    try:
        return str(import_extra("uv", "environments").find_uv_bin())
    except (BadInput, FileNotFoundError):
        found = shutil.which("uv")
    if found is None:
        message = (
            "The environment of a model is made by the program uv, got none. Run: pip install "
            "'overnight[environments]', or put uv on the PATH."
        )
        raise EnvironmentUnusable(message)
    return found


def _make_settings(environment: Mapping[str, str], index: str | None) -> dict[str, str]:
    """Return the environment variables that uv gets; an index is among them, since other users see a command line."""
    left_out = _SETTINGS_LEFT_OUT | (_SETTINGS_OF_INDEXES if index is not None else set())
    kept = {
        name: value for name, value in environment.items() if name not in left_out and not name.startswith("PYTHON")
    }
    named = {} if index is None else {"UV_DEFAULT_INDEX": index}
    return kept | named | {"NO_COLOR": "1", "PATH": _list_folders_of_python(environment)}


def _list_folders_of_python(environment: Mapping[str, str]) -> str:
    """Return a PATH with the interpreter that runs this and those of pyenv, whose shims fail for most versions."""
    root = Path(environment.get("PYENV_ROOT") or Path.home() / ".pyenv")
    folders = [each for each in environment.get("PATH", "").split(os.pathsep) if each and Path(each) != root / "shims"]
    # uv ends with an error where it meets a version before 3.6.
    installed = [str(each / "bin") for each in sorted(root.glob("versions/3.*")) if not _TOO_OLD.match(each.name)]
    return os.pathsep.join([*folders, str(Path(sys.base_prefix) / "bin"), *installed])


def _list_options(packages: PackageSource) -> list[str]:
    """Return the options by which uv takes packages from a source, without an index, which may hold a password."""
    wheels = [] if packages.wheels is None else ["--find-links", str(packages.wheels.expanduser().resolve())]
    offline = ["--offline"] if packages.offline else []
    return [*wheels, *offline, *(["--no-index"] if packages.offline and wheels else [])]


def _cut_patch(python: str) -> str:
    return ".".join(str(each) for each in Version(python).release[:2])


def _explain_failure(errors: str, what: str, folder: Path) -> BadInput:
    """Return what is to be done about a failure of uv."""
    reason = _shorten_reason(_split_statements(errors))
    if _NO_SPACE.search(errors):
        return EnvironmentUnusable(
            f"{folder} and uv's cache must take {what}, got:\n{reason}\nFree space or allow it there, or name other "
            "folders by the environment variables OVERNIGHT_ENVIRONMENTS and UV_CACHE_DIR."
        )
    if _UNREACHABLE.search(errors):
        return EnvironmentUnusable(
            f"The index must answer to install {what}, got:\n{reason}\nStart it or check its address, or take another "
            f"source: {give_option('packages', {'wheels': 'FOLDER', 'offline': True})}."
        )
    return ModelUnfit(
        f"It must be possible to install {what}, got:\n{reason}\nName an index or a folder of wheels that has them: "
        f"{give_option('packages', {'index': 'https://...'})}. Where no index has them, log the model again."
    )


def _split_statements(errors: str) -> list[str]:
    """Return the error, each of its causes and hints as uv wrote them, without warnings."""
    statements: list[str] = []
    for line in errors.translate(_DECORATION).splitlines():
        if _STATEMENT.match(line) or not statements:
            statements.append("")
        statements[-1] = f"{statements[-1]} {line.strip()}".strip()
    told = [each for each in statements if each and not each.startswith("warning:")]
    return told[1:] if len(told) > 1 and _SAYS_NOTHING.match(told[0]) else told


def _shorten_reason(statements: Sequence[str]) -> str:
    """Return what a program said in at most three lines: of more statements the first and the last two."""
    chosen = [*statements[:1], *statements[1:][1 - _REASON_LINES :]] or ["nothing"]
    characters = _REASON_CHARACTERS // len(chosen)
    return "\n".join(f"  {_cut_middle(' '.join(each.split()), characters)}" for each in chosen)


def _cut_middle(text: str, characters: int) -> str:
    """Return a text without its middle where it is long: paths stand there, and the reason at its end."""
    return text if len(text) <= characters else f"{text[: characters // 2]} ... {text[-characters // 2 :]}"
