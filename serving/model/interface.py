"""The Protocols of a loaded model, and the engine that its forward passes run on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol, Self, runtime_checkable

import numpy.typing as npt
from pydantic import Field

from serving.model.contract import Frozen
from serving.model.encoding import BatchUnit, Encoded
from serving.model.shared_memory import Allocate


class Engine(Frozen):
    """How a model's passes are computed. A plan keeps it, so that every attempt gives the same bits.

    The default is torch with its own kernels, on one intra-op thread a slot.
    """

    device: Literal["cpu", "cuda"] = Field(default="cpu", description="What computes.")
    threads: int = Field(default=1, ge=1, description="Intra-op threads of one slot.")
    linear: Literal["torch", "onednn"] = Field(default="torch", description="Library of float32 linear layers.")
    precision: Literal["float32", "bfloat16"] = Field(default="float32", description="bfloat16: under autocast.")
    compiled: bool = Field(default=False, description="Whether passes run through torch.compile.")

    def __str__(self) -> str:
        """Return what differs from the default, in words."""
        parts = {
            "CUDA": self.device == "cuda",
            f"{self.threads} threads a slot": self.threads > 1,
            "oneDNN": self.linear == "onednn",
            self.precision: self.precision != "float32",
            "compiled": self.compiled,
        }
        return ", ".join(words for words, differs in parts.items() if differs) or "one thread a slot"


class TuningLimits(Frozen):
    """What the tuner may try: values that the caller has fixed, and engines that it allows.

    `bfloat16_tolerance` is the largest absolute difference from float32 that a prediction may have; without it there is
    no reduced precision.
    """

    batch_size: int | None = None
    slots: int | None = None
    bfloat16_tolerance: float | None = None
    compiled: bool = False


Arrays = Mapping[str, npt.NDArray[Any]]
Predictions = dict[str, npt.NDArray[Any]]


class Model(Protocol):
    """A loaded model: rows in, predictions out."""

    def prepare(self, encoded: Encoded) -> Encoded:
        """Do what needs no forward pass, such as tokenising; called ahead of it, outside the slot's thread."""
        ...

    def predict(self, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Return every output of the contract for N rows.

        Text is in objects with None for a null, and so are integers and booleans among which there are nulls.

        Raises whatever the model raises.
        """
        ...

    def slot(self) -> AbstractContextManager[None]:
        """Return a context in which one thread makes forward passes."""
        ...

    @property
    def slots(self) -> int:
        """How many streams of forward passes this machine should run by default."""
        ...


@runtime_checkable
class Overlapping(Protocol):
    """A model that begins a pass before earlier ones are finished, as on a GPU."""

    passes_ahead: int

    def begin(self, inputs: Arrays) -> Any:
        """Begin a pass; the inputs are not written to."""
        ...

    def finish(self, begun: Any) -> dict[str, npt.NDArray[Any]]:
        """Wait for a pass and return its outputs, as `predict` would."""
        ...


class Halted(Exception):
    """Scoring stopped because `may_continue` returned False."""


@runtime_checkable
class Isolated(Protocol):
    """A model whose passes are made in a process of its own, so that one can be ended before it is finished."""

    def predict_while(self, inputs: Arrays, may_continue: Callable[[], bool]) -> dict[str, npt.NDArray[Any]]:
        """Return the outputs as `predict` would; the inputs are not written to.

        Raises Halted where `may_continue`, which is asked a few times a second, returns False.
        """
        ...

    def lend_memory(self, rows: int) -> Allocate:
        """Return what makes the arrays that so many rows are encoded into."""
        ...


@runtime_checkable
class SlotMemory(Protocol):
    """A model whose slots take memory of their own that is known before: processes, or the keys and values of texts."""

    def count_slot_bytes(self, slots: int, batch_size: int) -> int:
        """Return what so many slots take, with passes of so many rows or tokens."""
        ...


class Tunable(Model, Protocol):
    """A model whose passes can be made in several ways."""

    @property
    def engine(self) -> Engine:
        """The engine to use where nothing was measured."""
        ...

    @property
    def batch_size(self) -> int:
        """The batch size to use where nothing was measured."""
        ...

    @property
    def batch_unit(self) -> BatchUnit:
        """The unit of batch sizes: rows, or tokens with padding where `prepare` sets lengths."""
        ...

    @property
    def batch_sizes(self) -> Sequence[int]:
        """The batch sizes worth trying, from the smallest."""
        ...

    def engines(self, limits: TuningLimits) -> Sequence[Engine]:
        """Return the engines worth trying on this machine, the default first."""
        ...

    def with_engine(self, engine: Engine) -> Self:
        """Return the same model on another engine."""
        ...
