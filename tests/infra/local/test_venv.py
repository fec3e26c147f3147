import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from infra.local import venv as module
from infra.local.venv import VenvFailed, make_venv, venv_folder


def write_wheel(folder: Path, version: str, needs: str = "") -> Path:
    """Write a package of one module, said, whose requirements pip can read."""
    wheel = folder / f"said-{version}-py3-none-any.whl"
    about = f"said-{version}.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("said.py", f"VERSION = {version!r}\n")
        archive.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: said\nVersion: {version}\n{needs}")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    return wheel


def says(venv: Path) -> str:
    command = (str(venv / "bin/python"), "-I", "-c", "import said; print(said.VERSION)")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_an_environment_is_made_once_and_anew_when_its_requirements_change(tmp_path: Path) -> None:
    requirements, folder = tmp_path / "said.txt", tmp_path / "environments/said"
    requirements.write_text(f"{write_wheel(tmp_path, '1.0')}\n")

    venv = make_venv(requirements, folder)
    made = (venv / "pyvenv.cfg").stat().st_ino
    again = make_venv(requirements, folder)

    assert (folder, folder) == (venv, again)
    assert (made, "1.0") == ((venv / "pyvenv.cfg").stat().st_ino, says(venv))

    requirements.write_text(f"{write_wheel(tmp_path, '2.0')}\n")
    (venv / "left-over").touch()
    make_venv(requirements, folder)

    assert ("2.0", False) == (says(venv), (venv / "left-over").exists())
    assert [venv] == list(folder.parent.iterdir())


def test_what_pip_can_not_install_is_told_and_is_no_environment(tmp_path: Path) -> None:
    requirements, folder = tmp_path / "said.txt", tmp_path / "said"
    requirements.write_text(f"{tmp_path}/said-9.0-py3-none-any.whl\n")

    for _ in range(2):
        with pytest.raises(
            VenvFailed, match=r"(?s)said\.txt pins must install for .*No such file or directory.*said-9"
        ):
            make_venv(requirements, folder)


def test_packages_that_do_not_fit_each_other_are_no_environment(tmp_path: Path) -> None:
    requirements = tmp_path / "said.txt"
    requirements.write_text(f"{write_wheel(tmp_path, '1.0', needs='Requires-Python: <3')}\n")

    with pytest.raises(VenvFailed, match="requires a different Python"):
        make_venv(requirements, tmp_path / "said")


def test_a_requirements_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(VenvFailed, match=r"made from a requirements file, got .*no\.txt: No such file.* Name one"):
        make_venv(tmp_path / "no.txt")


def test_an_environment_lies_in_the_checkout_or_in_the_cache_of_an_installed_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    assert Path(module.__file__).parents[2] / ".venv-kserve" == venv_folder("kserve")

    monkeypatch.setattr(module, "_PROJECT", tmp_path)

    assert tmp_path / "cache/overnight/venvs/kserve" == venv_folder("kserve")


def test_what_an_environment_made_by_hand_lacks_is_told_on_stderr(tmp_path: Path) -> None:
    command = (sys.executable, "-m", "infra.local.venv", str(tmp_path / "no.txt"))
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert (1, "") == (done.returncode, done.stdout)
    assert "made from a requirements file" in done.stderr
