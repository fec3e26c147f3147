"""The model.py of an ensemble's mean in Triton's repository: it averages what the models before it have answered.

Its inputs are named after the number of a model and an output of it, as in "1.score"; its config has the outputs.
"""

# ruff: noqa: E402 - pauses are watched before anything takes time
import json
import os
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from serving.targets.triton_pauses import PauseWatch

_PAUSES = PauseWatch()

import numpy as np
import triton_python_backend_utils as pb_utils

from serving.targets.triton_tensors import make_tensor, read_tensor


class TritonPythonModel:
    """The mean of each output over all models, computed in float64."""

    def initialize(self, arguments: dict[str, str]) -> None:
        """Read the names of the inputs and outputs."""
        config = json.loads(arguments["model_config"])
        inputs = [each["name"] for each in config["input"]]
        self.inputs = {
            each["name"]: [name for name in inputs if name.partition(".")[2] == each["name"]]
            for each in config["output"]
        }
        _PAUSES.finish()

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request, in their order."""
        return [
            pb_utils.InferenceResponse([_average(request, output, names) for output, names in self.inputs.items()])
            for request in requests
        ]


def _average(request: Any, output: str, names: list[str]) -> Any:
    values = [read_tensor(pb_utils.get_input_tensor_by_name(request, name)) for name in names]
    mean = np.mean(values, axis=0, dtype=np.float64).astype(values[0].dtype)
    return make_tensor(output, mean)


_PAUSES.check()
