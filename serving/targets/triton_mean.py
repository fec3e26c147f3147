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
import torch
import triton_python_backend_utils as pb_utils
from torch.utils.dlpack import from_dlpack


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
    # With numpy 2 as_numpy fails in Triton before 24.11; DLPack serves all.
    values = [from_dlpack(pb_utils.get_input_tensor_by_name(request, name).to_dlpack()).numpy() for name in names]
    mean = np.mean(values, axis=0, dtype=np.float64).astype(values[0].dtype)
    # Triton marks a capsule as used in a way that numpy's own complains of, and torch's does not.
    return pb_utils.Tensor.from_dlpack(output, torch.from_numpy(np.ascontiguousarray(mean)))


_PAUSES.check()
