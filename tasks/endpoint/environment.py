"""The Python environment that the model of an endpoint runs in, on its model server and where it is compared with."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from pydantic import TypeAdapter

import serving
from serving.errors import EndpointFailed
from serving.model.environment_choice import MadeEnvironment, choose_model_environment
from serving.model.registry import Resolved
from serving.model.requirements import RequirementCheck, list_unmet, read_model_environment
from tasks.endpoint.spec import EndpointSpec
from tasks.endpoint.targets import BentoML, KServe, Seldon

_CHECKS = TypeAdapter(list[RequirementCheck])
_CHECK_SECONDS_MAX = 120.0
_LINES_SHOWN = 3
# The server's environment has all that this package needs to load a release there.
_PROGRAM = """\
import json, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from serving.model.requirements import list_unmet, read_model_environment
found = list_unmet(read_model_environment(Path(sys.argv[2])))
print(json.dumps([each.model_dump() for each in found]))
"""


def choose_endpoint_environment(spec: EndpointSpec, resolved: Resolved) -> MadeEnvironment | None:
    """Return the environment of its own that a model runs in, made by now; None where that is the server's.

    It is what the spec says, else its own where the versions here or those of the server are not what the model asks
    for. Raises BadInput as `choose_model_environment` does, and EndpointFailed where the server's can't be looked at.
    """
    is_open = spec.environment is None and not resolved.needs_torch
    return choose_model_environment(
        resolved,
        spec.environment,
        spec.packages,
        unmet=_list_unmet(spec, resolved) if is_open else (),
        obstacle=spec.target.environment_obstacle,
    )


def _list_unmet(spec: EndpointSpec, resolved: Resolved) -> list[RequirementCheck]:
    """Return what a model asks for and this interpreter lacks, else what the interpreter of its server lacks."""
    found = list_unmet(read_model_environment(resolved.folder))
    target = spec.target
    if found or not isinstance(target, BentoML | KServe | Seldon) or target.environment_obstacle is not None:
        return found
    python = Path(target.python)
    # That of an image, or one with a bare name, can't be asked here.
    is_here = len(python.parts) > 1 and python.exists()
    return _ask_server_python(python.absolute(), resolved.folder) if is_here else found


def _ask_server_python(python: Path, folder: Path) -> list[RequirementCheck]:
    package = Path(serving.__file__).parents[1]
    command = (str(python), "-I", "-c", _PROGRAM, str(package), str(folder))
    try:
        done = subprocess.run(  # noqa: S603 - the interpreter that runs the model server, on a program of ours
            command, capture_output=True, text=True, check=False, timeout=_CHECK_SECONDS_MAX
        )
        return _CHECKS.validate_python(json.loads(done.stdout))
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        said = done.stderr.strip().splitlines()[-_LINES_SHOWN:] if isinstance(error, ValueError) else [str(error)]
        lines = "\n".join(f"  {line}" for line in said)
        message = (
            f"The interpreter of the model server must import what a release loads with, got from {python}:\n{lines}\n"
            "Make its environment as the page on endpoints says, or give environment='caller' or 'model'."
        )
        raise EndpointFailed(message) from None
