"""Memory that a model process and its parent share: arrays of numbers cross without a copy.

A block of rows is encoded into a region that the process maps too, and only for reading. What lies elsewhere, and what
the process answers, is copied into a region that both may write to. Both sides read this file.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import sys
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Arrays = Mapping[str, npt.NDArray[Any]]
# Makes an array of a shape and a dtype whose values are to be filled in, as np.empty does.
Allocate = Callable[[tuple[int, ...], Any], npt.NDArray[Any]]

# Where an array begins: vectors of processors, and the lines of their caches, have at most so many bytes.
ALIGNMENT = 64
# Between columns of a block: a distance of a power of two would map every column to the same cache set.
_GAP = 2 * ALIGNMENT
_numbers = itertools.count(1)


class Region:
    """Memory that several processes map, by a file without a name; it goes with the last array that views it.

    Args:
        descriptor: Of the file. It stays the caller's.
        size: Its bytes.
        number: By which the processes name it.
        writable: Whether this process may write to it.
    """

    def __init__(self, descriptor: int, size: int, number: int, *, writable: bool = True) -> None:
        self.size, self.number = size, number
        access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self.memory = mmap.mmap(descriptor, size, prot=access)

    def view(self, place: Mapping[str, Any]) -> npt.NDArray[Any]:
        """Return the array at a place, as a view of the memory."""
        return np.ndarray(tuple(place["shape"]), np.dtype(place["dtype"]), self.memory, place["offset"])


class OwnRegion(Region):
    """A region that this process has made, and whose descriptor it keeps, to send to others."""

    def __init__(self, size: int) -> None:
        size = max(mmap.PAGESIZE, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE)
        if sys.platform == "linux":
            self.descriptor = os.memfd_create("overnight")
        else:
            with tempfile.TemporaryFile() as file:
                self.descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self.descriptor)
        os.ftruncate(self.descriptor, size)
        super().__init__(self.descriptor, size, next(_numbers))
        self._address = _find_address(np.frombuffer(self.memory, dtype=np.uint8))

    def find_offset(self, array: npt.NDArray[Any]) -> int | None:
        """Return where an array lies in this region, None where it lies elsewhere or not in one piece."""
        offset = _find_address(array) - self._address
        inside = offset >= 0 and offset + array.nbytes <= self.size
        return offset if inside and array.flags.c_contiguous else None


def _find_address(array: npt.NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])


class RegionPool:
    """The regions that blocks are encoded into; each is used again once the last array over it is gone."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Finalizers append at any moment, which needs no lock.
        self._free: deque[OwnRegion] = deque()
        self._all: tuple[OwnRegion, ...] = ()

    def lend(self, size: int) -> Allocate:
        """Return what makes arrays of so many bytes in all, one after the other, in a region of their own."""
        region = self._take(size)
        # Every array over the region keeps this object, also through views; of a memoryview it keeps the memory alone.
        view: Any = (ctypes.c_char * region.size).from_buffer(region.memory)
        weakref.finalize(view, self._free.append, region)
        used = 0

        def allocate(shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
            nonlocal used
            array: npt.NDArray[Any] = np.ndarray(shape, np.dtype(dtype), view, used)
            used += count_place_bytes(array.nbytes)
            return array

        return allocate

    def _take(self, size: int) -> OwnRegion:
        with self._lock:
            free = [self._free.popleft() for _ in range(len(self._free))]
            fitting = next((region for region in free if region.size >= size), None)
            if fitting is None:
                # Those that have become too small go: a longer block would find them too small again.
                kept = tuple(region for region in self._all if region not in free)
                fitting = OwnRegion(size)
                self._all = (*kept, fitting)
                return fitting
            self._free.extend(region for region in free if region is not fitting)
            return fitting

    @property
    def numbers(self) -> set[int]:
        """The regions that there are; any other number is of one that is gone."""
        return {region.number for region in self._all}

    def find_arrays(self, arrays: Arrays) -> dict[str, tuple[OwnRegion, int]]:
        """Return the region that each array lies in, and where, without those that lie in none."""
        found: dict[str, tuple[OwnRegion, int]] = {}
        regions = list(self._all)
        for name, array in arrays.items():
            for at, region in enumerate(regions):
                if (offset := region.find_offset(array)) is not None:
                    found[name] = region, offset
                    # The columns of a block lie in one region.
                    regions.insert(0, regions.pop(at))
                    break
        return found


def count_place_bytes(size: int) -> int:
    """Return what an array of so many bytes takes in a region that is lent, with the gap to the next one."""
    return -(-size // ALIGNMENT) * ALIGNMENT + _GAP


def is_opaque(array: npt.NDArray[Any]) -> bool:
    """Return whether an array holds text or bytes as objects, which no memory can be shared of."""
    return array.dtype.kind == "O"


def count_bytes(arrays: Arrays) -> int:
    """Return the bytes of shared memory that the arrays take."""
    return sum(each.nbytes + ALIGNMENT for each in arrays.values() if not is_opaque(each))


def put_arrays(arrays: Arrays, region: Region, offset: int) -> list[dict[str, Any]]:
    """Copy arrays of numbers into the region from an offset on; return where each lies.

    Columns of one type follow each other without a gap, and so are a matrix.
    """
    places: list[dict[str, Any]] = []
    before: npt.NDArray[Any] | None = None
    for name, array in arrays.items():
        if is_opaque(array):
            continue
        if before is None or array.ndim != 1 or (before.dtype, before.shape) != (array.dtype, array.shape):
            offset = -(-offset // ALIGNMENT) * ALIGNMENT
        place = describe_place(name, array, region, offset)
        region.view(place)[...] = array
        places.append(place)
        offset += array.nbytes
        before = array
    return places


def describe_place(name: str, array: npt.NDArray[Any], region: Region, offset: int) -> dict[str, Any]:
    """Return where an array lies, as JSON."""
    return {
        "name": name,
        "dtype": array.dtype.str,
        "shape": list(array.shape),
        "region": region.number,
        "offset": offset,
    }
