"""The Python environment that a model was logged in, as MLflow stored it, and what of it this interpreter lacks.

MLflow writes python_env.yaml (the version of Python, and `-r requirements.txt`), requirements.txt and conda.yaml beside
each model. Packages by name are taken, wheels that lie in the model's folder, and further files of it by `-r` and `-c`.
Everything else is refused with a reason. A URL or a repository may give other files tomorrow, and a path or an index
may exist only on the machine where the model was logged.
"""

from __future__ import annotations

import platform
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import Any

import yaml
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import InvalidVersion, Version
from pydantic import Field

from serving.model.contract import Frozen
from serving.redaction import hide_secrets

PYTHON = "python"
_PYTHON_ENV, _REQUIREMENTS, _CONDA, _MLMODEL = "python_env.yaml", "requirements.txt", "conda.yaml", "MLmodel"
# Any version of MLflow reads the models of others.
_ANY_VERSION = {"mlflow", "mlflow-skinny"}
_COMMENT = re.compile(r"(^|\s)#.*$")
_NESTED = re.compile(r"(-r|--requirement|-c|--constraint)[\s=]*(?P<name>\S.*)")
_CONSTRAINT = ("-c", "--constraint")
_SOURCE = re.compile(r"(-i|--index-url|--extra-index-url|-f|--find-links|--no-index|--trusted-host)(?![\w-])")
_HASH = re.compile(r"\s+--hash[=\s]\s*(?P<hash>\w+:[0-9a-fA-F]+)")
_REMOTE = re.compile(r"(\w+\+)?\w+://|\w+\+\w+:|[\w.-]+@[\w.-]+:")
_CONDA_PYTHON = re.compile(r"python\s*[=<>]=?\s*(?P<version>\d[\d.]*)")
_SKOPS_FILE = "serialization_format: skops"
# What takes a second or two to import, by the names of packages. None of them starts threads of its own then.
_LIBRARIES = {
    "catboost": "catboost",
    "lightgbm": "lightgbm",
    "scikit-learn": "sklearn.ensemble",
    "skops": "skops.io",
    "statsmodels": "statsmodels.api",
    "xgboost": "xgboost",
    "xgboost-cpu": "xgboost",
}
_CONDA_TOOLS = re.compile(r"(python|pip|setuptools|wheel)(?![\w.-])")


class ModelEnvironment(Frozen):
    """The Python environment that a model was logged in, as its files have it; secrets in them are hidden."""

    python: str | None = Field(default=None, description="The version of Python; null where no file names one.")
    requirements: tuple[str, ...] = Field(default=(), description="Packages by name, as pip takes them.")
    constraints: tuple[str, ...] = Field(default=(), description="Versions of packages, where something asks for them.")
    wheels: tuple[Path, ...] = Field(default=(), description="Wheels in the model's folder, by their full paths.")
    sources: tuple[str, ...] = Field(default=(), description="Options that say where packages come from; never used.")
    refused: tuple[str, ...] = Field(default=(), description="What can't be installed, each with its place and reason.")


class RequirementCheck(Frozen):
    """One package that a model asks for, or the version of Python, beside what is installed here."""

    name: str
    wanted: str = Field(description="As the model's requirements have it.")
    installed: str | None = Field(description="The version here, null where there is none.")
    fits: bool = Field(description="Whether the version here is one that is wanted.")


def list_unmet(environment: ModelEnvironment) -> list[RequirementCheck]:
    """Return what this interpreter does not meet: its version, where major or minor differ, and packages by name.

    Wheels of the model count by their name and version. What a package needs in turn, its extras included, does not
    count.
    """
    unmet = [each for each in check_requirements(environment) if not each.fits]
    if environment.python is None or Version(environment.python).release[:2] == sys.version_info[:2]:
        return unmet
    wanted, here = environment.python, platform.python_version()
    return [RequirementCheck(name=PYTHON, wanted=wanted, installed=here, fits=False), *unmet]


def check_requirements(environment: ModelEnvironment) -> list[RequirementCheck]:
    """Return each package that a model asks for on this machine, beside what is installed.

    MLflow itself counts only where it is missing: any of its versions reads the models of others. A constraint counts
    only where its package is here.
    """
    named = (parse_wheel_filename(path.name) for path in environment.wheels)
    wheels = [f"{name}=={release}" for name, release, _, _ in named]
    asked = [check for line in (*environment.requirements, *wheels) if (check := _check_line(line)) is not None]
    bounds = [check for line in environment.constraints if (check := _check_line(line)) is not None]
    return [*asked, *(each for each in bounds if each.installed is not None and not each.fits)]


def list_libraries(folder: Path) -> list[str]:
    """Return the modules of well-known libraries that the model in a folder needs, to be imported before it is loaded.

    They are those that it asks for by name, and skops where its file is one of skops, which asks for nothing.
    """
    lines = read_model_environment(folder).requirements
    names: set[str] = {canonicalize_name(Requirement(_HASH.sub("", line)).name) for line in lines}
    with suppress(OSError, UnicodeDecodeError):
        names |= {"skops"} if _SKOPS_FILE in (folder / _MLMODEL).read_text() else set()
    return sorted({module for name, module in _LIBRARIES.items() if name in names})


def make_install_command(requirements: Sequence[RequirementCheck]) -> str | None:
    """Return the pip command that installs what is missing here or differs, None where no package does."""
    wanted = [each.wanted for each in requirements if not each.fits and each.name != PYTHON]
    return f"pip install {shlex.join(wanted)}" if wanted else None


def _check_line(line: str) -> RequirementCheck | None:
    """Return what a line asks for beside what is here, None where its marker excludes this machine."""
    wanted = _HASH.sub("", line)
    asked = Requirement(wanted)
    if asked.marker is not None and not asked.marker.evaluate():
        return None
    found = _find_version(asked.name)
    is_any = canonicalize_name(asked.name) in _ANY_VERSION
    fits = found is not None and (is_any or asked.specifier.contains(found, prereleases=True))
    return RequirementCheck(name=asked.name, wanted=wanted, installed=found, fits=fits)


def _find_version(name: str) -> str | None:
    """Return the version of a package that is here, or of one that brings the same module under a name of its own.

    xgboost-cpu brings xgboost, as tensorflow-cpu, psycopg2-binary and others do for theirs.
    """
    try:
        return version(name)
    except PackageNotFoundError:
        module = canonicalize_name(name).replace("-", "_")
        others = packages_distributions().get(module, ())
        return next(
            (version(each) for each in others if canonicalize_name(each).startswith(canonicalize_name(name))), None
        )


def read_model_environment(folder: Path) -> ModelEnvironment:
    """Read the environment of a model: python_env.yaml, requirements.txt, and conda.yaml where neither is there.

    It raises nothing: what can't be read or installed is among `refused`, since a model may load here all the same.
    Packages that only build others (pip, setuptools, wheel) are left out.

    Args:
        folder: That of the model's files.
    """
    reader = _Reader(folder=folder.resolve())
    stored = reader.read_yaml(_PYTHON_ENV)
    conda = {} if stored or (folder / _REQUIREMENTS).is_file() else reader.read_yaml(_CONDA)
    if stored.get("dependencies"):
        reader.take_lines(stored["dependencies"], _PYTHON_ENV)
    elif (folder / _REQUIREMENTS).is_file():
        reader.take_file(_REQUIREMENTS, _REQUIREMENTS)
    elif conda:
        reader.take_conda(conda)
    elif not stored and not reader.refused:
        reader.refuse(f"{_PYTHON_ENV}, {_REQUIREMENTS} and {_CONDA}", "none of them is in the model's folder")
    python = stored.get("python") or _find_conda_python(conda) or _read_flavor_python(reader)
    return ModelEnvironment(
        python=reader.take_python(python),
        requirements=tuple(dict.fromkeys(reader.requirements)),
        constraints=tuple(dict.fromkeys(reader.constraints)),
        wheels=tuple(dict.fromkeys(reader.wheels)),
        sources=tuple(dict.fromkeys(reader.sources)),
        refused=tuple(dict.fromkeys(reader.refused)),
    )


def _list_conda_packages(conda: dict[str, Any]) -> list[Any]:
    found = conda.get("dependencies")
    return found if isinstance(found, list) else []


def _find_conda_python(conda: dict[str, Any]) -> str | None:
    named = (_CONDA_PYTHON.fullmatch(each) for each in _list_conda_packages(conda) if isinstance(each, str))
    return next((match["version"] for match in named if match), None)


def _read_flavor_python(reader: _Reader) -> str | None:
    flavors = reader.read_yaml(_MLMODEL).get("flavors")
    pyfunc = flavors.get("python_function") if isinstance(flavors, dict) else None
    return pyfunc.get("python_version") if isinstance(pyfunc, dict) else None


@dataclass(slots=True, kw_only=True)
class _Reader:
    """What is found while the files of a model are read."""

    folder: Path
    requirements: list[str] = field(default_factory=list)
    constraints: list[str] = field(default_factory=list)
    wheels: list[Path] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    files_read: set[Path] = field(default_factory=set)

    def refuse(self, what: str, reason: str, place: str = "") -> None:
        self.refused.append(hide_secrets(f"{what}{f' in {place}' if place else ''}: {reason}"))

    def read_yaml(self, name: str) -> dict[str, Any]:
        """Return a file of the model with all its values as text, since 3.10 is no number; nothing without it."""
        if not (self.folder / name).is_file():
            return {}
        try:
            # It makes texts, lists and dicts and nothing else.
            found = yaml.load((self.folder / name).read_text(), Loader=yaml.BaseLoader)  # noqa: S506
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            self.refuse(name, f"it can't be read ({type(error).__name__})")
            return {}
        if isinstance(found, dict):
            return found
        self.refuse(name, "it has no keys with values")
        return {}

    def take_python(self, named: Any) -> str | None:
        if not named:
            return None
        try:
            return str(Version(str(named)))
        except InvalidVersion:
            self.refuse(f"Python {named}", "it is no version")
            return None

    def take_conda(self, conda: dict[str, Any]) -> None:
        for each in _list_conda_packages(conda):
            if isinstance(each, dict) and set(each) == {"pip"}:
                self.take_lines(each["pip"], _CONDA)
            elif not isinstance(each, str) or not _CONDA_TOOLS.match(each):
                self.refuse(str(each), "a package of conda, and only those of pip can be installed", _CONDA)

    def take_file(self, name: str, place: str, *, bounds: bool = False) -> None:
        """Take the lines of a file of the model, where it is one and was not read before."""
        path = (self.folder / name).resolve()
        if not path.is_relative_to(self.folder) or not path.is_file():
            self.refuse(name, "a file that is not in the model's folder", place)
            return
        if path in self.files_read:
            return
        self.files_read.add(path)
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            self.refuse(name, f"it can't be read ({type(error).__name__})")
            return
        self.take_lines(text.splitlines(), path.relative_to(self.folder).as_posix(), bounds=bounds)

    def take_lines(self, lines: Any, place: str, *, bounds: bool = False) -> None:
        """Take lines as pip reads them from a file.

        Args:
            lines: As they are there.
            place: The file, for messages.
            bounds: Whether they are constraints.
        """
        if not isinstance(lines, list) or not all(isinstance(each, str) for each in lines):
            self.refuse("the packages", "they are no list of lines", place)
            return
        for line in _join_lines(lines):
            if nested := _NESTED.fullmatch(line):
                beside = Path(place).parent / nested["name"].strip("'\"")
                self.take_file(beside.as_posix(), place, bounds=bounds or nested[1] in _CONSTRAINT)
            elif _SOURCE.match(line):
                self.sources.append(hide_secrets(line))
            elif reason := self._find_refusal(line, place, bounds=bounds):
                self.refuse(line, reason, place)

    def _find_refusal(self, line: str, place: str, *, bounds: bool) -> str | None:
        """Take a package by name or a wheel of the model; return why a line is neither."""
        if line.startswith(("-e", "--editable")):
            return "a package that is edited in place"
        bare = _HASH.sub("", line)
        if " --" in bare or line.startswith("-"):
            return "an option of pip that is not supported"
        try:
            asked = Requirement(bare)
        except InvalidRequirement:
            if _REMOTE.match(line):
                return "a URL, which may give another package tomorrow"
            return "constraints are packages by name" if bounds else self._take_wheel(line, place)
        if asked.url is not None:
            return "a URL, which may give another package tomorrow"
        (self.constraints if bounds else self.requirements).append(" ".join(line.split()))
        return None

    def _take_wheel(self, line: str, place: str) -> str | None:
        path = (self.folder / Path(place).parent / line).resolve()
        if not path.is_relative_to(self.folder) or not path.is_file():
            return "neither a package by name nor a wheel in the model's folder"
        try:
            parse_wheel_filename(path.name)
        except InvalidWheelFilename:
            return "a file that is no wheel"
        self.wheels.append(path)
        return None


def _join_lines(lines: Sequence[str]) -> Iterator[str]:
    """Yield lines without comments, and those that go on after a backslash as one."""
    begun = ""
    for each in lines:
        line = begun + _COMMENT.sub("", each.strip())
        begun = line.removesuffix("\\") if line.endswith("\\") else ""
        if not begun and line.strip():
            yield line.strip()
    if begun.strip():
        yield begun.strip()
