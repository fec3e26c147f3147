"""Versions that appear whole in a model's folder, whatever ends the process that writes them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from serving.errors import EndpointFailed
from serving.model.contract import Contract
from serving.model.registry import ModelPin
from serving.model.release import Release
from serving.targets import Rendered
from serving.targets.triton_config import write_config
from serving.targets.triton_repository import CONFIG_FILE, read_releases, replaced, write_whole

_RELEASE = Release(
    endpoint="fraud",
    pin=ModelPin(name="m", version="1", model_id=None, source="s", digest="d"),
    contract=Contract(inputs=(), outputs=()),
)


def rendered(folder: Path, text: str) -> Rendered:
    tree = folder / "files"
    (tree / "code").mkdir(parents=True, exist_ok=True)
    (tree / "code/module.py").write_text(text)
    files = {"fraud/config.pbtxt": b"", "fraud/1/model.py": text.encode()}
    files["fraud/1/release.json"] = _RELEASE.model_dump_json().encode()
    return Rendered(files=files, trees={"fraud/1/model": tree})


def put(folder: Path, text: str) -> Path:
    fraud = folder / "repository/fraud"
    with replaced(fraud, "1", rendered(folder, text)):
        write_whole(fraud / CONFIG_FILE, write_config("fraud", _RELEASE, ["1"]))
    return fraud


def files(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_version_replaces_the_one_before_and_nothing_else_is_left(tmp_path: Path) -> None:
    put(tmp_path, "old")
    fraud = put(tmp_path, "new")

    assert {CONFIG_FILE, "1/model.py", "1/release.json", "1/model/code/module.py"} == set(files(fraud))
    assert ("new", "new") == (files(fraud)["1/model.py"], files(fraud)["1/model/code/module.py"])
    assert {"1": _RELEASE} == read_releases(fraud)


def test_on_an_error_what_was_there_comes_back(tmp_path: Path) -> None:
    fraud = put(tmp_path, "old")
    before = files(fraud)
    with pytest.raises(ZeroDivisionError), replaced(fraud, "1", rendered(tmp_path, "new")):
        raise ZeroDivisionError

    assert before == files(fraud)


def test_on_an_error_of_the_first_version_nothing_is_there(tmp_path: Path) -> None:
    fraud = tmp_path / "repository/fraud"
    with pytest.raises(ZeroDivisionError), replaced(fraud, "1", rendered(tmp_path, "new")):
        raise ZeroDivisionError

    assert not fraud.exists()


def test_a_version_whose_tree_can_not_be_read_leaves_what_was_there(tmp_path: Path) -> None:
    fraud = put(tmp_path, "old")
    before = files(fraud)
    missing = Rendered(files={}, trees={"fraud/1/model": tmp_path / "nowhere"})
    with pytest.raises(FileNotFoundError), replaced(fraud, "1", missing):
        pass

    assert before == files(fraud)


_KILLED = """
import os, signal, sys
from pathlib import Path
from serving.targets import Rendered
from serving.targets.triton_repository import replaced

renames = 0
rename = Path.rename


def counted(self, target):
    global renames
    if renames == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    renames += 1
    return rename(self, target)


Path.rename = counted
with replaced(Path(sys.argv[1]), "1", Rendered(files={"fraud/1/model.py": b"new"})):
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_process_that_is_killed_anywhere_leaves_a_whole_version_once_another_comes(
    tmp_path: Path, renames: int
) -> None:
    fraud = put(tmp_path, "old")
    killed = subprocess.run([sys.executable, "-c", _KILLED, str(fraud), str(renames)], check=False)
    with replaced(fraud, "2", Rendered(files={"fraud/2/model.py": b"other"})):
        found = files(fraud)["1/model.py"]

    assert -9 == killed.returncode
    assert ("new" if renames == 2 else "old") == found
    assert not list(fraud.glob(".*"))


def test_a_version_that_the_config_does_not_name_is_none(tmp_path: Path) -> None:
    fraud = put(tmp_path, "old")
    (fraud / "1").rename(fraud / "2")
    (fraud / CONFIG_FILE).unlink()

    assert {} == read_releases(fraud)


def test_who_reads_releases_finds_those_before_or_after_whatever_is_put_and_dropped_meanwhile(tmp_path: Path) -> None:
    fraud, version_1 = put(tmp_path, "old"), {"1": _RELEASE}
    files = {"fraud/2/release.json": _RELEASE.model_dump_json().encode()}

    def put_and_drop() -> None:
        for _ in range(30):
            put(tmp_path, "new")
            with replaced(fraud, "2", Rendered(files=files)):
                write_whole(fraud / CONFIG_FILE, write_config("fraud", _RELEASE, ["1", "2"]))
            write_whole(fraud / CONFIG_FILE, write_config("fraud", _RELEASE, ["1"]))
            shutil.rmtree(fraud / "2")

    with ThreadPoolExecutor(1) as threads:
        changing = threads.submit(put_and_drop)
        while not changing.done():
            assert read_releases(fraud) in (version_1, {**version_1, "2": _RELEASE})
        changing.result()


def test_a_release_that_the_config_names_and_that_is_missing_for_good_is_told(tmp_path: Path) -> None:
    fraud = put(tmp_path, "old")
    (fraud / "1/release.json").unlink()

    with pytest.raises(
        EndpointFailed, match=r"config\.pbtxt must name releases that are there, got no .*1/release\.json"
    ):
        read_releases(fraud)
