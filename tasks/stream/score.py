"""Scoring micro-batches: messages are decoded, encoded and scored as in a batch run. Failures become poison.

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
from tasks.stream.decode import Decoder, MessageGroup
from tasks.stream.message import Message, Poison


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredGroup:
    """A group of messages with the predictions of its rows, and flags of rows without one."""

    group: MessageGroup
    predictions: Predictions
    flags: Flags

    @property
    def rejects(self) -> npt.NDArray[np.int64]:
        """How many rows of each message are rejects."""
        return np.add.reduceat((self.flags.code_N != 0).astype(np.int64), self.group.row_offsets[:-1])

    @property
    def rows(self) -> npt.NDArray[np.int64]:
        """How many rows each message has."""
        return np.diff(self.group.row_offsets)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredBatch:
    """A scored micro-batch: its messages in order, and the poison among them.

    `unreadable` is the poison that gave no rows. The rest of the poison has all of its rows flagged in a group.
    """

    messages: tuple[Message, ...]
    groups: tuple[ScoredGroup, ...] = ()
    unreadable: tuple[Poison, ...] = ()
    poison: tuple[Poison, ...] = ()
    seconds: float = 0.0

    @property
    def rows(self) -> int:
        """How many rows were read."""
        return sum(len(group.flags.code_N) for group in self.groups)

    @property
    def rejects(self) -> int:
        """How many rows have no prediction."""
        return sum(int((group.flags.code_N != 0).sum()) for group in self.groups)

    def compact(self, key_columns: Sequence[str]) -> ScoredBatch:
        """Return what a table needs of it, to be held until the next part: no payloads, no columns but keys."""
        return replace(
            self,
            messages=_drop_payloads(self.messages),
            groups=tuple(_compact_group(group, key_columns) for group in self.groups),
            unreadable=tuple(replace(each, message=_drop_payloads([each.message])[0]) for each in self.unreadable),
            poison=tuple(replace(each, message=_drop_payloads([each.message])[0]) for each in self.poison),
        )


def _drop_payloads(messages: Iterable[Message]) -> tuple[Message, ...]:
    return tuple(replace(message, payload=b"") for message in messages)


def _compact_group(scored: ScoredGroup, key_columns: Sequence[str]) -> ScoredGroup:
    group, keys = scored.group, scored.group.table.select(list(key_columns))
    if key_columns:
        # A column of Arrow IPC is a view that keeps the whole message in memory.
        keys = keys.take(pa.array(np.arange(keys.num_rows)))
    return replace(scored, group=replace(group, messages=_drop_payloads(group.messages), table=keys, rows=None))


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The scores of one message, in the format of the message."""

    message: Message
    payload: bytes


@dataclass(slots=True)
class MicroScorer:
    """Scores micro-batches in the thread of one slot, inside the model's `slot()` context."""

    model: Model
    contract: Contract
    decoder: Decoder
    batch_size: int
    clock: Callable[[], float]
    forward: Forward = field(init=False)

    def __post_init__(self) -> None:
        # A stream may begin with rows that fail; `poison_in_a_row` ends a stream where all of them do. A service that
        # the model calls is waited for without end, since every new delivery of a message is counted.
        self.forward = Forward(
            self.model, self.contract, self.batch_size, proven=True, delays=iter_endless_retry_delays
        )

    def score(self, messages: Sequence[Message]) -> ScoredBatch:
        """Score a micro-batch. A message is poison where none of its rows gets a prediction.

        While a service that the model calls fails, it waits and tries again, until the stream must stop.

        Raises:
            DeviceLost, ModelFailed: As in a batch run.
        """
        start = self.clock()
        groups, unreadable = self.decoder.decode(messages)
        scored = tuple(self._score(group) for group in groups)
        poison = [*unreadable, *(each for group in scored for each in _find_poison(group))]
        return ScoredBatch(
            messages=tuple(messages),
            groups=scored,
            unreadable=tuple(unreadable),
            poison=tuple(poison),
            seconds=self.clock() - start,
        )

    def _score(self, group: MessageGroup) -> ScoredGroup:
        encoded = self.model.prepare(encode(self.contract, group.table))
        predictions = self.forward.score(encoded)
        return ScoredGroup(group=group, predictions=predictions, flags=encoded.flags)


def _find_poison(scored: ScoredGroup) -> list[Poison]:
    dead = np.flatnonzero(scored.rejects == scored.rows)
    built = []
    for index in dead:
        column, reason = scored.flags.reasons[scored.flags.code_N[scored.group.row_offsets[index]] - 1]
        built.append(Poison(message=scored.group.messages[index], column=column, reason=reason))
    return built


def build_answers(scored: ScoredBatch, contract: Contract, key_columns: tuple[str, ...]) -> list[Answer]:
    """Return the answers to all messages that are not poison, in the order of the groups.

    A JSON row is answered by one object: the keys as the message writes them, and the outputs. Arrow IPC is answered
    by as many rows: keys, outputs (null for rejects), reject_column and reject_reason.
    """
    built: list[Answer] = []
    for group in scored.groups:
        make = _build_json_answers if group.group.rows is not None else _build_arrow_answers
        built += make(group, contract, key_columns)
    return built


def _build_json_answers(scored: ScoredGroup, contract: Contract, key_columns: tuple[str, ...]) -> list[Answer]:
    names = [output.name for output in contract.outputs]
    columns = [
        _to_python(scored.predictions[name], output.width) for name, output in zip(names, contract.outputs, strict=True)
    ]
    built = []
    rows = scored.group.rows or ()
    for message, row, code, *values in zip(
        scored.group.messages, rows, scored.flags.code_N.tolist(), *columns, strict=True
    ):
        if not code:
            out = {key: row[key] for key in key_columns}
            out.update(zip(names, values, strict=True))
            built.append(Answer(message=message, payload=orjson.dumps(out)))
    return built


def _to_python(value: npt.NDArray[Any], width: int) -> list[Any]:
    """Return predictions as Python values: one per row, or a list of them. Every float32 stays exact."""
    return list((value.reshape(len(value)) if width == 1 else value.reshape(len(value), width)).tolist())


def _build_arrow_answers(scored: ScoredGroup, contract: Contract, key_columns: tuple[str, ...]) -> list[Answer]:
    keys = scored.group.table.select(list(key_columns))
    columns = dict(zip(keys.column_names, keys.columns, strict=True))
    columns |= output_columns(contract, scored.predictions, scored.flags)
    table = pa.table(columns)
    built = []
    for index in np.flatnonzero(scored.rejects < scored.rows):
        start, stop = int(scored.group.row_offsets[index]), int(scored.group.row_offsets[index + 1])
        payload = write_arrow(table.slice(start, stop - start))
        built.append(Answer(message=scored.group.messages[index], payload=payload))
    return built


def write_arrow(table: pa.Table) -> bytes:
    """Return rows as an Arrow IPC stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())
