"""A torch module on CUDA devices: copies in both directions overlap the passes. Importing this imports torch.

Shapes: N rows, F features. Stacked inputs are copied as [F, N], their layout in memory, and transposed on the device.
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

_DEFAULT_ENGINE = Engine(device="cuda")


@dataclass(frozen=True, slots=True)
class RunningPass:
    """A pass that runs on the device: the host tensors of its outputs, and the event after which they are filled."""

    raw: Any
    rows: int
    done: Any


class CudaModel:
    """A torch module with one stream of passes a device; `begin` and `finish` let passes and copies overlap."""

    batch_size, batch_sizes = 65536, (1024, 4096, 16384, 65536, 262144)
    batch_unit: BatchUnit = "rows"
    engine = _DEFAULT_ENGINE
    passes_ahead = 1

    def __init__(self, module: Any, contract: Contract, engine: Engine = _DEFAULT_ENGINE) -> None:
        self._module, self._contract, self._engine = module, contract, engine
        self._replicas = {at: _copy_to_device(module, at, engine) for at in range(torch.cuda.device_count())}
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for at in self._replicas:
            self._free.put(at)
        self._local = threading.local()

    def prepare(self, encoded: Encoded) -> Encoded:
        """Return the inputs as they are."""
        return encoded

    def predict(self, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Make one pass and wait for it; must be called inside `slot()`."""
        return self.finish(self.begin(inputs))

    def begin(self, inputs: Arrays) -> RunningPass:
        """Start the copy of N rows to the device, the pass over them and the copy back; do not wait."""
        streams: _DeviceStreams = self._local.streams
        tensors = [streams.to_device(inputs[value.name]) for value in self._contract.inputs]
        streams.compute.wait_stream(streams.copies)
        with torch.cuda.stream(streams.compute):
            raw = _map_tensors(self._replicas[streams.device](*tensors), _copy_to_host)
        for tensor in tensors:
            # Its memory was allocated on the stream of copies, and is read on this one.
            tensor.record_stream(streams.compute)
        return RunningPass(raw=raw, rows=len(tensors[0]), done=streams.compute.record_event())

    def finish(self, begun: RunningPass) -> dict[str, npt.NDArray[Any]]:
        """Wait for a pass and return its outputs."""
        begun.done.synchronize()
        # Copies, since the pinned buffers of the values are reused.
        return name_outputs(begun.raw, self._contract.outputs, begun.rows, lambda tensor: np.array(to_numpy(tensor)))

    @contextmanager
    def slot(self) -> Generator[None]:
        """Take a device that no other slot uses, and enter inference mode and the engine's precision."""
        device = self._free.get()
        self._local.streams = _DeviceStreams(device)
        precision: AbstractContextManager[Any] = nullcontext()
        if self._engine.precision == "bfloat16":
            precision = torch.autocast("cuda", torch.bfloat16)
        try:
            with torch.cuda.device(device), torch.inference_mode(), precision:
                yield
        finally:
            del self._local.streams
            self._free.put(device)

    @property
    def slots(self) -> int:
        """One a device, since the copies of a slot overlap its own passes."""
        return len(self._replicas)

    def engines(self, limits: TuningLimits) -> list[Engine]:
        """Return CUDA with torch's default kernels, and what the limits allow."""
        found = [_DEFAULT_ENGINE, *([_DEFAULT_ENGINE.model_copy(update={"compiled": True})] if limits.compiled else [])]
        if limits.bfloat16_tolerance is not None:
            found += [engine.model_copy(update={"precision": "bfloat16"}) for engine in found]
        return found

    def with_engine(self, engine: Engine) -> Self:
        """Return the same model on another engine."""
        return type(self)(self._module, self._contract, engine)


def _copy_to_device(module: Any, device: int, engine: Engine) -> Any:
    placed = copy.deepcopy(module).to(f"cuda:{device}")
    return torch.compile(placed, dynamic=True) if engine.compiled else placed


class _DeviceStreams:
    """A device's two streams: one copies to it, the other computes and copies back."""

    def __init__(self, device: int) -> None:
        self.device = device
        # torch publishes no types for them.
        stream: Any = torch.cuda.Stream
        self.compute, self.copies = stream(device), stream(device)

    def to_device(self, value: npt.NDArray[Any]) -> torch.Tensor:
        """Start the copy of an array to the device; one that is stored as [F, N] is copied in that layout.

        torch reuses pinned memory once the last copy from it has ended, so two buffers take turns.
        """
        host = torch.from_numpy(value)
        transposed = host.dim() > 1 and not host.is_contiguous()
        pinned = (host.movedim(0, -1) if transposed else host).contiguous().pin_memory()
        with torch.cuda.stream(self.copies):
            on_device = pinned.to(f"cuda:{self.device}", non_blocking=True)
            return on_device.movedim(-1, 0).contiguous() if transposed else on_device


def _map_tensors(raw: Any, change: Any) -> Any:
    """Apply a function to every tensor that a model returned, and keep the form."""
    if isinstance(raw, torch.Tensor):
        return change(raw)
    if isinstance(raw, dict):
        return {name: _map_tensors(value, change) for name, value in raw.items()}
    if isinstance(raw, list | tuple):
        return [_map_tensors(value, change) for value in raw]
    return raw


def _copy_to_host(tensor: torch.Tensor) -> torch.Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
