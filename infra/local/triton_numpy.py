"""Replaces Triton's triton_python_backend_utils in the local server: the same, and text under numpy 2.

The server of the nvidia-pytriton wheel is Triton 24.10, whose Python models were built against numpy 1 and read the
size of an array's items where numpy 2 keeps its flags: zero. So arrays that it makes repeat their first byte, and
arrays that it is given seem empty. Numbers can go by DLPack; text cannot. Triton 24.11 reads both versions of numpy;
this file can be removed when the wheel has that.
"""

import ctypes
from typing import Any

import c_python_backend_utils as triton
import numpy as np
import triton_python_backend_utils_of_the_wheel as wheel
from numpy._core._multiarray_umath import _ARRAY_API
from triton_python_backend_utils_of_the_wheel import *  # noqa: F403 - Triton looks its functions up here

# Positions that do not change within numpy 2.
_NEW_FROM_DESCR = 94
_FLAGS_OFFSET = 32

_NewFromDescr = ctypes.PYFUNCTYPE(
    ctypes.c_void_p, *[ctypes.c_void_p] * 2, ctypes.c_int, *[ctypes.c_void_p] * 3, ctypes.c_int, ctypes.c_void_p
)


def serialize_byte_tensor(input_tensor: Any) -> Any:
    """Return text as the wheel's own function does, in an array whose size Triton can read."""
    serialized: bytes = wheel.serialize_byte_tensor(input_tensor)
    if not serialized:
        return serialized
    # A dtype that nothing else has, and memory that the array does not own: numpy never looks at these flags again.
    array = np.frombuffer(serialized, np.dtype("u1", metadata={"for": "Triton"}))
    ctypes.c_uint32.from_address(id(array.dtype) + _FLAGS_OFFSET).value = 1
    return array


def _make_new_from_descr() -> Any:
    """Give Triton, and it alone, a function that makes arrays without the strides which it has computed wrongly.

    Triton reads numpy's table of functions when it first needs one; for that moment the table holds another function.
    """
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    table = (ctypes.c_void_p * (_NEW_FROM_DESCR + 1)).from_address(get_pointer(_ARRAY_API, None))
    original_pointer = table[_NEW_FROM_DESCR]
    original = _NewFromDescr(original_pointer or 0)
    without_strides = _NewFromDescr(
        lambda kind, dtype, ndim, shape, _strides, data, flags, like: original(
            kind, dtype, ndim, shape, None, data, flags, like
        )
    )
    table[_NEW_FROM_DESCR] = ctypes.cast(without_strides, ctypes.c_void_p).value
    try:
        triton.Tensor("", np.zeros(1, np.float32))
    except triton.TritonModelException:
        pass
    finally:
        table[_NEW_FROM_DESCR] = original_pointer
    return without_strides


# A reference, since Triton keeps none of its own.
_new_from_descr = _make_new_from_descr()
