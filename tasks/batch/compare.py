"""Compare the parts of a run with those of its challengers: two parts at a time, and nothing kept but sums.

Shapes: n rows of a batch, W values of a list.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from serving.errors import RunDamaged, name_input
from serving.model.contract import Output
from tasks.batch.challenger_rules import LabelKind, Labels
from tasks.batch.challengers import OutputKind, describe_kind, find_label_kind, pair_outputs
from tasks.batch.comparison import (
    DIFFERENCES,
    EVERY_OTHER_SEGMENT,
    ChallengerComparison,
    LabelComparison,
    LabelledSegment,
    OutputComparison,
    SegmentComparison,
)
from tasks.batch.dataset import name_corrupt_file
from tasks.batch.exact_deciles import find_deciles, place_in_deciles
from tasks.batch.key_check import map_ahead
from tasks.batch.label_metrics import RocArea, find_positives, finish_metric, measure_labels
from tasks.batch.labels import LABEL, LabelTable, describe_labels, join_labels, open_label_table
from tasks.batch.parts import ChunkId, list_parts, name_kept, read_given_up
from tasks.batch.plan import Plan
from tasks.batch.sketches import QuantileSketch, add_sketches, sketch_sorted
from tasks.storage import Entry, Storage

Numbers = npt.NDArray[np.float64]

_BATCH_ROWS, _READERS = 1 << 16, 2
# Of a column of segments so many values are told apart, those that come first; the rest is one more.
_SEGMENTS_MAX = 200
_QUANTILES = (0.5, 0.9, 0.99, 0.999)
_SKETCHES_AT_ONCE = 64
# Names of the columns of paired rows that are no keys: no key can have them, since a part has them once.
_OURS, _THEIRS, _OURS_BAD, _THEIRS_BAD = (
    "overnight.champion",
    "overnight.challenger",
    "overnight.bad",
    "overnight.bad_too",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairing:
    """A run and one of its challengers: their plans, the outputs that are compared, and where their parts are."""

    storage: Storage
    plan: Plan
    other: Plan
    outputs: tuple[tuple[Output, Output], ...]
    parts: tuple[tuple[Entry, Entry], ...]

    def read(self, *, keys: bool = False, kept: bool = True) -> Generator[pa.Table]:
        """Yield the rows of both, some at a time, in the order of the plan."""
        names = list(self.plan.options.key_columns) if keys else []
        beside = [name_kept(name) for name in self.plan.columns_kept] if kept else []
        ours, theirs = ([pair[at].name for pair in self.outputs] for at in (0, 1))

        def read_pair(pair: tuple[Entry, Entry]) -> pa.Table:
            one = _read_part(self.storage, pair[0], [*names, *ours])
            other = _read_part(self.storage, pair[1], [*theirs, *beside])
            columns: dict[str, Any] = {name: one.column(name) for name in names}
            columns |= {f"{_OURS}.{at}": one.column(name) for at, name in enumerate(ours)}
            columns |= {f"{_THEIRS}.{at}": other.column(name) for at, name in enumerate(theirs)}
            columns |= {_OURS_BAD: _find_nulls(one, ours), _THEIRS_BAD: _find_nulls(other, theirs)}
            return pa.table(columns | {name: other.column(name) for name in beside})

        for table in map_ahead(read_pair, self.parts, _READERS):
            for start in range(0, table.num_rows, _BATCH_ROWS):
                yield table.slice(start, _BATCH_ROWS)


def _read_part(storage: Storage, entry: Entry, columns: Sequence[str]) -> pa.Table:
    with storage.open_pinned(entry) as stream, name_corrupt_file(storage, entry):
        file = pq.ParquetFile(stream, page_checksum_verification=True)
        return file.read(columns=list(columns), use_threads=False).select(list(columns)).combine_chunks()


def _find_nulls(table: pa.Table, outputs: Sequence[str]) -> pa.ChunkedArray:
    """Return in which rows an output is null: all of them are in rejects."""
    return functools.reduce(pc.or_, [table.column(name).is_null() for name in outputs])


def pair_parts(storage: Storage, plan: Plan, other: Plan) -> Pairing:
    """Return a run and one of its challengers, all of whose parts are there. Raises RunDamaged where some are not."""
    ours, theirs = list_parts(storage, plan), list_parts(storage, other)
    chunks: list[ChunkId] = list(plan.chunks)
    if lost := [chunk for chunk in chunks if chunk not in ours or chunk not in theirs]:
        message = (
            f"Every chunk of run {plan.run} must have a part of {plan.model.uri} and one of {other.model.uri} to be "
            f"compared, got {len(lost)} of {len(chunks)} without. Score the run again with another rescore."
        )
        raise RunDamaged(message)
    outputs = tuple(pair_outputs(plan.contract, other.contract))
    pairs = tuple((ours[chunk], theirs[chunk]) for chunk in chunks)
    return Pairing(storage=storage, plan=plan, other=other, outputs=outputs, parts=pairs)


def compare_challenger(storage: Storage, plan: Plan, other: Plan) -> ChallengerComparison:
    """Compare one challenger, by its plan, with the model of a run whose parts are all there.

    Parts are read two at a time, once for sums and two or four times more for exact deciles. Labels of another table
    are joined by key, through files in the temporary folder.

    Raises:
        RunDamaged: Parts are gone.
        OvernightError: Labels can't be used, as `open_label_table` and `measure_labels` say.
    """
    told: dict[str, Any] = {"model": other.model.uri, "model_digest": other.model.digest}
    given_up = read_given_up(storage, other)
    if given_up is not None:
        return ChallengerComparison(**told, given_up=given_up)
    pairing = pair_parts(storage, plan, other)
    deciles = _find_deciles(pairing)
    tally = _Tally(pairing, deciles)
    for table in pairing.read():
        tally.add(table)
    return ChallengerComparison(
        **told,
        rows=tally.rows,
        rejects_champion_only=tally.rejects["ours"],
        rejects_challenger_only=tally.rejects["theirs"],
        rejects_both=tally.rejects["both"],
        outputs=tuple(tally.finish_output(at) for at in range(len(pairing.outputs))),
        segments=tuple(tally.finish_segments()),
        labels=_compare_with_labels(pairing),
    )


def _list_kinds(pairing: Pairing) -> list[OutputKind]:
    return [describe_kind(ours) for ours, _ in pairing.outputs]


def _find_deciles(pairing: Pairing) -> dict[int, tuple[Numbers, Numbers]]:
    """Return the deciles of both predictions of each output that is a number, over rows that both have scored."""
    numbers = [at for at, kind in enumerate(_list_kinds(pairing)) if kind == "number"]
    if not numbers:
        return {}

    def read() -> Generator[list[npt.NDArray[Any]]]:
        for table in pairing.read(kept=False):
            good = _drop_nulls(table)
            yield [_to_array(good, name, at) for at in numbers for name in (_OURS, _THEIRS)]

    found = find_deciles(read, 2 * len(numbers))
    return {at: (found[2 * place], found[2 * place + 1]) for place, at in enumerate(numbers)}


def _drop_nulls(table: pa.Table) -> pa.Table:
    """Return the rows that are compared: both models have given a value for each output."""
    bad = pc.or_(table.column(_OURS_BAD), table.column(_THEIRS_BAD))
    return table.filter(pc.invert(bad)) if pc.any(bad).as_py() else table


def _column(table: pa.Table, name: str, at: int) -> pa.Array:
    return table.column(f"{name}.{at}").combine_chunks()


def _to_array(table: pa.Table, name: str, at: int) -> npt.NDArray[Any]:
    return np.asarray(_column(table, name, at).to_numpy(zero_copy_only=False))


def _to_lists(column: pa.Array) -> npt.NDArray[Any]:
    """Return lists of the same length as [n, W]."""
    return np.asarray(column.flatten().to_numpy(zero_copy_only=False)).reshape(len(column), -1)


def _measure_output(table: pa.Table, at: int, kind: OutputKind) -> dict[str, Numbers]:
    """Return what each of n rows that both have scored adds to the figures of an output."""
    if kind == "number":
        ours, theirs = (_to_array(table, name, at).astype(np.float64) for name in (_OURS, _THEIRS))
        difference = np.abs(ours - theirs)
        equal = (ours == theirs).astype(np.float64)
        return {"equal": equal, "difference": difference, "ours": ours, "theirs": theirs}
    one, other = (_column(table, name, at) for name in (_OURS, _THEIRS))
    if kind == "class":
        return {"equal": np.asarray(pc.equal(one, other).to_numpy(zero_copy_only=False), np.float64)}
    ours, theirs = _to_lists(one), _to_lists(other)
    equal = (ours == theirs).all(axis=1).astype(np.float64)
    if kind == "list of classes":
        return {"equal": equal}
    difference = np.abs(ours.astype(np.float64) - theirs.astype(np.float64)).max(axis=1)
    same = (ours.argmax(axis=1) == theirs.argmax(axis=1)).astype(np.float64)
    return {"equal": equal, "difference": difference, "same_class": same}


@dataclass(slots=True)
class _Sums:
    """Sums over rows, by name."""

    rows: int = 0
    sums: dict[str, float] = field(default_factory=dict)

    def add(self, rows: int, sums: Mapping[str, float]) -> None:
        self.rows += rows
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def mean(self, name: str) -> float | None:
        return self.sums[name] / self.rows if self.rows and name in self.sums else None


class _Segments:
    """Sums of rows by the values of one column."""

    def __init__(self, column: str) -> None:
        self.column = column
        self.found: dict[str | None, _Sums] = {}

    def add(self, table: pa.Table, measures: Mapping[str, Numbers]) -> None:
        """Add what each row of a table adds to sums."""
        values = table.column(name_kept(self.column)).combine_chunks()
        values = values.dictionary_decode() if pa.types.is_dictionary(values.type) else values
        coded = values.cast(pa.string()).dictionary_encode(null_encoding="encode")
        names, codes = coded.dictionary.to_pylist(), coded.indices.to_numpy(zero_copy_only=False)
        rows = np.bincount(codes, minlength=len(names))
        sums = {name: np.bincount(codes, weights=each, minlength=len(names)) for name, each in measures.items()}
        for at, name in enumerate(names):
            known = name in self.found or len(self.found) < _SEGMENTS_MAX
            held = self.found.setdefault(name if known else EVERY_OTHER_SEGMENT, _Sums())
            held.add(int(rows[at]), {each: float(of[at]) for each, of in sums.items()})


class _Tally:
    """What the rows of a pairing add up to."""

    def __init__(self, pairing: Pairing, deciles: Mapping[int, tuple[Numbers, Numbers]]) -> None:
        self._pairing, self._deciles, self._kinds = pairing, deciles, _list_kinds(pairing)
        self.rejects = dict.fromkeys(("ours", "theirs", "both"), 0)
        outputs = range(len(pairing.outputs))
        self._sums = [_Sums() for _ in outputs]
        self._greatest = [0.0 for _ in outputs]
        self._beyond = [np.zeros(len(DIFFERENCES), np.int64) for _ in outputs]
        self._moved = [0 for _ in outputs]
        self._sketches: list[list[QuantileSketch]] = [[] for _ in outputs]
        self._segments = [_Segments(name) for name in pairing.plan.options.segment_columns]

    @property
    def rows(self) -> int:
        """Rows that both models have scored."""
        return self._sums[0].rows

    def add(self, table: pa.Table) -> None:
        """Add n rows."""
        ours, theirs = (table.column(name).to_numpy() for name in (_OURS_BAD, _THEIRS_BAD))
        self.rejects["both"] += int((ours & theirs).sum())
        self.rejects["ours"] += int((ours & ~theirs).sum())
        self.rejects["theirs"] += int((~ours & theirs).sum())
        good = _drop_nulls(table)
        measured = [_measure_output(good, at, kind) for at, kind in enumerate(self._kinds)]
        for at, measures in enumerate(measured):
            self._sums[at].add(good.num_rows, {name: float(values.sum()) for name, values in measures.items()})
            if good.num_rows and "difference" in measures:
                self._add_differences(at, measures["difference"])
            if at in self._deciles:
                one, other = (
                    place_in_deciles(_to_array(good, name, at), deciles)
                    for name, deciles in zip((_OURS, _THEIRS), self._deciles[at], strict=True)
                )
                self._moved[at] += int((one != other).sum())
        by_row = {f"{at}.{name}": values for at, each in enumerate(measured) for name, values in each.items()}
        whole = ~(ours | theirs)
        rejects = {"rejects_ours": ours.astype(np.float64), "rejects_theirs": theirs.astype(np.float64)}
        # Values of the rows that both have scored stand at the places of all rows, with 0 for the others.
        spread = {name: np.zeros(len(whole)) for name in by_row}
        for name, values in by_row.items():
            spread[name][whole] = values
        for segment in self._segments:
            segment.add(table, spread | rejects | {"good": whole.astype(np.float64)})

    def _add_differences(self, at: int, differences: Numbers) -> None:
        ordered = np.sort(differences)
        self._greatest[at] = max(self._greatest[at], float(ordered[-1]))
        self._beyond[at] += len(ordered) - np.searchsorted(ordered, DIFFERENCES, side="right")
        self._sketches[at].append(sketch_sorted(ordered))
        if len(self._sketches[at]) >= _SKETCHES_AT_ONCE:
            self._sketches[at] = [add_sketches(self._sketches[at])]

    def finish_output(self, at: int) -> OutputComparison:
        """Return the figures of an output."""
        sums, kind = self._sums[at], self._kinds[at]
        told: dict[str, Any] = {
            "output": self._pairing.outputs[at][0].name,
            "kind": kind,
            "rows": sums.rows,
            "equal": int(sums.sums.get("equal", 0)),
        }
        if kind in ("number", "list of numbers") and sums.rows:
            sketch = add_sketches(self._sketches[at])
            told |= {
                "difference_mean": sums.mean("difference"),
                "difference_max": self._greatest[at],
                "rows_beyond": {
                    f"{bound:g}": int(rows) for bound, rows in zip(DIFFERENCES, self._beyond[at], strict=True)
                },
                "quantiles": {f"p{100 * share:g}": sketch.quantile(share) for share in _QUANTILES},
                "champion_mean": sums.mean("ours"),
                "challenger_mean": sums.mean("theirs"),
                "rows_decile_changed": self._moved[at] if kind == "number" else None,
                "equal_class": int(sums.sums["same_class"]) if kind == "list of numbers" else None,
            }
        return OutputComparison(**told)

    def finish_segments(self) -> Generator[SegmentComparison]:
        """Yield the figures of each value of each segment column, the most frequent first."""
        names = [ours.name for ours, _ in self._pairing.outputs]
        for segment in self._segments:
            for value, sums in sorted(segment.found.items(), key=lambda pair: -pair[1].rows):
                rows = int(sums.sums["good"])

                def by_output(name: str, sums: _Sums = sums, rows: int = rows) -> dict[str, float]:
                    found = {each: sums.sums.get(f"{at}.{name}") for at, each in enumerate(names)}
                    return {each: total / rows for each, total in found.items() if total is not None and rows}

                yield SegmentComparison(
                    column=segment.column,
                    value=value,
                    rows=rows,
                    rejects_champion=int(sums.sums["rejects_ours"]),
                    rejects_challenger=int(sums.sums["rejects_theirs"]),
                    equal={each: int(sums.sums.get(f"{at}.equal", 0)) for at, each in enumerate(names)},
                    difference_mean=by_output("difference"),
                    champion_mean=by_output("ours"),
                    challenger_mean=by_output("theirs"),
                )


def _compare_with_labels(pairing: Pairing) -> LabelComparison | None:
    """Return both models beside the labels, None where there are none."""
    labels = pairing.plan.options.labels
    if labels is None:
        return None
    if labels.source is None:
        kept = name_kept(labels.column)
        with pairing.storage.open_pinned(pairing.parts[0][1]) as stream:
            label_type = pq.read_schema(stream).field(kept).type
        kind = find_label_kind(labels, pairing.plan.contract, label_type, None)
        labelled = (table.append_column(LABEL, table.column(kept)) for table in pairing.read())
        return _measure_rows(pairing, labels, labelled, kind)
    keys = pairing.plan.options.key_columns
    with pairing.storage.open_pinned(pairing.parts[0][0]) as stream:
        schema = pq.read_schema(stream)
    key_schema = pa.schema([schema.field(key) for key in keys])
    table = open_label_table(labels, keys, key_schema, pairing.storage.url)
    kind = find_label_kind(labels, pairing.plan.contract, table.label_type, None)
    return _measure_rows(pairing, labels, _join(pairing, table), kind)


def _join(pairing: Pairing, table: LabelTable) -> Generator[pa.Table]:
    rows = pairing.plan.rows + table.dataset.rows
    for joined in join_labels(pairing.read(keys=True), table, rows):
        for start in range(0, joined.num_rows, _BATCH_ROWS):
            yield joined.slice(start, _BATCH_ROWS)


def _measure_rows(pairing: Pairing, named: Labels, tables: Iterable[pa.Table], kind: LabelKind) -> LabelComparison:
    """Measure both models over rows with labels."""
    sums, areas = {name: _Sums() for name in (_OURS, _THEIRS)}, {name: RocArea() for name in (_OURS, _THEIRS)}
    segments = [_Segments(name) for name in pairing.plan.options.segment_columns]
    has_area = kind == "classification" and _is_binary(pairing.outputs[0][0])
    for table in tables:
        good = _drop_nulls(table)
        good = good.filter(pc.is_valid(good.column(LABEL)))
        labels = good.column(LABEL).combine_chunks()
        measured: dict[str, Numbers] = {}
        for name in (_OURS, _THEIRS):
            predicted = _column(good, name, 0)
            with name_input(describe_labels(named)):
                found = measure_labels(kind, predicted, labels)
            sums[name].add(good.num_rows, {each: float(values.sum()) for each, values in found.items()})
            measured |= {f"{name}.{each}": values for each, values in found.items()}
            if has_area:
                areas[name].add(_find_scores(predicted), find_positives(labels))
        for segment in segments:
            segment.add(good, measured)
    figures = {name: _finish(each.sums, each.rows) for name, each in sums.items()}
    error = 0.0
    if has_area:
        for name, area in areas.items():
            value, off = area.result()
            figures[name] |= {"auc": value} if not math.isnan(value) else {}
            error = max(error, off) if not math.isnan(off) else error
    return LabelComparison(
        kind=kind,
        rows=sums[_OURS].rows,
        champion=figures[_OURS],
        challenger=figures[_THEIRS],
        auc_error_max=error,
        segments=tuple(_finish_labelled(segments)),
    )


def _is_binary(output: Output) -> bool:
    return describe_kind(output) == "number" or (describe_kind(output) == "list of numbers" and output.width == 2)  # noqa: PLR2004 - classes


def _find_scores(predicted: pa.Array) -> Numbers:
    if hasattr(predicted.type, "value_type"):
        return _to_lists(predicted)[:, 1].astype(np.float64)
    return np.asarray(predicted.to_numpy(zero_copy_only=False), np.float64)


def _finish(sums: Mapping[str, float], rows: int) -> dict[str, float]:
    found = {name: finish_metric(name, total, rows) for name, total in sums.items()}
    return {name: value for name, value in found.items() if value is not None}


def _finish_labelled(segments: Sequence[_Segments]) -> Generator[LabelledSegment]:
    for segment in segments:
        for value, held in sorted(segment.found.items(), key=lambda pair: -pair[1].rows):
            both = []
            for name in (_OURS, _THEIRS):
                own = {
                    each.removeprefix(f"{name}."): of for each, of in held.sums.items() if each.startswith(f"{name}.")
                }
                both.append(_finish(own, held.rows))
            yield LabelledSegment(
                column=segment.column, value=value, rows=held.rows, champion=both[0], challenger=both[1]
            )
