"""A model of Python in processes of its own: what a row may do to it, and what outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow.sklearn
import numpy as np
import numpy.typing as npt
import pandas as pd
import psutil
import pyarrow as pa
import pytest
from mlflow.models import infer_signature
from sklearn.compose import make_column_transformer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from serving.errors import ModelFailed, ModelUnfit
from serving.model import process_handle
from serving.model.contract import Contract
from serving.model.encoding import Encoded, Flags, encode
from serving.model.forward import Forward
from serving.model.interface import Engine, Halted, Isolated, Model
from serving.model.loading import load_model
from serving.model.process_protocol import VERSION, pack_opaque, unpack_opaque
from serving.model.processes import ProcessModel, ProcessOptions
from serving.model.registry import resolve_model
from serving.model.shared_memory import OwnRegion, RegionPool, count_bytes, put_arrays
from tests.eventually import eventually
from tests.support import register_script

pytestmark = pytest.mark.servers

# What a row asks for by the value of its column a; all others are doubled.
SEGFAULT, EXIT, SLEEP, EAT, PRINT, FORK, THREAD, RAISE, QUIT, REFUSED, NAP, COLLECT = range(-1, -13, -1)
_LINE = f"""
        import ctypes, os, sys, threading
        for value in model_input["a"]:
            if value == {SEGFAULT}: ctypes.string_at(0)
            if value == {EXIT}: os._exit(3)
            if value == {SLEEP}: time.sleep(600)
            if value == {EAT}: self.eaten = bytearray(8 << 30)
            if value == {PRINT}: print("a model says this", flush=True)
            if value == {FORK} and os.fork() == 0: time.sleep(600)
            if value == {THREAD}: threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
            if value == {RAISE}: raise KeyError("a")
            if value == {QUIT}: sys.exit("enough")
            if value == {NAP}: time.sleep(1)
            if value == {COLLECT} and not __import__("gc").isenabled(): raise RuntimeError("nothing collects garbage")
            if value == {REFUSED}: raise ConnectionRefusedError(111, "refused")
"""


@pytest.fixture(scope="module")
def acting(registry: None) -> str:
    return register_script("acting", _LINE.strip())


@contextmanager
def loaded(uri: str, **limits: Any) -> Generator[tuple[ProcessModel, Contract]]:
    resolved = resolve_model(uri)
    contract = resolved.contract({}, {})
    model = load_model(resolved, contract, processes=ProcessOptions(**limits))
    assert isinstance(model, ProcessModel)
    with model.slot():
        yield model, contract


def rows(values: npt.NDArray[np.float32]) -> Encoded:
    return Encoded(inputs={"a": values}, flags=Flags.all_good(len(values)), rows=len(values))


def score(
    model: ProcessModel, contract: Contract, actions: Mapping[int, int], batch_size: int = 64
) -> tuple[npt.NDArray[Any], dict[int, str]]:
    """Score 256 rows of which some ask for something; return the predictions, and the reasons of the rejects."""
    values = np.arange(256, dtype=np.float32)
    for row, action in actions.items():
        values[row] = action
    encoded = rows(values)
    predictions = Forward(model, contract, batch_size, delays=lambda: iter((0.0,))).score(encoded)
    flags = encoded.flags
    return predictions["prediction"], {
        row: flags.reasons[flags.code_N[row] - 1][1] for row in np.flatnonzero(flags.code_N).tolist()
    }


def test_rows_that_end_the_process_are_rejected_and_all_others_keep_their_bits(acting: str) -> None:
    with loaded(acting, seconds_max=2.0, bytes_max=1 << 30) as (model, contract):
        actions = {5: SEGFAULT, 6: SEGFAULT, 70: EXIT, 140: SLEEP, 200: EAT, 201: QUIT, 255: RAISE}
        predictions, rejects = score(model, contract, actions)
        again, none = score(model, contract, {})
    good = [row for row in range(256) if row not in actions]

    assert rejects == {
        5: "the model's process died (SIGSEGV)",
        6: "the model's process died (SIGSEGV)",
        70: "the model's process ended (exit code 3)",
        140: "the model took longer than 2 s",
        200: "MemoryError: ",
        201: "ModelExit: it must return, got SystemExit: enough",
        255: "KeyError: 'a'",
    }
    assert np.array_equal(predictions[good], 2 * np.arange(256, dtype=np.float32)[good])
    assert (np.array_equal(again, 2 * np.arange(256, dtype=np.float32)), none) == (True, {})


def test_a_fault_of_what_the_model_calls_is_none_of_the_rows(acting: str) -> None:
    from serving.errors import DependencyFault

    with loaded(acting) as (model, contract), pytest.raises(DependencyFault, match="ConnectionRefusedError"):
        score(model, contract, {3: REFUSED})


def test_a_model_that_prints_forks_and_starts_threads_scores_and_leaves_nothing(
    acting: str, capfd: pytest.CaptureFixture[str]
) -> None:
    before = _list_descendants()
    # With limits of its own it is loaded anew, and its output is the test's.
    with loaded(acting, seconds_max=500.0) as (model, contract):
        predictions, rejects = score(model, contract, {0: PRINT, 80: FORK, 160: THREAD})
        model.processes.drop(model._here.worker)
        model._here.worker = None
    captured = capfd.readouterr()

    assert rejects == {}
    assert (predictions[0], predictions[80], predictions[160]) == (2 * PRINT, 2 * FORK, 2 * THREAD)
    assert ("", True) == (captured.out, "a model says this" in captured.err)
    # The first process and one with the model stay for the next slot.
    eventually(lambda: _list_descendants() - before, lambda added: len(added) <= 2)


def test_python_collects_garbage_while_passes_are_made(acting: str) -> None:
    with loaded(acting) as (model, contract):
        _, rejects = score(model, contract, {3: COLLECT})
    assert rejects == {}


def test_a_pass_is_ended_when_scoring_must_stop(acting: str) -> None:
    with loaded(acting) as (model, _):
        stop = threading.Event()
        threading.Timer(0.5, stop.set).start()
        with pytest.raises(Halted):
            model.predict_while({"a": np.full(1, SLEEP, dtype=np.float32)}, lambda: not stop.is_set())
        found = model.predict({"a": np.ones(1, dtype=np.float32)})

    assert 2 == found["prediction"][0]


def test_a_process_that_somebody_kills_costs_its_pass_alone(acting: str) -> None:
    with loaded(acting) as (model, contract):
        model.predict({"a": np.ones(1, dtype=np.float32)})
        first = model._here.worker.child.id
        os.kill(first, signal.SIGKILL)
        predictions, rejects = score(model, contract, {})
        second = model._here.worker.child.id

    assert (first != second, rejects) == (True, {})
    assert np.array_equal(predictions, 2 * np.arange(256, dtype=np.float32))


def test_an_answer_that_was_no_longer_waited_for_is_not_taken_for_the_next_one(acting: str) -> None:
    with loaded(acting) as (model, _):
        model.predict({"a": np.ones(1, dtype=np.float32)})
        worker = model._here.worker
        with pytest.raises(TimeoutError):
            worker.predict({"a": np.full(3, NAP, dtype=np.float32)}, 64, seconds_max=0.3, check=lambda: None)
        found = worker.predict({"a": np.arange(3, dtype=np.float32)}, 64, seconds_max=60, check=lambda: None)

    assert [0, 2, 4] == found["prediction"].tolist()


def test_an_error_of_a_pass_that_is_not_the_models_ends_its_process(acting: str) -> None:
    def interrupt() -> bool:
        raise KeyboardInterrupt

    with loaded(acting) as (model, _):
        model.predict({"a": np.ones(1, dtype=np.float32)})
        with pytest.raises(KeyboardInterrupt):
            model.predict_while({"a": np.full(1, SLEEP, dtype=np.float32)}, interrupt)
        found = model.predict({"a": np.arange(3, dtype=np.float32)})

    assert [0, 2, 4] == found["prediction"].tolist()


def test_passes_of_many_threads_at_once_do_not_meet(acting: str) -> None:
    def run(at: int) -> bool:
        with model.slot():
            values = np.arange(1000, dtype=np.float32) + at
            return all(np.array_equal(2 * values, model.predict({"a": values})["prediction"]) for _ in range(20))

    with loaded(acting) as (model, _), ThreadPoolExecutor(4) as threads:
        assert [True] * 4 == list(threads.map(run, range(4)))


def test_processes_with_more_threads_give_the_same_predictions(log_pipeline: str) -> None:
    frame = _make_frame()
    inputs = {name: frame[name].to_numpy() for name in frame}
    inputs["city"] = inputs["city"].astype(object)
    resolved = resolve_model(log_pipeline)
    contract = resolved.contract({}, {})
    here = load_model(resolved, contract, allow_pickle=True)
    there = load_model(resolved, contract, allow_pickle=True, processes=ProcessOptions())
    found = []
    for model in (here, there, there.with_engine(Engine(threads=2))):
        with model.slot():
            found.append(model.predict(inputs)["prediction"].tolist())

    assert set(found[0]) == {"yes", "no"}
    assert found[0] == found[1] == found[2]


@pytest.mark.skipif(sys.platform != "linux", reason="copies of a process are made on Linux alone")
def test_libraries_that_a_model_asks_for_are_there_before_it_loads_with_the_threads_of_its_engine(
    registry: None,
) -> None:
    line = """
        import sys, threadpoolctl
        threads = {each["num_threads"] for each in threadpoolctl.threadpool_info()}
        found = min(threads) if "sklearn.ensemble" in sys.modules and len(threads) == 1 else 0
        model_input = model_input.assign(a=float(found))
    """
    requirements = ("mlflow", "scikit-learn>=1")
    resolved = resolve_model(register_script("importing", line.strip(), requirements))
    contract = resolved.contract({}, {})
    model = load_model(resolved, contract, processes=ProcessOptions())
    found = []
    for threads in (1, 2, 3):
        engine = model.with_engine(Engine(threads=threads))
        with engine.slot():
            found.append(engine.predict({"a": np.zeros(1, np.float32)})["prediction"].item() / 2)

    assert [1, 2, 3] == found


def test_skops_is_there_before_a_model_loads_and_has_not_imported_torch(registry: None) -> None:
    line = """
        import sys
        model_input = model_input.assign(a=float("skops.io" in sys.modules and "torch" not in sys.modules))
    """
    resolved = resolve_model(register_script("importing-skops", line.strip(), ("mlflow", "skops")))
    model = load_model(resolved, resolved.contract({}, {}), processes=ProcessOptions(seconds_max=60))
    with model.slot():
        assert [2] == model.predict({"a": np.zeros(1, np.float32)})["prediction"].tolist()


def test_a_pickled_model_and_one_that_does_not_load_are_refused_in_the_same_words(
    log_pipeline: str, registry: None
) -> None:
    broken = register_script("broken-at-load", "pass")
    script = next(resolve_model(broken).folder.glob("*.py"))
    script.write_text("import no_such_module_here\n" + script.read_text())
    for uri, words in ((log_pipeline, "Pass allow_pickle=True"), (broken, "no_such_module_here")):
        resolved = resolve_model(uri)
        messages = []
        for processes in (None, ProcessOptions()):
            with pytest.raises(ModelUnfit, match=words) as caught:
                load_model(resolved, resolved.contract({}, {}), processes=processes)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]


def test_a_model_that_ends_its_process_while_it_loads_is_refused(registry: None) -> None:
    uri = register_script("ends-at-load", "pass")
    script = next(resolve_model(uri).folder.glob("*.py"))
    script.write_text("import os\nos._exit(9)\n")
    resolved = resolve_model(uri)

    with pytest.raises(ModelUnfit, match=r"must load, got a process that ended \(exit code 9\) while it read"):
        load_model(resolved, resolved.contract({}, {}), processes=ProcessOptions())


def test_nothing_outlives_a_parent_that_is_killed(acting: str, tmp_path: Path) -> None:
    code = f"""
import mlflow, numpy as np, sys, threading, time
from tests.serving.model.test_processes import FORK, SLEEP, loaded
mlflow.set_tracking_uri({mlflow.get_tracking_uri()!r})
with loaded({acting!r}) as (model, _):
    model.predict({{"a": np.full(1, FORK, dtype=np.float32)}})
    print("ready", flush=True)
    model.predict({{"a": np.full(1, SLEEP, dtype=np.float32)}})
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert "ready\n" == parent.stdout.readline()
        time.sleep(0.5)
        children = psutil.Process(parent.pid).children(recursive=True)
        parent.kill()

    assert len(children) >= 3
    eventually(lambda: not any(each.is_running() and each.status() != "zombie" for each in children))


def test_a_child_of_another_version_of_the_protocol_is_refused(acting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_handle, "VERSION", 0)
    with pytest.raises(
        ModelFailed, match=f"must speak version 0 of the protocol, got {VERSION}: Overnight was updated"
    ):
        process_handle._FirstProcesses().start(sys.executable)


def test_a_first_process_that_is_prepared_imports_what_it_is_told_later_before_anybody_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "told.py").write_text(f"import os, pathlib; pathlib.Path({str(tmp_path)!r}, str(os.getpid())).touch()")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    first = process_handle._FirstProcesses()
    try:
        first.prepare(sys.executable)
        first.prepare(sys.executable, ["told"])
        (importer,) = eventually(lambda: [each.name for each in tmp_path.iterdir() if each.name.isdigit()], bool)
        copy = first.start(sys.executable, ["told"])
        maker = psutil.Process(copy.id).ppid()
        copy.close()
    finally:
        first.close()

    assert int(importer) == maker
    assert [importer] == [each.name for each in tmp_path.iterdir() if each.name.isdigit()]


def test_text_bytes_and_numbers_reach_the_other_side_as_they_are() -> None:
    arrays: dict[str, npt.NDArray[Any]] = {
        "a": np.arange(5, dtype=np.float64),
        "b": np.arange(5, dtype=np.float64) * 2,
        "flag": np.array([True, False, True, False, True]),
        "at": np.array(["2026-01-01", "NaT", "1969-07-20", "2000-02-29", "1999-12-31"], dtype="datetime64[ns]"),
        "wide": np.arange(30, dtype=np.float32).reshape(5, 2, 3).transpose(0, 2, 1),
        "text": np.array(["ä", None, "", "a" * 1000, "\0"], dtype=object),
        "raw": np.array([b"\xff", None, b"", b"x", b"y"], dtype=object),
        "none": np.array([None] * 5, dtype=object),
        "pairs": np.array([["a", None]] * 5, dtype=object),
    }
    region = OwnRegion(count_bytes(arrays))
    found = {place["name"]: region.view(place) for place in put_arrays(arrays, region, 0)}
    found |= unpack_opaque(*pack_opaque(arrays))

    assert arrays.keys() == found.keys()
    for name, array in arrays.items():
        assert (array.dtype, array.shape) == (found[name].dtype, found[name].shape)
        assert array.tolist() == found[name].tolist()


def test_memory_that_is_lent_is_used_again_once_no_array_is_left_over_it() -> None:
    pool = RegionPool()
    allocate = pool.lend(100_000)
    first = allocate((1000,), np.float64)
    part = first[10:20]
    one = pool.numbers
    second = pool.lend(100_000)((1000,), np.float64)
    both = pool.numbers
    first[:], second[:] = 1.0, 2.0
    del first, allocate
    third = pool.lend(50_000)((1000,), np.float64)
    three = pool.numbers
    expected = part.tolist()
    third[:] = 3.0
    del part, second, third
    small = pool.lend(100_000)
    before = pool.numbers
    del small
    large = pool.lend(200_000)((20_000,), np.float64)

    assert (1, 2, 3) == (len(one), len(both), len(three))
    assert [1.0] * 10 == expected
    assert before == three
    # Regions that are too small for what comes now go.
    assert 1 == len(pool.numbers)
    assert not pool.numbers & three
    assert {"a": 0} == {name: offset for name, (_, offset) in pool.find_arrays({"a": large, "b": np.ones(3)}).items()}


@pytest.fixture(scope="module")
def scaled(registry: None) -> dict[str, str]:
    """Pipelines over numbers: one that leaves its inputs alone, and one that is told to write to them."""
    frame = pd.DataFrame(np.random.default_rng(5).standard_normal((500, 4)), columns=list("abcd"))
    addresses = {}
    for name, copies in (("scaled", True), ("scaled-in-place", False)):
        model = make_pipeline(StandardScaler(copy=copies), LogisticRegression()).fit(frame.copy(), frame.a > frame.b)
        with mlflow.start_run():
            logged = mlflow.sklearn.log_model(
                model,
                name="model",
                signature=infer_signature(frame, model.predict(frame.copy())),
                serialization_format="cloudpickle",
                pip_requirements=["scikit-learn"],
                registered_model_name=name,
            )
        addresses[name] = f"models:/{name}/{logged.registered_model_version}"
    return addresses


def encode_in(model: Model, contract: Contract, table: pa.Table) -> Encoded:
    assert isinstance(model, Isolated)
    return encode(contract, table, model.lend_memory(table.num_rows))


@pytest.mark.parametrize("name", ["scaled", "scaled-in-place"])
def test_a_block_in_shared_memory_is_scored_without_a_copy_and_stays_as_it_is(
    scaled: dict[str, str], name: str
) -> None:
    resolved = resolve_model(scaled[name])
    contract = resolved.contract({}, {})
    table = pa.table({each: np.random.default_rng(at).standard_normal(1000) for at, each in enumerate("abcd")})
    here = load_model(resolved, contract, allow_pickle=True)
    there = load_model(resolved, contract, allow_pickle=True, processes=ProcessOptions())
    assert isinstance(there, ProcessModel)
    with there.slot():
        for batch_size in (100, 1000):
            encoded, again = encode_in(there, contract, table), encode_in(there, contract, table)
            shared = there.processes.pool.find_arrays(encoded.inputs)
            found = [Forward(there, contract, batch_size).score(each)["prediction"] for each in (encoded, again)]
            expected = Forward(here, contract, batch_size).score(encode(contract, table))["prediction"]
            assert contract.inputs[0].name in shared
            assert len(shared) == len(encoded.inputs)
            assert found[0].tolist() == found[1].tolist() == expected.tolist()
            assert [table[each].to_pylist() for each in "abcd"] == [encoded.inputs[each].tolist() for each in "abcd"]


def test_rows_in_shared_memory_that_end_the_process_leave_their_neighbours_alone(scaled: dict[str, str]) -> None:
    resolved = resolve_model(scaled["scaled"])
    contract = resolved.contract({}, {})
    table = pa.table({each: np.random.default_rng(at).standard_normal(300) for at, each in enumerate("abcd")})
    model = load_model(resolved, contract, allow_pickle=True, processes=ProcessOptions())
    assert isinstance(model, ProcessModel)
    with model.slot():
        encoded = encode_in(model, contract, table)
        expected = Forward(model, contract, 100).score(encoded)["prediction"]
        # Another process takes over, which has seen none of the memory.
        os.kill(model._here.worker.child.id, signal.SIGKILL)
        found = Forward(model, contract, 100).score(encoded)["prediction"]

    assert expected.tolist() == found.tolist()


def test_a_model_of_the_users_own_code_gets_a_copy_that_it_may_write_to(acting: str) -> None:
    with loaded(acting) as (model, _):
        assert model.lend_memory(10) is np.empty
    with loaded(acting, bytes_max=1 << 30) as (model, _):
        assert model.lend_memory(10) is np.empty


@pytest.fixture(scope="module")
def log_pipeline(registry: None) -> str:
    frame = _make_frame()
    model = make_pipeline(
        make_column_transformer((OneHotEncoder(handle_unknown="ignore"), ["city"]), remainder="passthrough"),
        LogisticRegression(),
    ).fit(frame, np.where(frame.city == "Bern", "yes", "no"))
    with mlflow.start_run():
        logged = mlflow.sklearn.log_model(
            model,
            name="model",
            signature=infer_signature(frame, model.predict(frame)),
            serialization_format="cloudpickle",
            pip_requirements=["scikit-learn"],
            registered_model_name="cities",
        )
    return f"models:/cities/{logged.registered_model_version}"


def _make_frame() -> pd.DataFrame:
    drawn = np.random.default_rng(3)
    return pd.DataFrame(
        {"x": drawn.standard_normal(200), "city": np.array(["Bern", "Köln", "Graz"])[drawn.integers(0, 3, 200)]}
    )


def _list_descendants() -> set[int]:
    return {each.pid for each in psutil.Process().children(recursive=True) if each.status() != "zombie"}


def count_threads(model: ProcessModel) -> int:
    """Count the threads of the process of this thread's slot, without those of Arrow's allocator."""
    tasks = Path(f"/proc/{model._here.worker.child.id}/task").iterdir()
    return sum(not (task / "comm").read_text().startswith(("jemalloc_bg", "polars")) for task in tasks)


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in Linux's /proc")
def test_an_onnx_model_has_the_threads_of_its_engine_unless_it_was_logged_with_others(registry: None) -> None:
    import mlflow.onnx
    import skl2onnx
    from sklearn.linear_model import LinearRegression

    x_NF = np.random.default_rng(0).standard_normal((64, 4)).astype(np.float32)
    fitted = LinearRegression().fit(x_NF, x_NF[:, 0])
    expected = fitted.predict(x_NF)
    counts = []
    for threads in (None, 1, 3):
        with mlflow.start_run():
            logged = mlflow.onnx.log_model(
                skl2onnx.to_onnx(fitted, x_NF[:1]),
                name="model",
                signature=infer_signature({"X": x_NF}, {"variable": expected.reshape(-1, 1)}),
                onnx_session_options=threads and {"intra_op_num_threads": threads},
                pip_requirements=["onnxruntime"],
                registered_model_name="onnx-threads",
                metadata={"overnight": {"columns": {"X": ["a", "b", "c", "d"]}}},
            )
        with loaded(f"models:/onnx-threads/{logged.registered_model_version}") as (model, _):
            found = model.predict({"X": x_NF})["variable"]
            counts.append(count_threads(model))

        np.testing.assert_allclose(expected, found.reshape(-1), rtol=0, atol=1e-5)
    unset, one, three = counts

    assert (unset, unset + 2) == (one, three)
