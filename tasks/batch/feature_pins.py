"""A feature table as a plan is tied to it, and which of several workers keep in memory."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from pydantic import Field

from serving.model.contract import Contract, Frozen
from tasks.batch.as_of_join import HELD_ROW_BYTES
from tasks.batch.dataset import Snapshot
from tasks.batch.feature_table import FeatureTable

# Tables that take no more than this together, of the columns that are read, decoded, are kept in memory by each worker.
KEPT_BYTES_MAX = 256 << 20
# What a slot takes for rows that features of files are joined to at once, unless a chunk alone takes more.
JOINED_BYTES = 128 << 20
# Of a row that features are joined to: its code, its place and its time, as they are sorted, joined and put in order.
_JOINED_ROW_BYTES = 128


class FeaturePin(Frozen):
    """A feature table as a plan is tied to it.

    `columns` are those that are read, as the table calls them, and `partitions` the types of the keys and columns that
    are in the paths of its files. `is_kept` says that workers keep the table in memory. `null_rows` has, for each key
    and the time, how many rows hold a null in it and so match nothing; None where a footer does not tell.
    """

    table: FeatureTable
    snapshot: Snapshot
    columns: tuple[str, ...]
    partitions: dict[str, str] = Field(default_factory=dict, exclude_if=operator.not_)
    is_kept: bool
    null_rows: dict[str, int | None]

    @property
    def names(self) -> tuple[str, ...]:
        """What the model calls the columns."""
        return tuple(map(self.table.name_column, self.columns))

    @property
    def rows(self) -> int:
        """The rows of all files."""
        return sum(sum(file.row_groups) for file in self.snapshot.files)

    @property
    def decoded_bytes(self) -> int:
        """The bytes of all rows in memory, of the columns that are read."""
        return count_decoded(self.snapshot)

    @property
    def key_row_bytes(self) -> float:
        """The bytes of keys and time of a row in memory, on average."""
        return sum(sizes.keys for file in self.snapshot.files for sizes, _ in file.sized_groups) / self.rows

    @property
    def row_bytes(self) -> float:
        """The bytes of the columns that the model gets of a row in memory, on average."""
        return self.decoded_bytes / self.rows - self.key_row_bytes


def count_decoded(snapshot: Snapshot) -> int:
    """Return the bytes of all rows of a snapshot in memory, of the columns that were asked for when it was opened."""
    return sum(sizes.decoded for file in snapshot.files for sizes, _ in file.sized_groups)


def remove_features(contract: Contract, names: Sequence[str]) -> Contract:
    """Return a contract over what a source must have itself: without the columns that feature tables give."""
    if not names:
        return contract
    inputs = [
        value.model_copy(update={"columns": tuple(each for each in value.columns if each.name not in names)})
        for value in contract.inputs
    ]
    return contract.model_copy(update={"inputs": tuple(value for value in inputs if value.columns)})


def count_joined_bytes(features: Sequence[FeaturePin]) -> float:
    """Return the bytes that a row of the source takes while features are joined to it.

    These are its keys and times, in the forms in which they are joined, its features, once more as they are put
    together, and of one table that is read from files its rows that match so far, with a copy as others are dropped.
    """
    keys = max(pin.key_row_bytes for pin in features)
    found = sum(pin.row_bytes for pin in features)
    held = max((2 * (pin.row_bytes + HELD_ROW_BYTES) for pin in features if not pin.is_kept), default=0.0)
    return 4 * keys + _JOINED_ROW_BYTES + 2 * found + held


def choose_joined_rows(features: Sequence[FeaturePin], chunk_rows: int) -> int:
    """Return the rows of the source that features are joined to at once: those of a chunk, or of several.

    Several where a table is read from its files each time: as many as take JOINED_BYTES.
    """
    if all(pin.is_kept for pin in features):
        return chunk_rows
    return max(chunk_rows, int(JOINED_BYTES / count_joined_bytes(features)))


def describe_features(pin: FeaturePin) -> str:
    """Return what a run says of a feature table: its rows, how it is read, and which of its rows match nothing."""
    how = "kept in memory" if pin.is_kept else "read from its files for each chunk"
    unknown = [name for name, rows in pin.null_rows.items() if rows is None]
    nulls = [f"{rows:,} have no {name}" for name, rows in pin.null_rows.items() if rows]
    nulls += [f"its footers do not tell how many have no {' or no '.join(unknown)}"] if unknown else []
    return (
        f"Features {', '.join(pin.names)} come from {pin.snapshot.title}: {pin.rows:,} rows of "
        f"{pin.decoded_bytes / (1 << 20):,.1f} MiB, {how}."
        + (f" Rows without keys or time match nothing: {', '.join(nulls)}." if nulls else "")
    )


def choose_kept(sizes: Sequence[int], bytes_max: int = KEPT_BYTES_MAX) -> tuple[bool, ...]:
    """Return which tables of these sizes in bytes workers keep in memory: the smallest, as many as fit together."""
    kept, total = [False] * len(sizes), 0
    for at in sorted(range(len(sizes)), key=lambda place: (sizes[place], place)):
        total += sizes[at]
        kept[at] = total <= bytes_max
    return tuple(kept)
