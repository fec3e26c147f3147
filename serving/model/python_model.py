"""How a model of MLflow's python_function flavour is loaded and called, here or in a process of its own.

Needs nothing but numpy, pandas and MLflow: the environment of a model has no more. Shapes: N rows; inputs and outputs
are [N, *shape].
"""

from __future__ import annotations

import inspect
import itertools
import json
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from copy import deepcopy
from dataclasses import asdict, dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from serving.errors import ModelUnfit
from serving.model.outputs import name_outputs

Arrays = Mapping[str, npt.NDArray[Any]]
# MLflow reads this variable at every load; without it, unpickling is allowed.
ALLOW_PICKLE = "MLFLOW_ALLOW_PICKLE_DESERIALIZATION"

_ONNX_LOADER = "loader_module: mlflow.onnx"
# MLflow goes through every column of every call, which takes as long as a linear model. The contract has made sure of
# names and types before. These flavours take the DataFrame as it is.
_CHECKED_LOADERS = {"mlflow.catboost", "mlflow.lightgbm", "mlflow.sklearn", "mlflow.statsmodels", "mlflow.xgboost"}
# Their models leave the rows that they are given as they are.
_LIBRARIES_THAT_KEEP = {"catboost", "lightgbm", "sklearn", "xgboost"}


@dataclass(frozen=True)
class OutputForm:
    """Name, dtype and shape of an output, without the leading N."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def width(self) -> int:
        """The number of values of a row."""
        return int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True)
class CallForm:
    """How a model is called, by its signature and the contract; it goes to another process as JSON.

    Attributes:
        tensors: Whether it takes arrays; else a DataFrame.
        unnamed: Whether its only input has no name.
        fixed_texts: Inputs that MLflow wants as numpy's fixed-width text, with the kind of it.
        outputs: What it returns.
        params: What its params are given.
    """

    tensors: bool
    unnamed: bool
    fixed_texts: Mapping[str, str]
    outputs: tuple[OutputForm, ...]
    params: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` takes."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> CallForm:
        """Return the form that was written by `to_json`, through JSON."""
        outputs = tuple(OutputForm(each["name"], each["dtype"], tuple(each["shape"])) for each in values["outputs"])
        return cls(**{**values, "outputs": outputs})


class PythonModel:
    """A loaded model: arrays by name in, the outputs of its signature by name out.

    Raises ModelUnfit where the form has params that the model's own `predict` has no argument for: MLflow would leave
    them out without a word.
    """

    def __init__(self, model: Any, form: CallForm) -> None:
        self._form = form
        if form.params:
            _check_takes_params(model, form)
        flavor = model.metadata.flavors["python_function"]
        takes_frame = flavor["loader_module"] in _CHECKED_LOADERS and not form.tensors and not form.params
        # A model may be logged with another of its functions, such as predict_proba.
        inner = getattr(model._model_impl, flavor.get("predict_fn", "predict")) if takes_frame else None  # noqa: SLF001 - see above
        self._predict = inner or model.predict
        self._makes_categories = takes_frame and _is_fitted_on_categories(model, flavor["loader_module"])
        self._booster = _find_plain_booster(model, flavor) if takes_frame and not self._makes_categories else None
        self.keeps_inputs = takes_frame and _keeps_inputs(model.get_raw_model())

    def predict(self, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Run the model on N rows. Raises whatever the model raises."""
        form, rows = self._form, len(next(iter(inputs.values())))
        given: Any = dict(inputs) | {
            name: _to_fixed_width(inputs[name], kind) for name, kind in form.fixed_texts.items()
        }
        if self._booster is not None and _is_matrix_of(given, self._booster.feature_names):
            # As the library itself converts a DataFrame, without looking at each column.
            return name_outputs(self._booster.inplace_predict(_make_matrix(given)), form.outputs, rows, np.asarray)
        if form.unnamed:
            (given,) = given.values()
        if not form.tensors:
            given = _make_frame({0: given} if form.unnamed else given)
        if self._makes_categories:
            # The library looks each one up by its text: it is no matter which of them a batch has.
            given = given.astype({name: "category" for name, array in inputs.items() if array.dtype.kind == "O"})
        # A copy, since a model may change what it is given.
        raw = self._predict(given, **({"params": deepcopy(dict(form.params))} if form.params else {}))
        return name_outputs(raw, form.outputs, rows, np.asarray)


def load_python_model(folder: Path, form: CallForm, threads: int) -> PythonModel:
    """Load a model's files by MLflow, and leave no bytecode in its folder, which belongs to the registry.

    Whether the versions here are those of the model is for the caller to look at (serving/model/environment_choice.py).

    Args:
        folder: That of the model's files.
        form: How it is called.
        threads: Intra-op threads of an ONNX model that does not say it itself; other libraries read variables.
    """
    import mlflow.pyfunc  # noqa: PLC0415 - seconds of imports that a finished run does not need

    is_onnx = _ONNX_LOADER in (folder / "MLmodel").read_text()
    with keep_bytecode_out(folder), _set_onnx_threads(threads) if is_onnx else nullcontext():
        # MLflow goes through the files of every installed package to warn of versions, which takes one to two seconds.
        return PythonModel(mlflow.pyfunc.load_model(str(folder), suppress_warnings=True), form)


@contextmanager
def _set_onnx_threads(threads: int) -> Generator[None]:
    """Have sessions of ONNX Runtime that are made while the block runs use so many intra-op threads.

    It reads no variable. Each process would have a thread for each core, and those of several would wait for each other
    by spinning, which takes half of the time of most models. Options that the model was logged with come after this.
    """
    import onnxruntime  # noqa: PLC0415 - other models need none

    made = onnxruntime.SessionOptions

    def make_options() -> Any:
        options = made()
        options.intra_op_num_threads = threads
        return options

    onnxruntime.SessionOptions = make_options
    try:
        yield
    finally:
        onnxruntime.SessionOptions = made


@contextmanager
def keep_bytecode_out(folder: Path) -> Generator[None]:
    """Keep Python from writing bytecode into a folder while the block runs.

    That of libraries is written: a process that loads a torch model imports some 1,300 modules, and compiles them for
    five seconds where it finds none.
    """
    write = SourceFileLoader.set_data

    def write_elsewhere(loader: SourceFileLoader, path: str, data: Any, **options: Any) -> None:
        if not Path(path).resolve().is_relative_to(folder.resolve()):
            write(loader, path, data, **options)

    SourceFileLoader.set_data = write_elsewhere  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        SourceFileLoader.set_data = write  # type: ignore[method-assign]


def _is_fitted_on_categories(model: Any, loader: str) -> bool:
    """Return whether trees were fitted on pandas categories, which a signature has as text, and keep their texts.

    XGBoost keeps them since 3.1. One that does not would take the first text of a batch for the first of its fit.
    """
    raw = model.get_raw_model()
    if loader == "mlflow.lightgbm":
        return bool(getattr(getattr(raw, "booster_", raw), "pandas_categorical", None))
    if loader != "mlflow.xgboost":
        return False
    booster = raw.get_booster() if hasattr(raw, "get_booster") else raw
    return (
        hasattr(booster, "get_categories")
        and "c" in (booster.feature_types or ())
        and not booster.get_categories().empty()
    )


def _find_plain_booster(model: Any, flavor: Mapping[str, Any]) -> Any:
    """Return the trees of XGBoost's own API, whose `inplace_predict` gives what `predict` gives; None for others."""
    raw = model.get_raw_model()
    named = flavor["loader_module"] == "mlflow.xgboost" and flavor.get("predict_fn", "predict") == "predict"
    if not named or type(raw).__name__ != "Booster" or not raw.feature_names:
        return None
    config = json.loads(raw.save_config())
    return raw if config["learner"]["gradient_booster"]["name"] == "gbtree" else None


def _keeps_inputs(raw: Any) -> bool:
    """Return whether a model is made of parts of libraries alone that do not write to what they are given.

    One of scikit-learn that would, since it was told `copy=False`, raises for memory that it may not write to.
    """
    parts = [raw, *(raw.get_params(deep=True).values() if hasattr(raw, "get_params") else ())]
    classes = [type(part) for part in parts if hasattr(part, "predict") or hasattr(part, "transform")]
    return bool(classes) and all(
        each.__module__.split(".")[0] in _LIBRARIES_THAT_KEEP and each.__name__ != "FunctionTransformer"
        for each in classes
    )


def _make_frame(columns: Mapping[Any, npt.NDArray[Any]]) -> Any:
    """Return a DataFrame of columns: in one block where they have one type of numbers, as pandas reads a file.

    What then makes a matrix of it copies nothing. Columns that lie one after the other in memory are that block.
    """
    import pandas as pd  # noqa: PLC0415

    arrays = list(columns.values())
    if len(arrays) > 1 and arrays[0].dtype.kind in "fiub" and len({each.dtype for each in arrays}) == 1:
        return pd.DataFrame(_find_block(arrays).T, columns=list(columns), copy=False)
    return pd.DataFrame(dict(columns), copy=False)


def _find_block(arrays: list[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """Return n arrays of N numbers of one type as [n, N], without a copy where they lie so in one piece of memory."""
    first, rows = arrays[0], len(arrays[0])
    bases = {id(each.base) for each in arrays}
    starts = [each.__array_interface__["data"][0] for each in arrays]
    gaps = {after - before for before, after in itertools.pairwise(starts)}
    apart = gaps.pop() if len(gaps) == 1 else 0
    if len(bases) == 1 and apart >= rows * first.itemsize and all(each.flags.c_contiguous for each in arrays):
        shape, strides = (len(arrays), rows), (apart, first.itemsize)
        return np.lib.stride_tricks.as_strided(first, shape, strides, writeable=first.flags.writeable)
    return np.stack(arrays)


def _is_matrix_of(columns: Arrays, names: Sequence[str]) -> bool:
    """Return whether the columns have these names in this order, and are numbers all."""
    return list(columns) == list(names) and all(
        each.ndim == 1 and each.dtype.kind in "fiub" for each in columns.values()
    )


def _make_matrix(columns: Arrays) -> npt.NDArray[np.float32]:
    """Return n rows of F columns of numbers as [n, F], each value rounded once."""
    arrays = list(columns.values())
    with np.errstate(over="ignore"):
        # Column by column takes half of the time of a block as a whole.
        matrix_nF = np.empty((len(arrays[0]), len(arrays)), dtype=np.float32)
        for at, array in enumerate(arrays):
            matrix_nF[:, at] = array
    return matrix_nF


def _check_takes_params(model: Any, form: CallForm) -> None:
    from mlflow import MlflowException  # noqa: PLC0415

    with suppress(MlflowException):  # of another flavour, all of which take them
        predict = model.unwrap_python_model().predict
        if "params" not in inspect.signature(predict).parameters:
            message = (
                f"The model's predict must take an argument `params` to be given {sorted(form.params)}, got "
                f"predict{inspect.signature(predict)}. Add it and log the model again, or leave the params out."
            )
            raise ModelUnfit(message)


def _to_fixed_width(text_N: npt.NDArray[Any], kind: str) -> npt.NDArray[Any]:
    """Return text as numpy's fixed-width kind, which MLflow requires for tensors of text."""
    if any(item is None for item in text_N.flat):
        message = f"a tensor of {np.dtype(kind).name} can't hold a null"
        raise ValueError(message)
    return text_N.astype(kind)
