"""Loading a resolved model: as a torch module, a text model, or any flavour through mlflow.pyfunc.

Shapes: every input is [N, *shape] and every output [N, *shape] of the contract.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy.typing as npt
from mlflow.models import Model as MLmodel

from serving.errors import ModelUnfit, OvernightError
from serving.extras import import_extra
from serving.machine import pause_garbage_collection, set_variable
from serving.model.contract import Contract
from serving.model.encoding import BatchUnit, Encoded
from serving.model.interface import Arrays, Engine, Tunable, TuningLimits
from serving.model.load_errors import explain_load_error
from serving.model.model_files import check_files
from serving.model.pin import FileStates, ModelPin, check_files_unchanged, digest_folder, read_file_states
from serving.model.processes import ModelFiles, ProcessModel, ProcessOptions
from serving.model.python_model import ALLOW_PICKLE, CallForm, OutputForm, PythonModel, keep_bytecode_out
from serving.model.registry import Resolved
from serving.model.requirements import list_libraries

_DEFAULT_ENGINE = Engine()
# The model of a run, and its challengers.
_MODELS_KEPT = 5


@pause_garbage_collection()
def load_model(
    resolved: Resolved, contract: Contract, *, allow_pickle: bool = False, processes: ProcessOptions | None = None
) -> Tunable:
    """Load a resolved model, once in each process.

    A model that was logged as code runs its code, whatever `allow_pickle` says.

    Args:
        resolved: The model.
        contract: What it takes and returns.
        allow_pickle: Whether it may be unpickled.
        processes: Run a model of Python in processes of its own, so. Without, it runs in this process, as torch
            modules and text models always do.

    Raises:
        ModelUnfit: The model is pickled and `allow_pickle` is not set, since unpickling runs any code in the file; or a
            file changed between hashing and loading; or the model does not load here.
        BadInput: It needs torch, which is not installed.
    """
    if resolved.needs_torch:
        import_extra("torch", "torch")
    with _load_lock:
        files = resolved.files or _hash_files(resolved)
        if processes and not resolved.needs_torch:
            return _load_in_processes(resolved, files, contract, allow_pickle=allow_pickle, options=processes)
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


def _load_in_processes(
    resolved: Resolved, files: FileStates, contract: Contract, *, allow_pickle: bool, options: ProcessOptions
) -> ProcessModel:
    """Load a model in a process; the latest five are kept, with their processes, for the next call."""
    folder = resolved.folder
    form = make_call_form(resolved.mlmodel, contract)
    key = (resolved.pin, files, allow_pickle, contract.model_dump_json(), options)
    _models_that_read_files[resolved.pin.digest] = (folder, files)
    model = _models_in_processes.pop(key, None)
    if model is None:
        try:
            # The libraries that check are imported there already. In an environment of the model's own, they are its.
            is_checked_there = options.python == sys.executable and not allow_pickle
            allowed = allow_pickle or (not is_checked_there and check_files(folder, resolved.mlmodel))
            loaded = ModelFiles(
                folder=folder,
                form=form,
                allow_pickle=allowed,
                check=is_checked_there,
                libraries=tuple(list_libraries(folder)),
            )
            model = ProcessModel(loaded, contract, options)
            model.processes.load()
        except OvernightError:
            raise
        except Exception as error:
            raise explain_load_error(folder, error, allow_pickle=allow_pickle) from error
        check_files_unchanged(resolved.pin, folder, files)
    _models_in_processes[key] = model
    while len(_models_in_processes) > _MODELS_KEPT:
        del _models_in_processes[next(iter(_models_in_processes))]
    return model


_models_in_processes: dict[Any, ProcessModel] = {}


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


_load_lock = threading.Lock()


@functools.lru_cache(maxsize=_MODELS_KEPT)
def _load_cached(folder: Path, pin: ModelPin, files: FileStates, is_torch: bool, allow_pickle: bool) -> Any:  # noqa: FBT001 - keys of the cache
    import mlflow.pyfunc  # noqa: PLC0415 - seconds of imports that a finished run does not need

    try:
        # MLflow refuses skops files as it does pickles, unless this says that they were checked.
        allowed = allow_pickle or check_files(folder, MLmodel.load(str(folder / "MLmodel")))
        with set_variable(ALLOW_PICKLE, str(allowed).lower()), keep_bytecode_out(folder):
            if is_torch:
                model = _load_torch(folder, allow_pickle=allow_pickle)
            else:
                model = mlflow.pyfunc.load_model(str(folder), suppress_warnings=True)
    except ModelUnfit:
        raise
    except Exception as error:  # a flavour's loader may raise anything; it all means the same here
        raise explain_load_error(folder, error, allow_pickle=allow_pickle) from error
    check_files_unchanged(pin, folder, files)
    return model


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
    """Any other flavour, through mlflow.pyfunc in this process: a DataFrame or arrays in, any form of outputs.

    Raises ModelUnfit where the contract has params that the model's own `predict` has no argument for.
    """

    # The checks of each call take longer than many models do, so batches are larger than torch's.
    batch_size, batch_sizes = 1024, (64, 1024, 4096, 16384, 65536)
    engine = _DEFAULT_ENGINE
    batch_unit: BatchUnit = "rows"

    def __init__(self, model: Any, contract: Contract) -> None:
        self._model = PythonModel(model, make_call_form(model.metadata, contract))

    def prepare(self, encoded: Encoded) -> Encoded:
        """Return the inputs as they are."""
        return encoded

    def predict(self, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Run the model on N rows."""
        return self._model.predict(inputs)

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


def make_call_form(mlmodel: MLmodel, contract: Contract) -> CallForm:
    """Return how a model is called, by its signature and its contract."""
    from serving.model.signature import is_unnamed  # noqa: PLC0415 - MLflow's models, which the caller has imported

    schema = mlmodel.signature.inputs
    tensors = schema.is_tensor_spec()
    specs = zip(contract.inputs, schema.inputs, strict=True) if tensors else ()
    return CallForm(
        tensors=tensors,
        unnamed=is_unnamed(schema),
        fixed_texts={value.name: spec.type.kind for value, spec in specs if spec.type.kind in "US"},
        outputs=tuple(OutputForm(each.name, each.dtype, each.shape) for each in contract.outputs),
        params=dict(contract.params),
    )
