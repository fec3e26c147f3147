"""Tensors of numbers between Triton's Python backend and numpy, by DLPack, without torch.

`as_numpy` would do for what comes in, but with numpy 2 it fails in Triton before 24.11.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt
import triton_python_backend_utils as pb_utils

_rename = ctypes.pythonapi.PyCapsule_SetName
_rename.argtypes = [ctypes.py_object, ctypes.c_char_p]
# A capsule keeps no copy of its name, so these bytes must stay.
_TAKEN = b"used_dltensor"


def read_tensor(tensor: Any) -> npt.NDArray[Any]:
    """Return the numbers of a tensor of Triton's, not to be written to; booleans may come as bytes."""
    return np.from_dlpack(tensor)


def make_tensor(name: str, array: npt.NDArray[Any]) -> Any:
    """Return an array of numbers or booleans as a tensor of Triton's."""
    # numpy gives away no array that may not be written to.
    capsule = np.require(array, requirements=["C", "W"]).__dlpack__()
    tensor = pb_utils.Tensor.from_dlpack(name, capsule)
    # Triton takes what is in the capsule and renames it, but not to the name that the standard asks for. numpy would
    # write an error into Triton's log whenever it frees one.
    _rename(capsule, _TAKEN)
    return tensor
