"""Which Python a model of a run is to have: its own environment, or that of the caller."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from serving.errors import BadInput, ModelUnfit
from serving.model.registry import resolve_model
from serving.model.uv import PackageSource
from tasks.batch.options import BatchOptions
from tasks.batch.planned_models import choose_environment
from tests.support import register_script


def test_a_model_whose_own_environment_can_not_be_made_runs_with_the_versions_here_and_a_warning_says_so(
    registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # Other tests may have set the level of all loggers.
    caplog.set_level("WARNING", logger="serving.model.environment_choice")
    monkeypatch.setenv("OVERNIGHT_ENVIRONMENTS", str(tmp_path / "environments"))
    options = BatchOptions(packages=PackageSource(wheels=tmp_path, offline=True))
    resolved = resolve_model(register_script("wants-another", "pass", requirements=("scikit-learn==0.1",)))
    environment, processes = choose_environment(resolved, options)

    assert ("caller", sys.executable) == (environment, processes.python)
    (message,) = (record.getMessage() for record in caplog.records if record.name == "serving.model.environment_choice")
    assert "was logged with other versions than those here: scikit-learn==0.1 (" in message
    with pytest.raises(ModelUnfit, match="It must be possible to install the packages"):
        choose_environment(resolved, options.model_copy(update={"environment": "model"}))


def test_a_torch_module_has_no_environment_of_its_own(linear: str) -> None:
    with pytest.raises(BadInput, match=r"environment=.model. .*is for models that run in processes of their own"):
        choose_environment(resolve_model(linear), BatchOptions(environment="model"))


def test_a_model_that_is_to_run_with_the_versions_here_does_and_a_warning_names_those_that_differ(
    registry: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING", logger="serving.model.environment_choice")
    resolved = resolve_model(register_script("runs-with-others", "pass", requirements=("scikit-learn==0.1",)))
    environment, processes = choose_environment(resolved, BatchOptions(environment="caller"))

    assert ("caller", sys.executable) == (environment, processes.python)
    (message,) = (record.getMessage() for record in caplog.records if record.name == "serving.model.environment_choice")
    assert "was logged with other versions than those here: scikit-learn==0.1 (" in message
    assert message.endswith("It runs with these, as was asked for.")
