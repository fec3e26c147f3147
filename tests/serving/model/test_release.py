"""A release that was opened: what several requests get that are passed together."""

from __future__ import annotations

import asyncio
import platform
import shutil
import threading
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.errors import DependencyFault, DeviceLost, EnvironmentUnusable, ModelFailed, ModelUnfit
from serving.model.batching import BatchingConfig
from serving.model.contract import Contract
from serving.model.environment_choice import OwnEnvironment
from serving.model.forward import Forward
from serving.model.interface import Predictions
from serving.model.pin import ModelPin, digest_folder
from serving.model.registry import resolve_model
from serving.model.release import (
    MODEL_FOLDER,
    RELEASE_FILE,
    PredictionError,
    Predictor,
    Release,
    Runtime,
    open_predictor,
    open_release,
    unwrap_prediction,
)
from serving.model.torch_model import TorchModel
from serving.model.uv import PackageSource
from serving.targets import ReleaseFiles
from serving.targets.folder import write_folder
from tests.model_wheels import OLD_VERSION, PACKAGE, write_model_wheels
from tests.releases import release_of, rows
from tests.serving.toys import Picky, matrix
from tests.support import register_script


def folder_of(uri: str, folder: Path, *, batching: BatchingConfig | None = None) -> Path:
    """Write a release of a registered model as it travels."""
    resolved = resolve_model(uri)
    batching = batching or BatchingConfig(batch_size_max=64)
    release = Release(endpoint="e", pin=resolved.pin, contract=resolved.contract({}, {}), batching=batching)
    shutil.copytree(resolved.folder, folder / MODEL_FOLDER)
    (folder / RELEASE_FILE).write_text(release.model_dump_json())
    return folder


@pytest.fixture(scope="module")
def runtime(registry: Path, tmp_path_factory: pytest.TempPathFactory) -> Generator[Runtime]:
    """A model that doubles a, fails on 13 and has nothing to say of 7."""
    lines = (
        "if (model_input['a'] == 13).any(): raise ValueError('unlucky')",
        "model_input = model_input.replace(7, float('nan'))",
    )
    with open_release(
        folder_of(register_script("unlucky", "\n        ".join(lines)), tmp_path_factory.mktemp("release"))
    ) as runtime:
        yield runtime


def test_a_release_of_0_1_is_read_with_what_it_called_a_dial(runtime: Runtime) -> None:
    held = runtime.release.model_dump()
    held["dial"] = held.pop("batching")

    assert runtime.release == Release.model_validate(held)


def a(*values: float) -> dict[str, np.ndarray]:
    return {"a": np.array(values, np.float32)}


def test_each_request_gets_its_own_rows(runtime: Runtime) -> None:
    answers = runtime.predict_requests([a(1, 2), a(3), a(4, 5, 6)])

    assert [[2, 4], [6], [8, 10, 12]] == [
        answer["prediction"].tolist() for answer in answers if not isinstance(answer, ModelFailed)
    ]
    assert [] == runtime.predict_requests([])


def test_a_row_that_fails_or_has_no_finite_prediction_fails_only_its_own_request(runtime: Runtime) -> None:
    first, unlucky, infinite, last = runtime.predict_requests([a(1), a(2, 13), a(7), a(3)])

    assert "got none for row 1: ValueError: unlucky." in str(unlucky)
    assert "got none for row 0 (prediction): prediction is not finite." in str(infinite)
    assert isinstance(first, dict)
    assert isinstance(last, dict)
    assert ([2], [6]) == (first["prediction"].tolist(), last["prediction"].tolist())


def test_requests_that_all_fail_get_an_error_each_and_the_next_is_answered(runtime: Runtime) -> None:
    assert all(isinstance(answer, ModelFailed) for answer in runtime.predict_requests([a(13), a(13, 13)]))
    assert [2] == runtime.predict(a(1))["prediction"].tolist()


def test_one_request_raises_what_it_fails_on(runtime: Runtime) -> None:
    with pytest.raises(ModelFailed, match="unlucky"):
        runtime.predict(a(13))


def test_a_dependency_that_fails_is_reported_at_once_and_not_as_a_bad_row(registry: Path, tmp_path: Path) -> None:
    line = "if (model_input['a'] == 13).any(): raise ConnectionRefusedError('nobody listens')"
    with open_release(folder_of(register_script("cut-off", line), tmp_path / "release")) as runtime:
        answers = runtime.predict_requests([a(1), a(13)])
        with pytest.raises(DependencyFault, match=r"got ConnectionRefusedError: nobody listens \(tries: 1\)"):
            runtime.predict(a(13))

        assert [DependencyFault] * 2 == [type(answer) for answer in answers]
        assert [2] == runtime.predict(a(1))["prediction"].tolist()


def test_the_callers_arrays_are_not_changed(runtime: Runtime) -> None:
    rows = a(1, 13)
    runtime.predict_requests([rows])

    assert [1, 13] == rows["a"].tolist()


def test_more_rows_than_one_pass_takes_are_all_answered(runtime: Runtime) -> None:
    values = np.arange(20, 5020, dtype=np.float32)

    np.testing.assert_array_equal(values * 2, runtime.predict({"a": values})["prediction"])


@pytest.fixture(scope="module")
def counting(registry: Path, tmp_path_factory: pytest.TempPathFactory) -> Generator[Runtime]:
    """A model that tells how many rows its pass had, behind batching of 16 rows."""
    uri = register_script("counting", "model_input = model_input * 0 + len(model_input) / 2")
    folder = folder_of(uri, tmp_path_factory.mktemp("release"), batching=BatchingConfig(batch_size_max=16))
    with open_release(folder) as runtime:
        yield runtime


@settings(max_examples=20)
@given(rows=st.lists(st.integers(1, 40), max_size=20))
def test_requests_are_passed_together_up_to_the_rows_of_the_batching_and_a_larger_one_alone(
    counting: Runtime, rows: list[int]
) -> None:
    answers = counting.predict_requests([a(*range(count)) for count in rows])
    together = [answer["prediction"] for answer in answers if isinstance(answer, dict)]

    assert rows == [len(each) for each in together]
    assert all(each.max() <= max(16, count) for count, each in zip(rows, together, strict=True))


def test_requests_are_passed_in_order_with_as_many_rows_as_the_batching_allows(counting: Runtime) -> None:
    answers = counting.predict_requests([a(*range(count)) for count in (8, 8, 1, 20, 3, 13, 1)])

    assert [16, 16, 1, 20, 16, 16, 1] == [answer["prediction"][0] for answer in answers if isinstance(answer, dict)]


def test_texts_are_tokenised_and_answered_in_their_order(minilm: str, glosses: list[str], tmp_path: Path) -> None:
    texts = np.array(glosses[:20], dtype=object)
    with open_release(folder_of(minilm, tmp_path / "release")) as runtime:
        (name,) = (value.name for value in runtime.release.contract.inputs)
        together = runtime.predict_requests([{name: texts[:3]}, {name: texts[3:]}])
        whole = runtime.predict({name: texts})

    ((output, expected),) = whole.items()
    found = np.concatenate([answer[output] for answer in together if isinstance(answer, dict)])
    np.testing.assert_allclose(expected, found, rtol=0, atol=1e-6)


def test_a_folder_whose_model_does_not_load_is_refused(sleepy: str, tmp_path: Path) -> None:
    folder = folder_of(sleepy, tmp_path / "release")
    (folder / MODEL_FOLDER / "scripted.py").write_text("no code")
    release = Release.model_validate_json((folder / RELEASE_FILE).read_text())
    pin = release.pin.model_copy(update={"digest": digest_folder(folder / MODEL_FOLDER)})
    (folder / RELEASE_FILE).write_text(release.model_copy(update={"pin": pin}).model_dump_json())

    with pytest.raises(ModelUnfit, match="must load here"):
        open_release(folder)


def test_a_folder_with_another_model_than_its_release_is_refused(sleepy: str, tmp_path: Path) -> None:
    folder = folder_of(sleepy, tmp_path / "release")
    script = folder / MODEL_FOLDER / "scripted.py"
    script.write_text(script.read_text().replace("* 2", "* 3"))

    with pytest.raises(ModelUnfit, match=r"must be those of models:/sleepy/1 \(digest .*\), got digest .*Deploy"):
        open_release(folder)


CONTRACT: Contract = matrix(4)
PIN = ModelPin(name="toy", version="1", model_id=None, source="", digest="0" * 64)


def predictor_of(module: torch.nn.Module) -> Predictor:
    model = TorchModel(module, CONTRACT)
    forward = Forward(model=model, contract=CONTRACT, batch_size=64, proven=True)
    release = Release(endpoint="toy", pin=PIN, contract=CONTRACT, batching=BatchingConfig(batch_size_max=64))
    return Predictor(Runtime(release=release, model=model, _forward=forward))


def test_of_requests_passed_together_only_the_one_with_a_bad_row_fails() -> None:
    x_NF = rows(6, 4)
    x_NF[3, 0] = 1
    predictor = predictor_of(Picky())
    first, second, third = asyncio.run(predictor.predict_requests([{"x": x_NF[at : at + 2]} for at in (0, 2, 4)]))
    (alone,) = asyncio.run(predictor.predict_requests([{"x": x_NF[:2]}]))
    predictor.close()

    np.testing.assert_allclose(unwrap_prediction(first)["score"], unwrap_prediction(alone)["score"], rtol=0, atol=1e-6)
    assert 2 == len(unwrap_prediction(third)["score"])
    with pytest.raises(ModelFailed, match="no row may begin with 1"):
        unwrap_prediction(second)


def test_every_pass_is_made_in_one_thread_inside_the_slot() -> None:
    seen: set[tuple[str, bool, int]] = set()

    class Telling(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.add((threading.current_thread().name, torch.is_inference_mode_enabled(), torch.get_num_threads()))
            return x.sum(dim=1, keepdim=True)

    async def ask() -> list[list[Predictions | PredictionError]]:
        return await asyncio.gather(*(predictor.predict_requests([{"x": rows(1, 4)}]) for _ in range(8)))

    predictor = predictor_of(Telling())
    asyncio.run(ask())
    predictor.close()
    predictor.close()

    assert {("predict_0", True, 1)} == seen


def test_a_device_that_is_lost_is_reported_from_then_on() -> None:
    class Lost(torch.nn.Module):
        def forward(self, _x: torch.Tensor) -> torch.Tensor:
            message = "CUDA error: an illegal memory access was encountered"
            raise RuntimeError(message)

    predictor = predictor_of(Lost())
    predictor.check()
    with pytest.raises(DeviceLost):
        asyncio.run(predictor.predict_requests([{"x": rows(1, 4)}]))
    with pytest.raises(DeviceLost):
        predictor.check()
    predictor.close()


def test_a_folder_that_holds_a_release_predicts_as_its_model(linear: str, tmp_path: Path) -> None:
    put, x_NF = release_of(linear, "linear"), rows(5, 3)
    files = {"release.json": put.release.model_dump_json().encode()}
    write_folder(ReleaseFiles(files=files, trees={"model": put.model}), tmp_path / "release")
    predictor = open_predictor(tmp_path / "release")
    (prediction,) = asyncio.run(predictor.predict_requests([{"x": x_NF}]))
    predictor.close()

    assert put.release == predictor.release
    np.testing.assert_allclose(unwrap_prediction(prediction)["score"], put.predict(x_NF), rtol=0, atol=1e-6)


def test_a_release_without_an_environment_of_its_own_is_written_as_servers_of_earlier_releases_read_it(
    runtime: Runtime,
) -> None:
    assert runtime.release.environment is None
    assert "environment" not in runtime.release.model_dump()


class TestOwnEnvironment:
    @pytest.fixture
    def folder(self, registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A release whose model gives 5 a by a version of a package that is not here."""
        monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv"))
        line = f"import {PACKAGE}; return model_input['a'].to_numpy() * {PACKAGE}.SCALE"
        uri = register_script("release-own", line, requirements=(f"{PACKAGE}=={OLD_VERSION}", "mlflow-skinny"))
        (tmp_path / "release").mkdir()
        folder = folder_of(uri, tmp_path / "release")
        own = OwnEnvironment(
            python=platform.python_version(),
            packages=PackageSource(wheels=write_model_wheels(tmp_path / "wheels"), offline=True),
            folder=tmp_path / "environments",
        )
        release = Release.model_validate_json((folder / RELEASE_FILE).read_text())
        (folder / RELEASE_FILE).write_text(release.model_copy(update={"environment": own}).model_dump_json())
        return folder

    @pytest.mark.machines
    def test_an_environment_that_is_lost_is_made_again_and_one_that_can_not_be_is_told(
        self, folder: Path, tmp_path: Path
    ) -> None:
        for _ in range(2):
            with open_release(folder) as runtime:
                assert [10.0] == runtime.predict(ask(2.0))["prediction"].reshape(-1).tolist()
            for each in (tmp_path / "environments").glob("[0-9a-f]*"):
                shutil.rmtree(each)
        shutil.rmtree(tmp_path / "wheels")
        with pytest.raises(EnvironmentUnusable, match=r"Wheels must be in a folder, got .*wheels, which is none"):
            open_release(folder)

    def test_a_model_process_that_does_not_come_up_again_is_told_and_the_next_request_tries_again(
        self, folder: Path, tmp_path: Path
    ) -> None:
        with open_release(folder) as runtime:
            runtime.predict(ask(2.0))
            (made,) = (tmp_path / "environments").glob("[0-9a-f]*")
            made.rename(tmp_path / "aside")
            for child in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):  # one that has ended already
                    if child.cmdline()[:1] == [str(made / "bin/python")]:
                        child.kill()
            with pytest.raises(DependencyFault, match=r"must start on .*bin/python, got FileNotFoundError"):
                runtime.predict(ask(2.0))
            (tmp_path / "aside").rename(made)

            assert [15.0] == runtime.predict(ask(3.0))["prediction"].reshape(-1).tolist()


def ask(value: float) -> dict[str, np.ndarray]:
    return {"a": np.array([value], dtype=np.float32)}
