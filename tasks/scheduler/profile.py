"""Measures the profile of a model on this machine, once for a version and a kind of machine, and the rows for it.

Nothing in it is guessed: a figure is measured here, kept with the model version, or stated by a person. Rows are those
of a dataset, or made by the model's contract where there is none.

Shapes: N rows; every input is [N, *shape] of the contract.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, ValidationError, field_validator

from serving.errors import ModelFailed, ProfileFailed, SourceFormat
from serving.machine import describe_machine
from serving.model.batching import CostModel, fit_cost_model
from serving.model.contract import Contract, Frozen, Input
from serving.model.encoding import Encoded, encode
from serving.model.registry import save_tag
from serving.model.tuner import Tuning, measure_passes, measure_throughput, read_tuning
from tasks.batch.chunk_layout import list_row_groups
from tasks.batch.chunk_reader import Reader
from tasks.batch.dataset import Dataset, open_dataset
from tasks.batch.options import BatchOptions
from tasks.batch.plan import used_columns
from tasks.batch.source import pin_source
from tasks.batch.tuning import (
    SAMPLE_ROWS,
    enlarge_sample,
    make_tuning_wish,
    read_first_rows,
    tune_and_keep,
)
from tasks.endpoint.resolve import Arrays, LoadedModel
from tasks.endpoint.spec import EndpointSpec
from tasks.endpoint.targets import AnyTarget
from tasks.scheduler.decision import Profile
from tasks.scheduler.endpoint_benchmark import EndpointTimings, measure_in_process, measure_on_target

# Nobody waits for an endpoint with longer passes.
_PASS_MS_MAX = 2_000.0
_TAG = "overnight.profile."
_BYTES_MAX = 256 << 20
_FILES = 4
_GROUP_ROWS = 65_536
_BLOCK_ROWS = 16_384


class StatedFigures(Frozen):
    """Figures that a person states, in place of measuring them."""

    batch_rows_per_second: float | None = Field(
        default=None, gt=0, description="Rows a second of a batch run, reading and writing included, as from a report."
    )
    start_seconds: float | None = Field(
        default=None, ge=0, description="Seconds from nothing to the first scored row of a batch run."
    )
    stream_rows_per_second: float | None = Field(
        default=None, gt=0, description="Rows a second of a stream, broker included. Without: a batch run's."
    )
    cold_start_seconds: float | None = Field(
        default=None, ge=0, description="Seconds from nothing to the first answer of an endpoint."
    )
    request_ms: float | None = Field(
        default=None, ge=0, description="Milliseconds that a request costs beside its pass: server, transport, parsing."
    )


class ProfileOptions(Frozen):
    """How a model is measured."""

    source: str | None = Field(
        default=None,
        description="Parquet whose rows the model is measured with. Without: rows made by the model's contract.",
    )
    batch_options: BatchOptions = Field(
        default=BatchOptions(), description="How a batch run of the model is made: keys, columns, policies, slots."
    )
    target: Annotated[AnyTarget, Field(discriminator="kind")] | None = Field(
        default=None,
        description="The model server, running, on which cold start and requests are measured. Without: an endpoint of "
        "plain Python in a process of its own.",
    )
    batch_run_seconds: float = Field(
        default=3.0, gt=0, le=600, description="Seconds of scoring of the batch run that is measured."
    )
    remeasure: bool = Field(default=False, description="Measure again, whatever is kept with the model version.")
    stated_figures: StatedFigures = Field(
        default=StatedFigures(), description="Figures that are stated, and so not measured."
    )

    @field_validator("batch_options")
    @classmethod
    def _has_no_features(cls, value: BatchOptions) -> BatchOptions:
        if value.features:
            message = (
                f"must have no features, since joining them is not measured, got {len(value.features)} feature tables; "
                "name a source that has their columns"
            )
            raise ValueError(message)
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """A batch run in a process of its own: seconds from nothing to full speed, and rows a second from then on."""

    start_seconds: float
    rows_per_second: float


RunCalibration = Callable[[str, Path, Path, BatchOptions], Calibration]


def measure_profile(
    spec: EndpointSpec,
    subject: LoadedModel,
    options: ProfileOptions,
    run_calibration: RunCalibration,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> Profile:
    """Return the profile of a model on this machine, from a tag of its version where it was measured before.

    A measurement takes some twenty seconds: the batch path's tuner where it has not run yet, passes of 1, 2, 4, ...
    rows with all slots at work, an endpoint and a batch run in processes of their own.

    Args:
        spec: The endpoint that is measured.
        subject: The model, resolved and loaded.
        options: How it is measured. The profile is kept apart for each kind of machine and for different options.
        run_calibration: Makes a batch run of a model, a source, a destination and options, and returns its figures.
        clock: For tests.

    Raises:
        ProfileFailed: A figure can't be measured.
    """
    known = None if options.remeasure else read_profile(subject, options)
    if known is not None:
        return known
    stated, batch_options = options.stated_figures, options.batch_options
    with tempfile.TemporaryDirectory(prefix="overnight-profile-") as scratch:
        rows = _MeasuredRows.from_options(subject, options, Path(scratch))
        tuning = _tune(subject, rows.sample, batch_options, clock)
        slots = tuning.slots if tuning else batch_options.slots or subject.model.slots
        passes = measure_passes(subject.model, subject.contract, rows.sample, _PASS_MS_MAX, slots=slots, clock=clock)
        timings = None
        if None in (stated.cold_start_seconds, stated.request_ms):
            target = options.target
            timings = measure_on_target(target, spec, subject, slots) if target else measure_in_process(spec, subject)
        calibration = None
        if None in (stated.batch_rows_per_second, stated.start_seconds):
            if tuning:
                rows_per_second = tuning.rows_per_second
            else:
                rows_per_second = slots * _measure_slot(subject, rows.sample, batch_options, clock)
            rows.write(max(1, math.ceil(rows_per_second * options.batch_run_seconds)))
            destination = Path(scratch) / "scores"
            calibration = run_calibration(subject.resolved.pin.uri, rows.folder, destination, batch_options)
    profile = _make_profile(subject, slots, fit_cost_model(passes), timings, calibration, stated)
    save_tag(subject.resolved.pin, _profile_tag(options), profile.model_dump_json())
    return profile


def read_profile(subject: LoadedModel, options: ProfileOptions) -> Profile | None:
    """Return the profile in the model version's tags for this machine and these options, None where there is none."""
    try:
        profile = Profile.model_validate_json(subject.resolved.tags.get(_profile_tag(options), ""))
    except ValidationError:
        return None
    known = (subject.resolved.pin.digest, describe_machine())
    return profile if (profile.digest, profile.machine) == known else None


def _profile_tag(options: ProfileOptions) -> str:
    server = options.target.kind if options.target else "plain"
    stated = options.stated_figures.model_dump_json()
    text = f"{describe_machine()}\0{server}\0{options.batch_options.model_dump_json()}\0{stated}"
    return _TAG + hashlib.sha256(text.encode()).hexdigest()[:16]


def _make_profile(
    subject: LoadedModel,
    slots: int,
    pass_time: CostModel,
    timings: EndpointTimings | None,
    calibration: Calibration | None,
    stated: StatedFigures,
) -> Profile:
    pin = subject.resolved.pin
    measured: dict[str, Any] = {}
    if timings is not None:
        pass_ms = 1000 * pass_time.seconds(1)
        measured |= {
            "cold_start_seconds": timings.cold_start_seconds,
            "request_ms": max(0.0, timings.request_ms - pass_ms),
            "request_busy_ms": None if timings.busy_ms is None else max(0.0, timings.busy_ms - pass_ms),
            "served": timings.served,
            "jitter": timings.jitter,
        }
    if calibration is not None:
        measured |= {
            "batch_rows_per_second": calibration.rows_per_second,
            "start_seconds": calibration.start_seconds,
        }
    measured |= stated.model_dump(exclude_none=True)
    return Profile.model_validate(
        {
            "model": pin.uri,
            "digest": pin.digest,
            "machine": describe_machine(),
            "slots": slots,
            "pass_time": pass_time,
            "measured_at": datetime.now(UTC),
            **measured,
        }
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _MeasuredRows:
    """Rows to measure with: prepared ones for passes, and a function that writes a dataset for a batch run."""

    sample: Encoded
    folder: Path
    write: Callable[[int], int]

    @classmethod
    def from_options(cls, subject: LoadedModel, options: ProfileOptions, scratch: Path) -> _MeasuredRows:
        folder, contract, batch_options = scratch / "rows", subject.contract, options.batch_options
        if options.source is None:
            table = make_table(contract, subject.sample.inputs)
            table = pa.concat_tables([table] * math.ceil(SAMPLE_ROWS / table.num_rows))
            sample = _prepare_sample(subject, table)
            return cls(sample=sample, folder=folder, write=lambda rows: write_table(table, rows, folder))
        dataset = open_measured_rows(options.source, str(scratch / "scores"), contract, batch_options)
        return cls(
            sample=_prepare_sample(subject, read_first_rows(contract, batch_options, dataset)),
            folder=folder,
            write=lambda rows: write_measured_rows(dataset, contract, batch_options, rows, folder),
        )


def _prepare_sample(subject: LoadedModel, table: pa.Table) -> Encoded:
    sample = subject.model.prepare(encode(subject.contract, table))
    if (sample.flags.code_N != 0).all():
        message = (
            f"The model {subject.resolved.pin.uri} must take some of the first {table.num_rows:,} rows to be measured "
            "with, got none that keeps its contract. Measure with other rows, or set policies for nulls and casts."
        )
        raise ModelFailed(message)
    return enlarge_sample(subject.model, sample)


def _tune(subject: LoadedModel, sample: Encoded, options: BatchOptions, clock: Callable[[], float]) -> Tuning | None:
    """Return the batch path's tuning, from the version's tags or by the tuner, which then keeps it there."""
    wish = make_tuning_wish(options)
    tuning = read_tuning(subject.resolved.tags, describe_machine(), wish)
    return tuning or tune_and_keep(subject.resolved, subject.model, subject.contract, sample, wish, clock=clock)


def _measure_slot(subject: LoadedModel, sample: Encoded, options: BatchOptions, clock: Callable[[], float]) -> float:
    """Return the rows a second of one slot."""
    size = options.batch_size or subject.model.batch_size
    return measure_throughput(subject.model, subject.contract, sample, size, 1, clock)


def open_measured_rows(source: str, elsewhere: str, contract: Contract, options: BatchOptions) -> Dataset:
    """Open a dataset to measure with; `elsewhere` is a destination outside it. Raises what a batch run raises.

    Raises SourceFormat for other formats than Parquet, since their rows would have to be staged first.
    """
    snapshot = pin_source(source, elsewhere)
    if snapshot.format != "parquet":
        message = (
            f"The rows to measure with must be Parquet, got {snapshot.format} at {snapshot.root}. Write some of them "
            "as Parquet, or leave the source out: rows are then made by the model's contract."
        )
        raise SourceFormat(message)
    columns = [column.name for column in contract.columns]
    nullable = options.list_nullable(contract)
    dataset = open_dataset(snapshot, columns, options.key_columns, nullable, options.partition_types)
    contract.check(dataset.schema, f"The dataset at {snapshot.title}")
    return dataset


def write_measured_rows(dataset: Dataset, contract: Contract, options: BatchOptions, rows: int, folder: Path) -> int:
    """Write some of a dataset's rows as another dataset, in row groups of the same size; return how many.

    Rows are repeated where the dataset has fewer. There are fewer where so many would take more than 256 MiB.
    """
    columns = used_columns(contract, options, dataset.schema)
    reader = Reader(dataset.snapshot, columns, dataset.partitions, _BLOCK_ROWS, places=False)
    taken: list[pa.Table] = []
    count, group = 0, 0
    for piece in list_row_groups(dataset.snapshot.files):
        if count >= rows or sum(table.nbytes for table in taken) >= _BYTES_MAX:
            break
        group = max(group, piece.rows)
        for table in reader.read(piece):
            taken.append(table)
            count += table.num_rows
    return write_table(pa.concat_tables(taken), rows, folder, group=group)


def write_table(
    table: pa.Table, rows: int, folder: Path, *, group: int = _GROUP_ROWS, bytes_max: int = _BYTES_MAX
) -> int:
    """Write `rows` rows as Parquet files, the table's rows repeated; return how many: `bytes_max` bytes at most."""
    rows_max = max(1, int(bytes_max / max(1.0, table.nbytes / table.num_rows)))
    per_file = math.ceil(min(rows, rows_max) / _FILES)
    folder.mkdir(parents=True)
    repeated = pa.concat_tables([table] * math.ceil(per_file / table.num_rows)).slice(0, per_file)
    for number in range(_FILES):
        pq.write_table(repeated, folder / f"rows-{number}.parquet", row_group_size=max(1, min(group, per_file)))
    return per_file * _FILES


def make_table(contract: Contract, inputs: Arrays) -> pa.Table:
    """Return the columns that a batch run would read, with the rows of a model's inputs."""
    columns: dict[str, pa.Array] = {}
    for value in contract.inputs:
        columns |= _make_columns(value, inputs[value.name])
    return pa.table(columns)


def _make_columns(value: Input, array_N: npt.NDArray[Any]) -> dict[str, pa.Array]:
    if value.is_stacked:
        return {column.name: pa.array(np.ascontiguousarray(array_N[:, at])) for at, column in enumerate(value.columns)}
    (column,) = value.columns
    if not value.shape:
        return {column.name: pa.array(array_N.tolist() if array_N.dtype == object else array_N)}
    flat = pa.array(array_N.ravel().tolist() if array_N.dtype == object else array_N.ravel())
    return {column.name: pa.FixedSizeListArray.from_arrays(flat, int(np.prod(value.shape)))}


def calibration_failure(model: str, output: str) -> ProfileFailed:
    """Return the error for a batch run that could not be measured."""
    return ProfileFailed(
        f"A batch run of {model} must go through to be measured, got: {output}\nCorrect that, or state "
        "batch_rows_per_second and start_seconds."
    )
