"""Messages and models for the tests of streams."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import torch

from serving.model.contract import Column, Contract, Input, Output
from serving.model.torch_model import TorchModel
from tasks.stream.connections import Connections, Source
from tasks.stream.decode import Decoder
from tasks.stream.message import Message, Position
from tasks.stream.score import MicroScorer, ScoredBatch, write_arrow
from tests.eventually import eventually

CONTRACT = Contract(
    inputs=(
        Input(
            name="x",
            dtype="float32",
            shape=(2,),
            columns=(Column(name="a", dtype="float32"), Column(name="b", dtype="float32")),
        ),
    ),
    outputs=(Output(name="score", dtype="float32"),),
)
KEYS = ("id",)


class Sum(torch.nn.Module):
    """a + 2 b, which raises where a is 666."""

    def forward(self, x_NF: torch.Tensor) -> torch.Tensor:
        if (x_NF[:, 0] == 666).any():
            message = "no row may have an a of 666"
            raise ValueError(message)
        return x_NF[:, :1] + 2 * x_NF[:, 1:]


def model() -> TorchModel:
    return TorchModel(Sum(), CONTRACT)


def message(payload: bytes, number: int = 1, **fields: Any) -> Message:
    known = {"position": Position(0, number), "event_time": 0.0, "arrived": 0.0} | fields
    return Message(payload=payload, **known)


def json_row(number: int, a: object = 1.5, b: object = 2, *, deliveries: int = 1, **fields: Any) -> Message:
    return message(orjson.dumps({"id": number, "a": a, "b": b, **fields}), number, deliveries=deliveries)


def arrow_rows(number: int, values: Sequence[object], /, **columns: Any) -> Message:
    table = pa.table(
        {
            "id": pa.array(range(len(values))),
            "a": pa.array(values, pa.float32()),
            "b": pa.array([1.0] * len(values), pa.float32()),
        }
        | columns
    )
    return message(write_arrow(table), number)


def decoder(keys: tuple[str, ...] = KEYS) -> Decoder:
    return Decoder(CONTRACT, keys, fix_key_types=True)


def score(messages: Sequence[Message], decode: Decoder | None = None) -> ScoredBatch:
    """Score messages with the sum."""
    summing = model()
    with summing.slot():
        return MicroScorer(summing, CONTRACT, decode or decoder(), 64, Clock()).score(messages)


class Clock:
    """A clock that goes on by a second each time that it is read."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def scores(values: npt.NDArray[Any] | Sequence[float]) -> list[float]:
    return np.asarray(values, dtype=np.float32).reshape(-1).tolist()


Wait = Callable[[Callable[[], bool], str], None]


def take(source: Source, count: int) -> list[Message]:
    """Fetch so many messages."""
    found: list[Message] = []
    return eventually(
        lambda: found.extend(source.fetch(count - len(found), 1, 0.2)) or found, lambda seen: len(seen) == count
    )


def emit_messages(connections: Connections, count: int) -> list[Message]:
    """Fetch so many messages, emit them and acknowledge them."""
    found: list[Message] = []
    return eventually(
        lambda: found.extend(emit_next(connections, count - len(found))) or found, lambda seen: len(seen) == count
    )


def emit_next(connections: Connections, messages_max: int, seconds: float = 0.2) -> list[Message]:
    """Fetch the messages that are there or come in some seconds, emit them and acknowledge them."""
    if got := connections.source.fetch(messages_max, 1, seconds):
        connections.sink.emit([score(got)])
        connections.acknowledger.acknowledge(got, [])
    return got
