"""A torch module on CUDA devices: copies to and fro overlap the passes. Importing this imports torch.

Shapes: N rows, F features. Stacked inputs cross as [F, N], as they lie, and are transposed on the device.
"""

from __future__ import annotations

import copy
import queue
import threading
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from serving.model.contract import Contract
from serving.model.encoding import BatchUnit, Encoded
from serving.model.interface import Arrays, Engine, TuningLimits
from serving.model.outputs import name_outputs
from serving.model.torch_model import to_numpy

_CUDA = Engine(device="cuda")


@dataclass(frozen=True, slots=True)
class Pass:
    """A pass that the device has been told to make: its outputs on their way to the host, and when they are there."""

    raw: Any
    rows: int
    done: Any


class CudaModel:
    """A torch module, one stream of passes a device; `begin` and `finish` let passes and copies overlap."""

    batch_size, batch_sizes = 65536, (1024, 4096, 16384, 65536, 262144)
    batch_unit: BatchUnit = "rows"
    engine = _CUDA
    passes_ahead = 1

    def __init__(self, module: Any, contract: Contract, engine: Engine = _CUDA) -> None:
        self._module, self._contract, self._engine = module, contract, engine
        self._replicas = {at: _replica(module, at, engine) for at in range(torch.cuda.device_count())}
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for at in self._replicas:
            self._free.put(at)
        self._here = threading.local()

    def prepare(self, encoded: Encoded) -> Encoded:
        """Return the inputs as they are."""
        return encoded

    def predict(self, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Make one pass and wait for it; must be called inside `slot()`."""
        return self.finish(self.begin(inputs))

    def begin(self, inputs: Arrays) -> Pass:
        """Start the copy of N rows to the device, the pass over them and the copy back; do not wait."""
        lane: _Lane = self._here.lane
        tensors = [lane.to_device(inputs[value.name]) for value in self._contract.inputs]
        lane.compute.wait_stream(lane.copies)
        with torch.cuda.stream(lane.compute):
            raw = _each(self._replicas[lane.device](*tensors), _to_host)
        for tensor in tensors:
            # Its memory was taken on the copying stream, and is read on this one.
            tensor.record_stream(lane.compute)
        return Pass(raw=raw, rows=len(tensors[0]), done=lane.compute.record_event())

    def finish(self, begun: Pass) -> dict[str, npt.NDArray[Any]]:
        """Wait for a pass and return its outputs."""
        begun.done.synchronize()
        return name_outputs(begun.raw, self._contract.outputs, begun.rows, _copied)

    @contextmanager
    def slot(self) -> Generator[None]:
        """Take a device that no other slot has, and enter inference mode and the engine's precision."""
        device = self._free.get()
        self._here.lane = _Lane(device)
        half: AbstractContextManager[Any] = nullcontext()
        if self._engine.precision == "bfloat16":
            half = torch.autocast("cuda", torch.bfloat16)
        try:
            with torch.cuda.device(device), torch.inference_mode(), half:
                yield
        finally:
            del self._here.lane
            self._free.put(device)

    @property
    def slots(self) -> int:
        """One a device: the copies of a slot overlap its own passes."""
        return len(self._replicas)

    def engines(self, limits: TuningLimits) -> list[Engine]:
        """Return CUDA with torch's default kernels, and what the limits allow."""
        found = [_CUDA, *([_CUDA.model_copy(update={"compiled": True})] if limits.compiled else [])]
        if limits.bfloat16_tolerance is not None:
            found += [engine.model_copy(update={"precision": "bfloat16"}) for engine in found]
        return found

    def with_engine(self, engine: Engine) -> Self:
        """Return the same model on another engine."""
        return type(self)(self._module, self._contract, engine)


def _replica(module: Any, device: int, engine: Engine) -> Any:
    placed = copy.deepcopy(module).to(f"cuda:{device}")
    return torch.compile(placed, dynamic=True) if engine.compiled else placed


class _Lane:
    """A device's two streams: one copies to it, the other computes and copies back."""

    def __init__(self, device: int) -> None:
        self.device = device
        # torch publishes no types for them.
        stream: Any = torch.cuda.Stream
        self.compute, self.copies = stream(device), stream(device)

    def to_device(self, value: npt.NDArray[Any]) -> torch.Tensor:
        """Start the copy of an array to the device; one that lies as [F, N] crosses so.

        torch keeps pinned memory for the next copies, and hands it out again when the last one from it has ended:
        two buffers take turns.
        """
        host = torch.from_numpy(value)
        turned = host.dim() > 1 and not host.is_contiguous()
        pinned = (host.movedim(0, -1) if turned else host).contiguous().pin_memory()
        with torch.cuda.stream(self.copies):
            there = pinned.to(f"cuda:{self.device}", non_blocking=True)
            return there.movedim(-1, 0).contiguous() if turned else there


def _each(raw: Any, change: Any) -> Any:
    """Apply a function to every tensor of a model's answer, in the form it came in."""
    if isinstance(raw, torch.Tensor):
        return change(raw)
    if isinstance(raw, dict):
        return {name: _each(value, change) for name, value in raw.items()}
    if isinstance(raw, list | tuple):
        return [_each(value, change) for value in raw]
    return raw


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def _copied(tensor: torch.Tensor) -> npt.NDArray[Any]:
    # The pinned buffer that the values lie in is used again.
    return np.array(to_numpy(tensor))
