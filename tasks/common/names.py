"""Short names of models and addresses, for names of flow runs, events and reports."""

from __future__ import annotations

import re

from tasks.common.formatting import cut_text

BLOCK = "block:"
_NAME_CHARACTERS_MAX = 120
# What stands before the name of a model: the scheme of MLflow, or the block of a registry.
_MODEL_PREFIX = re.compile(rf"^(?:models:/+|{BLOCK}[^/]*/)")


def describe_model(model: str) -> str:
    """Return a model's address in short: churn@champion, or churn v3 for version 3 of it."""
    short = _MODEL_PREFIX.sub("", str(model))
    name, slash, version = short.rpartition("/")
    return f"{name} v{version}" if slash and name else short


def find_model_name(model: str) -> str:
    """Return the registered name in a model's address, without alias and version."""
    return re.split(r"[@/]", _MODEL_PREFIX.sub("", str(model)), maxsplit=1)[0]


def find_last_folder(address: str) -> str:
    """Return the last folder of an address or path: scores of s3://lake/scores/, the name of a block alone."""
    return str(address).rstrip("/").rpartition("/")[2].removeprefix(BLOCK) or str(address)


def name_batch_run(model: str, destination: str) -> str:
    """Return the name of a batch run: churn v3 → scores."""
    return shorten_name(f"{describe_model(model)} → {find_last_folder(destination)}")


def shorten_name(name: str) -> str:
    """Return a name that fits a line of the UI: the end of a longer one is left out."""
    return cut_text(name, _NAME_CHARACTERS_MAX)
