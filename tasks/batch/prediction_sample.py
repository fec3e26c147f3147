"""A bounded sample of a run's predictions: some rows to look at, and a picture of how each output is distributed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from serving.model.contract import Contract
from tasks.batch.manifest import Manifest
from tasks.batch.parts import REJECT_COLUMN, REJECT_REASON
from tasks.common.formatting import encode_png
from tasks.storage import Storage

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PARTS_MAX = 8
_ROWS_PER_PART_MAX = 2_500
_VALUES_MAX = 2_000_000
_READ_BYTES = 1 << 20
# More plots than these are too small to read.
_PLOTS_MAX, _PLOTS_PER_ROW = 9, 3
# Whole numbers with no more values than these are classes.
_CLASSES_MAX = 12
# Lists of more values are drawn as one: they are seldom probabilities of classes.
_CLASSES_APART_MAX = 4
_BINS = 40
# The span of a histogram's bins must be a number too.
_NUMBER_MAX = 1e307
_CHARACTERS_MAX, _ELEMENTS_MAX = 80, 3
_INK, _BAR = "#1f2933", "#2f6f9f"


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
    text = str(value)
    return text if len(text) <= _CHARACTERS_MAX else f"{text[: _CHARACTERS_MAX - 1]}…"


def draw_distributions(sample: PredictionSample) -> bytes | None:
    """Draw how each output is distributed over the sample, one small plot each; return a PNG.

    None where there is nothing to draw. Numbers are a histogram, classes and texts the shares of the most frequent.
    """
    drawable = [name for name in sample.outputs if _is_drawable(sample.table[name])]
    shown = drawable[:_PLOTS_MAX]
    if not shown:
        return None
    from matplotlib.figure import Figure  # noqa: PLC0415 - half a second that a finished run does not need

    columns = min(_PLOTS_PER_ROW, len(shown))
    lines = -(-len(shown) // columns)
    figure = Figure(figsize=(max(4.4, 3.3 * columns), 0.5 + 2.3 * lines), dpi=110, layout="constrained")
    grid: Any = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat[len(shown) :]:
        axes.set_visible(False)
    for axes, name in zip(grid.flat, shown, strict=False):
        _draw_output(axes, name, sample.table[name].combine_chunks())
    left_out = f"; {len(sample.outputs) - len(shown)} outputs are not shown" if len(sample.outputs) > len(shown) else ""
    title = f"{sample.table.num_rows:,} of {sample.rows:,} rows{left_out}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=9, color=_INK)
    return encode_png(figure)


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


def _draw_classes(axes: Axes, name: str, classes: list[pa.Array]) -> None:
    """Draw a line for each place of a list: all values together would show probabilities and what they leave as one."""
    for at, each in enumerate(classes):
        numbers = each.drop_null().to_numpy(zero_copy_only=False)
        numbers = np.clip(numbers.astype(np.float64), -_NUMBER_MAX, _NUMBER_MAX)
        axes.hist(
            numbers, bins=_BINS, range=_choose_range(numbers), histtype="step", label=f"{at}: mean {numbers.mean():.4g}"
        )
    axes.set_yticks([])
    axes.legend(fontsize=7, loc="upper center", framealpha=0.5)
    _finish_plot(axes, f"{name}, by class")


def _draw_output(axes: Axes, name: str, column: pa.Array) -> None:
    values, title = column.drop_null(), name
    if classes := split_classes(values):
        _draw_classes(axes, name, classes)
        return
    while hasattr(values.type, "value_type") and not pa.types.is_dictionary(values.type):
        values = values.flatten()
        title = f"{name}, all values"
    values = values.drop_null()
    kind = values.type
    if pa.types.is_floating(kind) or (pa.types.is_integer(kind) and pc.count_distinct(values).as_py() > _CLASSES_MAX):
        numbers = np.clip(values.to_numpy(zero_copy_only=False).astype(np.float64), -_NUMBER_MAX, _NUMBER_MAX)
        axes.hist(numbers, bins=_BINS, range=_choose_range(numbers), color=_BAR)
        axes.set_yticks([])
        axes.set_xlabel(f"mean {numbers.mean():.4g}, from {numbers.min():.4g} to {numbers.max():.4g}", fontsize=8)
    else:
        counts = sorted((each["counts"], str(each["values"])) for each in pc.value_counts(values).to_pylist())
        shown = counts[-_CLASSES_MAX:]
        labels = [label if len(label) <= 16 else f"{label[:15]}…" for _, label in shown]  # noqa: PLR2004 - fits a plot
        bars = axes.barh(range(len(shown)), [100 * count / len(values) for count, _ in shown], color=_BAR)
        axes.set_yticks(range(len(shown)), labels, fontsize=7)
        axes.bar_label(bars, fmt="%.3g %%", padding=2, fontsize=7)
        axes.margins(x=0.25)
        axes.set_xticks([])
        if len(counts) > len(shown):
            axes.set_xlabel(f"the most frequent of {len(counts):,} values", fontsize=8)
    _finish_plot(axes, title)


def _choose_range(numbers: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Return what bins are of: the range of the numbers, made wider where it has fewer floats than there are bins."""
    low, high = float(numbers.min()), float(numbers.max())
    least = 2 * _BINS * float(np.spacing(max(abs(low), abs(high))))
    wider = max(0.5, least) if high - low < least else 0.0
    return low - wider, high + wider


def _finish_plot(axes: Axes, title: str) -> None:
    axes.set_title(title if len(title) <= 40 else f"{title[:39]}…", loc="left", fontsize=9)  # noqa: PLR2004 - fits a plot
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
