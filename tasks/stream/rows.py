"""Rows on their way into a part, each with its place in the log. Shapes: N rows, n of one group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from serving.model.contract import Contract
from serving.model.encoding import Flags
from serving.model.forward import Predictions
from tasks.stream.message import Poison
from tasks.stream.score import ScoredGroup

PARTITION, NUMBER, ROW = "source_partition", "source_number", "source_row"

_PLACE = np.dtype([("partition", np.int64), ("number", np.int64), ("row", np.int64)])


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedRows:
    """N rows on their way into a part; `keys` are the user's, with the place of each row before them."""

    places_N: npt.NDArray[np.void]
    user_keys: pa.Table
    predictions: Predictions
    flags: Flags

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return len(self.places_N)

    @property
    def keys(self) -> pa.Table:
        """The places and the user's keys, as a part has them."""
        columns = {
            name: pa.array(self.places_N[field])
            for name, field in zip((PARTITION, NUMBER, ROW), ("partition", "number", "row"), strict=True)
        }
        return pa.table(columns | dict(zip(self.user_keys.column_names, self.user_keys.columns, strict=True)))

    def where(self, mask_N: npt.NDArray[np.bool_]) -> PlacedRows:
        """Return the rows of a mask."""
        return self if mask_N.all() else self._take(np.flatnonzero(mask_N))

    def in_order(self) -> PlacedRows:
        """Return the rows in the order of their places."""
        order_N = np.argsort(self.places_N, kind="stable", order=["partition", "number", "row"])
        return self if (order_N[1:] > order_N[:-1]).all() else self._take(order_N)

    def cast(self, types: Mapping[str, pa.DataType]) -> PlacedRows:
        """Return the rows with their keys in these types."""
        columns = {name: self.user_keys.column(name).cast(kind) for name, kind in types.items()}
        return replace(self, user_keys=pa.table(columns) if columns else self.user_keys)

    def _take(self, at: npt.NDArray[np.int64]) -> PlacedRows:
        return PlacedRows(
            places_N=self.places_N[at],
            user_keys=self.user_keys.take(pa.array(at)) if self.user_keys.num_columns else self.user_keys,
            predictions={name: value[at] for name, value in self.predictions.items()},
            flags=Flags(self.flags.code_N[at], list(self.flags.reasons)),
        )


def group_rows(scored: ScoredGroup, key_columns: Sequence[str]) -> PlacedRows:
    """Return the rows of a group of messages; row r of a message is its r-th."""
    rows_n = scored.rows
    places = np.empty(int(rows_n.sum()), dtype=_PLACE)
    places["partition"] = np.repeat([message.place.partition for message in scored.group.messages], rows_n)
    places["number"] = np.repeat([message.place.number for message in scored.group.messages], rows_n)
    places["row"] = np.arange(len(places)) - np.repeat(scored.group.edges[:-1], rows_n)
    keys = scored.group.table.select(list(key_columns))
    return PlacedRows(places_N=places, user_keys=keys, predictions=scored.predictions, flags=scored.flags)


def unread_rows(unread: Sequence[Poison], types: Mapping[str, pa.DataType], contract: Contract) -> PlacedRows:
    """Return one row for each message that could not be read: no keys, no predictions, and the reason."""
    places = np.array([(*poison.message.place, 0) for poison in unread], dtype=_PLACE)
    flags = Flags.none(len(unread))
    for at, poison in enumerate(unread):
        flags.mark_row(at, poison.column, poison.reason)
    nothing = {
        output.name: np.full(
            (len(unread), *output.shape),
            None if output.dtype == "str" else 0,
            dtype=object if output.dtype == "str" else output.dtype,
        )
        for output in contract.outputs
    }
    keys = pa.table({name: pa.nulls(len(unread), kind) for name, kind in types.items()})
    return PlacedRows(places_N=places, user_keys=keys, predictions=nothing, flags=flags)


def join_rows(pieces: Sequence[PlacedRows]) -> PlacedRows:
    """Return several pieces, whose keys have the same types, as one."""
    return PlacedRows(
        places_N=np.concatenate([piece.places_N for piece in pieces]),
        user_keys=pa.concat_tables([piece.user_keys for piece in pieces]),
        predictions={
            name: np.concatenate([piece.predictions[name] for piece in pieces]) for name in pieces[0].predictions
        },
        flags=Flags.joined([piece.flags for piece in pieces]),
    )
