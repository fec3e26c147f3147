"""Releases on the real Triton: answers, and versions that come and go while others serve."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow.models import ModelSignature, infer_signature
from sklearn.linear_model import LinearRegression

from infra.local.process import ServerCommand, ServerProcess, base_environment
from infra.local.triton import TritonServer
from serving.errors import EndpointFailed
from serving.model.batching import BatchingConfig
from serving.model.registry import resolve_model
from serving.model.release import Release, Scaling
from serving.protocol import oip, oip_body
from serving.targets import Address
from serving.targets.folder import write_folder
from serving.targets.triton import TritonHost, TritonTarget
from serving.targets.triton_autoscale import InstanceScaler, fetch_metrics
from serving.targets.triton_control import ControlRefused, control_model
from tests.eventually import eventually
from tests.serving.targets.triton_models import (
    Served,
    SteadyLoad,
    infer_url,
    list_instances,
    random_rows,
    register_mirror,
    register_words,
    served,
)
from tests.support import register_network, register_torch

DTYPES = (
    "bool",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "float16",
    "float32",
    "float64",
)


@pytest.fixture(scope="module")
def host(triton: TritonServer) -> TritonHost:
    return TritonHost(repository=triton.repository, url=triton.url, grpc=triton.grpc)


# The models are registered once, whatever becomes of the server: tests name their versions.
@pytest.fixture(scope="session")
def fraud(registry: Path) -> Served:
    return served(register_network("fraud", seed=0), "fraud")


@pytest.fixture(scope="module")
def at(host: TritonHost, fraud: Served) -> Address:
    return host.deploy(fraud.release, fraud.model)


@pytest.fixture(scope="session")
def words(registry: Path) -> Served:
    return served(register_words("words"), "words")


@pytest.fixture(scope="module")
def words_at(host: TritonHost, words: Served) -> Address:
    return host.deploy(words.release, words.model)


def word_rows(*texts: str) -> dict[str, Any]:
    given = np.empty(len(texts), dtype=object)
    given[:] = texts
    return {"text": given, "number": np.arange(len(texts), dtype=np.int32)}


@pytest.mark.parametrize("binary", [False, True])
def test_answers_equal_the_models_own(fraud: Served, at: Address, binary: bool) -> None:  # noqa: FBT001 - a case
    rows = random_rows(200)
    answer = fraud.ask(at, rows, binary=binary)["score"]

    assert (200,) == answer.shape
    np.testing.assert_allclose(fraud.predict(rows)["score"], answer, rtol=0, atol=1e-6)


def test_requests_that_are_passed_together_get_their_own_answers(fraud: Served, at: Address) -> None:
    rows = random_rows(64)
    answers: dict[int, Any] = {}

    def ask(row: int) -> None:
        answers[row] = fraud.ask(at, {"x": rows["x"][row : row + 1]})["score"][0]

    threads = [threading.Thread(target=ask, args=(row,)) for row in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    np.testing.assert_allclose(fraud.predict(rows)["score"], [answers[row] for row in range(64)], rtol=0, atol=1e-6)


@pytest.mark.parametrize("binary", [False, True])
def test_text_and_several_inputs_and_outputs_pass(words: Served, words_at: Address, binary: bool) -> None:  # noqa: FBT001
    rows = word_rows("héé", "b\0\0", "", "longer", "日本語")
    answer = words.ask(words_at, rows, binary=binary)

    assert [3, 3, 0, 6, 3] == answer["length"].tolist()
    assert ["HÉÉ", "B\0\0", "", "LONGER", "日本語"] == answer["upper"].tolist()
    assert [False, False, False, True, False] == answer["long"].tolist()
    assert [0, 0.5, 1, 1.5, 2] == answer["half"].tolist()


def test_a_row_that_the_model_fails_on_has_a_reason_and_the_requests_beside_it_their_answers(
    words: Served, words_at: Address
) -> None:
    failed = words.post(words_at, word_rows("good", "bad"))

    assert 500 == failed.status_code
    assert "none for row 1: ValueError: no such word" in failed.json()["error"]
    assert ["GOOD"] == words.ask(words_at, word_rows("good"))["upper"].tolist()


def test_bytes_that_are_no_text_are_the_callers_fault(words: Served, words_at: Address) -> None:
    body = oip.encode_request(words.release.contract, word_rows("ab"), binary=True)
    answer = httpx.post(infer_url(words_at), content=body.content.replace(b"ab", b"\xff\xfe"), headers=body.headers)

    assert (400, True) == (answer.status_code, "must be UTF-8" in answer.json()["error"])


def test_numbers_of_every_type_pass_both_ways(host: TritonHost, registry: Path) -> None:
    mirror = served(register_mirror("mirror", DTYPES), "mirror")
    address = host.deploy(mirror.release, mirror.model)
    ends = {dtype: _ends(np.dtype(dtype)) for dtype in DTYPES}
    contract = mirror.release.contract
    # Triton takes no FP16 in JSON, and gives none.
    mixed = oip_body.write_body(
        {"outputs": [{"name": f"{dtype}_back", "parameters": {"binary_data": dtype == "float16"}} for dtype in DTYPES]},
        "inputs",
        [(value, ends[value.name], value.name == "float16") for value in contract.inputs],
    )
    for body in (mixed, oip.encode_request(contract, ends, binary=True)):
        answer = httpx.post(infer_url(address), content=body.content, headers=body.headers)
        assert 200 == answer.status_code, answer.text
        length = int(answer.headers[oip.HEADER_LENGTH])
        outputs = oip.decode_response(answer.content, contract, header_length=length)
        for dtype in DTYPES:
            np.testing.assert_array_equal(ends[dtype], outputs[f"{dtype}_back"])
    host.remove(mirror.release)

    assert 200 != mirror.post(address, ends).status_code


def test_a_model_without_torch_is_served_without_it(host: TritonHost, triton: TritonServer, registry: Path) -> None:
    linear = served(_register_linear("linear"), "linear")
    address = host.deploy(linear.release, linear.model)
    rows = {"a": np.arange(3.0), "b": np.ones(3)}
    answer = linear.ask(address, rows, binary=True)
    (instance,) = list_instances(triton, "linear")
    libraries = Path(f"/proc/{instance}/maps").read_text()
    host.remove(linear.release)

    assert [1.0, 3.0, 5.0] == pytest.approx(answer["prediction"].tolist())
    assert "sklearn" in libraries
    assert "torch" not in libraries
    # Python tells so of what fails while an object is freed, such as the capsule of an output.
    assert "Exception ignored" not in triton.process.log_text()


def _register_linear(name: str) -> str:
    """Register scikit-learn's regression of 2 a + b, saved by skops; return its address."""
    x = pd.DataFrame({"a": [0.0, 1.0, 2.0], "b": [1.0, 0.0, 2.0]})
    y = pd.DataFrame({"prediction": 2 * x["a"] + x["b"]})
    with mlflow.start_run():
        logged = mlflow.sklearn.log_model(
            LinearRegression().fit(x, y["prediction"]),
            name="model",
            signature=infer_signature(x, y),
            serialization_format="skops",
            pip_requirements=["scikit-learn", "skops"],
            registered_model_name=name,
        )
    return f"models:/{name}/{logged.registered_model_version}"


def _ends(dtype: np.dtype[Any]) -> Any:
    if dtype.kind == "b":
        return np.array([[False, True], [True, False]])
    limits = np.finfo(dtype) if dtype.kind == "f" else np.iinfo(dtype)
    return np.array([[limits.min, limits.max], [0, 1]], dtype=dtype)


def test_tritonclient_understands_the_server(fraud: Served, at: Address) -> None:
    http = pytest.importorskip("tritonclient.http", reason="pip install -e '.[dev]' brings tritonclient[http]")
    rows = random_rows(5)
    client = http.InferenceServerClient(at.url.removeprefix("http://"))
    given = http.InferInput("x", [5, 3], "FP32")
    given.set_data_from_numpy(rows["x"])
    try:
        answer = client.infer(at.model, [given], model_version=str(at.version), request_id="7")
        metadata = client.get_model_metadata(at.model)
    finally:
        client.close()

    np.testing.assert_allclose(fraud.predict(rows)["score"][:, None], answer.as_numpy("score"), rtol=0, atol=1e-6)
    assert "7" == answer.get_response()["id"]
    inputs, outputs = (metadata[key] for key in ("inputs", "outputs"))
    metadata = oip.make_model_metadata(at.model, fraud.release.contract, versions=["1"], platform="python")
    assert [each.model_dump(mode="json") for each in (*metadata.inputs, *metadata.outputs)] == [*inputs, *outputs]


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [1, 4], "data": [0] * 4},
        {"datatype": "FP64"},
        {"name": "z"},
        {"data": [0]},
        {"data": [None, 0, 0]},
        {"data": ["a", 0, 0]},
        {"shape": [5000, 3], "data": [0] * 15000},
    ],
)
def test_bad_input_is_refused_and_the_model_keeps_serving(fraud: Served, at: Address, change: dict[str, Any]) -> None:
    good = {"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [0, 0, 0]}
    answer = httpx.post(infer_url(at), json={"inputs": [{**good, **change}]})

    # With 500 where JSON's data are wrong: the gateway answers 400.
    assert answer.status_code in range(400, 600)
    assert answer.json()["error"]
    assert (1,) == fraud.ask(at, random_rows(1))["score"].shape


def test_a_version_is_added_and_removed_while_the_others_lose_no_request(
    host: TritonHost, fraud: Served, at: Address, words: Served, words_at: Address
) -> None:
    second = served(register_network("fraud", seed=1), "fraud")
    rows = random_rows(10)
    with SteadyLoad(fraud, at) as load:
        second_at = host.deploy(second.release, second.model)
        both = fraud.ask(at, rows)["score"], second.ask(second_at, rows)["score"]
        host.remove(second.release)
        host.remove(second.release)

    assert (at.model, "2") == (second_at.model, second_at.version)
    np.testing.assert_allclose(fraud.predict(rows)["score"], both[0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(second.predict(rows)["score"], both[1], rtol=0, atol=1e-6)
    assert [] == load.lost
    assert load.answered > 0
    assert 200 != second.post(second_at, rows).status_code
    assert ["LONG"] == words.ask(words_at, word_rows("long"))["upper"].tolist()


@pytest.mark.machines
def test_a_version_that_takes_other_tensors_is_deployed_as_a_model_of_its_own(
    host: TritonHost, fraud: Served, at: Address
) -> None:
    wide = served(register_torch("fraud", torch.nn.Linear(4, 1), ("a", "b", "c", "d")), "fraud")
    wide_at = host.deploy(wide.release, wide.model)
    x = np.ones((2, 4), np.float32)

    assert f"fraud.v{wide.release.version}" == wide_at.model
    assert (at, wide_at) == host.list_endpoints()["fraud"]
    np.testing.assert_allclose(wide.predict({"x": x})["score"], wide.ask(wide_at, {"x": x})["score"], atol=1e-6)
    assert (2,) == fraud.ask(at, random_rows(2))["score"].shape

    host.remove(wide.release)

    assert (at,) == host.list_endpoints()["fraud"]
    assert not (host.repository / wide_at.model).exists()


def test_an_endpoint_is_unloaded_and_loaded_again_while_others_serve(
    host: TritonHost, fraud: Served, at: Address, words: Served, words_at: Address
) -> None:
    with SteadyLoad(fraud, at) as load:
        host.unload("words")
        # This takes effect at the next load.
        host.scale("words", 2)
        instances = host.count_instances("words")
        host.scale("words", 1)
        unloaded = words.post(words_at, word_rows("a"))
        host.load("words")
        loaded = words.ask(words_at, word_rows("a"))

    assert 2 == instances
    assert unloaded.status_code in range(400, 600)
    assert ["A"] == loaded["upper"].tolist()
    assert [] == load.lost
    assert load.answered > 0


@pytest.mark.machines
def test_a_release_that_is_deployed_again_takes_its_new_batching(host: TritonHost, fraud: Served, at: Address) -> None:
    other = fraud.release.model_copy(update={"batching": BatchingConfig(batch_size_max=3, wait_ms_max=0.5)})
    with SteadyLoad(fraud, at) as load:
        address = host.deploy(other, fraud.model)
    batching = httpx.get(f"{at.url}/v2/models/{at.model}/versions/1/config").json()["dynamic_batching"]

    assert at == address
    assert [] == load.lost
    assert ([3], 500) == (batching["preferred_batch_size"], batching["max_queue_delay_microseconds"])


@pytest.mark.machines
def test_a_pickled_version_is_refused_with_the_reason_and_the_others_of_its_endpoint_keep_serving(
    host: TritonHost, fraud: Served, at: Address
) -> None:
    pickled = _pickled(fraud)
    files = _files(host.repository)
    with SteadyLoad(fraud, at) as load, pytest.raises(EndpointFailed, match=r"version 7 is at UNAVAILABLE") as refused:
        host.deploy(pickled.release, pickled.model)

    assert "must not need unpickling" in str(refused.value)
    assert "allow_pickle=True" in str(refused.value)
    assert "At:" not in str(refused.value)
    assert files == _files(host.repository)
    assert [] == load.lost
    assert (1,) == fraud.ask(at, random_rows(1))["score"].shape


def _pickled(like: Served) -> Served:
    """Return a torch network that was logged as a pickle, as version 7 of the same endpoint."""
    signature: ModelSignature = resolve_model(like.release.pin.uri).mlmodel.signature
    with mlflow.start_run():
        logged = mlflow.pytorch.log_model(
            torch.nn.Linear(3, 1),
            name="model",
            signature=signature,
            serialization_format="pickle",
            metadata={"overnight": {"columns": {"x": ["a", "b", "c"]}}},
            pip_requirements=["torch"],
            registered_model_name="pickled",
        )
    found = served(f"models:/pickled/{logged.registered_model_version}", like.release.endpoint)
    pin = found.release.pin.model_copy(update={"version": "7"})
    return Served(release=found.release.model_copy(update={"pin": pin}), model=found.model)


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.machines
def test_a_queue_that_grows_gets_an_instance_and_gives_it_back_when_it_is_calm(
    host: TritonHost, triton: TritonServer, sleepy: str, tmp_path: Path
) -> None:
    slow = served(sleepy, "slow", batching=BatchingConfig(), scaling=Scaling(replicas_min=1, replicas_max=2))
    address = host.deploy(slow.release, slow.model)
    stop, calm, lost = threading.Event(), threading.Event(), []

    def ask(*, all_along: bool) -> None:
        while not (stop.is_set() or (calm.is_set() and not all_along)):
            answer = slow.post(address, {"a": np.ones(1, np.float32)})
            lost.extend([answer.text] if answer.status_code != 200 else [])
            time.sleep(0.3 if calm.is_set() else 0)

    threads = [threading.Thread(target=ask, kwargs={"all_along": at == 0}) for at in range(6)]
    for thread in threads:
        thread.start()
    try:
        with ServerProcess(_autoscaler(triton, tmp_path)) as scaler:
            eventually(lambda: host.count_instances("slow"), lambda count: count == 2)
            calm.set()
            eventually(lambda: host.count_instances("slow"), lambda count: count == 1)
            scaler.stop()
            ended = scaler.exit_code
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    host.remove(slow.release)

    assert 0 == ended, scaler.log_text()
    assert "slow: 2 instances instead of 1" in scaler.log_text()
    assert [] == lost


def _autoscaler(triton: TritonServer, folder: Path) -> ServerCommand:
    """The program that looks after every endpoint of a Triton."""
    log_path = folder / "autoscale.log"
    ports = ("--url", triton.url, "--grpc", triton.grpc, "--metrics", triton.metrics_url)
    where = ("--repository", str(triton.repository), "--seconds", "0.5")
    return ServerCommand(
        argv=(sys.executable, "-m", "serving.targets.triton_autoscale", *where, *ports),
        environment=base_environment(),
        folder=folder,
        log_path=log_path,
        ready=lambda: "scaling the endpoints" in log_path.read_text(),
    )


def test_an_instance_that_is_killed_is_loaded_again_while_others_serve(
    host: TritonHost, triton: TritonServer, fraud: Served, at: Address, words: Served, words_at: Address
) -> None:
    scaler = InstanceScaler(
        host=host, metrics_url=triton.metrics_url, endpoint="words", scaling=Scaling(), batching=words.release.batching
    )
    scaler.restart_dead(fetch_metrics(triton.metrics_url))
    with SteadyLoad(fraud, at) as load:
        (instance,) = list_instances(triton, "words")
        os.kill(instance, signal.SIGKILL)
        dead = words.post(words_at, word_rows("a"))

        def restart_and_ask() -> int:
            scaler.restart_dead(fetch_metrics(triton.metrics_url))
            return words.post(words_at, word_rows("a")).status_code

        # Triton counts a request as failed a moment after it has answered.
        eventually(restart_and_ask, lambda status: status == 200)
        alive = words.ask(words_at, word_rows("a"))

    assert (500, True) == (dead.status_code, "is not healthy" in dead.text)
    assert ["A"] == alive["upper"].tolist()
    assert 1 == scaler.restarts
    assert [] == load.lost
    assert not host.restart_dead_instances("words")


def test_an_endpoint_whose_process_died_is_unloaded_and_loaded_again(
    host: TritonHost, triton: TritonServer, words: Served, words_at: Address
) -> None:
    (instance,) = list_instances(triton, "words")
    os.kill(instance, signal.SIGKILL)
    # Triton never ends a model whose dead process was asked.
    dead = words.post(words_at, word_rows("a")).status_code
    host.unload("words")
    unloaded = words.post(words_at, word_rows("a")).status_code
    host.load("words")

    assert (500, 503) == (dead, unloaded)
    assert ["A"] == words.ask(words_at, word_rows("a"))["upper"].tolist()


_TRAP = """
import os
import signal
from pathlib import Path

trapped = Path(__file__).with_name("trapped")
if len(list(Path(__file__).parent.glob("trapped*"))) < {times}:
    Path(f"{{trapped}}{{os.getpid()}}").touch()
    os.kill(os.getpid(), signal.{name})
"""

_PAUSE_ONCE = """
import subprocess
import time

resumed = Path(__file__).with_name("resumed")
if not resumed.exists():
    pid = os.getpid()
    subprocess.Popen(["sh", "-c", f"kill -STOP {pid}; sleep 2.5; kill -CONT {pid}; touch {resumed}"])
while not resumed.exists():
    time.sleep(0.05)
"""

_HOLD_LOCK = "import ctypes\n\nctypes.PyDLL(None).usleep(2_500_000)\n"


@pytest.mark.parametrize(
    ("model", "code", "before", "again"),
    [
        *(
            pytest.param(f"trap-{name}", _TRAP.format(name=name, times=1), "import gc", True, id=f"dies by {name}")
            for name in ("SIGILL", "SIGTRAP", "SIGSEGV")
        ),
        pytest.param("paused-import", _PAUSE_ONCE, "import numpy", True, id="stands still for seconds, importing"),
        pytest.param("paused-load", _PAUSE_ONCE, "        gc.freeze()", True, id="stands still for seconds, loading"),
        pytest.param("holding", _HOLD_LOCK, "import numpy", False, id="holds the interpreter's lock for seconds"),
    ],
)
def test_a_load_is_tried_again_if_its_process_dies_or_stands_still(
    triton: TritonServer,
    fraud: Served,
    model: str,
    code: str,
    before: str,
    *,
    again: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with (
        model_with_code(triton, fraud, model, code, before=before),
        caplog.at_level(logging.WARNING, "serving.targets.triton_control"),
    ):
        control_model(triton.grpc, "load", model, timeout_s=60, waits_s=(0.0, 0.0))
        ready = httpx.get(f"{triton.url}/v2/models/{model}/ready").status_code

    assert 200 == ready
    told = [f"{model}: a process died while it started; loaded again in 0 s (1 of 2)"]
    assert (told if again else []) == caplog.messages


def test_a_load_whose_process_always_dies_is_refused_after_the_last_wait(triton: TritonServer, fraud: Served) -> None:
    with model_with_code(triton, fraud, "traps", _TRAP.format(name="SIGILL", times=99), before="import gc") as model:
        with pytest.raises(ControlRefused, match="is not healthy"):
            control_model(triton.grpc, "load", model, timeout_s=60, waits_s=(0.0, 0.0))
        trapped = list((triton.repository / model / fraud.release.version).glob("trapped*"))

    assert 3 == len(trapped)


@contextmanager
def model_with_code(triton: TritonServer, like: Served, model: str, code: str, *, before: str) -> Generator[str]:
    """Have a release in the repository whose model.py runs this code before a line of its own."""
    write_folder(TritonTarget(model=model).render(like.release, like.model), triton.repository / ".new")
    (triton.repository / ".new" / model).rename(triton.repository / model)
    file = triton.repository / model / like.release.version / "model.py"
    text = file.read_text()
    assert before in text
    spaces = " " * (len(before) - len(before.lstrip()))
    file.write_text(text.replace(before, textwrap.indent(code, spaces) + before, 1))
    try:
        yield model
    finally:
        control_model(triton.grpc, "unload", model, timeout_s=60)
        shutil.rmtree(triton.repository / model)
        shutil.rmtree(triton.repository / ".new")


def test_an_endpoint_that_is_not_there_is_named(host: TritonHost) -> None:
    with pytest.raises(EndpointFailed, match="got 'nobody'; deploy it first"):
        host.unload("nobody")


def test_a_server_that_does_not_answer_is_named(tmp_path: Path, fraud: Served) -> None:
    host = TritonHost(repository=tmp_path, url="http://127.0.0.1:9", grpc="127.0.0.1:9")

    with pytest.raises(EndpointFailed, match=r"Triton must answer at 127.0.0.1:9"):
        host.deploy(fraud.release, fraud.model)

    assert [".lock"] == [path.name for path in tmp_path.iterdir()]


def test_a_repository_that_is_no_folder_is_named(tmp_path: Path, fraud: Served) -> None:
    (tmp_path / "repository").touch()
    host = TritonHost(repository=tmp_path / "repository", url="http://127.0.0.1:9", grpc="127.0.0.1:9")

    with pytest.raises(EndpointFailed, match=r"must be a folder to read and write, got: .*repository.*then call again"):
        host.deploy(fraud.release, fraud.model)


def test_what_is_rendered_is_what_the_host_writes(host: TritonHost, at: Address, fraud: Served, tmp_path: Path) -> None:
    rendered = TritonTarget().render(fraud.release, fraud.model)

    assert {"fraud/config.pbtxt", "fraud/1/model.py", "fraud/1/release.json"} == set(rendered.files)
    assert {"fraud/1/model": fraud.model} == rendered.trees
    assert fraud.release == Release.model_validate_json(rendered.files["fraud/1/release.json"])
    assert rendered.files["fraud/1/model.py"] == (host.repository / "fraud/1/model.py").read_bytes()
