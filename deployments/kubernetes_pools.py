"""Prefect's work pools on Kubernetes: the template of infra/kubernetes, with what each pool sets of it.

A pool is a file NAME.yaml, as those of infra/kubernetes/base/pools. It has `description` and variables of the template,
whose defaults they become; `env` is added to the template's own.
"""

from __future__ import annotations

import copy
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import yaml
from prefect.client.schemas.actions import WorkPoolCreate

from deployments.apply import FLOW_RUNS_PER_POOL_MAX
from serving.errors import BadInput

KUBERNETES = "kubernetes"


def read_kubernetes_pools(folder: Path, image: str) -> list[WorkPoolCreate]:
    """Return the pools that a folder describes, by name, whose flow runs have this image unless they say another.

    Raises BadInput where there is none, a file is no such description, or it names a variable that the template lacks.
    """
    paths = sorted(folder.glob("*.yaml"))
    if not paths:
        message = f"The folder of pools must hold NAME.yaml for each pool, got none in {folder}. Name another folder."
        raise BadInput(message)
    template = json.loads((files("infra") / "kubernetes" / "work-pool.json").read_text())
    return [_make_pool(path, template, image) for path in paths]


def _make_pool(path: Path, template: dict[str, Any], image: str) -> WorkPoolCreate:
    given = _read_pool(path)
    description = str(given.pop("description", f"Jobs of Kubernetes, as {path.name} describes them"))
    return WorkPoolCreate(
        name=path.stem,
        description=description,
        type=KUBERNETES,
        base_job_template=set_defaults(template, {"image": image, **given}, str(path)),
        concurrency_limit=FLOW_RUNS_PER_POOL_MAX,
    )


def _read_pool(path: Path) -> dict[str, Any]:
    try:
        given = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        message = f"{path} must be a file of YAML, got: {' '.join(str(error).split())[:300]}. Correct it."
        raise BadInput(message) from None
    if not isinstance(given, dict):
        message = f"{path} must be an object, such as {{cpu_request: '4'}}, got {str(given)[:80]!r}. Correct it."
        raise BadInput(message)
    return given


def set_defaults(template: dict[str, Any], defaults: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a base job template whose variables have other defaults; `env` is added to that of the template.

    Raises BadInput for a variable that the template does not have, or a value that does not fit it.
    """
    filled = copy.deepcopy(template)
    variables = filled["variables"]["properties"]
    if unknown := sorted(defaults.keys() - variables.keys()):
        message = (
            f"{where} must name variables of work-pool.json, got {', '.join(unknown)}. `overnight deploy --show "
            "work-pool.json` has their names."
        )
        raise BadInput(message)
    for name, value in defaults.items():
        merged = {**variables[name].get("default", {}), **value} if name == "env" else value
        try:
            jsonschema.validate(merged, {key: each for key, each in variables[name].items() if key != "allOf"})
        except jsonschema.ValidationError as error:
            message = (
                f"{name} of {where} must fit its variable of work-pool.json, got: {error.message[:300]}. Correct it."
            )
            raise BadInput(message) from None
        variables[name]["default"] = merged
    return filled
