"""How a model is run over a dataset: by a kept tuning, a new one, or its defaults where measuring does not pay."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pyarrow as pa

from serving.errors import SourceEmpty
from serving.machine import describe_machine
from serving.model.contract import Contract
from serving.model.encoding import Encoded, encode
from serving.model.interface import Tunable, TuningLimits
from serving.model.registry import Resolved, save_tag
from serving.model.tuner import Tuning, measure_throughput, read_tuning, tune, tuning_tag
from tasks.batch.chunk_layout import ROW_BYTES_OFF, Chunk, Piece, Sizes
from tasks.batch.chunk_reader import Reader
from tasks.batch.dataset import SOURCE_FILE, SOURCE_ROW, Dataset
from tasks.batch.options import BatchOptions
from tasks.batch.plan import used_columns

# The tuner takes about four seconds, once for a model version and a kind of machine; it may halve the work each night.
_WORK_SECONDS_MIN = 3.0
SAMPLE_ROWS = 4096
_SAMPLE_BYTES_MAX = 32 << 20


def choose_sizes(
    resolved: Resolved, model: Tunable, contract: Contract, options: BatchOptions, dataset: Dataset
) -> Sizes:
    """Return the batch size, the engine and what else shapes a plan. May keep a tuning with the model version."""
    table = read_first_rows(contract, options, dataset)
    untuned = Sizes(
        batch_size=options.batch_size or model.batch_size,
        slots=options.slots or model.slots,
        row_bytes=measure_row_bytes(table, dataset),
        rows_per_second=None,
        engine=model.engine,
        batch_unit=model.batch_unit,
    )
    wish = make_tuning_wish(options)
    tuning = read_tuning(resolved.tags, describe_machine(), wish)
    if tuning is not None:
        return _apply_tuning(tuning, untuned)
    if options.batch_size and options.rows_per_chunk:
        return untuned
    sample = model.prepare(encode(contract, table))
    if (sample.flags.code_N != 0).all():
        return untuned
    rate = measure_throughput(model, contract, sample, untuned.batch_size, 1, time.perf_counter)
    if dataset.rows / (rate * untuned.slots) > _WORK_SECONDS_MIN:
        tuning = tune_and_keep(resolved, model, contract, enlarge_sample(model, sample), wish)
    return _apply_tuning(tuning, untuned) if tuning else replace(untuned, rows_per_second=rate)


def tune_and_keep(
    resolved: Resolved,
    model: Tunable,
    contract: Contract,
    sample: Encoded,
    wish: TuningLimits,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> Tuning | None:
    """Tune a model on this machine, and keep what is found with its version; None where no row can be scored."""
    tuning = tune(model, contract, sample, wish, machine=describe_machine(), clock=clock)
    if tuning is not None:
        save_tag(resolved.pin, tuning_tag(tuning.machine, wish), tuning.model_dump_json())
    return tuning


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
    partitions = {name: str(dataset.schema.field(name).type) for name in dataset.hive}
    reader = Reader(dataset.snapshot, columns, partitions, SAMPLE_ROWS)
    first = next(list_row_groups(dataset), None)
    if first is None:
        message = f"The source must hold at least one row, got none below {dataset.snapshot.root}."
        raise SourceEmpty(message)
    sizes = dataset.snapshot.files[first.file].group_bytes
    decoded = sizes[first.row_group].decoded if sizes else 0
    rows = min(first.rows, SAMPLE_ROWS, max(1, int(_SAMPLE_BYTES_MAX * first.rows / max(decoded, 1))))
    return next(reader.blocks(Chunk(pieces=(first.model_copy(update={"row_stop": rows}),)), rows))


def list_row_groups(dataset: Dataset) -> Iterator[Piece]:
    """Yield the row groups of a dataset that have rows, in order, each as one piece."""
    for at, file in enumerate(dataset.snapshot.files):
        for group, rows in enumerate(file.row_groups):
            if rows:
                yield Piece(file=at, row_group=group, row_start=0, row_stop=rows)


def enlarge_sample(model: Tunable, sample: Encoded) -> Encoded:
    """Return the sample, repeated to hold the largest batch that is tried, within 32 MiB."""
    row_bytes = sum(value.nbytes for value in sample.inputs.values()) / sample.rows
    wanted = min(model.batch_sizes[-1], int(_SAMPLE_BYTES_MAX / max(row_bytes, 1)))
    times = math.ceil(wanted / sample.rows)
    return sample if sample.length_N is not None or times < 2 else sample.repeat(times)  # noqa: PLR2004 - once is as it is
