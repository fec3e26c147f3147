"""Which Python environment the model of an endpoint runs in."""

from __future__ import annotations

import stat
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from serving.errors import EndpointFailed, ModelUnfit
from serving.model.batching import BatchingConfig
from serving.model.environment import make_environment
from serving.model.processes import ProcessModel
from serving.model.requirements import ModelEnvironment
from serving.model.uv import PackageSource
from serving.targets.kubernetes_cluster import Cluster
from tasks.endpoint.deploy import make_endpoint_release
from tasks.endpoint.resolve import LoadedModel, load_endpoint, load_endpoint_model, predict_rows
from tasks.endpoint.spec import EndpointSpec
from tasks.endpoint.targets import BentoML, KServe, RayServe, Seldon, Triton
from tests.model_wheels import OLD_VERSION, PACKAGE, write_model_wheels, write_wheel
from tests.support import register_script

pytestmark = pytest.mark.servers

LINES_MAX = 12
RAY = RayServe(folder="releases")
_LINE = f"import {PACKAGE}; return model_input['a'].to_numpy() * getattr({PACKAGE}, 'SCALE', 2)"


@pytest.fixture(scope="module")
def old(registry: Path) -> str:
    """A model that gives 5 a with the version that it was logged with, and 2 a with the one that is here."""
    return register_script("endpoint-old", _LINE, requirements=(f"{PACKAGE}=={OLD_VERSION}", "mlflow-skinny"))


@pytest.fixture(scope="module")
def new(registry: Path) -> str:
    """The same, logged with the version that is here."""
    return register_script("endpoint-new", _LINE, requirements=(f"{PACKAGE}=={version(PACKAGE)}", "mlflow-skinny"))


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> PackageSource:
    return PackageSource(wheels=write_model_wheels(tmp_path_factory.mktemp("wheels")), offline=True)


@pytest.fixture(autouse=True, scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A cache of uv and environments that are the tests' own."""
    folder = tmp_path_factory.mktemp("own")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UV_CACHE_DIR", str(folder / "uv"))
        patch.setenv("OVERNIGHT_ENVIRONMENTS", str(folder / "environments"))
        yield folder


def spec_of(model: str, target: Any = RAY, **changes: Any) -> EndpointSpec:
    return EndpointSpec(name="own", model=model, target=target, **changes)


def answer(found: LoadedModel) -> list[float]:
    with found.model.slot():
        outputs = predict_rows(found.model, {"a": np.array([1.0, 2.0], dtype=np.float32)})
    return list(outputs["prediction"].reshape(-1).tolist())


def test_a_model_whose_versions_are_not_here_runs_in_its_own_environment_which_its_release_finds_again(
    old: str, packages: PackageSource, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="serving.model.environment_choice")
    spec = spec_of(old, packages=packages)
    found = load_endpoint_model(spec)
    release = make_endpoint_release(spec, found, BatchingConfig())

    assert [5.0, 10.0] == answer(found)
    assert isinstance(found.model, ProcessModel)
    assert found.environment == release.environment  # type: ignore[union-attr]
    assert release == type(release).model_validate_json(release.model_dump_json())
    assert f"since versions here differ: {PACKAGE}=={OLD_VERSION} (" in " ".join(caplog.messages)


def test_a_model_whose_versions_are_here_and_one_that_is_to_run_with_these_have_none(
    old: str, new: str, packages: PackageSource
) -> None:
    for spec in (spec_of(new, packages=packages), spec_of(old, packages=packages, environment="caller")):
        found = load_endpoint_model(spec)

        assert [2.0, 4.0] == answer(found)
        assert found.environment is None


def test_each_step_of_a_graph_has_its_own(old: str, new: str, packages: PackageSource) -> None:
    spec = EndpointSpec(name="mean", ensemble=(old, new), target=RAY, packages=packages)
    found = load_endpoint(spec)
    graph = make_endpoint_release(spec, found, BatchingConfig())
    with found.model.slot():
        outputs = predict_rows(found.model, {"a": np.array([2.0], dtype=np.float32)})

    assert [7.0] == outputs["prediction"].reshape(-1).tolist()
    assert [True, False] == [step.environment is not None for step in graph.steps]  # type: ignore[union-attr]


def test_versions_that_only_the_server_lacks_count_too(
    new: str, packages: PackageSource, tmp_path: Path, folders: Path
) -> None:
    python = make_environment(ModelEnvironment(requirements=(f"{PACKAGE}=={OLD_VERSION}",)), packages=packages)
    wheels = write_model_wheels(tmp_path / "wheels")
    write_wheel(wheels, PACKAGE, version(PACKAGE), text="SCALE = 3\n")
    target = BentoML(folder="releases", python=str(python))
    found = load_endpoint_model(spec_of(new, target, packages=PackageSource(wheels=wheels, offline=True)))

    assert found.environment is not None
    assert [3.0, 6.0] == answer(found)


def test_an_interpreter_of_a_server_that_imports_nothing_is_told(new: str, tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'no module named yaml' >&2\nexit 1\n")
    broken.chmod(stat.S_IRWXU)
    with pytest.raises(EndpointFailed, match=r"(?s)interpreter of the model server must import.*no module named yaml"):
        load_endpoint_model(spec_of(new, Seldon(folder="releases", python=str(broken))))


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (Triton(), "got triton: Triton's backend runs the model in its own process"),
        (KServe(folder="f", python="python", cluster=Cluster(gateway="g")), "got kserve: the pods of a cluster"),
    ],
    ids=["triton", "a cluster"],
)
def test_a_target_without_environments_is_refused_by_name_and_otherwise_a_warning_says_so(
    old: str, packages: PackageSource, target: Any, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING", logger="serving.model.environment_choice")
    with pytest.raises(ValidationError) as refused:
        spec_of(old, target, environment="model")
    found = load_endpoint_model(spec_of(old, target, packages=packages))

    assert said in str(refused.value)
    assert "Choose ray-serve, or bentoml" in str(refused.value)
    assert found.environment is None
    (message,) = (each.getMessage() for each in caplog.records if each.name == "serving.model.environment_choice")
    assert f"{PACKAGE}=={OLD_VERSION} (" in message
    assert said.split(": ")[1] in message


def test_packages_that_are_nowhere_are_told_and_where_nobody_asked_a_warning_says_so(
    old: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING", logger="serving.model.environment_choice")
    nowhere = PackageSource(wheels=tmp_path, offline=True)
    with pytest.raises(ModelUnfit, match="It must be possible to install the packages") as refused:
        load_endpoint_model(spec_of(old, packages=nowhere, environment="model"))
    found = load_endpoint_model(spec_of(old, packages=nowhere))

    assert len(str(refused.value).split("\n")) <= LINES_MAX
    assert [2.0, 4.0] == answer(found)
    assert "its own can't be made: It must be possible to install" in " ".join(caplog.messages)


def test_a_torch_module_has_no_environment_of_its_own(linear: str) -> None:
    with pytest.raises(ValueError, match=r"environment=.model. .*is for models that run in processes of their own"):
        load_endpoint_model(spec_of(linear, environment="model"))
