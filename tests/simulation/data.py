"""A model and sources that the simulation knows the right answers of.

The model is a formula over two columns, by version. A file is a list of rows; each version of it is remembered.
"""

from __future__ import annotations

import contextlib
import io
import random
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from serving.errors import ModelUnfit
from serving.model.contract import Column, Contract, Input, Output
from serving.model.encoding import BatchUnit, Encoded
from serving.model.interface import Engine, TuningLimits
from serving.model.pin import ModelPin
from serving.model.processes import ProcessOptions
from tasks.storage import Entry
from tests.simulation.storage import SimulatedStorage

CONTRACT = Contract(
    inputs=(
        Input(
            name="x",
            dtype="float64",
            shape=(2,),
            columns=(Column(name="a", dtype="float64"), Column(name="b", dtype="float64")),
        ),
    ),
    outputs=(Output(name="y", dtype="float64"),),
)

# Versions from the fifth on are challengers alone. One writes over its inputs, one fails on some rows, and one for good
# where it meets such a row.
_WRITES_OVER, _FAILS_ON_ROWS, _FAILS = 5, 6, 7
_B_MAX = 7.5
_NARROWED = 0.4

Row = tuple[int, float | None, float | None]
# The key of a row as text, its prediction, and whether it is a reject.
Answered = tuple[tuple[str, ...], float | None, bool]


def answer(version: int, a: float | None, b: float | None) -> float | None:
    """Return the model's own answer to a row, None for a reject."""
    if a is None or b is None or (version in (_FAILS_ON_ROWS, _FAILS) and b > _B_MAX):
        return None
    return a * version + b


def may_fail(version: int) -> bool:
    """Return whether the model may be given up: also where it fails on each row of its first batch."""
    return version in (_FAILS_ON_ROWS, _FAILS)


@dataclass(frozen=True)
class ToyModel:
    """A model that is a formula; satisfies serving.model.interface.Tunable."""

    version: int
    slots: int = 1
    engine: Engine = field(default_factory=Engine)
    batch_size: int = 4
    batch_unit: BatchUnit = "rows"
    batch_sizes: tuple[int, ...] = (4,)

    def prepare(self, encoded: Encoded) -> Encoded:
        """Return the inputs as they are."""
        return encoded

    def predict(self, inputs: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Return y of N rows."""
        x_NF = inputs["x"]
        if self.version == _FAILS and (x_NF[:, 1] > _B_MAX).any():
            message = "A model must be whole, but this one is not."
            raise ModelUnfit(message)
        if self.version == _FAILS_ON_ROWS and (x_NF[:, 1] > _B_MAX).any():
            message = "too large"
            raise ValueError(message)
        y_N = x_NF[:, 0] * self.version + x_NF[:, 1]
        if self.version == _WRITES_OVER:
            x_NF[:] = 0
        return {"y": y_N}

    @contextlib.contextmanager
    def slot(self) -> Generator[None]:
        """Nothing to enter."""
        yield

    def engines(self, limits: TuningLimits) -> list[Engine]:
        """Return the only one."""
        return [self.engine]

    def with_engine(self, engine: Engine) -> Self:
        """Return the model itself."""
        return self


@dataclass(frozen=True)
class ToyResolved:
    """A pinned version of the model, as serving.model.registry.Resolved is one."""

    version: int
    # It runs in this process, as torch modules do.
    is_torch = True
    needs_torch = True
    mlmodel = SimpleNamespace(flavors={})

    @property
    def pin(self) -> ModelPin:
        """What a run is tied to."""
        digest = f"{self.version:064x}"
        return ModelPin(name="toy", version=str(self.version), model_id=None, source="", digest=digest)

    @property
    def tags(self) -> dict[str, str]:
        """None: nothing is tuned."""
        return {}

    def contract(self, *_options: object) -> Contract:
        """Return the contract, which no option changes."""
        return CONTRACT


def resolve_toy(address: str) -> ToyResolved:
    """Return the version that an address names, as serving.model.registry.resolve_model does."""
    return ToyResolved(int(address.rpartition("/")[2]))


def open_toy(*, version: str, **_told: str) -> ToyResolved:
    """Open a version, as serving.model.registry.open_model does."""
    return ToyResolved(int(version))


def load_toy(resolved: ToyResolved, contract: Contract, *, allow_pickle: bool, processes: ProcessOptions) -> ToyModel:
    """Load the model of a version."""
    return ToyModel(resolved.version)


class Source:
    """Files of rows in a simulated storage, and every version of each that there has been.

    Where `types` draws something, each file has columns in types and an order of its own, all of which hold the values.
    """

    def __init__(
        self,
        storage: SimulatedStorage,
        chance: random.Random,
        kind: str,
        more_columns: Callable[[Sequence[int]], dict[str, pa.Array]],
        types: random.Random | None = None,
    ) -> None:
        self._storage, self._chance, self._kind, self._more_columns = storage, chance, kind, more_columns
        self._types = types
        self._rows: dict[Entry, list[Row]] = {}
        self._next = 0

    @property
    def url(self) -> str:
        """Its address."""
        return self._storage.url

    def write_some(self) -> None:
        """Write one to three files."""
        for _ in range(self._chance.randint(1, 3)):
            self._write_new()

    def change(self) -> None:
        """Write another version of a file, put an earlier one back, add a file, rename or delete one."""
        paths = sorted(self._storage.objects)
        what = self._chance.choice(["another", "back", "add", "rename", "delete"])
        if what == "add":
            self._write_new()
        elif what == "delete" and len(paths) > 1:
            self._storage.erase([self._chance.choice(paths)])
        elif what == "rename":
            path = self._chance.choice(paths)
            entry = next(entry for entry in reversed(self._rows) if entry.path == path)
            self._storage.erase([path])
            self._write_new(self._rows[entry])
        elif what == "back":
            entry = self._chance.choice(list(self._rows))
            self._write(entry.path, self._rows[entry])
        else:
            self._write(self._chance.choice(paths), self._some_rows())

    def rows_of(self, entry: Entry) -> list[Row]:
        """Return the rows of one version of a file."""
        return self._rows[entry]

    def list_rows(self) -> dict[str, list[Row]]:
        """Return the rows of each file as it is now."""
        return {path: self._rows[entry] for path, (_, entry) in self._storage.objects.items()}

    def replace(self, entry: Entry, data: bytes) -> Entry:
        """Write other bytes over a version of a file, which hold the same rows or can't be read; return the new one."""
        written = self._storage.write(entry.path, data)
        self._rows[written] = self._rows[entry]
        return written

    def _write_new(self, rows: list[Row] | None = None) -> None:
        self._next += 1
        self._write(f"f{self._next}.{self._kind}", rows or self._some_rows())

    def _some_rows(self) -> list[Row]:
        rows = []
        for _ in range(self._chance.randint(1, 40)):
            self._next += 1
            a = None if self._chance.random() < 0.05 else round(self._chance.uniform(-9, 9), 3)
            b = round(self._chance.uniform(-9, 9), 3)
            if self._types:
                a, b = None if a is None else float(np.float32(a)), float(np.float32(b))
            rows.append((self._next, a, b))
        return rows

    def _write(self, path: str, rows: list[Row]) -> None:
        more = self._more_columns([number for number, _, _ in rows])
        table = _make_table(rows, more)
        if self._types:
            table = _evolve(table, self._types)
        entry = self._storage.write(path, _file_bytes(table, self._kind, self._chance.choice([5, 9, 50])))
        self._rows[entry] = rows


def _make_table(rows: Sequence[Row], more: dict[str, pa.Array]) -> pa.Table:
    ids, a, b = zip(*rows, strict=True)
    own = {"id": pa.array(ids, pa.int64()), "a": pa.array(a, pa.float64()), "b": pa.array(b, pa.float64())}
    return pa.table(own | more)


def _evolve(table: pa.Table, chance: random.Random) -> pa.Table:
    """Return a table whose columns are in another order, some in narrower types, and beside some that nobody reads."""
    narrower = {"id": pa.int32(), "a": pa.float32(), "b": pa.float32()}
    for name, kind in narrower.items():
        if chance.random() < _NARROWED:
            table = table.set_column(table.column_names.index(name), name, table.column(name).cast(kind))
    names = [*table.column_names, *(["more"] if chance.random() < _NARROWED else [])]
    columns = {name: table.column(name) if name != "more" else pa.nulls(len(table)) for name in names}
    return pa.table({name: columns[name] for name in chance.sample(names, len(names))})


def _file_bytes(table: pa.Table, kind: str, rows_per_group: int) -> bytes:
    sink = io.BytesIO()
    if kind == "parquet":
        pq.write_table(table, sink, row_group_size=rows_per_group)
    else:
        pa.csv.write_csv(table, sink)
    return sink.getvalue()


def expected(rows_by_file: Mapping[str, Sequence[Row]], version: int, keys: Sequence[str]) -> list[Answered]:
    """Return what the table of a run must hold, in order."""
    found: list[Answered] = []
    for path, rows in rows_by_file.items():
        for at, (number, a, b) in enumerate(rows):
            key = (number,) if keys else (path, at)
            y = answer(version, a, b)
            found.append((tuple(str(value) for value in key), y, y is None))
    return sorted(found, key=repr)
