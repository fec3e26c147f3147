"""A feature table of versions that are all remembered, and the join as of the time of each row in plain Python."""

from __future__ import annotations

import io
import random
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta

import pyarrow as pa
import pyarrow.parquet as pq

from serving.model.contract import Column, Contract, Input
from tasks.batch.dataset import Snapshot
from tasks.batch.feature_table import FeatureTable
from tasks.storage import Entry
from tests.simulation.data import CONTRACT, Row
from tests.simulation.storage import SimulatedStorage

FEATURE_CONTRACT = CONTRACT.model_copy(
    update={
        "inputs": (
            Input(
                name="x",
                dtype="float64",
                shape=(2,),
                columns=(Column(name="a", dtype="float64"), Column(name="f", dtype="float64")),
            ),
        )
    }
)
_ENTITIES, _MINUTES = 5, 60
_BEGAN = datetime(2030, 1, 1)  # noqa: DTZ001 - of a column without a zone

# What it is about, from which minute on it was known, and the feature.
FeatureRow = tuple[int, int, float | None]


def choose_contract(features: Sequence[FeatureTable]) -> Contract:
    """Return the contract of the model of a call: with features it reads one of them in place of a column."""
    return FEATURE_CONTRACT if features else CONTRACT


def make_spine(ids: Sequence[int]) -> dict[str, pa.Array]:
    """Return the columns of source rows by which features are joined to them."""
    times = [_BEGAN + timedelta(minutes=_find_minute(number)) for number in ids]
    return {"entity": pa.array([_find_entity(number) for number in ids]), "t": pa.array(times, pa.timestamp("us"))}


def _find_entity(number: int) -> int:
    return number % (_ENTITIES + 1)


def _find_minute(number: int) -> int:
    return number * 7 % _MINUTES


class Features:
    """Two files of feature rows in a simulated storage, and every version of each that there has been."""

    def __init__(self, storage: SimulatedStorage, chance: random.Random) -> None:
        self._storage, self._chance = storage, chance
        self._rows: dict[Entry, list[FeatureRow]] = {}

    def write_some(self) -> None:
        """Write both files."""
        for path in ("0.parquet", "1.parquet"):
            self._write(path)

    def change(self) -> None:
        """Write one of the files again, with other rows."""
        self._write(self._chance.choice(["0.parquet", "1.parquet"]))

    def join(
        self, rows_by_file: Mapping[str, Sequence[Row]], snapshot: Snapshot, table: FeatureTable
    ) -> dict[str, list[Row]]:
        """Return the rows of source files with the feature of each in place of its second column."""
        found = [row for file in snapshot.files for row in self._rows[file.entry]]
        age = table.age_seconds_max
        minutes = None if age is None else age // 60
        return {
            path: [(number, a, find_latest(found, number, minutes)) for number, a, _ in rows]
            for path, rows in rows_by_file.items()
        }

    def _write(self, path: str) -> None:
        chance = self._chance
        rows = [
            (
                chance.randrange(_ENTITIES),
                chance.randrange(_MINUTES),
                None if chance.random() < 0.1 else round(chance.uniform(-9, 9), 3),
            )
            for _ in range(chance.randint(5, 25))
        ]
        entities, minutes, values = zip(*rows, strict=True)
        times = [_BEGAN + timedelta(minutes=minute) for minute in minutes]
        table = pa.table(
            {
                "entity": pa.array(entities, pa.int64()),
                "known": pa.array(times, pa.timestamp("us")),
                "f": pa.array(values, pa.float64()),
            }
        )
        sink = io.BytesIO()
        pq.write_table(table, sink, row_group_size=chance.choice([5, 50]))
        self._rows[self._storage.write(path, sink.getvalue())] = rows


def find_latest(rows: Sequence[FeatureRow], number: int, age_max: int | None) -> float | None:
    """Return the feature of a source row: of the latest row that is not later, the last of them, unless it is too old.

    Args:
        rows: The rows of the table, in its order.
        number: The key of the source row.
        age_max: How many minutes older the feature may be.
    """
    entity, minute = _find_entity(number), _find_minute(number)
    latest: FeatureRow | None = None
    for row in rows:
        if row[0] == entity and row[1] <= minute and (latest is None or row[1] >= latest[1]):
            latest = row
    if latest is None or (age_max is not None and minute - latest[1] > age_max):
        return None
    return latest[2]
