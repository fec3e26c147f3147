"""Models whose files would run code when they are read, or could: refused by name, and nothing of them has run."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import struct
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightgbm
import mlflow.lightgbm
import mlflow.sklearn
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from mlflow.models import Model as MLmodel
from mlflow.models import ModelSignature, infer_signature
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.tree import DecisionTreeRegressor

from serving.errors import ModelUnfit
from serving.model.loading import load_model
from serving.model.pin import digest_folder
from serving.model.processes import ProcessOptions
from serving.model.registry import Resolved, resolve_model
from serving.option_words import Flags, name_options_by_flags

Log = Callable[..., str]
Records = dict[str, bytes]


class Written:
    """What makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


def signature_of(frame: pd.DataFrame, predictions: Any) -> ModelSignature:
    with warnings.catch_warnings():
        # MLflow advises against columns of integers, which it then takes for no columns at all.
        warnings.simplefilter("ignore", UserWarning)
        return infer_signature(frame, predictions)


def pickled(thing: object) -> bytes:
    sink = io.BytesIO()
    torch.save(thing, sink)
    return sink.getvalue()


def reopened(resolved: Resolved, folder: Path) -> Resolved:
    """The files of a folder, as if they were the model's."""
    pin = resolved.pin.model_copy(update={"digest": digest_folder(folder)})
    return replace(resolved, folder=folder, pin=pin, mlmodel=MLmodel.load(str(folder / "MLmodel")))


def load(resolved: Resolved, *, allow_pickle: bool = False) -> Any:
    return load_model(resolved, resolved.contract({}, {}), allow_pickle=allow_pickle)


def refusal(resolved: Resolved) -> str:
    with pytest.raises(ModelUnfit) as caught:
        load(resolved)
    return str(caught.value)


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[str], Resolved]:
    """Copies the files of a registered model, to be changed."""

    def copied(uri: str) -> Resolved:
        resolved = resolve_model(uri)
        shutil.copytree(resolved.folder, tmp_path / "model")
        return reopened(resolved, tmp_path / "model")

    return copied


def records_of(path: Path) -> Records:
    with zipfile.ZipFile(path) as archive:
        return {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}


def write_records(path: Path, records: Records) -> bytes:
    """Write an archive with torch's own writer, which adds some of the records itself."""
    writer = torch._C.PyTorchFileWriter(str(path))
    for name, data in records.items():
        if name not in ("byteorder", "version") and not name.startswith(".data/"):
            writer.write_record(name, data, len(data))
    writer.write_end_of_file()
    return path.read_bytes()


def in_sample_inputs(records: Records, evil: bytes) -> None:
    records["data/sample_inputs/model.pt"] = evil


def in_a_weight(records: Records, evil: bytes) -> None:
    config = json.loads(records["data/weights/model_weights_config.json"])
    first = next(iter(config["config"].values()))
    first["use_pickle"] = True
    records["data/weights/model_weights_config.json"] = json.dumps(config).encode()
    records[f"data/weights/{first['path_name']}"] = evil


def in_weights_of_another_model_called_raw(records: Records, evil: bytes) -> None:
    for kind in ("models/{}.json", "data/sample_inputs/{}.pt", "data/constants/{}_constants_config.json"):
        records[kind.format("weight_x")] = records[kind.format("model")]
    raw = {"config": {"x": {"path_name": "weight_x.pt", "use_pickle": False}}}
    records["data/weights/other_config.json"] = json.dumps(raw).encode()
    records["data/weights/weight_x.pt"] = evil


def in_a_custom_object(records: Records, evil: bytes) -> None:
    records["data/constants/opaque_obj_0"] = evil


def as_a_library(records: Records, evil: bytes) -> None:
    raw = {"config": {"x": {"path_name": "weight_x.so", "use_pickle": False}}}
    records["data/aotinductor/data/weights/x_config.json"] = json.dumps(raw).encode()
    records["data/aotinductor/data/weights/weight_x.so"] = evil


PLACES = [
    in_sample_inputs,
    in_a_weight,
    in_weights_of_another_model_called_raw,
    in_a_custom_object,
    as_a_library,
]


@pytest.mark.parametrize("place", PLACES)
def test_an_exported_model_with_code_in_it_is_refused_and_its_code_has_not_run(
    pt2: str, copied: Callable[[str], Resolved], tmp_path: Path, place: Callable[[Records, bytes], None]
) -> None:
    model = copied(pt2)
    archive = model.folder / "data" / "model.pt2"
    records = records_of(archive)
    place(records, pickled(Written(tmp_path / "written")))
    write_records(archive, records)

    assert "allow_pickle=True in the options if you trust its author" in refusal(reopened(model, model.folder))
    assert not (tmp_path / "written").exists()


def test_the_code_in_it_would_run_where_pickles_are_allowed(
    pt2: str, copied: Callable[[str], Resolved], tmp_path: Path
) -> None:
    model = copied(pt2)
    records = records_of(model.folder / "data" / "model.pt2")
    in_a_weight(records, pickled(Written(tmp_path / "written")))
    write_records(model.folder / "data" / "model.pt2", records)
    with contextlib.suppress(ModelUnfit):
        load(reopened(model, model.folder), allow_pickle=True)

    assert (tmp_path / "written").exists()


def end_of(data: bytes) -> tuple[int, int, int]:
    """Where the last entry of a zip starts, and size and offset of its directory."""
    end = data.rfind(b"PK\5\6")
    size, offset = struct.unpack_from("<2L", data, end + 12)
    return end, size, offset


def test_an_archive_with_two_directories_is_refused(
    pt2: str, copied: Callable[[str], Resolved], tmp_path: Path
) -> None:
    model = copied(pt2)
    archive = model.folder / "data" / "model.pt2"
    good, records = archive.read_bytes(), records_of(archive)
    in_sample_inputs(records, pickled(Written(tmp_path / "written")))
    evil = write_records(archive, records)
    _, size, offset = end_of(evil)
    _, good_size, good_offset = end_of(good)
    # Python looks right before the end, where the good one is; torch where the end says.
    forged = evil[: offset + size] + good + good[good_offset : good_offset + good_size]
    archive.write_bytes(forged + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 11, 11, good_size, offset, 0))

    assert "a zip that may be read in more than one way" in refusal(reopened(model, model.folder))
    assert not (tmp_path / "written").exists()


@pytest.mark.parametrize("more", [b"a comment", b"PK\5\6" + bytes(18)])
def test_an_archive_with_bytes_after_its_end_is_refused(
    pt2: str, copied: Callable[[str], Resolved], more: bytes
) -> None:
    model = copied(pt2)
    with (model.folder / "data" / "model.pt2").open("ab") as file:
        file.write(more)

    assert "must hold what torch.export.save writes" in refusal(reopened(model, model.folder))


def test_a_file_that_is_no_archive_is_refused(pt2: str, copied: Callable[[str], Resolved]) -> None:
    model = copied(pt2)
    (model.folder / "data" / "model.pt2").write_bytes(b"no zip")

    assert "must hold what torch.export.save writes" in refusal(reopened(model, model.folder))


def test_a_pickled_network_without_a_python_function_is_refused_by_name(
    pickled: str, copied: Callable[[str], Resolved]
) -> None:
    model = copied(pickled)
    mlmodel = yaml.safe_load((model.folder / "MLmodel").read_text())
    del mlmodel["flavors"]["python_function"]
    (model.folder / "MLmodel").write_text(yaml.safe_dump(mlmodel))

    assert "must not need unpickling" in refusal(reopened(model, model.folder))


def test_what_skops_trusts_needs_no_allow_pickle_and_answers_as_itself(log: Log, frame: pd.DataFrame) -> None:
    models = (
        make_pipeline(StandardScaler(), LinearRegression()).fit(frame, frame.a + frame.n),
        make_pipeline(StandardScaler(), LogisticRegression()).fit(frame, frame.n % 3),
        lightgbm.LGBMRegressor(n_estimators=3, verbose=-1, n_jobs=1).fit(frame, frame.a),
    )
    for model in models:
        flavor = mlflow.lightgbm if isinstance(model, lightgbm.LGBMModel) else mlflow.sklearn
        signature = signature_of(frame, model.predict(frame))
        uri = log("trusted", flavor.log_model, model, signature=signature, serialization_format="skops")
        resolved = resolve_model(uri)
        found = load(resolved).predict({name: frame[name].to_numpy() for name in frame.columns})

        assert np.array_equal(model.predict(frame), found["prediction"])


def test_types_that_skops_does_not_trust_are_refused_even_where_the_model_lists_them(
    log: Log, frame: pd.DataFrame
) -> None:
    tree = DecisionTreeRegressor(max_depth=2).fit(frame, frame.a)
    signature = signature_of(frame, tree.predict(frame))
    options = {"serialization_format": "skops", "skops_trusted_types": ["sklearn.tree._tree.Tree"]}
    resolved = resolve_model(log("untrusted", mlflow.sklearn.log_model, tree, signature=signature, **options))

    message = refusal(resolved)
    assert "got: sklearn.tree._tree.Tree." in message
    assert "(skops_trusted_types) is no reason to trust them. Pass allow_pickle=True" in message
    found = load(resolved, allow_pickle=True).predict({name: frame[name].to_numpy() for name in frame.columns})
    assert np.array_equal(tree.predict(frame), found["prediction"])
    # The process of a model refuses it in the same words, and with the flags of the command that runs here.
    flag = {"allow_pickle": "--allow-pickle"}
    for flags, advice in ((Flags(), "Pass allow_pickle=True"), (Flags(by_option=flag), "Pass --allow-pickle if")):
        with name_options_by_flags(flags), pytest.raises(ModelUnfit, match=r"got: sklearn.tree._tree.Tree\.") as caught:
            load_model(resolved, resolved.contract({}, {}), processes=ProcessOptions())
        assert advice in str(caught.value)


def change_schema(path: Path, change: Callable[[str], str]) -> None:
    """Rewrite the description of the objects in a file of skops."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    schema = records["schema.json"].decode()
    records["schema.json"] = change(schema).encode()
    assert schema != records["schema.json"].decode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, record in records.items():
            archive.writestr(name, record)


def test_a_dtype_of_numpy_is_trusted_in_the_form_that_skops_writes_alone(
    log: Log, frame: pd.DataFrame, copied: Callable[[str], Resolved]
) -> None:
    model = make_pipeline(SimpleImputer(), LinearRegression()).fit(frame, frame.a)
    signature = signature_of(frame, model.predict(frame))
    options = {"serialization_format": "skops", "skops_trusted_types": ["numpy.dtype"]}
    uri = log("imputed", mlflow.sklearn.log_model, model, signature=signature, **options)
    found = load(resolve_model(uri)).predict({name: frame[name].to_numpy() for name in frame.columns})
    changed = copied(uri)
    (file,) = changed.folder.rglob("model.skops")
    change_schema(file, lambda schema: schema.replace('"DTypeNode"', '"ObjectNode"'))

    assert np.array_equal(model.predict(frame), found["prediction"])
    assert "got: numpy.dtype." in refusal(reopened(changed, changed.folder))


def test_a_model_that_lists_the_functions_to_be_called_as_trusted_is_refused(log: Log, frame: pd.DataFrame) -> None:
    model = make_pipeline(FunctionTransformer(np.save), LinearRegression())
    fitted = make_pipeline(FunctionTransformer(), LinearRegression()).fit(frame, frame.a)
    model.steps[1] = fitted.steps[1]
    options = {"serialization_format": "skops", "skops_trusted_types": ["numpy.save"]}
    signature = signature_of(frame, frame.a.to_numpy())

    assert "numpy.save" in refusal(
        resolve_model(log("calls", mlflow.sklearn.log_model, model, signature=signature, **options))
    )


@pytest.mark.parametrize("change", ["loader", "data"])
def test_a_model_that_is_marked_as_skops_and_read_otherwise_is_not_unpickled(
    log: Log, frame: pd.DataFrame, copied: Callable[[str], Resolved], tmp_path: Path, change: str
) -> None:
    model = LinearRegression().fit(frame, frame.a)
    signature = signature_of(frame, model.predict(frame))
    resolved = copied(log("says-skops", mlflow.sklearn.log_model, model, signature=signature))
    mlmodel = yaml.safe_load((resolved.folder / "MLmodel").read_text())
    pyfunc = mlmodel["flavors"]["python_function"]
    inner = resolved.folder / "inner"
    inner.mkdir()
    if change == "loader":
        pyfunc |= {"loader_module": "mlflow.pyfunc.model", "python_model": "model.pkl", "cloudpickle_version": "3.0"}
    else:
        other = {"flavors": {"sklearn": {"serialization_format": "pickle"}}}
        (inner / "MLmodel").write_text(yaml.safe_dump(other))
        pyfunc["data"] = "inner/model.pkl"
    (resolved.folder / "MLmodel").write_text(yaml.safe_dump(mlmodel))
    for at in (resolved.folder, inner):
        torch.save(Written(tmp_path / "written"), at / "model.pkl", _use_new_zipfile_serialization=False)

    assert "must" in refusal(reopened(resolved, resolved.folder))
    assert not (tmp_path / "written").exists()
