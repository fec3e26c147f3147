"""Scoring micro-batches: decoded, encoded and passed as in a batch run; what can't be scored is set apart.

Shapes: N rows of a group of messages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa

from serving.model.contract import Contract
from serving.model.encoding import Flags, encode
from serving.model.forward import Forward, iter_endless_retry_delays
from serving.model.interface import Model, Predictions
from tasks.batch.parts import output_columns
from tasks.stream.decode import Decoder, Group
from tasks.stream.message import Message, Poison


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredGroup:
    """A group of messages with the predictions of its rows, and flags of those that have none."""

    group: Group
    predictions: Predictions
    flags: Flags

    @property
    def rejects(self) -> npt.NDArray[np.int64]:
        """How many rows of each message are rejects."""
        return np.add.reduceat((self.flags.code_N != 0).astype(np.int64), self.group.edges[:-1])

    @property
    def rows(self) -> npt.NDArray[np.int64]:
        """How many rows each message has."""
        return np.diff(self.group.edges)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A micro-batch, scored: its messages in order, and the poison among them.

    `unread` is the poison that gave no rows; the rest of it has all of its rows flagged in a group.
    """

    messages: tuple[Message, ...]
    groups: tuple[ScoredGroup, ...] = ()
    unread: tuple[Poison, ...] = ()
    poison: tuple[Poison, ...] = ()
    seconds: float = 0.0

    @property
    def rows(self) -> int:
        """The rows that were read."""
        return sum(len(group.flags.code_N) for group in self.groups)

    @property
    def rejects(self) -> int:
        """The rows without a prediction."""
        return sum(int((group.flags.code_N != 0).sum()) for group in self.groups)

    def light(self, key_columns: Sequence[str]) -> Scored:
        """Return what a table's rows are made of, which may be held for long: no payloads, and no columns but keys."""
        return replace(
            self,
            messages=_light(self.messages),
            groups=tuple(_light_group(group, key_columns) for group in self.groups),
            unread=tuple(replace(each, message=_light([each.message])[0]) for each in self.unread),
            poison=tuple(replace(each, message=_light([each.message])[0]) for each in self.poison),
        )


def _light(messages: Iterable[Message]) -> tuple[Message, ...]:
    return tuple(replace(message, payload=b"") for message in messages)


def _light_group(scored: ScoredGroup, key_columns: Sequence[str]) -> ScoredGroup:
    group, keys = scored.group, scored.group.table.select(list(key_columns))
    if key_columns:
        # A column of Arrow IPC is a view of the whole message, which would stay with it.
        keys = keys.take(pa.array(np.arange(keys.num_rows)))
    return replace(scored, group=replace(group, messages=_light(group.messages), table=keys, rows=None))


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What goes out for one message: its scores in the form that it came in."""

    message: Message
    payload: bytes


@dataclass(slots=True)
class MicroScorer:
    """Scores micro-batches in the thread of one slot, which has entered the model's `slot`."""

    model: Model
    contract: Contract
    decoder: Decoder
    batch_size: int
    clock: Callable[[], float]
    forward: Forward = field(init=False)

    def __post_init__(self) -> None:
        # A stream may begin with rows that fail: that they all do is told by poison in a row.
        # What the model calls may be away for long: messages wait for it, since each delivery of one is counted.
        self.forward = Forward(
            self.model, self.contract, self.batch_size, proven=True, delays=iter_endless_retry_delays
        )

    def score(self, messages: Sequence[Message]) -> Scored:
        """Score a micro-batch: a message none of whose rows gets a prediction is poison, the others are answered.

        Waits for as long as what the model calls or runs on fails, and the stream is not told to stop. Raises
        DeviceLost and ModelFailed, as a batch run does.
        """
        start = self.clock()
        groups, unread = self.decoder.decode(messages)
        scored = tuple(self._score(group) for group in groups)
        poison = [*unread, *(each for group in scored for each in _poison(group))]
        return Scored(
            messages=tuple(messages),
            groups=scored,
            unread=tuple(unread),
            poison=tuple(poison),
            seconds=self.clock() - start,
        )

    def _score(self, group: Group) -> ScoredGroup:
        encoded = self.model.prepare(encode(self.contract, group.table))
        predictions = self.forward.score(encoded)
        return ScoredGroup(group=group, predictions=predictions, flags=encoded.flags)


def _poison(scored: ScoredGroup) -> list[Poison]:
    dead = np.flatnonzero(scored.rejects == scored.rows)
    found = []
    for at in dead:
        column, reason = scored.flags.reasons[scored.flags.code_N[scored.group.edges[at]] - 1]
        found.append(Poison(message=scored.group.messages[at], column=column, reason=reason))
    return found


def answers(scored: Scored, contract: Contract, key_columns: tuple[str, ...]) -> list[Answer]:
    """Return what goes out for each message that is no poison, in the order of the groups.

    JSON is answered with one object: the keys as they were, and the outputs. Arrow IPC is answered with as many rows:
    keys, outputs (null for rejects), reject_column and reject_reason.
    """
    found: list[Answer] = []
    for group in scored.groups:
        make = _json_answers if group.group.rows is not None else _arrow_answers
        found += make(group, contract, key_columns)
    return found


def _json_answers(scored: ScoredGroup, contract: Contract, key_columns: tuple[str, ...]) -> list[Answer]:
    names = [output.name for output in contract.outputs]
    columns = [
        _values(scored.predictions[name], output.width) for name, output in zip(names, contract.outputs, strict=True)
    ]
    found = []
    rows = scored.group.rows or ()
    for message, row, code, *values in zip(
        scored.group.messages, rows, scored.flags.code_N.tolist(), *columns, strict=True
    ):
        if not code:
            out = {key: row[key] for key in key_columns}
            out.update(zip(names, values, strict=True))
            found.append(Answer(message=message, payload=orjson.dumps(out)))
    return found


def _values(value: npt.NDArray[Any], width: int) -> list[Any]:
    """Return the predictions as Python's own: a value a row, or a list of them; float32 loses no bit on the way."""
    return list((value.reshape(len(value)) if width == 1 else value.reshape(len(value), width)).tolist())


def _arrow_answers(scored: ScoredGroup, contract: Contract, key_columns: tuple[str, ...]) -> list[Answer]:
    keys = scored.group.table.select(list(key_columns))
    columns = dict(zip(keys.column_names, keys.columns, strict=True))
    columns |= output_columns(contract, scored.predictions, scored.flags)
    table = pa.table(columns)
    found = []
    for at in np.flatnonzero(scored.rejects < scored.rows):
        start, stop = int(scored.group.edges[at]), int(scored.group.edges[at + 1])
        payload = write_arrow(table.slice(start, stop - start))
        found.append(Answer(message=scored.group.messages[at], payload=payload))
    return found


def write_arrow(table: pa.Table) -> bytes:
    """Return rows as an Arrow IPC stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())
