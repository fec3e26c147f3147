"""The model of an endpoint, resolved once and loaded here, and rows that it answers."""

from __future__ import annotations

from dataclasses import dataclass

from serving.errors import ModelFailed
from serving.model.contract import Contract
from serving.model.interface import Tunable
from serving.model.loading import load_model
from serving.model.registry import Resolved, resolve_model
from tasks.endpoint.samples import Sample, answered, example_rows, random_rows
from tasks.endpoint.spec import EndpointSpec

_RANDOM_ROWS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A pinned model version, its contract, the model itself, and the rows that its endpoint is held against."""

    resolved: Resolved
    contract: Contract
    model: Tunable
    example: Sample | None
    random: Sample | None

    @property
    def version(self) -> str:
        """The model version, a whole number from 1."""
        return self.resolved.pin.version

    @property
    def sample(self) -> Sample:
        """The rows to measure with: random ones, which differ, where the model answers any."""
        sample = self.random or self.example
        assert sample is not None, "resolve makes none without"  # noqa: S101 - our own mistake, not a caller's
        return sample


def resolve(spec: EndpointSpec) -> Subject:
    """Resolve and load a spec's model, and have it answer its own example and random rows.

    Raises ModelNotFound, ModelUnfit, and ModelFailed where it answers none of them.
    """
    resolved = resolve_model(spec.model)
    contract = resolved.contract(spec.input_columns, spec.policies)
    model = load_model(resolved, contract, allow_pickle=spec.allow_pickle)
    with model.slot():
        example = answered(model, example_rows(resolved, contract))
        random = answered(model, random_rows(contract, _RANDOM_ROWS))
    if example is None and random is None:
        message = (
            f"{resolved.pin.uri} must answer its own input example, or random rows, in finite numbers, to be held "
            "against its endpoint; it answers none. Log it with an input_example that it answers."
        )
        raise ModelFailed(message)
    return Subject(resolved=resolved, contract=contract, model=model, example=example, random=random)
