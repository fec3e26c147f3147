"""The batching of a release: as given, or chosen by passes that are measured on the real model."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

from pydantic import AliasChoices, Field, ValidationError

from serving.machine import count_cores, describe_machine
from serving.model.batching import BatchingConfig, CostModel, choose_batching, fit_cost_model
from serving.model.contract import Frozen
from serving.model.encoding import Encoded, Flags
from serving.model.interface import Model
from serving.model.registry import ModelPin, save_tag
from serving.model.release import Scaling
from serving.model.tuner import measure_passes
from tasks.endpoint.resolve import LoadedModel, Sample
from tasks.endpoint.spec import Budget, EndpointSpec

_SAMPLE_ROWS = 1024


class BatchingChoice(Frozen):
    """The batching, and what it was chosen by."""

    batching: BatchingConfig = Field(
        validation_alias=AliasChoices("batching", "dial"),
        description="Rows of a pass and milliseconds of waiting, at most.",
    )
    passes: tuple[tuple[int, float], ...] = Field(default=(), description="Rows and milliseconds of measured passes.")
    cost: CostModel | None = Field(
        default=None, validation_alias=AliasChoices("cost", "time"), description="The line through them, in seconds."
    )


def resolve_batching(spec: EndpointSpec, loaded: LoadedModel) -> BatchingChoice:
    """Return the batching of a spec; with a budget, the model is measured here first, for about a second.

    Where this version was tuned before, for the same budget and replicas on a machine of this kind, that is kept.
    Raises LatencyImpossible where no batching keeps the budget.
    """
    if spec.budget is None:
        return BatchingChoice(batching=spec.batching or BatchingConfig())
    settings = read_settings(spec.name, loaded.resolved.tags)
    if settings is not None and (settings.budget, settings.scaling, settings.machine) == _batching_terms(spec):
        return settings.chosen
    replicas = max(1, spec.scaling.replicas_max)
    passes = measure_passes(
        loaded.model,
        loaded.contract,
        _repeat_rows(loaded.model, loaded.sample),
        spec.budget.latency_ms,
        slots=min(replicas, count_cores()),
        clock=time.perf_counter,
    )
    cost = fit_cost_model(passes)
    # Half of the callers: with all of them in one pass, none is left to fill the next one meanwhile.
    rows_max = max(1, spec.budget.callers // 2)
    batching = choose_batching(cost, spec.budget.latency_ms, spec.budget.rate, replicas=replicas, rows_max=rows_max)
    return BatchingChoice(
        batching=batching, passes=tuple((rows, 1000 * seconds) for rows, seconds in passes), cost=cost
    )


def _repeat_rows(model: Model, sample: Sample) -> Encoded:
    encoded = model.prepare(Encoded(inputs=sample.inputs, flags=Flags.all_good(sample.rows), rows=sample.rows))
    return encoded.repeat(math.ceil(_SAMPLE_ROWS / sample.rows)).slice_rows(0, _SAMPLE_ROWS)


class ServedSettings(Frozen):
    """How an endpoint last served a version, kept as a tag of it: to go back to, and not to be measured again."""

    chosen: BatchingChoice = Field(description="The batching that was verified.")
    scaling: Scaling = Field(description="The replicas.")
    budget: Budget | None = Field(description="What the batching was chosen for.")
    machine: str = Field(description="The kind of machine that it was measured on.")


def _batching_terms(spec: EndpointSpec) -> tuple[Budget | None, Scaling, str]:
    return spec.budget, spec.scaling, describe_machine()


def save_settings(spec: EndpointSpec, pin: ModelPin, chosen: BatchingChoice) -> bool:
    """Save in a tag of the model version how it is served; return False where the registry refuses the tag."""
    budget, scaling, machine = _batching_terms(spec)
    settings = ServedSettings(chosen=chosen, scaling=scaling, budget=budget, machine=machine)
    return save_tag(pin, make_tag_name(spec.name), settings.model_dump_json())


def read_settings(endpoint: str, tags: Mapping[str, str]) -> ServedSettings | None:
    """Return how an endpoint last served a version, by the version's tags; None where that is not known."""
    try:
        return ServedSettings.model_validate_json(tags.get(make_tag_name(endpoint), ""))
    except ValidationError:
        return None


def make_tag_name(endpoint: str) -> str:
    """Return the name of the tag by which a model version keeps how an endpoint serves it."""
    return f"overnight.endpoint.{endpoint}"
