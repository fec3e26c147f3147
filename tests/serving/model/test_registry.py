from __future__ import annotations

import importlib
import os
import shutil
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import mlflow
import mlflow.pytorch
import numpy as np
import pytest
import torch
from mlflow.models import ModelSignature
from mlflow.store.artifact.s3_artifact_repo import S3ArtifactRepository
from mlflow.types import ColSpec, Schema

from serving.errors import ModelNotFound, ModelUnfit
from serving.model.loading import check_model_unchanged, load_model
from serving.model.pin import digest_files, digest_folder, read_file_states
from serving.model.python_model import keep_bytecode_out
from serving.model.registry import _download, open_model, resolve_model
from tasks.storage import open_storage
from tests.servers import set_environment
from tests.serving.toys import SCORE, network, tensor
from tests.support import register_network

if TYPE_CHECKING:
    from infra.local.s3 import S3Server

Log = Callable[..., str]


@pytest.fixture(scope="module")
def pair(log_network: Log) -> list[str]:
    """Two versions of one model, the first of them the champion."""
    versions = [log_network("a-pair", network(seed=seed)) for seed in (1, 2)]
    mlflow.MlflowClient().set_registered_model_alias("a-pair", "champion", "1")
    return versions


def not_found(uri: str) -> str:
    with pytest.raises(ModelNotFound) as caught:
        resolve_model(uri)
    return str(caught.value)


def listing(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below a folder, with its time and bytes."""
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()
    }


@pytest.mark.parametrize(
    ("uri", "version"),
    [
        ("models:/a-pair@champion", "1"),
        ("models:/a-pair/1", "1"),
        ("models:/a-pair/2", "2"),
        ("models:/a-pair/latest", "2"),
        ("a-pair@champion", "1"),
        ("a-pair/latest", "2"),
    ],
)
def test_an_alias_a_version_and_latest_are_pinned_to_a_version(pair: list[str], uri: str, version: str) -> None:
    pin = resolve_model(uri).pin

    assert ("a-pair", version, pair[int(version) - 1]) == (pin.name, pin.version, pin.uri)
    assert f"models:/{pin.model_id}" == pin.source


def test_a_version_is_pinned_the_same_by_every_name(pair: list[str]) -> None:
    assert resolve_model("models:/a-pair/1") == resolve_model(pair[0])
    assert resolve_model("models:/a-pair@champion").pin == resolve_model(pair[0]).pin
    assert resolve_model(pair[0]).pin.digest != resolve_model(pair[1]).pin.digest


def test_a_copied_version_has_the_files_of_the_one_that_it_is_a_copy_of(log_network: Log) -> None:
    client = mlflow.MlflowClient()
    original = resolve_model(log_network("in-staging", network(seed=3)))
    client.copy_model_version("models:/in-staging/1", "in-production")
    client.copy_model_version("models:/in-production/1", "abroad")

    for name in ("in-production", "abroad"):
        copied = resolve_model(f"models:/{name}/1")
        assert (name, "1") == (copied.pin.name, copied.pin.version)
        assert (original.folder, original.pin.digest) == (copied.folder, copied.pin.digest)
        assert copied == open_model(name=name, version="1", source=copied.pin.source)


def test_a_copy_without_its_original_is_reported(log_network: Log) -> None:
    log_network("to-go", network(seed=4))
    mlflow.MlflowClient().copy_model_version("models:/to-go/1", "left")
    mlflow.MlflowClient().delete_model_version("to-go", "1")

    with pytest.raises(ModelUnfit, match=r"left version 1 must be readable at models:/to-go/1, got: .*not found"):
        resolve_model("models:/left/1")


@pytest.mark.usefixtures("pair")
def test_a_promoted_alias_resolves_to_another_version_and_the_old_pin_stays() -> None:
    client = mlflow.MlflowClient()
    before = resolve_model("models:/a-pair@champion").pin
    client.set_registered_model_alias("a-pair", "champion", "2")
    after = resolve_model("models:/a-pair@champion").pin
    client.set_registered_model_alias("a-pair", "champion", "1")

    assert ("1", "2") == (before.version, after.version)
    assert before == open_model(name=before.name, version=before.version, source=before.source).pin


@pytest.mark.usefixtures("pair")
def test_the_message_for_an_unknown_version_or_alias_lists_those_that_exist() -> None:
    have = "which has versions [1, 2] and aliases {'champion': 1}."

    assert not_found("models:/a-pair/9") == f"models:/a-pair/9 must name a version or an alias of 'a-pair', {have}"
    assert not_found("models:/a-pair@nobody").endswith(have)


@pytest.mark.usefixtures("pair")
@pytest.mark.parametrize(
    "uri", ["models:/absent/1", "models:/absent@champion", "models:/absent/latest", "models:/it's/1"]
)
def test_the_message_for_an_unknown_model_lists_those_that_exist_and_the_registry(registry: Path, uri: str) -> None:
    message = not_found(uri)

    assert "'a-pair'" in message
    assert f"sqlite:///{registry}/mlflow.db has no model" in message


@pytest.mark.parametrize(
    "uri", ["", "models:/", "models:/a-pair", "models:/a-pair/champion", "runs:/1/model", "s3://lake/model", "a/b/1"]
)
def test_the_message_for_an_invalid_address_explains_valid_ones(uri: str) -> None:
    assert "must be models:/NAME@ALIAS, models:/NAME/VERSION or models:/NAME/latest" in not_found(uri)


@pytest.mark.usefixtures("registry")
def test_a_registry_that_does_not_answer_is_not_a_registry_without_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "")
    mlflow.set_registry_uri("http://somebody:secret@127.0.0.1:9")
    try:
        message = not_found("models:/a-pair/1")
    finally:
        mlflow.set_registry_uri(None)

    assert message.startswith("The registry must answer for models:/a-pair/1, got: ")
    assert "secret" not in message


@pytest.mark.usefixtures("pair")
def test_a_long_list_of_models_is_cut_short() -> None:
    client = mlflow.MlflowClient()
    for at in range(25):
        client.create_registered_model(f"a-model-{at:02d}")
    message = not_found("models:/absent/1")
    for at in range(25):
        client.delete_registered_model(f"a-model-{at:02d}")

    assert "'a-model-00'" in message
    assert "'a-model-24'" not in message
    assert " and more. Register it" in message


def test_the_digest_changes_with_any_byte_and_any_name(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / "weights"
    file.touch()
    seen = []
    for name, content in [("weights", b"ab"), ("weights", b"aB"), ("weights", b"ab\0"), ("other", b"ab")]:
        file = file.rename(tmp_path / "data" / name)
        file.write_bytes(content)
        seen.append(digest_folder(tmp_path))
    (tmp_path / "empty").touch()
    seen.append(digest_folder(tmp_path))

    assert 5 == len(set(seen))


def test_files_are_hashed_again_once_one_of_them_was_written(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"one")
    states = [read_file_states(tmp_path)]
    digests = [digest_files(tmp_path, states[0])]
    os.utime(tmp_path / "weights", ns=(0, 0))
    changed = (tmp_path / "weights").stat()
    # The same size, and the time of modification put back: what no program can set has moved on.
    (tmp_path / "weights").write_bytes(b"two")
    os.utime(tmp_path / "weights", ns=(changed.st_atime_ns, changed.st_mtime_ns))
    states.append(read_file_states(tmp_path))
    digests.append(digest_files(tmp_path, states[1]))

    assert states[0] != states[1]
    assert digests[0] != digests[1] == digest_folder(tmp_path)


def test_the_digest_does_not_depend_on_place_or_time(tmp_path: Path, pt2: str) -> None:
    resolved = resolve_model(pt2)
    copy = tmp_path / "copy"
    shutil.copytree(resolved.folder, copy)
    for path in copy.rglob("*"):
        os.utime(path, (0, 0))

    assert resolved.pin.digest == digest_folder(copy)


def test_the_digest_stays_where_mlflow_itself_loads_the_model_by_its_name(registry: Path) -> None:
    uri = register_network(f"loaded_{uuid.uuid4().hex[:8]}", seed=0)
    before = resolve_model(uri)
    mlflow.pytorch.load_model(uri)

    assert (before.folder / "registered_model_meta").is_file()
    assert before.pin == resolve_model(uri).pin


def test_resolving_loading_and_running_a_model_writes_nothing_into_the_registry(
    log_code: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    uri = log_code("written", 'x["a"].to_numpy() * 2', Schema([ColSpec("double", "a")]), Schema([tensor("float64")]))
    resolved = resolve_model(uri)
    before = listing(resolved.folder)
    contract = resolved.contract({}, {})
    model = load_model(resolved, contract)

    assert before == listing(resolved.folder)
    assert [2.0] == model.predict({"a": np.ones(1)})["prediction"].tolist()
    # What a model's own code imports later may leave Python's caches: they do not make it another model.
    assert before.items() <= listing(resolved.folder).items()
    assert resolved.pin == resolve_model(uri).pin


def test_a_library_that_a_model_imports_keeps_its_bytecode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    name = f"imported_{uuid.uuid4().hex}"
    for part in ("model", "library"):
        (tmp_path / part).mkdir()
        (tmp_path / part / f"{name}_{part}.py").touch()
        monkeypatch.syspath_prepend(tmp_path / part)
    # As a folder of MLflow's may be named.
    (tmp_path / "link").symlink_to(tmp_path / "model")
    with keep_bytecode_out(tmp_path / "link"):
        importlib.import_module(f"{name}_model")
        importlib.import_module(f"{name}_library")

    assert [f"{name}_library"] == [each.name.split(".")[0] for each in tmp_path.rglob("*.pyc")]


def test_a_version_without_its_files_is_unfit(log_network: Log) -> None:
    uri = log_network("emptied", network(), form="pickle")
    resolved = resolve_model(uri)
    (resolved.folder / "MLmodel").unlink()

    with pytest.raises(ModelUnfit, match="emptied version 1 must hold an MLmodel, got none"):
        resolve_model(uri)


def test_a_version_whose_model_was_deleted_is_unfit(log_network: Log) -> None:
    uri = log_network("deleted", network(), form="pickle")
    mlflow.MlflowClient().delete_logged_model(str(resolve_model(uri).pin.model_id))

    with pytest.raises(ModelUnfit, match="deleted version 1 must be readable at models:/m-"):
        resolve_model(uri)


@pytest.mark.parametrize("name", ["plain", "with space", "hash#mark?"])
@pytest.mark.parametrize("address", [str, Path.as_uri])
def test_files_are_found_in_folders_of_any_name(
    tmp_path: Path, pt2: str, name: str, address: Callable[[Path], str]
) -> None:
    copy = tmp_path / name
    shutil.copytree(resolve_model(pt2).folder, copy)

    assert copy == open_model(name="pt2", version="1", source=address(copy)).folder


@pytest.fixture(scope="module")
def stored(running_s3: S3Server, registry: Path) -> str:
    experiment = mlflow.MlflowClient().create_experiment("remote", artifact_location="s3://lake/mlflow")
    signature = ModelSignature(Schema([tensor("float32", 4, name="x")]), SCORE)
    with set_environment(running_s3.environment), mlflow.start_run(experiment_id=experiment):
        logged = mlflow.pytorch.log_model(
            network(),
            name="model",
            signature=signature,
            input_example=torch.zeros(3, 4),
            pip_requirements=["mlflow"],
            registered_model_name="remote",
        )
    return f"models:/remote/{logged.registered_model_version}"


@pytest.fixture
def remote(stored: str, s3: S3Server) -> str:
    """A network whose files are on S3."""
    return stored


def test_files_on_s3_are_downloaded_once_and_used_again(
    remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = resolve_model(remote)
    before = listing(tmp_path)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    again = resolve_model(remote)

    assert first == again
    assert before == listing(tmp_path)
    assert tmp_path / "overnight" / "models" / str(first.pin.model_id) == first.folder
    assert [first.folder] == list(first.folder.parent.iterdir())


def test_a_model_from_s3_answers_as_the_one_that_was_logged(
    remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    resolved = resolve_model(remote)
    model = load_model(resolved, resolved.contract({}, {}))
    x = np.random.default_rng(0).random((5, 4), dtype=np.float32)
    with model.slot():
        found = model.predict({"x": x})["score"]
        expected = network()(torch.from_numpy(x)).numpy()

    assert np.array_equal(expected[:, 0], found)


def test_the_loser_of_a_download_race_uses_the_winners_files(
    remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    resolved = resolve_model(remote)
    before = listing(tmp_path)
    location = mlflow.MlflowClient().get_logged_model(str(resolved.pin.model_id)).artifact_location
    assert resolved.folder == _download(str(location), resolved.pin.model_id)

    assert before == listing(tmp_path)


@pytest.mark.usefixtures("s3")
def test_versions_of_one_address_have_the_files_that_are_there_when_they_are_resolved(
    pt2: str, log_network: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where each training writes over the last one's files, and registers their address again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    address = "s3://lake/rewritten/model"
    store = open_storage(address)
    models = [resolve_model(uri) for uri in (pt2, log_network("rewritten", network(seed=3)), pt2)]
    found = []
    for version, model in enumerate(models):
        store.delete([file.path for file in store.entries()])
        S3ArtifactRepository(address).log_artifacts(str(model.folder))
        found.append(open_model(name="rewritten", version=str(version), source=address))
        # What has no ETags is downloaded for each run, and kept by its digest.
        assert model.pin.digest == _download(address, None).name

    assert [model.pin.digest for model in models] == [each.pin.digest for each in found]
    assert found[0].folder == found[2].folder != found[1].folder


@pytest.mark.usefixtures("s3")
def test_files_that_are_not_at_their_source_are_unfit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for source in ("s3://absent-bucket/model", "s3://lake/absent"):
        with pytest.raises(ModelUnfit, match="gone version 3 must"):
            open_model(name="gone", version="3", source=source)

    assert {} == listing(tmp_path)


def rewrite(file: Path, old: str, new: str) -> None:
    """Change a file's bytes in place, and give it the size and the modification time that it had."""
    before = file.stat()
    assert len(old) == len(new)
    file.write_text(file.read_text().replace(old, new))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def log_doubler(log_code: Log, name: str) -> str:
    signature = (Schema([ColSpec("double", "a")]), Schema([tensor("float64")]))
    return log_code(name, 'x["a"].to_numpy() * 2', *signature)


@pytest.mark.parametrize("times", ["changed", "changed and back"])
def test_a_model_whose_files_are_swapped_between_digest_and_load_is_refused(log_code: Log, times: str) -> None:
    resolved = resolve_model(log_doubler(log_code, f"swapped-{len(times)}"))
    script = resolved.folder / "script.py"
    rewrite(script, "* 2", "* 3")
    if times == "changed and back":
        rewrite(script, "* 3", "* 2")

    with pytest.raises(ModelUnfit, match=r"must stay as they were when they were hashed .* the first script\.py"):
        load_model(resolved, resolved.contract({}, {}))


def test_a_model_whose_files_are_swapped_while_they_load_is_refused(log_code: Log) -> None:
    resolved = resolve_model(log_doubler(log_code, "swapping"))
    script = resolved.folder / "script.py"
    # It changes itself as it is loaded, as somebody else may.
    script.write_text(script.read_text() + "\nfrom pathlib import Path\nPath(__file__).write_bytes(b'# gone')\n")
    resolved = resolve_model("models:/swapping/1")

    with pytest.raises(ModelUnfit, match=r"but 1 in .* were changed, the first script\.py"):
        load_model(resolved, resolved.contract({}, {}))


def test_a_network_whose_files_are_swapped_between_digest_and_load_is_refused(log_network: Log) -> None:
    resolved = resolve_model(log_network("swapped-network", network(seed=5)))
    other = resolve_model(log_network("swapped-network", network(seed=6)))
    for file in (path for path in other.folder.rglob("*.pt2")):
        shutil.copy(file, resolved.folder / file.relative_to(other.folder))

    with pytest.raises(ModelUnfit, match="must stay as they were when they were hashed"):
        load_model(resolved, resolved.contract({}, {}))


def test_a_loaded_model_that_may_still_read_its_files_is_held_to_them(log_code: Log) -> None:
    resolved = resolve_model(log_doubler(log_code, "late"))
    load_model(resolved, resolved.contract({}, {}))
    check_model_unchanged(resolved.pin)
    (resolved.folder / "later.py").write_text("x = 1")

    with pytest.raises(ModelUnfit, match=r"the first later\.py"):
        check_model_unchanged(resolved.pin)


def test_a_loaded_model_whose_files_were_deleted_is_unfit(log_code: Log) -> None:
    resolved = resolve_model(log_doubler(log_code, "deleted-later"))
    load_model(resolved, resolved.contract({}, {}))
    shutil.rmtree(resolved.folder)

    with pytest.raises(ModelUnfit, match="were changed, the first MLmodel"):
        check_model_unchanged(resolved.pin)


def test_a_network_in_memory_needs_its_files_no_more(log_network: Log) -> None:
    resolved = resolve_model(log_network("in-memory", network(seed=7)))
    load_model(resolved, resolved.contract({}, {}))
    shutil.rmtree(resolved.folder)
    check_model_unchanged(resolved.pin)


def test_a_link_to_a_folder_among_a_models_files_is_refused(tmp_path: Path, pt2: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(resolve_model(pt2).folder, copy)
    (tmp_path / "code").mkdir()
    (copy / "code").symlink_to(tmp_path / "code")

    with pytest.raises(ModelUnfit, match="must hold no link to a folder"):
        open_model(name="pt2", version="1", source=str(copy))
