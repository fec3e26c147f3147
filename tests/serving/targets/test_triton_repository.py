"""Versions that appear whole in a model's folder, whatever ends the process that writes them."""

from __future__ import annotations

import shutil
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from serving.errors import EndpointFailed
from serving.model.batching import BatchingConfig
from serving.model.contract import Column, Contract, Input, Output
from serving.model.interface import Engine
from serving.model.pin import ModelPin
from serving.model.release import Release, Scaling
from serving.targets import ReleaseFiles
from serving.targets.triton_repository import (
    CONFIG_FILE,
    parse_instances,
    read_releases,
    render_config,
    replace_file,
    replace_version,
    set_instances,
)

_RELEASE = Release(
    endpoint="fraud",
    pin=ModelPin(name="m", version="1", model_id=None, source="s", digest="d"),
    contract=Contract(inputs=(), outputs=()),
)


def render_text(folder: Path, text: str) -> ReleaseFiles:
    tree = folder / "files"
    (tree / "code").mkdir(parents=True, exist_ok=True)
    (tree / "code/module.py").write_text(text)
    files = {"fraud/config.pbtxt": b"", "fraud/1/model.py": text.encode()}
    files["fraud/1/release.json"] = _RELEASE.model_dump_json().encode()
    return ReleaseFiles(files=files, trees={"fraud/1/model": tree})


def put(folder: Path, text: str) -> Path:
    fraud = folder / "repository/fraud"
    with replace_version(fraud, "1", render_text(folder, text)):
        replace_file(fraud / CONFIG_FILE, render_config("fraud", _RELEASE, ["1"]))
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
    with pytest.raises(ZeroDivisionError), replace_version(fraud, "1", render_text(tmp_path, "new")):
        raise ZeroDivisionError

    assert before == files(fraud)


def test_on_an_error_of_the_first_version_nothing_is_there(tmp_path: Path) -> None:
    fraud = tmp_path / "repository/fraud"
    with pytest.raises(ZeroDivisionError), replace_version(fraud, "1", render_text(tmp_path, "new")):
        raise ZeroDivisionError

    assert not fraud.exists()


def test_a_version_whose_tree_can_not_be_read_leaves_what_was_there(tmp_path: Path) -> None:
    fraud = put(tmp_path, "old")
    before = files(fraud)
    missing = ReleaseFiles(files={}, trees={"fraud/1/model": tmp_path / "nowhere"})
    with pytest.raises(FileNotFoundError), replace_version(fraud, "1", missing):
        pass

    assert before == files(fraud)


_KILLED = """
import os, signal, sys
from pathlib import Path
from serving.targets import ReleaseFiles
from serving.targets.triton_repository import replace_version

renames = 0
rename = Path.rename


def counted(self, target):
    global renames
    if renames == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    renames += 1
    return rename(self, target)


Path.rename = counted
with replace_version(Path(sys.argv[1]), "1", ReleaseFiles(files={"fraud/1/model.py": b"new"})):
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_process_that_is_killed_anywhere_leaves_a_whole_version_once_another_comes(
    tmp_path: Path, renames: int
) -> None:
    fraud = put(tmp_path, "old")
    killed = subprocess.run([sys.executable, "-c", _KILLED, str(fraud), str(renames)], check=False)
    with replace_version(fraud, "2", ReleaseFiles(files={"fraud/2/model.py": b"other"})):
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
            with replace_version(fraud, "2", ReleaseFiles(files=files)):
                replace_file(fraud / CONFIG_FILE, render_config("fraud", _RELEASE, ["1", "2"]))
            replace_file(fraud / CONFIG_FILE, render_config("fraud", _RELEASE, ["1"]))
            shutil.rmtree(fraud / "2")

    with ThreadPoolExecutor(1) as threads:
        changing = threads.submit(put_and_drop)
        while not changing.done():
            assert read_releases(fraud) in (version_1, {**version_1, "2": _RELEASE})
        changing.result()


def test_a_release_that_the_config_names_and_that_is_stays_missing_is_an_error(tmp_path: Path) -> None:
    fraud = put(tmp_path, "old")
    (fraud / "1/release.json").unlink()

    with pytest.raises(
        EndpointFailed, match=r"config\.pbtxt must name releases that are there, got no .*1/release\.json"
    ):
        read_releases(fraud)


CONTRACT = Contract(
    inputs=(
        Input(name="x", dtype="float32", shape=(2, 3), columns=(Column(name="x", dtype="float32", shape=(2, 3)),)),
        Input(name='a "quoted"\nname é', dtype="str", columns=(Column(name="t", dtype="str"),)),
        Input(name="when", dtype="datetime64[ns]", columns=(Column(name="when", dtype="datetime64[ns]"),)),
    ),
    outputs=(Output(name="score", dtype="float64"), Output(name="ok", dtype="bool", shape=(4,))),
)
RELEASE = Release(
    endpoint="fraud",
    pin=ModelPin(name="m", version="3", model_id=None, source="s", digest="d"),
    contract=CONTRACT,
)


def parse(config: str) -> Any:
    """Parse a config as Triton does: a field that its schema has not, or a value of another type, is an error."""
    pytest.importorskip("tritonclient", reason="pip install -e '.[dev]' brings tritonclient")
    with warnings.catch_warnings():
        # protobuf's, about code that was generated for the release before.
        warnings.simplefilter("ignore", UserWarning)
        from google.protobuf import text_format
        from tritonclient.grpc import model_config_pb2
    return text_format.Parse(config, model_config_pb2.ModelConfig())


def test_the_config_has_the_settings_of_the_release() -> None:
    batching = BatchingConfig(batch_size_max=32, wait_ms_max=2.5)
    release = RELEASE.model_copy(update={"batching": batching, "rows_max": 100})
    config = parse(render_config("fraud", release, ["10", "9"]))

    assert ("fraud", "python", 100) == (config.name, config.backend, config.max_batch_size)
    assert [9, 10] == list(config.version_policy.specific.versions)
    assert [32] == list(config.dynamic_batching.preferred_batch_size)
    assert 2500 == config.dynamic_batching.max_queue_delay_microseconds
    # With one, requests lie for half a second now and then.
    assert not config.dynamic_batching.HasField("default_queue_policy")


def test_it_names_every_tensor_with_its_type_and_the_shape_of_a_row() -> None:
    config = parse(render_config("fraud", RELEASE, ["3"]))
    names = type(config.input[0]).DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number

    assert [
        ("x", "TYPE_FP32", [2, 3]),
        ('a "quoted"\nname é', "TYPE_STRING", [1]),
        ("when", "TYPE_INT64", [1]),
        ("score", "TYPE_FP64", [1]),
        ("ok", "TYPE_BOOL", [4]),
    ] == [(each.name, names[each.data_type].name, list(each.dims)) for each in (*config.input, *config.output)]


def test_requests_are_not_collected_where_a_batch_has_one_row() -> None:
    assert not parse(render_config("fraud", RELEASE, ["3"])).HasField("dynamic_batching")


def test_a_pass_larger_than_a_request_may_be_is_one_that_triton_lets_through() -> None:
    release = RELEASE.model_copy(update={"batching": BatchingConfig(batch_size_max=512), "rows_max": 8})

    assert 512 == parse(render_config("fraud", release, ["3"])).max_batch_size


@pytest.mark.parametrize(("replicas_min", "count"), [(0, 1), (1, 1), (3, 3)])
def test_replicas_are_instances_of_which_a_loaded_model_has_one_at_least(replicas_min: int, count: int) -> None:
    release = RELEASE.model_copy(update={"scaling": Scaling(replicas_min=replicas_min, replicas_max=8)})
    text = render_config("fraud", release, ["3"])
    (group,) = parse(text).instance_group

    assert (count, "KIND_CPU") == (group.count, group.Kind.Name(group.kind))
    assert count == parse_instances(text)


def test_an_engine_on_a_gpu_has_its_instances_there() -> None:
    text = render_config("fraud", RELEASE.model_copy(update={"engine": Engine(device="cuda")}), ["3"])
    (group,) = parse(text).instance_group

    assert "KIND_GPU" == group.Kind.Name(group.kind)


def test_another_number_of_instances_changes_nothing_else() -> None:
    text = render_config("fraud", RELEASE, ["3"])
    more = set_instances(text, 12)

    assert 12 == parse_instances(more)
    assert text == set_instances(more, 1)
    assert render_config("fraud", RELEASE, ["3"], instances=12) == more
