"""The profile: what a model is measured at on this machine, once for a version and a kind of machine.

Nothing in it is guessed: a figure is measured here, remembered with the model version, or stated by a person.
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

import pyarrow as pa
from pydantic import Field, ValidationError

from serving.errors import ModelFailed, ProfileFailed
from serving.machine import describe_machine
from serving.model.batching import CostModel, fit_cost_model
from serving.model.contract import Frozen
from serving.model.encoding import Encoded, encode
from serving.model.registry import save_tag
from serving.model.tuner import Tuning, measure_passes, measure_throughput, read_tuning
from tasks.batch.options import BatchOptions
from tasks.batch.tuning import SAMPLE_ROWS, enlarge_sample, make_tuning_wish, read_first_rows, tune_and_keep
from tasks.endpoint.resolve import LoadedModel
from tasks.endpoint.spec import AnyTarget, EndpointSpec
from tasks.scheduler.decision import Profile
from tasks.scheduler.door import Door, try_door, try_target
from tasks.scheduler.rows import open_rows, table_of, write_rows, write_table

# Passes above it say nothing about an endpoint that anybody waits for.
_PASS_MS_MAX = 2_000.0
_TAG = "overnight.profile."


class Stated(Frozen):
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
        default=None, ge=0, description="Milliseconds that a request costs beside its pass: door, transport, parsing."
    )


class Measuring(Frozen):
    """How a model is measured."""

    source: str | None = Field(
        default=None,
        description="Parquet whose rows the model is measured with. Without: rows made by what the model takes.",
    )
    options: BatchOptions = Field(
        default=BatchOptions(), description="How a batch run of the model is made: keys, columns, policies, slots."
    )
    target: Annotated[AnyTarget, Field(discriminator="kind")] | None = Field(
        default=None,
        description="The model server, running, on which cold start and requests are measured. Without: an endpoint of "
        "plain Python in a process of its own.",
    )
    seconds: float = Field(
        default=3.0, gt=0, le=600, description="Seconds of scoring that the trial of a batch run is made for."
    )
    again: bool = Field(default=False, description="Measure anew, whatever is remembered with the model version.")
    stated: Stated = Field(default=Stated(), description="Figures that are stated, and so not measured.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A batch run in a process of its own: seconds from nothing to full speed, and rows a second from then on."""

    start_seconds: float
    rows_per_second: float


RunTrial = Callable[[str, Path, Path, BatchOptions], Trial]


def measure_profile(
    spec: EndpointSpec,
    subject: LoadedModel,
    measuring: Measuring,
    run_trial: RunTrial,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> Profile:
    """Return the profile of a model on this machine: remembered where it was measured before, else measured.

    Takes some twenty seconds: the batch path's tuner where it has not run yet, passes of 1, 2, 4, ... rows with all
    slots at work, an endpoint and a batch run (by `run_trial`: model, source, destination, options) in processes of
    their own. Kept as a tag of the model version, apart for each kind of machine, way to run, and figures that are
    stated in place of measured ones. Raises ProfileFailed where a figure can't be measured.
    """
    known = None if measuring.again else recall_profile(subject, measuring)
    if known is not None:
        return known
    with tempfile.TemporaryDirectory(prefix="overnight-profile-") as scratch:
        rows = _Rows.of(subject, measuring, Path(scratch))
        tuning = _tuned(subject, rows.sample, measuring.options, clock)
        slots = tuning.slots if tuning else measuring.options.slots or subject.model.slots
        passes = measure_passes(subject.model, subject.contract, rows.sample, _PASS_MS_MAX, slots=slots, clock=clock)
        line = fit_cost_model(passes)
        stated = measuring.stated
        door = None
        if None in (stated.cold_start_seconds, stated.request_ms):
            target = measuring.target
            door = try_target(target, spec, subject, slots) if target else try_door(spec, subject)
        trial = None
        if None in (stated.batch_rows_per_second, stated.start_seconds):
            rate = tuning.rows_per_second if tuning else slots * _rate(subject, rows.sample, measuring.options, clock)
            rows.write(max(1, math.ceil(rate * measuring.seconds)))
            trial = run_trial(subject.resolved.pin.uri, rows.folder, Path(scratch) / "scores", measuring.options)
    profile = _profile(subject, slots, line, door, trial, stated)
    save_tag(subject.resolved.pin, _tag(measuring), profile.model_dump_json())
    return profile


def recall_profile(subject: LoadedModel, measuring: Measuring) -> Profile | None:
    """Return what the model version's tags hold for this machine and this way to run it, None where that is nothing."""
    try:
        profile = Profile.model_validate_json(subject.resolved.tags.get(_tag(measuring), ""))
    except ValidationError:
        return None
    known = (subject.resolved.pin.digest, describe_machine())
    return profile if (profile.digest, profile.machine) == known else None


def _tag(measuring: Measuring) -> str:
    server = measuring.target.kind if measuring.target else "plain"
    stated = measuring.stated.model_dump_json()
    told = f"{describe_machine()}\0{server}\0{measuring.options.model_dump_json()}\0{stated}"
    return _TAG + hashlib.sha256(told.encode()).hexdigest()[:16]


def _profile(
    subject: LoadedModel, slots: int, line: CostModel, door: Door | None, trial: Trial | None, stated: Stated
) -> Profile:
    pin = subject.resolved.pin
    measured: dict[str, Any] = {}
    if door is not None:
        busy_ms = None if door.busy_ms is None else max(0.0, door.busy_ms - 1000 * line.seconds(1))
        request_ms = max(0.0, door.request_ms - 1000 * line.seconds(1))
        measured |= {
            "cold_start_seconds": door.cold_start_seconds,
            "request_ms": request_ms,
            "request_busy_ms": busy_ms,
            "served": door.served,
            "jitter": door.jitter,
        }
    if trial is not None:
        measured |= {"batch_rows_per_second": trial.rows_per_second, "start_seconds": trial.start_seconds}
    measured |= stated.model_dump(exclude_none=True)
    return Profile.model_validate(
        {
            "model": pin.uri,
            "digest": pin.digest,
            "machine": describe_machine(),
            "slots": slots,
            "pass_time": line,
            "measured_at": datetime.now(UTC),
            **measured,
        }
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """Rows to measure with: prepared ones for passes, and a dataset of as many as a trial needs."""

    sample: Encoded
    folder: Path
    write: Callable[[int], int]

    @classmethod
    def of(cls, subject: LoadedModel, measuring: Measuring, scratch: Path) -> _Rows:
        folder = scratch / "rows"
        contract, options = subject.contract, measuring.options
        if measuring.source is None:
            table = table_of(contract, subject.sample.inputs)
            table = pa.concat_tables([table] * math.ceil(SAMPLE_ROWS / table.num_rows))
            return cls(sample=_sample(subject, table), folder=folder, write=lambda n: write_table(table, n, folder))
        dataset = open_rows(measuring.source, str(scratch / "scores"), contract, options)
        return cls(
            sample=_sample(subject, read_first_rows(contract, options, dataset)),
            folder=folder,
            write=lambda n: write_rows(dataset, contract, options, n, folder),
        )


def _sample(subject: LoadedModel, table: pa.Table) -> Encoded:
    sample = subject.model.prepare(encode(subject.contract, table))
    if (sample.flags.code_N != 0).all():
        message = (
            f"The model {subject.resolved.pin.uri} must take some of the first {table.num_rows:,} rows to be measured "
            "with, got none that keeps its contract. Measure with other rows, or set policies for nulls and casts."
        )
        raise ModelFailed(message)
    return enlarge_sample(subject.model, sample)


def _tuned(subject: LoadedModel, sample: Encoded, options: BatchOptions, clock: Callable[[], float]) -> Tuning | None:
    """Return the batch path's tuning, from the version's tags or by the tuner, which then keeps it there."""
    wish = make_tuning_wish(options)
    tuning = read_tuning(subject.resolved.tags, describe_machine(), wish)
    return tuning or tune_and_keep(subject.resolved, subject.model, subject.contract, sample, wish, clock=clock)


def _rate(subject: LoadedModel, sample: Encoded, options: BatchOptions, clock: Callable[[], float]) -> float:
    size = options.batch_size or subject.model.batch_size
    return measure_throughput(subject.model, subject.contract, sample, size, 1, clock)


def trial_failed(model: str, said: str) -> ProfileFailed:
    """Return the error for a batch run that could not be measured."""
    return ProfileFailed(
        f"A batch run of {model} must go through to be measured, got: {said}\nMend what it says, or state "
        "batch_rows_per_second and start_seconds."
    )
