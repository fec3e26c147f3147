"""How a model is run over a dataset: by a kept tuning, a new one, or its defaults where measuring does not pay."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import pyarrow as pa

from serving.errors import SourceEmpty
from serving.machine import describe_machine
from serving.model.contract import Contract
from serving.model.encoding import Encoded, encode
from serving.model.interface import Isolated, Tunable, TuningLimits
from serving.model.registry import Resolved, save_tag
from serving.model.tuner import BUDGET_SECONDS, Tuning, measure_throughput, read_tuning, tune, tuning_tag
from tasks.batch.chunk_layout import ROW_BYTES_OFF, Chunk, Sizes, list_row_groups
from tasks.batch.chunk_reader import Reader
from tasks.batch.dataset import SOURCE_FILE, SOURCE_ROW, Dataset
from tasks.batch.feature_pins import FeaturePin
from tasks.batch.options import BatchOptions
from tasks.batch.plan import Plan, used_columns
from tasks.batch.scoring_result import ScoringResult

# The tuner takes about four seconds, once for a model version and a kind of machine; it may halve the work each night.
_WORK_SECONDS_MIN = 3.0
# Processes gain less from tuning than torch does: it may take so much of what the run is expected to take.
_TUNING_SHARE, _TUNING_SECONDS_MIN = 0.15, 1.0
# A tuning is made again for a run that allows for so many times the seconds that it had.
_MORE_SECONDS = 4.0
# What a pass takes for itself is no matter to one that takes so long.
_LONG_PASS_SECONDS = 0.1
# A larger batch is measured by one pass where that takes so long. A first pass fills fresh memory: of five flavours it
# took up to 1.23 times as long as those after it.
_ONE_PASS_SECONDS, _FIRST_PASS_RATIO = 0.03, 1.2
SAMPLE_ROWS = 4096
# Of models without a choice, such as those that generate text: a few rows take seconds, and tell how large chunks are.
_ROWS_TIMED = 16
_SHORT_BATCH_MAX = 16_384
# A run must be so long, and so much slower than was measured, for a tuning to be given up.
_SECONDS_TO_JUDGE, _SLOWER_MIN = 2.0, 0.85
_SAMPLE_BYTES_MAX = 32 << 20


def choose_sizes(
    resolved: Resolved,
    model: Tunable,
    contract: Contract,
    options: BatchOptions,
    dataset: Dataset,
    features: Sequence[FeaturePin] = (),
) -> Sizes:
    """Return the batch size, the engine and what else shapes a plan. May keep a tuning with the model version.

    For a dataset without rows nothing is measured.
    """
    if not dataset.rows:
        return _leave_untuned(model, options, row_bytes=0.0)
    table = read_first_rows(contract, options, dataset)
    row_bytes = measure_row_bytes(table, dataset) + sum(pin.row_bytes for pin in features)
    for pin in features:
        table = _add_first_features(table, pin)
    untuned = _leave_untuned(model, options, row_bytes)
    wish = make_tuning_wish(options)
    tuning = _find_tuning(resolved, model, wish, dataset.rows)
    is_fixed = options.batch_size and options.rows_per_chunk
    if is_fixed or (tuning is not None and model.batch_unit == "rows"):
        return _apply_tuning(tuning, untuned) if tuning else untuned
    sample = model.prepare(encode(contract, table))
    if sample.length_N is not None:
        untuned = replace(untuned, rows_per_pass=untuned.batch_size / max(1.0, float(sample.length_N.mean())))
    if tuning is not None:
        return _apply_tuning(tuning, untuned)
    if (sample.flags.code_N != 0).all():
        return untuned
    if len(model.batch_sizes) * len(model.engines(wish)) == 1:
        few = sample.slice_rows(0, _ROWS_TIMED)
        rate = measure_throughput(model, contract, few, untuned.batch_size, 1, time.perf_counter)
        return replace(untuned, rows_per_second=rate)
    batch_size, rate = _measure_short(model, contract, sample, options, dataset.rows)
    seconds = dataset.rows / (rate * untuned.slots)
    if seconds > _WORK_SECONDS_MIN:
        enlarged, seconds_max = enlarge_sample(model, sample), _limit_tuning(model, seconds)
        tuning = tune_and_keep(resolved, model, contract, enlarged, wish, seconds_max=seconds_max)
    return _apply_tuning(tuning, untuned) if tuning else replace(untuned, batch_size=batch_size, rows_per_second=rate)


def _leave_untuned(model: Tunable, options: BatchOptions, row_bytes: float) -> Sizes:
    """Return the sizes that the options say, and else those that the model has by itself."""
    return Sizes(
        batch_size=options.batch_size or model.batch_size,
        slots=options.slots or model.slots,
        row_bytes=row_bytes,
        rows_per_second=None,
        engine=model.engine,
        batch_unit=model.batch_unit,
    )


def _find_tuning(resolved: Resolved, model: Tunable, wish: TuningLimits, rows: int) -> Tuning | None:
    """Return the tuning that a model version keeps, None without one or where it was hurried for so many rows."""
    tuning = read_tuning(resolved.tags, describe_machine(), wish)
    if tuning is None or tuning.seconds_max >= BUDGET_SECONDS:
        return tuning
    allowed = _limit_tuning(model, rows / tuning.rows_per_second)
    return tuning if allowed < _MORE_SECONDS * tuning.seconds_max else None


def _limit_tuning(model: Tunable, seconds: float) -> float:
    """Return the seconds that tuning may take before a run that is expected to take so many."""
    if not isinstance(model, Isolated):
        return BUDGET_SECONDS
    return min(BUDGET_SECONDS, max(_TUNING_SECONDS_MIN, _TUNING_SHARE * seconds))


def _measure_short(
    model: Tunable, contract: Contract, sample: Encoded, options: BatchOptions, rows: int
) -> tuple[int, float]:
    """Return the batch size for a run that is too short to be tuned, and the rows a second of one slot with it.

    A pass of a process takes so much for itself that a larger batch may be many times as fast: where passes are that
    short, the largest of which each slot gets one is measured too.
    """
    plain = options.batch_size or model.batch_size
    rate = measure_throughput(model, contract, sample, plain, 1, time.perf_counter)
    larger = [size for size in model.batch_sizes if plain < size <= min(_SHORT_BATCH_MAX, rows // model.slots)]
    if not isinstance(model, Isolated) or options.batch_size or not larger or plain / rate > _LONG_PASS_SECONDS:
        return plain, rate
    enlarged = enlarge_sample(model, sample)
    # The process is warm by now: of a pass that takes so long one is enough.
    faster = measure_throughput(
        model, contract, enlarged, larger[-1], 1, time.perf_counter, pass_seconds_max=_ONE_PASS_SECONDS
    )
    return (larger[-1], faster) if faster * _FIRST_PASS_RATIO >= rate else (plain, rate)


def tune_and_keep(
    resolved: Resolved,
    model: Tunable,
    contract: Contract,
    sample: Encoded,
    wish: TuningLimits,
    *,
    clock: Callable[[], float] = time.perf_counter,
    seconds_max: float = BUDGET_SECONDS,
) -> Tuning | None:
    """Tune a model on this machine, and keep what is found with its version; None where no row can be scored."""
    machine = describe_machine()
    tuning = tune(model, contract, sample, wish, machine=machine, clock=clock, seconds_max=seconds_max)
    if tuning is not None:
        save_tag(resolved.pin, tuning_tag(tuning.machine, wish), tuning.model_dump_json())
    return tuning


def forget_slow_tuning(plan: Plan, result: ScoringResult) -> str | None:
    """Give up a kept tuning that the run was far slower than: the next run measures again.

    It may have been measured in a moment when the machine had more to give, or less to choose from. Up to half of the
    passes' seconds are put down to the other stages of the run.

    Returns:
        What was measured then and now, in words; None where the tuning stays.
    """
    tuning, seconds = plan.tuning, result.seconds["forward"]
    if tuning is None or tuning.machine != describe_machine() or seconds < _SECONDS_TO_JUDGE:
        return None
    # What reads, encodes and writes shares the cores with the passes, which the tuner had for them alone.
    beside = sum(result.seconds[stage] for stage in ("read", "encode", "write"))
    rate = tuning.slots * result.rows / max(seconds - beside, seconds / 2)
    if rate >= _SLOWER_MIN * tuning.rows_per_second:
        return None
    save_tag(plan.model, tuning_tag(tuning.machine, tuning.limits), "given up")
    return f"{rate:,.0f} rows/s in its passes, {tuning.rows_per_second:,.0f} when it was tuned"


def make_tuning_wish(options: BatchOptions) -> TuningLimits:
    """Return what the options let the tuner try."""
    return TuningLimits(
        batch_size=options.batch_size,
        slots=options.slots,
        bfloat16_tolerance=options.bfloat16_tolerance,
        compiled=options.torch_compile,
    )


def _apply_tuning(tuning: Tuning, untuned: Sizes) -> Sizes:
    return replace(
        untuned,
        batch_size=tuning.batch_size,
        slots=tuning.slots,
        rows_per_second=tuning.rows_per_second / tuning.slots,
        engine=tuning.engine,
        tuning=tuning,
    )


def measure_row_bytes(table: pa.Table, dataset: Dataset) -> float:
    """Return the bytes of a decoded row: of the first rows, or what all footers say where that is far from them."""
    first = float(table.nbytes) / table.num_rows
    groups = [(sizes.decoded, rows) for file in dataset.snapshot.files for sizes, rows in file.sized_groups]
    places: float = sum(table.column(name).nbytes for name in (SOURCE_FILE, SOURCE_ROW)) / table.num_rows
    mean = places + sum(size for size, _ in groups) / max(1, sum(rows for _, rows in groups))
    return mean if groups and not first / ROW_BYTES_OFF <= mean <= first * ROW_BYTES_OFF else first


def read_first_rows(contract: Contract, options: BatchOptions, dataset: Dataset) -> pa.Table:
    """Return rows of the dataset's first row group that has any."""
    columns = used_columns(contract, options, dataset.schema)
    reader = Reader(dataset.snapshot, columns, dataset.partitions, SAMPLE_ROWS)
    first = next(list_row_groups(dataset.snapshot.files), None)
    if first is None:
        message = f"The source must hold at least one row, got none below {dataset.snapshot.root}."
        raise SourceEmpty(message)
    sizes = dataset.snapshot.files[first.file].group_bytes
    decoded = sizes[first.row_group].decoded if sizes else 0
    rows = min(first.rows, SAMPLE_ROWS, max(1, int(_SAMPLE_BYTES_MAX * first.rows / max(decoded, 1))))
    return next(reader.blocks(Chunk(pieces=(first.model_copy(update={"row_stop": rows}),)), rows))


def _add_first_features(table: pa.Table, pin: FeaturePin) -> pa.Table:
    """Return rows beside a feature table's first rows, for which a model takes as long as for those of a join."""
    reader = Reader(pin.snapshot, pin.columns, pin.partitions, SAMPLE_ROWS, places=False)
    rows, first = table.num_rows, next(list_row_groups(pin.snapshot.files))
    few = first.model_copy(update={"row_stop": min(first.rows, rows)})
    read = pa.concat_tables(reader.read(few))
    repeated = pa.concat_tables([read] * math.ceil(rows / read.num_rows)).slice(0, rows)
    for name, column in zip(pin.names, repeated.columns, strict=True):
        table = table.append_column(name, column)
    return table


def enlarge_sample(model: Tunable, sample: Encoded) -> Encoded:
    """Return the sample, repeated to hold the largest batch that is tried, within 32 MiB."""
    row_bytes = sum(value.nbytes for value in sample.inputs.values()) / sample.rows
    wanted = min(model.batch_sizes[-1], int(_SAMPLE_BYTES_MAX / max(row_bytes, 1)))
    times = math.ceil(wanted / sample.rows)
    return sample if sample.length_N is not None or times < 2 else sample.repeat(times)  # noqa: PLR2004 - once is as it is
