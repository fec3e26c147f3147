"""A feature table as the options of a run name it: where it is, its keys, its time, and how old a row may be."""

from __future__ import annotations

import re
from collections import Counter
from typing import Self

from pydantic import Field, field_validator, model_validator

from serving.model.contract import ColumnNames, Frozen

# More tables than this are better joined once, in the table that the run reads.
FEATURE_TABLES_MAX = 16
_KEYS_MAX = 8
_AGE = re.compile(r"(\d{1,12})([smhdw])")
_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}
# Of so many seconds the nanoseconds fit 64 bits.
_AGE_SECONDS_MAX = 36_500 * 86_400


class FeatureTable(Frozen):
    """A table of features over time: each row of the source gets its latest row that is not later than the source's."""

    source: str = Field(
        min_length=1,
        max_length=4096,
        description="Where it is: a file, folder, glob or prefix of Parquet, a Delta or Iceberg table, or an Overnight "
        "destination.",
    )
    join_keys: ColumnNames = Field(
        min_length=1,
        max_length=_KEYS_MAX,
        description="The columns that name what a row is about, called the same in the source and in this table.",
    )
    time: str = Field(
        min_length=1,
        description="The column of this table that says from when on a row was known: a date or a timestamp.",
    )
    columns: ColumnNames = Field(
        default=(),
        description="The columns that the model gets from this table. Without: each that the model reads and this "
        "table has.",
    )
    max_age: str | None = Field(
        default=None,
        description="How much earlier than the row of the source a row may be, such as 30d: a whole number of s, m, h, "
        "d or w. An older one is no match. Without: any age.",
    )
    prefix: str | None = Field(
        default=None,
        min_length=1,
        description="What is put before the names of the columns, for two tables that have columns of the same name.",
    )

    @field_validator("max_age")
    @classmethod
    def _is_age(cls, value: str | None) -> str | None:
        match = None if value is None else _AGE.fullmatch(value)
        if value is not None and (match is None or _count_seconds(match) > _AGE_SECONDS_MAX):
            message = (
                "must be a whole number, zero or more, with one of the units s, m, h, d and w, such as '30d', and at "
                f"most 36500d, got {value!r}"
            )
            raise ValueError(message)
        return value

    @model_validator(mode="after")
    def _columns_differ(self) -> Self:
        for name, given in (("join_keys", self.join_keys), ("columns", self.columns)):
            if twice := [column for column, count in Counter(given).items() if count > 1]:
                message = f"{name} must be different columns, got {twice} twice"
                raise ValueError(message)
        if shared := sorted(set(self.join_keys) & {self.time, *self.columns}):
            message = f"join_keys must be other columns than time and columns, got {shared} in both"
            raise ValueError(message)
        return self

    @property
    def age_seconds_max(self) -> int | None:
        """The greatest age in seconds, None where any is allowed."""
        match = _AGE.fullmatch(self.max_age or "")
        return None if match is None else _count_seconds(match)

    def name_column(self, column: str) -> str:
        """Return what the model calls a column of this table."""
        return f"{self.prefix or ''}{column}"


def _count_seconds(match: re.Match[str]) -> int:
    return int(match[1]) * _UNIT_SECONDS[match[2]]
