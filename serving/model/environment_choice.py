"""Which Python environment a model of Python runs in: that of its caller, or one of its own.

Its own is made where it is asked for, and where the versions at hand are not those that the model was logged with.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from serving.errors import BadInput
from serving.extras import import_extra
from serving.model.contract import Frozen
from serving.model.requirements import RequirementCheck, list_unmet, read_model_environment
from serving.model.uv import PackageSource
from serving.option_words import give_option

if TYPE_CHECKING:
    # It imports MLflow, which takes seconds, and options need none of it.
    from serving.model.pin import ModelPin
    from serving.model.registry import Resolved

_UNMET_SHOWN = 5

_log = logging.getLogger(__name__)

Environment = Literal["caller", "model"]
# Fields that the options of a batch run have in common with the spec of an endpoint.
EnvironmentOption = Annotated[
    Environment | None,
    Field(
        description="Where a model of Python runs. caller: with the versions that are here. model: in an environment "
        "that uv makes from what MLflow stored. Without: the latter where versions here differ and there is uv."
    ),
]
PackagesOption = Annotated[
    PackageSource | None,
    Field(
        description="Where the packages of a model's environment come from. Without: where uv's own settings say.",
    ),
]


class OwnEnvironment(Frozen):
    """What another process needs to find the environment that was made for a model, or to make it again."""

    python: str = Field(description="The version of Python.")
    packages: PackageSource = Field(description="Where its packages come from.")
    folder: Path = Field(description="Where environments are kept.")


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeEnvironment:
    """An environment that was made for a model: its interpreter, and what finds it again."""

    interpreter: str
    own: OwnEnvironment


def choose_model_environment(
    resolved: Resolved,
    asked: Environment | None,
    packages: PackageSource | None,
    *,
    unmet: Sequence[RequirementCheck] | None = None,
    obstacle: str | None = None,
) -> MadeEnvironment | None:
    """Return the environment of a model's own that it is to run in, made by now; None where it runs in its caller's.

    It is what was asked for, else its own where the versions at hand are not those that the model asks for. Where that
    can't be made, the model runs with the versions at hand. A warning says so wherever it does, and they differ.

    Args:
        resolved: The model.
        asked: What the caller asked for; None leaves the choice to this function.
        packages: Where packages come from; None: where uv's own settings say.
        unmet: What the versions at hand lack; None: those of this interpreter are looked at.
        obstacle: Why an environment of its own is of no use here; None where it is.

    Raises:
        BadInput: Its own was asked for, and the model runs in this process, or its own can't be made.
    """
    here = resolved.needs_torch
    if here and asked == "model":
        message = (
            f"{give_option('environment', 'model')} is for models that run in processes of their own, got "
            f"{resolved.pin.uri}, which runs in this one ({', '.join(resolved.mlmodel.flavors)}). Leave it out."
        )
        raise BadInput(message)
    if resolved.is_torch:
        return None
    if asked == "model":
        return make_own_environment(resolved, packages)
    lacking = list_unmet(read_model_environment(resolved.folder)) if unmet is None else unmet
    if here or asked == "caller":
        if lacking:
            why = "as was asked for." if asked else "as every model of its kind does."
            _warn_of_versions(resolved, lacking, why)
        return None
    return _make_where_versions_differ(resolved, packages, lacking, obstacle) if lacking else None


def _list_shown(unmet: Sequence[RequirementCheck]) -> str:
    return ", ".join(f"{each.wanted} ({each.installed or 'missing'} here)" for each in unmet[:_UNMET_SHOWN])


def _warn_of_versions(resolved: Resolved, unmet: Sequence[RequirementCheck], why: str) -> None:
    _log.warning(
        "%s was logged with other versions than those here: %s. It runs with these, %s",
        *(resolved.pin.uri, _list_shown(unmet), why),
    )


def _make_where_versions_differ(
    resolved: Resolved, packages: PackageSource | None, unmet: Sequence[RequirementCheck], obstacle: str | None
) -> MadeEnvironment | None:
    try:
        made = None if obstacle else make_own_environment(resolved, packages)
    except BadInput as error:
        made, obstacle = None, str(error)
    found = _list_shown(unmet)
    if made is None:
        _warn_of_versions(resolved, unmet, f"since an environment of its own can't be made: {obstacle}")
    else:
        _log.info("%s runs in an environment of its own, since versions here differ: %s.", resolved.pin.uri, found)
    return made


def make_own_environment(resolved: Resolved, packages: PackageSource | None) -> MadeEnvironment:
    """Return the environment of a model, which is made where it is not there yet.

    Raises ModelUnfit and EnvironmentUnusable where it can't be made.
    """
    making = import_extra("serving.model.environment", "environments")
    source = packages or PackageSource()
    if source.wheels is not None:
        source = source.model_copy(update={"wheels": source.wheels.expanduser().resolve()})
    own = OwnEnvironment(
        python=read_model_environment(resolved.folder).python or platform.python_version(),
        packages=source,
        folder=making.find_environments().expanduser().absolute(),
    )
    return MadeEnvironment(interpreter=restore_own_environment(own, resolved.pin, resolved.folder), own=own)


def restore_own_environment(own: OwnEnvironment, pin: ModelPin, folder: Path) -> str:
    """Return the interpreter of an environment that was made for a model, which is made again where it is lost.

    Args:
        own: What finds it.
        pin: The model.
        folder: That of the model's files.

    Raises:
        ModelUnfit, EnvironmentUnusable: It is lost, and can't be made here.
    """
    from serving.model.environment import make_environment  # noqa: PLC0415 - most models need none

    stored = read_model_environment(folder).model_copy(update={"python": own.python})
    model = f"{pin.uri} {pin.digest[:12]}"
    return str(make_environment(stored, packages=own.packages, folder=own.folder, model=model))
