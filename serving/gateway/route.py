"""A route: what the gateway does with the requests of one endpoint. An administrator puts it, a file keeps it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from serving.model.contract import Contract, Frozen

if TYPE_CHECKING:
    # serving.targets imports MLflow, which takes seconds; the gateway starts without it.
    from serving.targets import Address

HOST_PORT = r"^[A-Za-z0-9._-]{1,253}:[0-9]{1,5}$"
ENDPOINT_PATTERN = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"
KEY_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"
KeyName = Annotated[str, Field(pattern=KEY_PATTERN)]
VersionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]


class Served(Frozen):
    """One version of an endpoint: where it answers, and its share of the requests."""

    version: VersionName = Field(description="The version, as clients name it in /v2/models/NAME/versions/VERSION.")
    url: str = Field(
        pattern=r"^https?://[^/\s?#@]+(/[^\s?#]*)?$", max_length=2048, description="The base URL of its model server."
    )
    upstream_model: str = Field(min_length=1, max_length=256, description="The model's name there.")
    upstream_version: str | None = Field(
        default=None, max_length=256, description="The model's version there; none where that server knows none."
    )
    speaks: Literal["v2", "mlflow-tensors", "mlflow-columns"] = Field(
        default="v2",
        description="v2: the Open Inference Protocol. mlflow-tensors, mlflow-columns: MLflow's scoring server, whose "
        "model was logged with a signature of tensors or of columns.",
    )
    weight: float = Field(
        default=0, ge=0, le=1e6, description="Its share of the requests that name no version, over all weights."
    )

    @classmethod
    def at(cls, address: Address, *, version: str, weight: float) -> Self:
        """Return a version that answers at the address of a V2 server."""
        return cls(
            version=version,
            url=address.url.rstrip("/"),
            upstream_model=address.model,
            upstream_version=address.version,
            weight=weight,
        )


class Limits(Frozen):
    """What one request may be, and how many at once."""

    rows_max: int = Field(default=1024, ge=1, le=1 << 20, description="Rows of a request, at most.")
    bytes_max: int = Field(default=8 << 20, ge=1, le=1 << 30, description="Bytes of a request, at most.")
    requests_per_second: float | None = Field(
        default=None, gt=0, le=1e6, description="Requests a second, at most; none: as many as come."
    )
    burst: int = Field(default=100, ge=1, le=1_000_000, description="Requests at once above that rate, at most.")
    timeout_s: float = Field(default=10.0, gt=0, le=3600, description="Seconds that a request may wait and take.")
    in_flight_max: int = Field(default=64, ge=1, le=4096, description="Requests that are with the servers at once.")
    queue_max: int = Field(default=256, ge=0, le=65_536, description="Requests that wait for those, at most.")


class Sleep(Frozen):
    """When an endpoint's models are unloaded, and how they are loaded again for the request that needs them."""

    keep_warm_s: float = Field(gt=0, le=30 * 86_400, description="Seconds after the last request until they unload.")
    hold_s_max: float = Field(default=60.0, gt=0, le=3600, description="Seconds that a request waits for a load.")
    grpc: Annotated[str, Field(pattern=HOST_PORT)] | None = Field(
        default=None,
        description="Triton's gRPC door, HOST:PORT, which loads a model while other models are asked. None: the model "
        "repository extension of V2 over HTTP, which may keep the server's other callers waiting.",
    )


class Rollout(Frozen):
    """The rule by which a version on trial takes all requests, or loses its share."""

    version: VersionName = Field(description="The version on trial; its weight is its share while it is.")
    requests_min: int = Field(default=100, ge=1, le=10_000_000, description="Requests it answers before it can win.")
    seconds_min: float = Field(default=0.0, ge=0, le=30 * 86_400, description="Seconds it is on trial before it can.")
    error_rate_max: float = Field(default=0.01, ge=0, lt=1, description="Share of its requests that may fail.")
    p99_ms_max: float | None = Field(
        default=None, gt=0, le=3.6e6, description="Milliseconds within which 99 of 100 of its answers must come."
    )


class Shadow(Frozen):
    """A version that is asked the same, and whose answers are compared and never returned."""

    version: VersionName = Field(description="The version that is asked too.")
    tolerance: float = Field(
        default=1e-5, ge=0, le=1, description="Absolute and relative difference between equal numbers, at most."
    )
    in_flight_max: int = Field(
        default=4, ge=1, le=256, description="Requests that it is asked at once; more are not asked."
    )


class Route(Frozen):
    """What becomes of the requests of one endpoint."""

    versions: tuple[Served, ...] = Field(min_length=1, max_length=32, description="The versions that can be asked.")
    contract: Contract = Field(description="What the model takes and gives; requests are held against it.")
    limits: Limits = Field(default=Limits(), description="What one request may be, and how many at once.")
    keys: tuple[KeyName, ...] = Field(
        default=(), max_length=256, description="The API keys that may ask, by name; none: everybody who gets here."
    )
    rollout: Rollout | None = Field(default=None, description="A version on trial, and the rule of its trial.")
    shadow: Shadow | None = Field(default=None, description="A version whose answers are only compared.")
    sleep: Sleep | None = Field(default=None, description="When the models are unloaded; none: never.")

    @model_validator(mode="after")
    def _whole(self) -> Self:
        names = [each.version for each in self.versions]
        if len({*names}) < len(names):
            message = f"Each version must stand once in a route, got {names}."
            raise ValueError(message)
        if not any(each.weight for each in self.versions):
            message = f"One version at least must have a weight above 0, got none of {names}."
            raise ValueError(message)
        for what, named in (("rollout", self.rollout), ("shadow", self.shadow)):
            if named is not None and named.version not in names:
                message = f"The version of {what} must be one of {names}, got {named.version!r}."
                raise ValueError(message)
        if self.rollout is not None and not self._is_tried(self.rollout.version):
            message = (
                f"The version on trial, {self.rollout.version!r}, and another must have a weight above 0, got "
                f"{ {each.version: each.weight for each in self.versions} }."
            )
            raise ValueError(message)
        if self.sleep is not None and any(each.speaks != "v2" for each in self.versions):
            message = "Models are unloaded through the V2 protocol: versions that speak another must have no sleep."
            raise ValueError(message)
        return self

    def _is_tried(self, version: str) -> bool:
        return {True, False} == {each.version == version for each in self.versions if each.weight}

    def served(self, version: str) -> Served | None:
        """Return a version by its name, None where the route has none of that name."""
        return next((each for each in self.versions if each.version == version), None)


def promoted(route: Route) -> Route:
    """Return the route after a trial that was won: that version gets every request."""
    return _ended(route, won=True)


def rolled_back(route: Route) -> Route:
    """Return the route after a trial that was lost: that version gets no request that does not name it."""
    return _ended(route, won=False)


def _ended(route: Route, *, won: bool) -> Route:
    assert route.rollout is not None, "only a trial can end"  # noqa: S101 - our own mistake, not a caller's
    tried = route.rollout.version
    weights = {
        each.version: (100.0 if each.version == tried else 0.0) if won else each.weight for each in route.versions
    }
    if not won:
        weights[tried] = 0.0
    versions = tuple(each.model_copy(update={"weight": weights[each.version]}) for each in route.versions)
    return route.model_copy(update={"versions": versions, "rollout": None})
