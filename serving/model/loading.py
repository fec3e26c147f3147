"""Loading a resolved model: as a torch module, a text model, or any flavour through mlflow.pyfunc.

Shapes: every input is [N, *shape] and every output [N, *shape] of the contract.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress
from copy import deepcopy
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from mlflow import MlflowException
from mlflow.models import Model as MLmodel

from serving.errors import ModelUnfit
from serving.machine import pause_garbage_collection, set_variable
from serving.model.contract import Contract
from serving.model.encoding import BatchUnit, Encoded
from serving.model.interface import Arrays, Engine, Tunable, TuningLimits
from serving.model.load_errors import explain_load_error
from serving.model.model_files import check_files
from serving.model.outputs import name_outputs
from serving.model.registry import (
    FileStates,
    ModelPin,
    Resolved,
    check_files_unchanged,
    digest_folder,
    read_file_states,
)

_DEFAULT_ENGINE = Engine()


@pause_garbage_collection()
def load_model(resolved: Resolved, contract: Contract, *, allow_pickle: bool = False) -> Tunable:
    """Load a resolved model, once in each process.

    A model that was logged as code runs its code, whatever `allow_pickle` says.

    Raises:
        ModelUnfit: The model is pickled and `allow_pickle` is not set, since unpickling runs any code in the file; or a
            file changed between hashing and loading; or the model does not load here.
    """
    with _load_lock:
        files = resolved.files or _hash_files(resolved)
        loaded = _load_cached(resolved.folder, resolved.pin, files, resolved.is_torch, allow_pickle)
        if not resolved.is_torch:
            _models_that_read_files[resolved.pin.digest] = (resolved.folder, files)
    if resolved.is_torch:
        import torch  # noqa: PLC0415 - a finished run needs no import of torch

        from serving.model.cuda import CudaModel  # noqa: PLC0415 - the same
        from serving.model.torch_model import TorchModel  # noqa: PLC0415 - the same

        return CudaModel(loaded, contract) if torch.cuda.is_available() else TorchModel(loaded, contract)
    if resolved.is_text:
        from serving.model.text import make_text_model  # noqa: PLC0415 - the same

        return make_text_model(loaded, contract) or PyfuncModel(loaded, contract)
    return PyfuncModel(loaded, contract)


def check_model_unchanged(pin: ModelPin) -> None:
    """Raise ModelUnfit where a loaded model may still read its files, and one has changed since they were hashed.

    An exported torch module is in memory. A model that runs Python may open artifacts or import code later.
    """
    if pin.digest in _models_that_read_files:
        check_files_unchanged(pin, *_models_that_read_files[pin.digest])


_models_that_read_files: dict[str, tuple[Path, FileStates]] = {}


def _hash_files(resolved: Resolved) -> FileStates:
    """Hash the files of a release and return their state. Raises ModelUnfit where the digest is not the pinned one."""
    files = read_file_states(resolved.folder)
    digest = digest_folder(resolved.folder)
    if digest != resolved.pin.digest:
        message = (
            f"The files in {resolved.folder} must be those of {resolved.pin.uri} (digest {resolved.pin.digest[:12]}), "
            f"got digest {digest[:12]}. Deploy the version again."
        )
        raise ModelUnfit(message)
    return files


# MLflow reads this variable at every load; without it, unpickling is allowed.
_ALLOW_PICKLE = "MLFLOW_ALLOW_PICKLE_DESERIALIZATION"

_load_lock = threading.Lock()


@functools.lru_cache(maxsize=2)
def _load_cached(folder: Path, pin: ModelPin, files: FileStates, is_torch: bool, allow_pickle: bool) -> Any:  # noqa: FBT001 - keys of the cache
    import mlflow.pyfunc  # noqa: PLC0415 - seconds of imports that a finished run does not need

    try:
        # MLflow refuses skops files as it does pickles, unless this says that they were checked.
        allowed = allow_pickle or check_files(folder, MLmodel.load(str(folder / "MLmodel")))
        with set_variable(_ALLOW_PICKLE, str(allowed).lower()), _suppress_bytecode():
            if is_torch:
                model = _load_torch(folder, allow_pickle=allow_pickle)
            else:
                model = mlflow.pyfunc.load_model(str(folder))
    except ModelUnfit:
        raise
    except Exception as error:  # a flavour's loader may raise anything; it all means the same here
        raise explain_load_error(folder, error, allow_pickle=allow_pickle) from error
    check_files_unchanged(pin, folder, files)
    return model


@contextmanager
def _suppress_bytecode() -> Generator[None]:
    """Keep Python from writing bytecode caches into a model's folder, which belongs to the registry."""
    before = sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before


def _load_torch(folder: Path, *, allow_pickle: bool) -> Any:
    import mlflow.pytorch  # noqa: PLC0415
    import torch  # noqa: PLC0415

    options = {"weights_only": False} if allow_pickle else {}
    module = mlflow.pytorch.load_model(str(folder), **options)
    if isinstance(module, torch.fx.GraphModule) and (
        training := [str(n) for n in module.graph.nodes if _is_training(n)]
    ):
        message = (
            f"A model must be exported for inference, got training mode in its graph at {training}: it would answer "
            "differently each time. Call model.eval() before you log it."
        )
        raise ModelUnfit(message)
    return module


def _is_training(node: Any) -> bool:
    """Return whether a node of an exported graph is a dropout or a normalisation in training mode."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return False
    given = dict(zip((argument.name for argument in schema.arguments), node.args, strict=False)) | node.kwargs
    return bool((given.get("train") or given.get("training")) and given.get("p") != 0)


class PyfuncModel:
    """Any other flavour, through mlflow.pyfunc: a DataFrame or arrays in, any form of outputs.

    Raises ModelUnfit where the contract has params that the model's own `predict` has no argument for: MLflow would
    leave them out without a word.
    """

    # The checks of each call take longer than many models do, so batches are larger than torch's.
    batch_size, batch_sizes = 1024, (64, 1024, 4096, 16384, 65536)
    engine = _DEFAULT_ENGINE
    batch_unit: BatchUnit = "rows"

    def __init__(self, model: Any, contract: Contract) -> None:
        self._model = model
        self._contract = contract
        schema = model.metadata.signature.inputs
        self._tensors = schema.is_tensor_spec()
        self._unnamed = schema.inputs[0].name is None
        specs = zip(contract.inputs, schema.inputs, strict=True) if self._tensors else ()
        self._texts = {value.name: spec.type.kind for value, spec in specs if spec.type.kind in "US"}
        if contract.params:
            _check_takes_params(model, contract)

    def prepare(self, encoded: Encoded) -> Encoded:
        """Return the inputs as they are."""
        return encoded

    def predict(self, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Run the model on N rows."""
        import pandas as pd  # noqa: PLC0415

        rows = len(next(iter(inputs.values())))
        given: Any = dict(inputs) | {name: _to_fixed_width(inputs[name], kind) for name, kind in self._texts.items()}
        if self._unnamed:
            (given,) = given.values()
        if not self._tensors:
            given = pd.DataFrame({0: given} if self._unnamed else given, copy=False)
        # A copy, since a model may change what it is given.
        raw = self._model.predict(given, params=deepcopy(self._contract.params) or None)
        return name_outputs(raw, self._contract.outputs, rows, np.asarray)

    @contextmanager
    def slot(self) -> Generator[None]:
        """Do nothing: the library of the flavour has its own threads."""
        yield

    @property
    def slots(self) -> int:
        """One: these libraries use all cores themselves, and few are thread-safe."""
        return 1

    def engines(self, limits: TuningLimits) -> list[Engine]:  # noqa: ARG002 - there is none to choose
        """Return the only one."""
        return [_DEFAULT_ENGINE]

    def with_engine(self, engine: Engine) -> Self:  # noqa: ARG002
        """Return the model itself."""
        return self


def _check_takes_params(model: Any, contract: Contract) -> None:
    with suppress(MlflowException):  # of another flavour, all of which take them
        predict = model.unwrap_python_model().predict
        if "params" not in inspect.signature(predict).parameters:
            message = (
                f"The model's predict must take an argument `params` to be given {sorted(contract.params)}, got "
                f"predict{inspect.signature(predict)}. Add it and log the model again, or leave the params out."
            )
            raise ModelUnfit(message)


def _to_fixed_width(text_N: npt.NDArray[Any], kind: str) -> npt.NDArray[Any]:
    """Return text as numpy's fixed-width kind, which MLflow requires for tensors of text."""
    if any(item is None for item in text_N.flat):
        message = f"a tensor of {np.dtype(kind).name} can't hold a null"
        raise ValueError(message)
    return text_N.astype(kind)
