"""The batching of a release: as given, or chosen by passes that are measured on the real model."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping

from pydantic import AliasChoices, Field, ValidationError

from serving.machine import count_cores, describe_machine
from serving.model.batching import BatchingConfig, BatchingSetting, CostModel, fit_cost_model, list_batchings
from serving.model.contract import Frozen
from serving.model.encoding import Encoded, Flags
from serving.model.pin import ModelPin
from serving.model.registry import save_tag
from serving.model.release import Scaling
from serving.model.tuner import measure_passes
from tasks.endpoint.resolve import Loaded
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
    setting: BatchingSetting | None = Field(
        default=None,
        description="Its replicas, and what rows wait by the simulation. Null where the batching is explicit, where no "
        "budget was given, and where an earlier release chose the batching.",
    )

    def choose_scaling(self, scaling: Scaling) -> Scaling:
        """Return the scaling with as many replicas at least as carry the expected rate; one to zero stays as it is."""
        if self.setting is None or scaling.replicas_min >= self.setting.replicas or not scaling.replicas_min:
            return scaling
        return scaling.model_copy(update={"replicas_min": self.setting.replicas})

    def describe(self) -> str:
        """Return the batching and its replicas in words."""
        replicas = f"{self.setting.replicas} replica{'s' * (self.setting.replicas > 1)}, " if self.setting else ""
        return replicas + describe_batching(self.batching)


def describe_batching(batching: BatchingConfig) -> str:
    """Return a batching in words."""
    if batching.batch_size_max == 1:
        return "each request alone"
    waiting = f"waiting {batching.wait_ms_max:.3g} ms at most" if batching.wait_ms_max else "waiting for no others"
    return f"up to {batching.batch_size_max:,} rows a pass, {waiting}"


def resolve_batching(spec: EndpointSpec, loaded: Loaded) -> Iterator[BatchingChoice]:
    """Yield the batchings of a spec, in the order in which to try them.

    Explicit batching is the only one. Without it and without a budget, each request is passed alone; what a server that
    others run does with requests is not known here.

    For a budget, the setting that was verified before comes first, where this version was served for the same budget
    and replicas on a machine of this kind. For the others the model is measured here, for about a second. Raises
    LatencyImpossible where no batching keeps the budget.
    """
    if spec.budget is None or spec.batching is not None or not spec.target.deploys:
        yield BatchingChoice(batching=spec.batching or BatchingConfig())
        return
    settings = read_settings(loaded.settings_name(spec.name), loaded.sources[-1].tags)
    if (
        settings is not None
        # A choice without a setting was not made as it is now: for the least latency.
        and settings.chosen.setting is not None
        and (settings.budget, settings.scaling, settings.machine) == _batching_terms(spec)
    ):
        yield settings.chosen
    yield from _measure_choices(spec.budget, spec.scaling, loaded)


def _measure_choices(budget: Budget, scaling: Scaling, loaded: Loaded) -> Iterator[BatchingChoice]:
    replicas_max = max(1, scaling.replicas_min, scaling.replicas_max)
    sample = loaded.sample
    encoded = loaded.model.prepare(Encoded(inputs=sample.inputs, flags=Flags.all_good(sample.rows), rows=sample.rows))
    passes = measure_passes(
        loaded.model,
        loaded.contract,
        encoded.repeat(math.ceil(_SAMPLE_ROWS / sample.rows)).slice_rows(0, _SAMPLE_ROWS),
        budget.latency_ms,
        slots=min(replicas_max, count_cores()),
        clock=time.perf_counter,
    )
    cost = fit_cost_model(passes)
    found = list_batchings(
        cost,
        budget.latency_ms,
        budget.rate,
        replicas_min=max(1, scaling.replicas_min),
        replicas_max=replicas_max,
        # Half of the callers: with all of them in one pass, none is left to fill the next one meanwhile.
        rows_max=max(1, budget.callers // 2),
    )
    passes_ms = tuple((rows, 1000 * seconds) for rows, seconds in passes)
    for setting in found:
        yield BatchingChoice(batching=setting.batching, passes=passes_ms, cost=cost, setting=setting)


class ServedSettings(Frozen):
    """How an endpoint last served a version, kept as a tag of it: to go back to, and not to be measured again."""

    chosen: BatchingChoice = Field(description="The batching that was verified.")
    scaling: Scaling = Field(description="The replicas that the spec asked for.")
    budget: Budget | None = Field(description="What the batching was chosen for.")
    machine: str = Field(description="The kind of machine that it was measured on.")


def _batching_terms(spec: EndpointSpec) -> tuple[Budget | None, Scaling, str]:
    return spec.budget, spec.scaling, describe_machine()


def save_settings(spec: EndpointSpec, pin: ModelPin, chosen: BatchingChoice, name: str | None = None) -> bool:
    """Save in a tag of the model version how it is served; return False where the registry refuses the tag.

    `name` is that of the settings, of which a graph has its own; without, the endpoint's.
    """
    budget, scaling, machine = _batching_terms(spec)
    settings = ServedSettings(chosen=chosen, scaling=scaling, budget=budget, machine=machine)
    return save_tag(pin, make_tag_name(name or spec.name), settings.model_dump_json())


def read_settings(endpoint: str, tags: Mapping[str, str]) -> ServedSettings | None:
    """Return how an endpoint last served a version, by the version's tags; None where that is not known."""
    try:
        return ServedSettings.model_validate_json(tags.get(make_tag_name(endpoint), ""))
    except ValidationError:
        return None


def make_tag_name(endpoint: str) -> str:
    """Return the name of the tag by which a model version keeps how an endpoint serves it."""
    return f"overnight.endpoint.{endpoint}"
