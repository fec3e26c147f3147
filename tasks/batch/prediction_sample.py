"""A bounded sample of a run's predictions: some rows to look at, and a picture of how each output is distributed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from serving.model.contract import Contract
from tasks.batch.manifest import Manifest
from tasks.batch.parts import REJECT_COLUMN, REJECT_REASON
from tasks.common.charts import Numbers, Panel, arrange_panels, draw_bars, draw_histogram
from tasks.common.formatting import cut_text
from tasks.storage import Storage

_PARTS_MAX = 8
_ROWS_PER_PART_MAX = 2_500
_VALUES_MAX = 2_000_000
_READ_BYTES = 1 << 20
# More than these are too small to read.
_CHARTS_MAX, _CHARTS_PER_ROW = 9, 3
_CHART_SIZE = 360, 240
# Whole numbers with no more values than these are classes.
_CLASSES_MAX = 12
# Lists of more values are drawn as one: they are seldom probabilities of classes.
_CLASSES_APART_MAX = 4
_BINS = 40
# The span of a histogram's bins must be a number too.
_NUMBER_MAX = 1e307
_CHARACTERS_MAX, _ELEMENTS_MAX = 80, 3
_TITLE_MAX, _LABEL_MAX = 40, 16


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictionSample:
    """Rows of a run that have a prediction: key columns and outputs, those of the first rows of some of its parts."""

    table: pa.Table
    outputs: tuple[str, ...]
    rows: int

    def list_rows(self, count: int) -> list[dict[str, Any]]:
        """Return so many rows, spread over the sample, with values that a table of JSON holds."""
        height = self.table.num_rows
        shown = min(count, height)
        picked = pa.array([height * at // shown for at in range(shown)], type=pa.int64())
        return [
            {name: _show_value(value) for name, value in row.items()} for row in self.table.take(picked).to_pylist()
        ]


def read_sample(storage: Storage, manifest: Manifest, contract: Contract) -> PredictionSample:
    """Read the first rows of at most eight parts, spread evenly over a published run; rejects are left out.

    At most 20,000 rows, and 2,000,000 values of wide outputs, whatever the size of the run.

    Raises:
        StorageFault: A part can't be read.
    """
    outputs = tuple(output.name for output in contract.outputs)
    width = sum(max(1, output.width) for output in contract.outputs)
    rows_max = max(10, min(_ROWS_PER_PART_MAX, _VALUES_MAX // _PARTS_MAX // width))
    count = min(_PARTS_MAX, len(manifest.parts))
    paths = [manifest.parts[len(manifest.parts) * at // count].path for at in range(count)]
    tables = [table for path in paths if (table := _read_first_rows(storage, path, rows_max)) is not None]
    table = pa.concat_tables(tables) if tables else pa.table({name: [] for name in outputs})
    return PredictionSample(table=table, outputs=outputs, rows=manifest.rows)


def _read_first_rows(storage: Storage, path: str, rows: int) -> pa.Table | None:
    """Return the first rows of a part that have a prediction; None where a Delta table has rewritten it since."""
    entry = storage.find(path)
    if entry is None:
        return None
    with (
        storage.open_pinned(entry) as source,
        pq.ParquetFile(source, buffer_size=_READ_BYTES, pre_buffer=False) as part,
    ):
        batch = next(part.iter_batches(batch_size=rows, use_threads=False), None)
    if batch is None:
        return None
    table = pa.Table.from_batches([batch])
    table = table.filter(pc.is_null(table[REJECT_REASON]))
    return table.drop_columns([REJECT_COLUMN, REJECT_REASON])


def _show_value(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}") if np.isfinite(value) else str(value)
    if value is None or isinstance(value, bool | int):
        # A browser's numbers are exact up to 2^53.
        return str(value) if isinstance(value, int) and abs(value) >= 1 << 53 else value
    if isinstance(value, list):
        shown = ", ".join(str(_show_value(each)) for each in value[:_ELEMENTS_MAX])
        return f"[{shown}]" if len(value) <= _ELEMENTS_MAX else f"[{shown}, … {len(value)} values]"
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    return cut_text(str(value), _CHARACTERS_MAX)


def draw_distributions(sample: PredictionSample) -> bytes | None:
    """Draw how each output is distributed over the sample, one small chart each; return an SVG.

    None where there is nothing to draw. Numbers are a histogram, classes and texts the shares of the most frequent.
    """
    drawable = [name for name in sample.outputs if _is_drawable(sample.table[name])]
    shown = drawable[:_CHARTS_MAX]
    if not shown:
        return None
    left_out = f"; {len(sample.outputs) - len(shown)} outputs are not shown" if len(sample.outputs) > len(shown) else ""
    panels = [_draw_output(name, sample.table[name].combine_chunks()) for name in shown]
    return arrange_panels(
        panels,
        columns=min(_CHARTS_PER_ROW, len(panels)),
        heading=f"{sample.table.num_rows:,} of {sample.rows:,} rows{left_out}",
    )


def _is_drawable(column: pa.ChunkedArray) -> bool:
    kind = _element_type(column.type)
    is_number = pa.types.is_floating(kind) or pa.types.is_integer(kind)
    is_class = pa.types.is_boolean(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)
    return bool(len(column) > column.null_count and (is_number or is_class))


def _element_type(kind: pa.DataType) -> pa.DataType:
    nested = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return _element_type(kind.value_type) if nested else kind


def split_classes(values: pa.Array) -> list[pa.Array]:
    """Return the values of each place of short lists of floats, such as probabilities of classes; nothing of others."""
    kind = values.type
    if not hasattr(kind, "value_type") or not pa.types.is_floating(kind.value_type):
        return []
    widths = pc.unique(pc.list_value_length(values)).to_pylist()
    if len(widths) != 1 or widths[0] not in range(2, _CLASSES_APART_MAX + 1):
        return []
    return [pc.list_element(values, at) for at in range(widths[0])]


def _draw_output(name: str, column: pa.Array) -> Panel:
    values, title = column.drop_null(), name
    if classes := split_classes(values):
        # All values together would show probabilities and what they leave as one.
        return _draw_numbers(f"{name}, by class", [_to_numbers(each.drop_null()) for each in classes])
    while hasattr(values.type, "value_type") and not pa.types.is_dictionary(values.type):
        values = values.flatten()
        title = f"{name}, all values"
    values = values.drop_null()
    kind = values.type
    if pa.types.is_floating(kind) or (pa.types.is_integer(kind) and pc.count_distinct(values).as_py() > _CLASSES_MAX):
        return _draw_numbers(title, [_to_numbers(values)])
    counts = sorted(
        ((each["counts"], str(each["values"])) for each in pc.value_counts(values).to_pylist()), reverse=True
    )
    shares = [(cut_text(label, _LABEL_MAX), 100 * count / len(values)) for count, label in counts[:_CLASSES_MAX]]
    bars = [(label, share, f"{share:.3g} %") for label, share in shares]
    note = f"the most frequent of {len(counts):,} values" if len(counts) > len(bars) else ""
    return draw_bars(cut_text(title, _TITLE_MAX), bars, note, *_CHART_SIZE)


def _draw_numbers(title: str, series: Sequence[Numbers]) -> Panel:
    """Draw a histogram of numbers, or one line for each place of a list, such as probabilities of classes."""
    together = np.concatenate(series)
    edges = np.linspace(*_choose_range(together), _BINS + 1)
    means = [f"{each.mean():.4g}" for each in series]
    note = f"mean {means[0]}, from {together.min():.4g} to {together.max():.4g}" if len(series) == 1 else ""
    counted = [(f"{at}: mean {means[at]}", np.histogram(each, edges)[0]) for at, each in enumerate(series)]
    return draw_histogram(cut_text(title, _TITLE_MAX), counted, edges, note, *_CHART_SIZE)


def _to_numbers(values: pa.Array) -> Numbers:
    numbers: Numbers = values.to_numpy(zero_copy_only=False).astype(np.float64)
    return np.clip(numbers, -_NUMBER_MAX, _NUMBER_MAX)


def _choose_range(numbers: Numbers) -> tuple[float, float]:
    """Return what bins are of: the range of the numbers, made wider where it has fewer floats than there are bins."""
    low, high = float(numbers.min()), float(numbers.max())
    least = 2 * _BINS * float(np.spacing(max(abs(low), abs(high))))
    wider = max(0.5, least) if high - low < least else 0.0
    return low - wider, high + wider
