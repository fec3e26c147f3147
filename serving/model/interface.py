"""What every loaded model can do: predict, in slots; and the engine that its forward passes are tied to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol, Self, runtime_checkable

import numpy.typing as npt
from pydantic import Field

from serving.model.contract import Frozen
from serving.model.encoding import BatchUnit, Encoded


class Engine(Frozen):
    """What a plan ties a model's passes to, so that every attempt gives the same bits.

    The default is torch with its own kernels, on one intra-op thread a slot.
    """

    device: Literal["cpu", "cuda"] = Field(default="cpu", description="What computes.")
    threads: int = Field(default=1, ge=1, description="Intra-op threads of one slot.")
    linear: Literal["torch", "onednn"] = Field(default="torch", description="What multiplies in float32 linear layers.")
    precision: Literal["float32", "bfloat16"] = Field(default="float32", description="bfloat16: under autocast.")
    compiled: bool = Field(default=False, description="Whether torch.compile made the passes.")

    def __str__(self) -> str:
        """Say what differs from the default, for people."""
        told = {
            "CUDA": self.device == "cuda",
            f"{self.threads} threads a slot": self.threads > 1,
            "oneDNN": self.linear == "onednn",
            self.precision: self.precision != "float32",
            "compiled": self.compiled,
        }
        return ", ".join(words for words, differs in told.items() if differs) or "torch (default kernels)"


class TuningLimits(Frozen):
    """What the caller lets the tuner try, and what it may not choose itself.

    bfloat16_tolerance is the largest absolute difference from float32 that a prediction may have, None
    where reduced precision is not wanted.
    """

    batch_size: int | None = None
    slots: int | None = None
    bfloat16_tolerance: float | None = None
    compiled: bool = False


Arrays = Mapping[str, npt.NDArray[Any]]
Predictions = dict[str, npt.NDArray[Any]]


class Model(Protocol):
    """What batch, stream and endpoint share: rows in, predictions out."""

    def prepare(self, encoded: Encoded) -> Encoded:
        """Do what needs no forward pass, such as tokenising, ahead of it and in another thread than the slot's."""
        ...

    def predict(self, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Return every output of the contract for N rows, text as objects with None for a null.

        Whatever the model raises comes through.
        """
        ...

    def slot(self) -> AbstractContextManager[None]:
        """Enter what one stream of forward passes needs in its own thread."""
        ...

    @property
    def slots(self) -> int:
        """How many streams of forward passes this machine should run, unless told."""
        ...


@runtime_checkable
class Overlapping(Protocol):
    """A model whose passes are begun before the ones ahead of them are waited for, as a GPU makes them."""

    passes_ahead: int

    def begin(self, inputs: Arrays) -> Any:
        """Begin a pass; the inputs are not written to."""
        ...

    def finish(self, begun: Any) -> dict[str, npt.NDArray[Any]]:
        """Wait for a pass and return its outputs, as `predict` would."""
        ...


class Tunable(Model, Protocol):
    """A model whose passes can be made in several ways."""

    @property
    def engine(self) -> Engine:
        """The engine where nothing was measured: the plainest."""
        ...

    @property
    def batch_size(self) -> int:
        """The batch size where nothing was measured."""
        ...

    @property
    def batch_unit(self) -> BatchUnit:
        """What batch sizes count: rows, or tokens with padding where `prepare` gives rows their lengths."""
        ...

    @property
    def batch_sizes(self) -> Sequence[int]:
        """The batch sizes worth trying, from the smallest."""
        ...

    def engines(self, limits: TuningLimits) -> Sequence[Engine]:
        """Return the engines worth trying here, the plainest first."""
        ...

    def with_engine(self, engine: Engine) -> Self:
        """Return the same model on another engine."""
        ...
