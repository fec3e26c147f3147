"""The route of an endpoint and its state: the records that the administrator's API and the gateway's files hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import AwareDatetime, Field, JsonValue, field_validator, model_validator

from serving.model.contract import Contract, Frozen

if TYPE_CHECKING:
    from serving.targets import Address

HOST_PORT = r"^[A-Za-z0-9._-]{1,253}:[0-9]{1,5}$"
ENDPOINT_PATTERN = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"
KEY_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"
KeyName = Annotated[str, Field(pattern=KEY_PATTERN)]
VersionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
Outcome = Literal["promoted", "rolled back"]
ModelState = Literal["awake", "asleep", "waking", "unknown"]


class ServedVersion(Frozen):
    """One version of an endpoint: the address of its model server, and its share of the requests."""

    version: VersionName = Field(description="The version, as clients name it in /v2/models/NAME/versions/VERSION.")
    url: str = Field(
        pattern=r"^https?://[^/\s?#@]+(/[^\s?#]*)?$", max_length=2048, description="The base URL of its model server."
    )
    upstream_model: str = Field(min_length=1, max_length=256, description="The model's name on that server.")
    grpc: Annotated[str, Field(pattern=HOST_PORT)] | None = Field(
        default=None, description="The gRPC address of its model server, HOST:PORT; none: callers use HTTP alone."
    )
    upstream_version: str | None = Field(
        default=None,
        max_length=256,
        description="The model's version on that server; none where the server has no versions.",
    )
    speaks: Literal["v2", "mlflow-tensors", "mlflow-columns"] = Field(
        default="v2",
        description="The server's protocol. v2: the Open Inference Protocol. mlflow-tensors, mlflow-columns: MLflow's "
        "scoring server, whose model was logged with a signature of tensors or of columns.",
    )
    weight: float = Field(
        default=0, ge=0, le=1e6, description="Its share of the requests that name no version, over the sum of weights."
    )

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: str) -> str:
        try:
            parts = urlsplit(url)
            is_complete = bool(parts.hostname) and parts.port != 0
        except ValueError:
            is_complete = False
        if not is_complete:
            message = f"The URL must be http://HOST:PORT or https://HOST:PORT, got {url!r}."
            raise ValueError(message)
        return url

    @classmethod
    def from_address(cls, address: Address, *, version: str, weight: float) -> Self:
        """Return a version that a V2 server has at this address."""
        return cls(
            version=version,
            url=address.url.rstrip("/"),
            grpc=address.grpc,
            upstream_model=address.model,
            upstream_version=address.version,
            weight=weight,
        )


class Limits(Frozen):
    """What the requests of an endpoint may cost."""

    rows_max: int = Field(default=1024, ge=1, le=1 << 20, description="Maximum number of rows of a request.")
    bytes_max: int = Field(default=8 << 20, ge=1, le=1 << 30, description="Maximum number of bytes of a request.")
    requests_per_second: float | None = Field(
        default=None, gt=0, le=1e6, description="Maximum rate of requests; none: no limit."
    )
    burst: int = Field(
        default=100, ge=1, le=1_000_000, description="Maximum number of requests above the rate at once."
    )
    timeout_s: float = Field(default=10.0, gt=0, le=3600, description="Seconds that a request may wait and take.")
    in_flight_max: int = Field(
        default=64, ge=1, le=4096, description="Maximum number of requests that the model servers have at once."
    )
    queue_max: int = Field(
        default=256, ge=0, le=65_536, description="Maximum number of requests that wait for a model server."
    )


class SleepRule(Frozen):
    """When an endpoint's models are unloaded, and how they are loaded again for the next request."""

    keep_warm_s: float = Field(gt=0, le=30 * 86_400, description="Seconds after the last request until they unload.")
    hold_s_max: float = Field(default=60.0, gt=0, le=3600, description="Seconds that a request waits for a load.")
    grpc: Annotated[str, Field(pattern=HOST_PORT)] | None = Field(
        default=None,
        description="Triton's gRPC address, HOST:PORT, which loads a model without delaying requests to other models. "
        "None: the model repository extension of V2 over HTTP, which may delay them.",
    )


class Rollout(Frozen):
    """The rule by which a canary is promoted or rolled back."""

    version: VersionName = Field(description="The canary; its weight is its share until the decision.")
    requests_min: int = Field(
        default=100, ge=1, le=10_000_000, description="Requests that it answers before it can be promoted."
    )
    seconds_min: float = Field(
        default=0.0, ge=0, le=30 * 86_400, description="Seconds that pass before it can be promoted."
    )
    seconds_max: float | None = Field(
        default=None,
        gt=0,
        le=30 * 86_400,
        description="Seconds after which it is rolled back where it has had too few requests; none: it waits for them.",
    )
    error_rate_max: float = Field(default=0.01, ge=0, lt=1, description="Share of its requests that may fail.")
    p99_ms_max: float | None = Field(
        default=None, gt=0, le=3.6e6, description="Maximum 99th percentile of its latency in milliseconds."
    )


class Shadow(Frozen):
    """A version that gets copies of requests; its answers are compared and never returned."""

    version: VersionName = Field(description="The version that gets the copies.")
    tolerance: float = Field(
        default=1e-5, ge=0, le=1, description="Maximum absolute and relative difference between equal numbers."
    )
    in_flight_max: int = Field(
        default=4, ge=1, le=256, description="Maximum number of copies at once; further requests are not copied."
    )


class Route(Frozen):
    """What the gateway does with the requests of one endpoint."""

    versions: tuple[ServedVersion, ...] = Field(
        min_length=1, max_length=32, description="The versions that can be requested."
    )
    contract: Contract = Field(description="The model's inputs and outputs; requests are checked against it.")
    limits: Limits = Field(default=Limits(), description="What the requests may cost.")
    keys: tuple[KeyName, ...] = Field(
        default=(), max_length=256, description="The names of the API keys that are accepted; none: no key is needed."
    )
    rollout: Rollout | None = Field(default=None, description="The rule of a canary.")
    shadow: Shadow | None = Field(default=None, description="A version whose answers are only compared.")
    sleep: SleepRule | None = Field(default=None, description="When the models are unloaded; none: never.")
    spec: dict[str, JsonValue] = Field(
        default_factory=dict,
        description="What the endpoint was put online with, for a later call that leaves a part of it out. The gateway "
        "only keeps it.",
    )

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        names = [served.version for served in self.versions]
        weights = {served.version: served.weight for served in self.versions}
        if len(weights) < len(names):
            message = f"The versions of a route must have different names, got {names}."
            raise ValueError(message)
        if not any(weights.values()):
            message = f"At least one version must have a weight above 0, got {weights}."
            raise ValueError(message)
        for field, rule in (("rollout", self.rollout), ("shadow", self.shadow)):
            if rule is not None and rule.version not in names:
                message = f"The version of {field} must be one of {names}, got {rule.version!r}."
                raise ValueError(message)
        if self.rollout is not None:
            canary = self.rollout.version
            if not weights[canary] or not any(weight for version, weight in weights.items() if version != canary):
                message = f"The canary {canary!r} and another version must have a weight above 0, got {weights}."
                raise ValueError(message)
        if self.sleep is not None and any(served.speaks != "v2" for served in self.versions):
            message = (
                "Every version of a route with `sleep` must speak v2, because models are unloaded through that "
                "protocol. Leave out `sleep`."
            )
            raise ValueError(message)
        return self

    def find_version(self, version: str) -> ServedVersion | None:
        """Return a version by its name, None where the route has no version of that name."""
        return next((served for served in self.versions if served.version == version), None)


def promote_canary(route: Route) -> Route:
    """Return the route without its rollout, where the canary gets every request."""
    assert route.rollout is not None, "the route has a canary"  # noqa: S101 - our own mistake, not a caller's
    canary = route.rollout.version
    return _end_rollout(
        route, {served.version: 100.0 if served.version == canary else 0.0 for served in route.versions}
    )


def roll_back_canary(route: Route) -> Route:
    """Return the route without its rollout, where the canary gets only requests that name it."""
    assert route.rollout is not None, "the route has a canary"  # noqa: S101 - our own mistake, not a caller's
    return _end_rollout(route, {route.rollout.version: 0.0})


def _end_rollout(route: Route, weights: dict[str, float]) -> Route:
    versions = tuple(
        served.model_copy(update={"weight": weights.get(served.version, served.weight)}) for served in route.versions
    )
    return route.model_copy(update={"versions": versions, "rollout": None})


class CanaryTally(Frozen):
    """What a canary has answered so far."""

    requests: int = Field(default=0, ge=0, description="Requests that it answered or failed.")
    errors: int = Field(default=0, ge=0, description="Requests that it failed.")
    slow: int = Field(default=0, ge=0, description="Requests that took longer than the rule's p99_ms_max.")

    def add(self, rule: Rollout, *, failed: bool, latency_ms: float) -> CanaryTally:
        """Return the tally after one more request."""
        slow = rule.p99_ms_max is not None and latency_ms > rule.p99_ms_max
        return CanaryTally(requests=self.requests + 1, errors=self.errors + failed, slow=self.slow + slow)


class Trial(Frozen):
    """A canary that is not decided yet."""

    began: AwareDatetime = Field(description="When it got its first share of the requests.")
    tally: CanaryTally = Field(default=CanaryTally(), description="What it has answered since.")


class Verdict(Frozen):
    """How a canary ended, and why."""

    version: str = Field(description="The version that was the canary.")
    outcome: Outcome = Field(description="promoted: it gets every request. rolled back: it gets none.")
    reason: str = Field(description="The figures that decided.")
    tally: CanaryTally = Field(description="What the canary had answered.")
    at: AwareDatetime = Field(description="When it ended.")


class SavedEndpoint(Frozen):
    """A route with the state of its canary, as its file holds it."""

    route: Route
    trial: Trial | None = Field(default=None, description="The canary that is not decided yet.")
    verdict: Verdict | None = Field(default=None, description="How the last canary ended.")


class EndpointState(SavedEndpoint):
    """A route, its canary, and the requests and models of the moment."""

    in_flight: dict[str, int] = Field(
        description="Requests that the model servers have, by version; versions that left the route included."
    )
    waiting: int = Field(description="Requests that wait for a model server.")
    models: ModelState = Field(
        description="Whether the models are loaded (awake), where the route lets them unload; unknown: this gateway "
        "has not loaded or unloaded them yet."
    )
