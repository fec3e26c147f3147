"""What to do about a model that does not load: one advice for each cause, and it is one that works.

MLflow's own advice is left out where the cause is known: the environment variable that it names is set by Overnight at
each load, so that setting it changes nothing.
"""

from __future__ import annotations

import re
from pathlib import Path

from mlflow.models import Model as MLmodel

from serving.errors import ModelUnfit
from serving.model.requirements import check_requirements, make_install_command, read_model_environment
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
    install = make_install_command(check_requirements(read_model_environment(folder)))
    if install:
        return f"Its requirements name what is not here: {install}"
    if isinstance(error, ModuleNotFoundError):
        return (
            f"Its requirements.txt does not name a package for {error.name!r}: install it, and log the model again "
            "with extra_pip_requirements, or with code_paths where it is a module of yours."
        )
    return ""


def _shorten(error: Exception) -> str:
    text = " ".join(str(error).split()).rstrip(". ")
    return text if len(text) <= _CHARACTERS_SHOWN else f"{text[:_CHARACTERS_SHOWN]}..."
