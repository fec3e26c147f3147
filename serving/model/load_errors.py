"""What to do about a model that does not load: one advice for each cause, and it is one that works.

MLflow's own advice is left out where the cause is known: the environment variable that it names is set by Overnight at
each load, so that setting it changes nothing.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mlflow.models import Model as MLmodel
from packaging.requirements import InvalidRequirement, Requirement
from pydantic import Field

from serving.errors import ModelUnfit
from serving.model.contract import Frozen
from serving.option_words import give_option

# How a model of each flavour is logged so that nothing in it needs unpickling.
_ADVICE_BY_LOADER = {
    "mlflow.pytorch": 'Log it with serialization_format="pt2", or',
    "mlflow.lightgbm": 'Log its Booster (model.booster_), or it with serialization_format="skops", or',
    "mlflow.pyfunc.model": 'Log it as code (python_model="model.py"), or',
}
_PICKLED = re.compile(r"pickle|MLFLOW_ALLOW_PICKLE_DESERIALIZATION", re.IGNORECASE)
_UNTRUSTED = re.compile(r"untrusted types?", re.IGNORECASE)
_CHARACTERS_SHOWN = 300


def explain_load_error(folder: Path, error: Exception, *, allow_pickle: bool) -> ModelUnfit:
    """Return what is to be done about a model that a library could not load.

    Args:
        folder: That of the model's files.
        error: What the library raised.
        allow_pickle: Whether the caller allows pickles.
    """
    mlmodel = MLmodel.load(str(folder / "MLmodel"))
    if not allow_pickle and _PICKLED.search(str(error)):
        return _refuse_pickle(mlmodel)
    if _UNTRUSTED.search(f"{type(error).__name__} {error}"):
        return ModelUnfit(
            "A model saved by skops must be logged with the types that it is made of (skops_trusted_types), got others "
            f"in {folder}: {_shorten(error)}. Log it again with serialization_format='cloudpickle', and "
            f"{_advise_pickle()}."
        )
    got = f"The model in {folder} must load here, got {type(error).__name__}: {_shorten(error)}."
    return ModelUnfit(f"{got} {_advise_packages(folder, error)}".rstrip())


def _refuse_pickle(mlmodel: MLmodel) -> ModelUnfit:
    loader = str(mlmodel.flavors.get("python_function", {}).get("loader_module") or "")
    advice = _ADVICE_BY_LOADER.get(loader)
    allow = _advise_pickle()
    what_to_do = f"{advice} {allow}" if advice else f"{allow[0].upper()}{allow[1:]}"
    return ModelUnfit(
        "A model must not need unpickling, which runs any code in its files, unless asked for; got one with a pickle "
        f"in it ({loader or ', '.join(mlmodel.flavors)}). {what_to_do}."
    )


def _advise_pickle() -> str:
    return f"pass {give_option('allow_pickle', value=True)} if you trust its author"


def _advise_packages(folder: Path, error: Exception) -> str:
    """Return the line that installs what the model's own requirements name and this environment lacks."""
    install = make_install_command(list(check_requirements(folder)))
    if install:
        return f"Its requirements name what is not here: {install}"
    if isinstance(error, ModuleNotFoundError):
        return (
            f"Its requirements.txt does not name a package for {error.name!r}: install it, and log the model again "
            "with extra_pip_requirements, or with code_paths where it is a module of yours."
        )
    return ""


class RequirementCheck(Frozen):
    """One package that a model asks for, beside what is installed here."""

    name: str
    wanted: str = Field(description="As the model's requirements have it.")
    installed: str | None = Field(description="The version here, null where there is none.")
    fits: bool = Field(description="Whether the version here is one that is wanted.")


def make_install_command(requirements: Sequence[RequirementCheck]) -> str | None:
    """Return the pip command that installs what is missing here or differs, None where nothing does."""
    wanted = [each.wanted for each in requirements if not each.fits]
    return f"pip install {shlex.join(wanted)}" if wanted else None


def check_requirements(folder: Path) -> Iterator[RequirementCheck]:
    """Yield each package of a model's requirements.txt; lines that name none, such as options and paths, are left out.

    MLflow itself counts only where it is missing: any of its versions reads the models of others.
    """
    try:
        lines = (folder / "requirements.txt").read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return
    for line in (line.partition(" #")[0].strip() for line in lines):
        try:
            asked = Requirement(line)
        except InvalidRequirement:
            continue
        if asked.marker is not None and not asked.marker.evaluate():
            continue
        try:
            found = version(asked.name)
        except PackageNotFoundError:
            found = None
        fits = found is not None and (asked.name == "mlflow" or asked.specifier.contains(found, prereleases=True))
        yield RequirementCheck(name=asked.name, wanted=line, installed=found, fits=fits)


def _shorten(error: Exception) -> str:
    text = " ".join(str(error).split()).rstrip(". ")
    return text if len(text) <= _CHARACTERS_SHOWN else f"{text[:_CHARACTERS_SHOWN]}..."
