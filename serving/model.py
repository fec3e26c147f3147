"""A model that predicts: one Protocol, and the two ways in which MLflow models become one.

Shapes: every input is [N, *shape] and every output [N, *shape] of the contract.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from serving.contract import Contract, Output
from serving.errors import ModelFailed, ModelUnfit
from serving.registry import Resolved

Arrays = Mapping[str, npt.NDArray[Any]]


class Model(Protocol):
    """What batch, stream and endpoint share: rows in, predictions out."""

    def predict(self, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Return every output of the contract for N rows; whatever the model raises comes through."""
        ...

    def slot(self) -> AbstractContextManager[None]:
        """Enter what one stream of forward passes needs in its own thread."""
        ...

    @property
    def slots(self) -> int:
        """How many streams of forward passes this machine should run, unless told."""
        ...


def load_model(resolved: Resolved, contract: Contract, *, allow_pickle: bool = False) -> Model:
    """Load a resolved model, once in each process.

    Raises ModelUnfit where the model is pickled and `allow_pickle` is not set, since unpickling
    runs whatever code the file holds.
    """
    loaded = _load(resolved.folder, resolved.pin.digest, resolved.is_torch, allow_pickle)
    return TorchModel(loaded, contract) if resolved.is_torch else PyfuncModel(loaded, contract)


# MLflow reads it at every load, and takes an absent one as yes.
_ALLOW_PICKLE = "MLFLOW_ALLOW_PICKLE_DESERIALIZATION"

_loading = threading.Lock()


@functools.lru_cache(maxsize=2)
def _load(folder: Path, digest: str, is_torch: bool, allow_pickle: bool) -> Any:  # noqa: ARG001, FBT001 - the digest is a key of the cache
    import mlflow.pyfunc  # noqa: PLC0415 - seconds of imports that a finished run does not need

    with _loading:
        before = os.environ.get(_ALLOW_PICKLE)
        os.environ[_ALLOW_PICKLE] = str(allow_pickle).lower()
        try:
            return _load_torch(folder, allow_pickle=allow_pickle) if is_torch else mlflow.pyfunc.load_model(str(folder))
        except Exception as error:  # a flavour's loader may raise anything; it all means the same here
            raise _unfit(folder, error, allow_pickle=allow_pickle) from error
        finally:
            del os.environ[_ALLOW_PICKLE]
            if before is not None:
                os.environ[_ALLOW_PICKLE] = before


def _load_torch(folder: Path, *, allow_pickle: bool) -> Any:
    import mlflow.pytorch  # noqa: PLC0415

    options = {"weights_only": False} if allow_pickle else {}
    return mlflow.pytorch.load_model(str(folder), **options)


def _unfit(folder: Path, error: Exception, *, allow_pickle: bool) -> ModelUnfit:
    if not allow_pickle and "pickle" in str(error).lower():
        return ModelUnfit(
            f"A model must not need unpickling, which runs any code in its files, unless asked for; got: {error} "
            "Log it in a safe format (mlflow.pytorch: pt2), or pass allow_pickle=True if you trust whoever logged it."
        )
    return ModelUnfit(f"The model in {folder} must load here, got {type(error).__name__}: {error}.")


class TorchModel:
    """A torch module, called with its inputs in the signature's order."""

    def __init__(self, module: Any, contract: Contract) -> None:
        self._module = module
        self._contract = contract

    def predict(self, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Run one forward pass; must be called inside `slot()`."""
        import torch  # noqa: PLC0415 - a finished run is told so before torch is imported

        tensors = [torch.from_numpy(inputs[value.name]) for value in self._contract.inputs]
        rows = tensors[0].shape[0]
        return _named(self._module(*tensors), self._contract.outputs, rows, lambda tensor: tensor.numpy())

    @contextmanager
    def slot(self) -> Generator[None]:
        """Enter inference mode with one intra-op thread: neither reaches other threads by itself."""
        import torch  # noqa: PLC0415

        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with torch.inference_mode():
                yield
        finally:
            torch.set_num_threads(before)

    @property
    def slots(self) -> int:
        """One a core: measured faster than one stream over all cores."""
        if hasattr(os, "sched_getaffinity"):
            return len(os.sched_getaffinity(0))
        return os.cpu_count() or 1


class PyfuncModel:
    """Any other flavour, through mlflow.pyfunc: a DataFrame or arrays in, anything out."""

    def __init__(self, model: Any, contract: Contract) -> None:
        self._model = model
        self._contract = contract
        self._tensors = model.metadata.signature.inputs.is_tensor_spec()
        self._unnamed = self._tensors and model.metadata.signature.inputs.inputs[0].name is None

    def predict(self, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Run the model on N rows."""
        import pandas as pd  # noqa: PLC0415

        rows = len(next(iter(inputs.values())))
        given: Any = dict(inputs) if self._tensors else pd.DataFrame(dict(inputs), copy=False)
        if self._unnamed:
            (given,) = inputs.values()
        return _named(self._model.predict(given), self._contract.outputs, rows, np.asarray)

    @contextmanager
    def slot(self) -> Generator[None]:
        """Nothing to enter: the library behind keeps its own threads."""
        yield

    @property
    def slots(self) -> int:
        """One: these libraries use all cores themselves, and few promise to be thread-safe."""
        return 1


def _named(raw: Any, outputs: tuple[Output, ...], rows: int, to_numpy: Any) -> dict[str, npt.NDArray[Any]]:
    """Give every output its name and shape, whatever shape the model answers in."""
    values = _by_name(raw, outputs)
    return {output.name: _shaped(to_numpy(values[output.name]), output, rows) for output in outputs}


def _by_name(raw: Any, outputs: tuple[Output, ...]) -> dict[str, Any]:
    names = [output.name for output in outputs]
    if hasattr(raw, "columns") and hasattr(raw, "iloc"):
        if len(outputs) == 1 and outputs[0].width == raw.shape[1]:
            return {names[0]: raw.to_numpy()}
        return {name: _column_of(raw, name, at) for at, name in enumerate(names)}
    if isinstance(raw, Mapping):
        if missing := [name for name in names if name not in raw]:
            message = f"The model must answer with {names}, got {sorted(map(str, raw))}: {missing} missing."
            raise ModelFailed(message)
        return {name: raw[name] for name in names}
    if len(outputs) == 1:
        return {names[0]: raw[0] if isinstance(raw, tuple) and len(raw) == 1 else raw}
    if not isinstance(raw, list | tuple) or len(raw) != len(outputs):
        message = f"The model must answer with {len(outputs)} outputs {names}, got a {type(raw).__name__}."
        raise ModelFailed(message)
    return dict(zip(names, raw, strict=True))


def _column_of(frame: Any, name: str, at: int) -> Any:
    return frame[name].to_numpy() if name in frame.columns else frame.iloc[:, at].to_numpy()


def _shaped(value: npt.NDArray[Any], output: Output, rows: int) -> npt.NDArray[Any]:
    if value.size != rows * output.width:
        message = (
            f"Output {output.name!r} must hold {output.width} values for each of {rows} rows, got shape {value.shape}. "
            "Log the model again with the signature of what it returns."
        )
        raise ModelFailed(message)
    if output.dtype == "str":
        return value.astype(object).reshape(rows, *output.shape)
    return value.reshape(rows, *output.shape).astype(output.dtype, copy=False)
