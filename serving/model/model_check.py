"""What a registered model is, and whether it would load on this machine, before a run asks."""

from __future__ import annotations

import platform
from pathlib import Path

from pydantic import Field

from serving.errors import BadInput, ModelUnfit
from serving.model.contract import Contract, Frozen
from serving.model.loading import load_model
from serving.model.registry import resolve_model
from serving.model.requirements import (
    RequirementCheck,
    check_requirements,
    make_install_command,
    read_model_environment,
)

# Files that Python or torch unpickle, by what those who write them call them.
_PICKLED = {".pkl", ".pickle", ".joblib", ".pth", ".pt"}
_FLAVORS_COMMON = {"python_function"}


class ModelCheck(Frozen):
    """What a registered model is, and whether it loads here."""

    model: str = Field(description="The pinned version.")
    digest: str = Field(description="SHA-256 over its files.")
    folder: str = Field(description="Where its files lie on this machine.")
    flavors: tuple[str, ...] = Field(description="MLflow's flavours of it, without python_function.")
    loads: bool = Field(description="Whether a run on this machine could load it.")
    problems: tuple[str, ...] = Field(default=(), description="Why it does not load, and what to do.")
    contract: Contract | None = Field(default=None, description="Its inputs and outputs, where its signature has them.")
    python_logged: str | None = Field(default=None, description="The version of Python that it was logged with.")
    python_here: str = Field(description="The version of Python here.")
    requirements: tuple[RequirementCheck, ...] = Field(default=(), description="The packages that it asks for.")
    install: str | None = Field(default=None, description="The command that installs what is missing or differs.")
    pickles: tuple[str, ...] = Field(default=(), description="Files of it that are unpickled, which runs their code.")
    code: tuple[str, ...] = Field(default=(), description="Files of Python in it, which run where it is loaded.")

    def list_figures(self) -> list[tuple[str, str]]:
        """Return what a person reads of it, in order."""
        contract = self.contract or Contract(inputs=(), outputs=())
        unfit = [each for each in self.requirements if not each.fits]
        columns = [_describe_column(each.name, each.dtype, may_be_null=each.may_be_null) for each in contract.columns]
        outputs = [
            _describe_column(
                *(each.name, f"{each.dtype} x {each.width}" if each.width > 1 else each.dtype),
                may_be_null=not each.required,
            )
            for each in contract.outputs
        ]
        python = "" if self.python_logged in (None, self.python_here) else f", logged with {self.python_logged}"
        return [
            ("model", self.model),
            ("loads here", "yes" if self.loads else "no"),
            ("flavours", ", ".join(self.flavors)),
            ("inputs", ", ".join(columns) or "unknown"),
            ("outputs", ", ".join(outputs) or "unknown"),
            ("Python", f"{self.python_here}{python}"),
            ("packages", _describe_packages(self.requirements, unfit)),
            ("pickles", ", ".join(self.pickles) or "none"),
            ("code", ", ".join(self.code) or "none"),
            ("files", self.folder),
        ]


def check_model(uri: str, *, allow_pickle: bool = False) -> ModelCheck:
    """Resolve a model and load it as a run would.

    Raises ModelNotFound where there is none; what keeps it from loading is told by the result.
    """
    resolved = resolve_model(uri)
    problems: list[str] = []
    contract = None
    try:
        contract = resolved.contract({}, {})
        load_model(resolved, contract, allow_pickle=allow_pickle)
    except (ModelUnfit, BadInput) as error:
        problems.append(str(error))
    environment = read_model_environment(resolved.folder)
    requirements = tuple(check_requirements(environment))
    return ModelCheck(
        model=resolved.pin.uri,
        digest=resolved.pin.digest,
        folder=str(resolved.folder),
        flavors=tuple(sorted(set(resolved.mlmodel.flavors) - _FLAVORS_COMMON)) or ("python_function",),
        loads=not problems,
        problems=tuple(problems),
        contract=contract,
        python_logged=environment.python,
        python_here=platform.python_version(),
        requirements=requirements,
        install=make_install_command(requirements),
        pickles=tuple(_list_files(resolved.folder, _PICKLED)),
        code=tuple(_list_files(resolved.folder, {".py"})),
    )


def _describe_column(name: str, kind: str, *, may_be_null: bool) -> str:
    return f"{name} ({kind}{', may be null' if may_be_null else ''})"


def _describe_packages(requirements: tuple[RequirementCheck, ...], unfit: list[RequirementCheck]) -> str:
    if not requirements:
        return "none are named"
    if not unfit:
        return f"all {len(requirements)} are here, in versions that fit"
    differ = [
        f"{each.wanted} ({'is missing' if each.installed is None else f'{each.installed} here'})" for each in unfit
    ]
    return f"{len(unfit)} of {len(requirements)} differ: {', '.join(differ)}"


def _list_files(folder: Path, suffixes: set[str]) -> list[str]:
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.suffix in suffixes)
    return sorted(path.as_posix() for path in found if "__pycache__" not in path.parts)
