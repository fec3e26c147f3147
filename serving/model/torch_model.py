"""A torch module as a model, and the ways in which this machine can run it. Importing this imports torch."""

from __future__ import annotations

import functools
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import fx

from serving.machine import cores
from serving.model import onednn
from serving.model.contract import Contract
from serving.model.encoding import BatchUnit, Encoded
from serving.model.exported import checked_once
from serving.model.interface import Arrays, Engine, Wish
from serving.model.outputs import named_outputs

_PLAIN = Engine()


class TorchModel:
    """A torch module, called with its inputs in the signature's order."""

    # Measured best for small networks on two cores, where nothing else is known.
    batch_size, batch_sizes = 1024, (64, 256, 512, 1024, 2048, 4096, 8192)
    engine = _PLAIN
    batch_unit: BatchUnit = "rows"

    def __init__(self, module: Any, contract: Contract, engine: Engine = _PLAIN) -> None:
        self._module, self._contract, self._engine = module, contract, engine
        self._passes = engine_module(module, engine)

    def prepare(self, encoded: Encoded) -> Encoded:
        """Return the inputs as they are."""
        return encoded

    def predict(self, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Run one forward pass; must be called inside `slot()`."""
        tensors = [torch.from_numpy(inputs[value.name]) for value in self._contract.inputs]
        rows = tensors[0].shape[0]
        return named_outputs(self._passes(*tensors), self._contract.outputs, rows, to_numpy)

    def slot(self) -> AbstractContextManager[None]:
        """Enter inference mode, intra-op threads and precision: none of them reaches other threads by itself."""
        return torch_slot(self._engine)

    @property
    def slots(self) -> int:
        """As many as the cores have threads for: measured faster than one stream over all cores."""
        return max(1, cores() // self._engine.threads)

    def engines(self, wish: Wish) -> list[Engine]:
        """Return torch as it comes, oneDNN where it may be faster, both over all cores, and what the wish allows."""
        return torch_engines(self._module, wish)

    def using(self, engine: Engine) -> Self:
        """Return the same model on another engine; the weights are shared."""
        return type(self)(self._module, self._contract, engine)


def to_numpy(tensor: Any) -> npt.NDArray[Any]:
    """Return a tensor's values, without a copy where numpy has their type: bfloat16 becomes float32."""
    return np.asarray((tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy())


def torch_engines(module: Any, wish: Wish) -> list[Engine]:
    """Return the engines worth trying for a module: torch as it comes, then others, then what the wish allows."""
    found = [Engine()]
    if onednn.available() and onednn.through_onednn(module) is not None:
        found.append(Engine(linear="onednn"))
    if wish.compiled:
        found.append(Engine(compiled=True))
    if wish.bfloat16_tolerance is not None:
        # The layers of an exported graph through oneDNN have their types written down.
        halved = [engine for engine in found if engine.linear == "torch" or not isinstance(module, fx.GraphModule)]
        found += [engine.model_copy(update={"precision": "bfloat16"}) for engine in halved]
    # Slots that the caller has counted have a thread each.
    many = [] if wish.slots or cores() == 1 else [engine.model_copy(update={"threads": cores()}) for engine in found]
    return found + many


@functools.lru_cache(maxsize=8)
def engine_module(module: Any, engine: Engine) -> Any:
    """Return what to call for a pass on an engine.

    A plan that was made where oneDNN is to be had runs through torch's own kernels where it is not.
    """
    if engine.linear == "onednn" and onednn.available():
        module = onednn.through_onednn(module) or module
    return torch.compile(module, dynamic=True) if engine.compiled else checked_once(module)


@contextmanager
def torch_slot(engine: Engine) -> Generator[None]:
    """Enter what an engine needs in the thread of one slot, and leave the thread as it was."""
    half = engine.precision == "bfloat16"
    before = torch.get_num_threads()
    torch.set_num_threads(engine.threads)
    try:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16) if half else nullcontext():
            yield
    finally:
        torch.set_num_threads(before)
