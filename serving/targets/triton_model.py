"""The model.py of a release in Triton's model repository: one slot for the release that lies beside this file."""

# ruff: noqa: E402 - the collector is off before anything is imported
import gc
import os
import sys
from pathlib import Path
from typing import Any

# A seventh of the time that the imports below take; the objects that they make are never garbage.
gc.disable()
# Other instances have the other cores, and nothing of a request leaves the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from serving.targets.triton_pauses import PauseWatch

# The imports below are most of a load.
_PAUSES = PauseWatch()

import numpy as np
import triton_python_backend_utils as pb_utils

from serving.errors import BadRequest, DependencyFault, OvernightError
from serving.model.contract import TEXT_DTYPES, Input, Output
from serving.model.release import open_release
from serving.targets.triton_tensors import make_tensor, read_tensor


class TritonPythonModel:
    """One instance: a batch of Triton's is passed in this process's one thread, the batching's rows at a time."""

    def initialize(self, _arguments: dict[str, str]) -> None:
        """Load the release; what is raised here is Triton's reason for not serving it."""
        self.runtime = open_release(Path(__file__).parent).__enter__()
        self.contract = self.runtime.release.contract
        gc.freeze()
        gc.enable()
        _PAUSES.finish()

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request, in their order. One that fails gets its reason, and the others their answers."""
        given = [self._inputs(request) for request in requests]
        answers = iter(
            self.runtime.predict_requests([inputs for inputs in given if not isinstance(inputs, BadRequest)])
        )
        return [self._response(each if isinstance(each, BadRequest) else next(answers)) for each in given]

    def finalize(self) -> None:
        """Leave the slot, and end this process, which Triton waits for.

        The interpreter would free every object of MLflow and the model's libraries one by one: a second or more of a
        core, just when the next load may need it.
        """
        self.runtime.__exit__()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)

    def _inputs(self, request: Any) -> dict[str, Any] | BadRequest:
        try:
            return {
                value.name: _to_numpy(pb_utils.get_input_tensor_by_name(request, value.name), value)
                for value in self.contract.inputs
            }
        except UnicodeDecodeError as error:
            return BadRequest(f"Text must be UTF-8, got: {error}.")

    def _response(self, answer: dict[str, Any] | OvernightError) -> Any:
        if isinstance(answer, OvernightError):
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(answer), _error_code(answer)))
        return pb_utils.InferenceResponse([_to_tensor(answer[value.name], value) for value in self.contract.outputs])


def _error_code(error: OvernightError) -> Any:
    """Return what is answered with 400, 503 or 500."""
    if isinstance(error, BadRequest):
        return pb_utils.TritonError.INVALID_ARG
    return pb_utils.TritonError.UNAVAILABLE if isinstance(error, DependencyFault) else pb_utils.TritonError.INTERNAL


def _to_numpy(tensor: Any, value: Input) -> Any:
    if value.dtype not in TEXT_DTYPES:
        return read_tensor(tensor).view(value.dtype).reshape(-1, *value.shape)
    items = tensor.as_numpy().reshape(-1)
    texts = np.empty(len(items), dtype=object)
    texts[:] = [item.decode() for item in items] if value.dtype == "str" else list(items)
    return texts.reshape(-1, *value.shape)


def _to_tensor(array: Any, value: Output) -> Any:
    shaped = np.ascontiguousarray(array).reshape(len(array), *(value.shape or (1,)))
    return pb_utils.Tensor(value.name, shaped) if value.dtype == "str" else make_tensor(value.name, shaped)


# What runs next, before `initialize`, is Triton's own code.
_PAUSES.check()
