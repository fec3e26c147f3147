"""How the forward passes of a model are made, where that may change the last bits of its predictions."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from serving.contract import Frozen


class Engine(Frozen):
    """What a plan ties a model's passes to, so that every attempt gives the same bits.

    The default is torch as it comes, on one intra-op thread a slot.
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
        return ", ".join(words for words, differs in told.items() if differs) or "torch as it comes"


class Wish(Frozen):
    """What the caller lets the tuner try, and what it may not choose itself.

    bfloat16_tolerance is the largest absolute difference from float32 that a prediction may have, None
    where reduced precision is not wanted.
    """

    batch_size: int | None = None
    slots: int | None = None
    bfloat16_tolerance: float | None = None
    compiled: bool = False
