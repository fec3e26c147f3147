"""What to do about a model that does not load."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from serving.model.load_errors import explain_load_error

NUMPY = version("numpy")


def a_model(folder: Path, *requirements: str, loader: str = "mlflow.sklearn") -> Path:
    (folder / "MLmodel").write_text(yaml.safe_dump({"flavors": {"python_function": {"loader_module": loader}}}))
    (folder / "requirements.txt").write_text("\n".join(requirements))
    return folder


def test_a_missing_package_names_the_line_that_installs_what_the_model_asks_for(tmp_path: Path) -> None:
    folder = a_model(tmp_path, "mlflow==3.0", f"numpy=={NUMPY}", "no-such-package>=1,<2", "another==3")
    error = explain_load_error(
        folder, ModuleNotFoundError("No module named 'another'", name="another"), allow_pickle=False
    )

    assert str(error).endswith("pip install 'no-such-package>=1,<2' another==3")
    assert "got ModuleNotFoundError: No module named 'another'." in str(error)


def test_a_module_that_no_requirement_names_says_so(tmp_path: Path) -> None:
    folder = a_model(tmp_path, "mlflow")
    error = explain_load_error(folder, ModuleNotFoundError("No module named 'own'", name="own"), allow_pickle=False)

    assert "requirements.txt does not name a package for 'own'" in str(error)
    assert "code_paths" in str(error)


@pytest.mark.parametrize(
    ("loader", "advice"),
    [
        ("mlflow.sklearn", "Pass allow_pickle=True in the options if you trust its author."),
        ("mlflow.pytorch", 'Log it with serialization_format="pt2", or pass allow_pickle=True in the options'),
        ("mlflow.pyfunc.model", 'Log it as code (python_model="model.py"), or pass allow_pickle=True in the options'),
    ],
)
def test_a_pickle_has_one_advice_and_not_the_variable_that_is_set_at_each_load(
    tmp_path: Path, loader: str, advice: str
) -> None:
    refused = RuntimeError("pickle is disallowed. Set environment variable 'MLFLOW_ALLOW_PICKLE_DESERIALIZATION'")
    error = explain_load_error(a_model(tmp_path, loader=loader), refused, allow_pickle=False)

    assert advice in str(error)
    assert "MLFLOW_ALLOW" not in str(error)


def test_where_pickles_are_allowed_nobody_is_told_to_allow_them(tmp_path: Path) -> None:
    error = explain_load_error(a_model(tmp_path), ValueError("pickle data was truncated"), allow_pickle=True)

    assert "allow_pickle" not in str(error)
    assert "pickle data was truncated" in str(error)
