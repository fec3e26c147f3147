"""The batching of a release: as given, or chosen by passes that are measured on the real model."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

from pydantic import AliasChoices, Field, ValidationError

from serving.machine import cores, machine_kind
from serving.model.batching import BatchingConfig, CostModel, choose_batching, fit_cost_model
from serving.model.contract import Frozen
from serving.model.encoding import Encoded, Flags
from serving.model.interface import Model
from serving.model.registry import ModelPin, save_tag
from serving.model.release import Scaling
from serving.model.tuner import measure_passes
from tasks.endpoint.resolve import Subject
from tasks.endpoint.samples import Sample
from tasks.endpoint.spec import Budget, EndpointSpec

_SAMPLE_ROWS = 1024


class Chosen(Frozen):
    """The batching, and what it was chosen by."""

    batching: BatchingConfig = Field(
        validation_alias=AliasChoices("batching", "dial"),
        description="Rows of a pass and milliseconds of waiting, at most.",
    )
    passes: tuple[tuple[int, float], ...] = Field(default=(), description="Rows and milliseconds of measured passes.")
    cost: CostModel | None = Field(
        default=None, validation_alias=AliasChoices("cost", "time"), description="The line through them, in seconds."
    )


def resolve_batching(spec: EndpointSpec, subject: Subject) -> Chosen:
    """Return the batching of a spec; with a budget, the model is measured here first, for about a second.

    Where this version was tuned before, for the same budget and replicas on a machine of this kind, that stands.
    Raises LatencyImpossible where no batching keeps the budget.
    """
    if spec.budget is None:
        return Chosen(batching=spec.batching or BatchingConfig())
    setting = remembered(spec.name, subject.resolved.tags)
    if setting is not None and (setting.budget, setting.scaling, setting.machine) == _terms(spec):
        return setting.chosen
    replicas = max(1, spec.scaling.replicas_max)
    passes = measure_passes(
        subject.model,
        subject.contract,
        _repeated(subject.model, subject.sample),
        spec.budget.latency_ms,
        slots=min(replicas, cores()),
        clock=time.perf_counter,
    )
    cost = fit_cost_model(passes)
    # Half of those who wait: with all of them in a pass, nobody is left to fill the next one meanwhile.
    rows_max = max(1, spec.budget.callers // 2)
    batching = choose_batching(cost, spec.budget.latency_ms, spec.budget.rate, replicas=replicas, rows_max=rows_max)
    return Chosen(batching=batching, passes=tuple((rows, 1000 * seconds) for rows, seconds in passes), cost=cost)


def _repeated(model: Model, sample: Sample) -> Encoded:
    encoded = model.prepare(Encoded(inputs=sample.inputs, flags=Flags.none(sample.rows), rows=sample.rows))
    return encoded.repeated(math.ceil(_SAMPLE_ROWS / sample.rows)).rows_at(0, _SAMPLE_ROWS)


class Setting(Frozen):
    """How an endpoint last served a version, kept as a tag of it: to go back to, and not to be measured again."""

    chosen: Chosen = Field(description="The batching that was verified.")
    scaling: Scaling = Field(description="The replicas.")
    budget: Budget | None = Field(description="What the batching was chosen for.")
    machine: str = Field(description="The kind of machine that it was measured on.")


def _terms(spec: EndpointSpec) -> tuple[Budget | None, Scaling, str]:
    return spec.budget, spec.scaling, machine_kind()


def remember(spec: EndpointSpec, pin: ModelPin, chosen: Chosen) -> bool:
    """Keep with the model version how it is served; False where the registry does not take it."""
    budget, scaling, machine = _terms(spec)
    setting = Setting(chosen=chosen, scaling=scaling, budget=budget, machine=machine)
    return save_tag(pin, tag_of(spec.name), setting.model_dump_json())


def remembered(endpoint: str, tags: Mapping[str, str]) -> Setting | None:
    """Return how an endpoint last served a version, by the version's tags; None where that is not known."""
    try:
        return Setting.model_validate_json(tags.get(tag_of(endpoint), ""))
    except ValidationError:
        return None


def tag_of(endpoint: str) -> str:
    """Return the name of the tag by which a model version keeps how an endpoint serves it."""
    return f"overnight.endpoint.{endpoint}"
