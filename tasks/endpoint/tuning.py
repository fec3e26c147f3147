"""The dial of a release: as given, or chosen by passes that are measured on the real model."""

from __future__ import annotations

import math
import time

from pydantic import Field

from serving.contract import Contract, Frozen
from serving.dial import PassTime, choose_dial, fit, measure_passes
from serving.encode import Encoded, Flags
from serving.machine import cores
from serving.model import Model
from serving.release import Dial
from tasks.endpoint.samples import Sample
from tasks.endpoint.spec import EndpointSpec

_SAMPLE_ROWS = 1024


class Chosen(Frozen):
    """A dial, and what it was chosen by."""

    dial: Dial = Field(description="Rows of a pass and milliseconds of waiting, at most.")
    passes: tuple[tuple[int, float], ...] = Field(default=(), description="Rows and milliseconds of measured passes.")
    time: PassTime | None = Field(default=None, description="The line through them.")


def settle_dial(spec: EndpointSpec, model: Model, contract: Contract, sample: Sample) -> Chosen:
    """Return the dial of a spec; with a budget, the model is measured here first, for about a second.

    Raises LatencyImpossible where no dial keeps the budget.
    """
    if spec.budget is None:
        return Chosen(dial=spec.dial or Dial())
    replicas = max(1, spec.scaling.replicas_max)
    many = _repeated(model, sample)
    passes = measure_passes(
        model, contract, many, spec.budget.latency_ms, slots=min(replicas, cores()), clock=time.perf_counter
    )
    line = fit(passes)
    dial = choose_dial(line, spec.budget.latency_ms, spec.budget.rate, replicas=replicas, rows_max=spec.budget.callers)
    return Chosen(dial=dial, passes=tuple(passes), time=line)


def _repeated(model: Model, sample: Sample) -> Encoded:
    encoded = model.prepare(Encoded(inputs=sample.inputs, flags=Flags.none(sample.rows), rows=sample.rows))
    return encoded.repeated(math.ceil(_SAMPLE_ROWS / sample.rows)).rows_at(0, _SAMPLE_ROWS)
