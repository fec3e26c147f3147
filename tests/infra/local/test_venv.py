import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from uv import find_uv_bin

from infra.local.venv import RegistryUnreachable, VenvFailed, make_venv, venv_folder

pytestmark = pytest.mark.servers

BY_PIP_AND_UV = pytest.mark.parametrize("uv", [None, find_uv_bin()], ids=["pip", "uv"])


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


@BY_PIP_AND_UV
def test_an_environment_is_created_once_and_again_when_its_requirements_change(uv: str | None, tmp_path: Path) -> None:
    requirements, folder = tmp_path / "said.txt", tmp_path / "environments/said"
    requirements.write_text(f"{write_wheel(tmp_path, '1.0')}\n")

    venv = make_venv(requirements, folder, uv=uv)
    made = (venv / "pyvenv.cfg").stat().st_ino
    again = make_venv(requirements, folder, uv=uv)

    assert (folder, folder) == (venv, again)
    assert (made, "1.0") == ((venv / "pyvenv.cfg").stat().st_ino, says(venv))

    requirements.write_text(f"{write_wheel(tmp_path, '2.0')}\n")
    (venv / "left-over").touch()
    make_venv(requirements, folder, uv=uv)

    assert ("2.0", False) == (says(venv), (venv / "left-over").exists())
    assert [venv] == list(folder.parent.iterdir())


def test_what_pip_can_not_install_is_reported_and_leaves_no_environment(tmp_path: Path) -> None:
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


def test_the_same_requirements_of_two_checkouts_share_an_environment_in_the_users_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    one, two = tmp_path / "one/said.txt", tmp_path / "two/said.txt"
    for requirements in (one, two):
        requirements.parent.mkdir()
        requirements.write_text(f"{write_wheel(tmp_path, '1.0')}\n")
    shared = make_venv(one)

    assert shared == make_venv(two) == venv_folder(two)
    assert [shared] == list((tmp_path / "cache/overnight/venvs").glob("said-*"))

    two.write_text(f"{write_wheel(tmp_path, '2.0')}\n")
    other = make_venv(two)

    assert ("1.0", "2.0") == (says(shared), says(other))


def test_one_of_several_callers_creates_an_environment_and_a_half_made_one_is_created_again(tmp_path: Path) -> None:
    requirements, folder = tmp_path / "said.txt", tmp_path / "environments/said"
    requirements.write_text(f"{write_wheel(tmp_path, '1.0')}\n")
    # As a process that was killed leaves it.
    (folder / "lib").mkdir(parents=True)
    (folder / "lib/half").touch()
    with ThreadPoolExecutor(3) as threads:
        made = list(threads.map(lambda _: make_venv(requirements, folder), range(3)))
        stamps = {(each / "pyvenv.cfg").stat().st_ino for each in made}

    assert ([folder] * 3, "1.0", 1) == (made, says(folder), len(stamps))
    assert not (folder / "lib/half").exists()


@BY_PIP_AND_UV
def test_a_registry_that_does_not_answer_is_distinguished_from_requirements_that_do_not_exist(
    uv: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held_port: int
) -> None:
    requirements = tmp_path / "said.txt"
    requirements.write_text("said==1.0\n")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{held_port}/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    with pytest.raises(RegistryUnreachable, match=r"said\.txt pins must install"):
        make_venv(requirements, tmp_path / "said", uv=uv)

    (tmp_path / "empty").mkdir()
    requirements.write_text(f"--no-index\n--find-links {tmp_path}/empty\nsaid==1.0\n")
    with pytest.raises(VenvFailed, match=r"No matching distribution|was not found") as failed:
        make_venv(requirements, tmp_path / "said", uv=uv)

    assert VenvFailed is failed.type


def test_what_an_environment_made_by_hand_lacks_is_reported_on_stderr(tmp_path: Path) -> None:
    command = (sys.executable, "-m", "infra.local.venv", str(tmp_path / "no.txt"))
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert (1, "") == (done.returncode, done.stdout)
    assert "made from a requirements file" in done.stderr
