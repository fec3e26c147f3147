"""What a model's files say of its Python environment, and what of it is not met here."""

from __future__ import annotations

import platform
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import mlflow
import pytest
import yaml

from serving.model.requirements import (
    ModelEnvironment,
    RequirementCheck,
    check_requirements,
    list_libraries,
    list_unmet,
    make_install_command,
    read_model_environment,
)

NUMPY = version("numpy")
OTHER_PYTHON = f"{sys.version_info[0]}.{sys.version_info[1] + 1}.0"


class Same(mlflow.pyfunc.PythonModel):
    """A model that returns what it gets."""

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]  # noqa: ANN201
        return model_input


def write_model(folder: Path, **texts: str) -> Path:
    """Write files of a model, each under its name with two underscores for its dot."""
    for name, text in texts.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def test_what_mlflow_stores_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "bounds.txt").write_text("pandas>=2\n")
    asked = [
        f"numpy=={NUMPY}",
        "scipy[test]>=1",
        f"-c {tmp_path}/bounds.txt",
        "--extra-index-url https://me:pw@host/simple",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        mlflow.pyfunc.save_model(tmp_path / "model", python_model=Same(), pip_requirements=asked)
    found = read_model_environment(tmp_path / "model")

    assert (platform.python_version(), ()) == (found.python, found.refused)
    assert (f"mlflow=={version('mlflow')}", *asked[:2]) == found.requirements
    assert ("pandas>=2",) == found.constraints
    assert ("--extra-index-url https://***@host/simple",) == found.sources


@pytest.mark.parametrize(
    ("texts", "python", "requirements"),
    [
        ({"python_env__yaml": "python: 3.10\ndependencies:\n- -r requirements.txt\n"}, "3.10", ("numpy<3",)),
        ({"python_env__yaml": "python: 3.10.13\n"}, "3.10.13", ("numpy<3",)),
        ({"python_env__yaml": "python: 3.12.1\ndependencies: [a, -r requirements.txt]"}, "3.12.1", ("a", "numpy<3")),
        ({"MLmodel": "flavors: {python_function: {python_version: 3.9.18}}"}, "3.9.18", ("numpy<3",)),
        ({"conda__yaml": "dependencies: [python=3.8, {pip: [b]}]"}, None, ("numpy<3",)),
        ({}, None, ("numpy<3",)),
    ],
)
def test_the_version_of_python_and_the_packages_come_from_the_first_file_that_has_them(
    tmp_path: Path, texts: dict[str, str], python: str | None, requirements: tuple[str, ...]
) -> None:
    found = read_model_environment(write_model(tmp_path, requirements__txt="numpy<3\n", **texts))

    assert (python, requirements, ()) == (found.python, found.requirements, found.refused)


def test_a_model_with_conda_yaml_alone_is_read_from_its_pip_part(tmp_path: Path) -> None:
    conda = {"dependencies": ["python=3.10.13", "pip<=23", {"pip": ["mlflow==3.0", "numpy"]}]}
    found = read_model_environment(write_model(tmp_path, conda__yaml=yaml.safe_dump(conda)))

    assert ("3.10.13", ("mlflow==3.0", "numpy"), ()) == (found.python, found.requirements, found.refused)

    conda["dependencies"].insert(0, "libgdal=3")
    found = read_model_environment(write_model(tmp_path, conda__yaml=yaml.safe_dump(conda)))

    assert ("libgdal=3 in conda.yaml: a package of conda, and only those of pip can be installed",) == found.refused


def test_comments_continued_lines_and_further_files_of_the_model_are_read_as_pip_reads_them(tmp_path: Path) -> None:
    text = "# why\nnumpy>=1, \\\n  <3  # two lines\n\n-r more.txt\n--constraint=bounds.txt\nnumpy>=1, <3\n"
    texts = {"more__txt": "-r requirements.txt\nscipy --hash=sha256:00ff\n", "bounds__txt": "pandas<3\n"}
    found = read_model_environment(write_model(tmp_path, requirements__txt=text, **texts))

    assert ("numpy>=1, <3", "scipy --hash=sha256:00ff") == found.requirements
    assert (("pandas<3",), ()) == (found.constraints, found.refused)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("git+https://me:pw@host/a.git@main#egg=a", "a URL"),
        ("a @ https://ghp_0123456789@host/a.whl", "a URL"),
        ("https://me:pw@host/a.tar.gz", "a URL"),
        ("file:///a/b.whl", "a URL"),
        ("-e .", "a package that is edited in place"),
        ("--editable=git+ssh://git@host/a", "a package that is edited in place"),
        ("../a.whl", "neither a package by name nor a wheel in the model's folder"),
        ("/etc/passwd", "neither a package by name nor a wheel in the model's folder"),
        ("./own", "neither a package by name nor a wheel in the model's folder"),
        ("./MLmodel.txt", "a file that is no wheel"),
        ("--pre", "an option of pip that is not supported"),
        ("numpy --no-binary", "an option of pip that is not supported"),
        ("-r ../more.txt", "a file that is not in the model's folder"),
        ("-c none.txt", "a file that is not in the model's folder"),
        ("numpy=1", "neither a package by name nor a wheel in the model's folder"),
    ],
)
def test_what_can_not_be_installed_is_refused_with_its_reason_and_without_its_password(
    tmp_path: Path, line: str, reason: str
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "a.whl").touch()
    (tmp_path / "more.txt").write_text("numpy\n")
    folder = write_model(tmp_path / "model", requirements__txt=f"scipy\n{line}\n", MLmodel__txt="")
    found = read_model_environment(folder)

    assert [("scipy",), 1] == [found.requirements, len(found.refused)]
    assert f" in requirements.txt: {reason}" in found.refused[0]
    assert not [secret for secret in ("me:pw", "ghp_0123456789") if secret in str(found)]


def test_wheels_of_the_model_are_taken_and_count_by_name_and_version(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    names = (f"numpy-{NUMPY}-py3-none-any.whl", "tiny_model_lib-1.0-py3-none-any.whl")
    for name in names:
        (tmp_path / "wheels" / name).touch()
    text = "\n".join(f"wheels/{name}" for name in names)
    found = read_model_environment(write_model(tmp_path, requirements__txt=text))

    assert tuple((tmp_path / "wheels" / name).resolve() for name in names) == found.wheels
    assert ["tiny-model-lib==1.0"] == [each.wanted for each in list_unmet(found)]


def test_options_that_name_an_index_are_set_aside_without_their_passwords(tmp_path: Path) -> None:
    lines = ["--extra-index-url https://me:pw@host/simple", "-i https://host/simple", "--find-links=wheels", "numpy"]
    found = read_model_environment(write_model(tmp_path, requirements__txt="\n".join(lines)))

    assert ("--extra-index-url https://***@host/simple", *lines[1:3]) == found.sources
    assert (("numpy",), ()) == (found.requirements, found.refused)


@pytest.mark.parametrize(
    ("texts", "refused"),
    [
        ({}, "python_env.yaml, requirements.txt and conda.yaml: none of them is in the model's folder"),
        ({"python_env__yaml": "{"}, "python_env.yaml: it can't be read (ParserError)"),
        ({"python_env__yaml": "- a"}, "python_env.yaml: it has no keys with values"),
        ({"python_env__yaml": "dependencies: a"}, "the packages in python_env.yaml: they are no list of lines"),
        ({"python_env__yaml": "python: three\ndependencies: [a]"}, "Python three: it is no version"),
    ],
)
def test_files_that_can_not_be_read_are_refused(tmp_path: Path, texts: dict[str, str], refused: str) -> None:
    assert (refused,) == read_model_environment(write_model(tmp_path, **texts)).refused


@pytest.mark.parametrize(
    ("line", "missing"),
    [
        (f"numpy=={NUMPY}", False),
        ("numpy", False),
        ("NumPy>=1", False),
        ("numpy==1.0.1", True),
        ("numpy>=99", True),
        ("no-such-package", True),
        ("no-such-package[extra]>=1,<2 # why", True),
        ("no-such-package; python_version < '3'", False),
        ("mlflow==1.0", False),
        ("mlflow-skinny==1.0", False),
        ("# a comment", False),
        ("-r other.txt", False),
        ("./wheels/own.whl", False),
        ("", False),
    ],
)
def test_only_what_is_not_here_as_it_is_asked_for_is_missing(tmp_path: Path, line: str, missing: bool) -> None:  # noqa: FBT001
    environment = read_model_environment(write_model(tmp_path, requirements__txt=line))
    found = [each.wanted for each in list_unmet(environment)]

    assert ([line.partition(" #")[0]] if missing else []) == found


def test_another_minor_version_of_python_is_unmet_and_another_patch_is_not() -> None:
    (other,) = list_unmet(ModelEnvironment(python=OTHER_PYTHON))
    patch = f"{sys.version_info[0]}.{sys.version_info[1]}.99"

    assert ("python", OTHER_PYTHON, platform.python_version()) == (other.name, other.wanted, other.installed)
    assert [] == list_unmet(ModelEnvironment(python=patch))
    assert make_install_command([other]) is None, "pip installs no Python"


def test_a_constraint_counts_where_its_package_is_here() -> None:
    found = check_requirements(ModelEnvironment(constraints=("numpy<1", "no-such-package<1", "pandas>0")))

    assert [("numpy<1", False)] == [(each.wanted, each.fits) for each in found]


def test_the_well_known_libraries_that_a_model_needs_are_told_by_their_modules(tmp_path: Path) -> None:
    asked = ["XGBoost-CPU==3.1.1 --hash=sha256:" + "0" * 64, "scikit_learn>=1.5", "pandas", "overnight-of-xgboost==1"]
    assert [] == list_libraries(tmp_path)

    (tmp_path / "requirements.txt").write_text("\n".join(asked))
    assert ["sklearn.ensemble", "xgboost"] == list_libraries(tmp_path)

    (tmp_path / "MLmodel").write_text("flavors:\n  sklearn:\n    serialization_format: skops\n")
    assert ["sklearn.ensemble", "skops.io", "xgboost"] == list_libraries(tmp_path)


def test_a_model_without_requirements_lacks_none(tmp_path: Path) -> None:
    assert [] == list_unmet(read_model_environment(tmp_path))


def test_nothing_is_to_be_installed_where_everything_fits() -> None:
    assert make_install_command((RequirementCheck(name="a", wanted="a", installed="1", fits=True),)) is None


def test_a_package_that_brings_the_module_under_another_name_is_here() -> None:
    environment = ModelEnvironment(requirements=("xgboost>=3", "xgboost==0.1", "no-such-package-here"))

    assert [True, False, False] == [each.fits for each in check_requirements(environment)]
