"""The spec of an endpoint: model, batching, scaling, rollout and access; and the API keys that it names."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AliasChoices, BeforeValidator, Field, JsonValue, model_validator

from serving.errors import BadInput
from serving.gateway.keys import ADMIN_KEY, KEY_LENGTH_MIN
from serving.gateway.route import ENDPOINT_PATTERN, KeyName, Limits
from serving.model.batching import BatchingConfig
from serving.model.contract import ColumnPolicy, Frozen
from serving.model.environment_choice import EnvironmentOption, PackagesOption
from serving.model.graph import STEPS_MAX, STEPS_MIN
from serving.model.release import Scaling
from serving.option_words import give_option
from tasks.endpoint.targets import URL, AnyTarget, FolderTarget, Target, default_target

GATEWAY = "http://127.0.0.1:8080"


class Budget(Frozen):
    """How fast answers must be, and how many are expected. Without explicit batching, the batching is chosen for it."""

    latency_ms: float = Field(gt=0, le=60_000, description="Milliseconds within which a request is to be answered.")
    rate: float = Field(gt=0, le=1e6, description="Rows a second that are expected, of all callers together.")
    callers: int = Field(
        default=1024,
        ge=1,
        le=1024,
        description="Rows that wait for their answer at a time, at most; a batch is of half of them, at most.",
    )


class AllAtOnce(Frozen):
    """The new version gets all traffic as soon as its answers are verified."""

    kind: Literal["all-at-once"] = Field(default="all-at-once", description="Tells this rollout from others.")


class Canary(Frozen):
    """The new version gets a share of the traffic first, and all of it where it keeps its rule."""

    kind: Literal["canary"] = Field(default="canary", description="Tells this rollout from others.")
    percent: float = Field(default=10.0, gt=0, le=50, description="Its share of the traffic, in percent.")
    requests_min: int = Field(
        default=100, ge=1, le=1_000_000, description="Answers of it that must be seen before it gets the rest."
    )
    error_rate_max: float = Field(
        default=0.01, ge=0, lt=1, description="Share of its answers that may be errors; more roll it back."
    )
    p99_ms_max: float | None = Field(
        default=None, gt=0, description="Milliseconds within which 99 of 100 of its answers must come; null: any."
    )
    seconds_max: float = Field(
        default=600.0, gt=0, le=86_400, description="It is rolled back where it has not got its answers by then."
    )
    wait: bool = Field(
        default=True,
        description="Whether the call waits for the decision. Else the gateway decides by the same rule, and the next "
        "call takes down the version that has no traffic any more.",
    )


class Shadow(Frozen):
    """The new version gets copies of requests, and its answers go nowhere; a later call gives it traffic."""

    kind: Literal["shadow"] = Field(default="shadow", description="Tells this rollout from others.")
    tolerance: float = Field(
        default=1e-5,
        gt=0,
        le=1,
        description="Largest difference from the answers of the serving version that counts as equal.",
    )
    in_flight_max: int = Field(
        default=4, ge=1, le=256, description="Copies that it gets at a time, at most; while it is busy it gets none."
    )


class Access(Frozen):
    """Who may send requests, by names of API keys, never the keys.

    Without any name an endpoint keeps the keys that it has. Where it has none, all who reach the gateway may.
    """

    environment: tuple[KeyName, ...] = Field(
        default=(), max_length=64, description="Environment variables of the machine this runs on that hold a key."
    )
    secrets: tuple[KeyName, ...] = Field(
        default=(), max_length=64, description="Prefect Secret blocks that hold a key."
    )
    anyone: bool = Field(
        default=False,
        description="Take off the keys that the endpoint has: all who reach the gateway may send requests.",
    )

    @property
    def names(self) -> tuple[KeyName, ...]:
        """The names of all keys."""
        return (*self.environment, *self.secrets)

    @model_validator(mode="after")
    def _validate_anyone(self) -> Self:
        if self.anyone and self.names:
            message = f"Access must be by keys or for anyone, got both: {', '.join(self.names)}. Leave out one of them."
            raise ValueError(message)
        return self


# Fields that the spec of an endpoint has in common with the terms of a workload.
Gateway = Annotated[str, Field(pattern=URL, description="The URL of the gateway.")]
AdminSecret = Annotated[
    str | None,
    Field(
        description="A Prefect Secret block that holds the gateway's administrator key. Without: the environment "
        "variable OVERNIGHT_ADMIN_KEY of the machine this runs on."
    ),
]
InputColumns = Annotated[
    dict[str, tuple[str, ...]],
    Field(description="Which columns feed a tensor input, where the model does not say it."),
]
Policies = Annotated[
    dict[str, ColumnPolicy],
    Field(description="How columns are cast and what becomes of nulls, as in a batch run."),
]
Params = Annotated[
    dict[str, JsonValue],
    Field(description="Values of params in the model's signature, the same for every request, as in a batch run."),
]
AllowPickle = Annotated[
    bool, Field(description="Load a pickled model. Unpickling runs any code in it: only for models you trust.")
]
Tolerance = Annotated[
    float,
    Field(
        gt=0,
        lt=1,
        description="How far an answer may be from the model's own, relative to the largest of them or to 1.",
    ),
]

MeasureSeconds = Annotated[
    float,
    Field(
        ge=0,
        le=60,
        description="Seconds of requests at the budget's rate, and as many at twice that rate: the release must keep "
        "the budget under both before it gets traffic. 0 deploys without that check.",
    ),
]


class Step(Frozen):
    """One model of several that an endpoint answers by; its address alone, as text, is a step too."""

    model: str = Field(description="models:/NAME@ALIAS or models:/NAME/VERSION, resolved once.")
    batching: BatchingConfig | None = Field(
        default=None, description="Explicit batching of this step. Without: what follows from that of the endpoint."
    )
    params: Params = Field(default_factory=dict)


def _read_step(given: object) -> object:
    return {"model": given} if isinstance(given, str) else given


# What a call does not say is not taken from an earlier one: who calls whom, what gets traffic and how, and the trust
# that runs the code in a pickle.
OF_EACH_CALL = frozenset({"name", "model", "steps", "ensemble", "gateway", "admin_secret", "rollout", "allow_pickle"})

Steps = Annotated[
    tuple[Annotated[Step, BeforeValidator(_read_step, json_schema_input_type=str | Step)], ...], Field(max_length=8)
]


class EndpointSpec(Frozen):
    """An online endpoint. It answers by one model, or by two or three: as steps, or as an ensemble.

    What a spec leaves out stays as the endpoint of that name has it, but for the fields in `OF_EACH_CALL`.
    """

    name: str = Field(pattern=ENDPOINT_PATTERN, description="The endpoint's name, by which callers ask for its model.")
    model: str | None = Field(
        default=None, description="models:/NAME@ALIAS or models:/NAME/VERSION, resolved once. Or steps, or ensemble."
    )
    steps: Steps = Field(
        default=(),
        description="In place of a model two or three, each of which takes what the one before it gives, such as "
        "preprocessing, a model and postprocessing.",
    )
    ensemble: Steps = Field(
        default=(),
        description="In place of a model two or three that take and give the same; the answer is their outputs' mean.",
    )
    gateway: Gateway = GATEWAY
    admin_secret: AdminSecret = None
    target: Target = Field(default_factory=default_target)
    budget: Budget | None = Field(
        default=None,
        description="Latency and rate that the endpoint is held against, and that its batching is chosen for. Without "
        "it and without `batching`: no batching.",
    )
    batching: BatchingConfig | None = Field(
        default=None,
        validation_alias=AliasChoices("batching", "dial"),
        description="Explicit batching. Beside a budget it is held against it, and nothing else is tried.",
    )
    scaling: Scaling = Field(default=Scaling(), description="How many replicas the model server has.")
    keep_warm: float | Literal["auto"] | None = Field(
        default=None,
        description="Seconds after the last request until the model is unloaded; the next request loads it. auto: as "
        "long as a cold start takes, and for ever where that breaks the budget. Without: it is never unloaded.",
    )
    rollout: Annotated[AllAtOnce | Canary | Shadow, Field(discriminator="kind")] = Field(
        default=AllAtOnce(), description="How a new version gets its traffic."
    )
    access: Access = Field(default=Access(), description="Who may ask.")
    limits: Limits = Field(default=Limits(), description="What one request may be, and how many at once.")
    input_columns: InputColumns = Field(default_factory=dict)
    policies: Policies = Field(default_factory=dict)
    params: Params = Field(default_factory=dict)
    allow_pickle: AllowPickle = False
    environment: EnvironmentOption = None
    packages: PackagesOption = None
    tolerance: Tolerance = 1e-5
    measure_seconds: MeasureSeconds = 2.0

    @property
    def graph_steps(self) -> tuple[Step, ...]:
        """The steps or the models of the ensemble; none where the endpoint answers by one model."""
        return self.steps or self.ensemble

    @model_validator(mode="after")
    def _validate_models(self) -> Self:
        given = [name for name in ("model", "steps", "ensemble") if getattr(self, name)]
        if len(given) != 1:
            message = (
                "An endpoint must have a model, steps or an ensemble, and one of these three, got "
                f"{' and '.join(given) or 'none'}. Give one of them."
            )
            raise ValueError(message)
        if self.model is None:
            self._validate_graph(given[0])
        return self

    def _validate_graph(self, field: str) -> None:
        count = len(self.graph_steps)
        if not STEPS_MIN <= count <= STEPS_MAX:
            message = (
                f"{field} must name {STEPS_MIN} or {STEPS_MAX} models, got {count}. Give one model as `model`, and log "
                "what more of them do as fewer models."
            )
            raise ValueError(message)
        if not self.target.chains_models:
            message = (
                f"{field} must be served by {_list_kinds('chains_models')}, got {self.target.kind}, which chains no "
                "models. Choose one of those targets, or log what the models do together as one model."
            )
            raise ValueError(message)
        if self.params:
            message = (
                f"params must be those of a step beside {field}, got {sorted(self.params)} for all. Move them there."
            )
            raise ValueError(message)

    @model_validator(mode="after")
    def _validate_environment(self) -> Self:
        if self.environment == "model" and (obstacle := self.target.environment_obstacle):
            message = (
                f"{give_option('environment', 'model')} must have a target that runs a model in an environment of its "
                f"own, got {self.target.kind}: {obstacle}. Choose ray-serve, or bentoml, kserve or seldon without a "
                "cluster, or give the server the model's versions and leave it out."
            )
            raise ValueError(message)
        return self

    @model_validator(mode="after")
    def _validate_wait(self) -> Self:
        has_cluster = isinstance(self.target, FolderTarget) and self.target.cluster is not None
        if has_cluster and isinstance(self.rollout, Canary) and not self.rollout.wait:
            message = (
                "A canary on a target with a cluster must be waited for, since the flow writes the step that follows, "
                "got wait=False. Leave it out."
            )
            raise ValueError(message)
        return self

    @model_validator(mode="after")
    def _validate_keep_warm(self) -> Self:
        if isinstance(self.keep_warm, float) and not 1 <= self.keep_warm <= 7 * 86_400:
            message = f"keep_warm must be from 1 second to a week, got {self.keep_warm:g}."
            raise ValueError(message)
        if self.keep_warm == "auto" and self.budget is None:
            message = "keep_warm can be auto only beside a budget, which says how late an answer may be, got none."
            raise ValueError(message)
        if self.keep_warm is not None and not self.target.unloads_models:
            able = _list_kinds("unloads_models")
            message = f"keep_warm must be left out on {self.target.kind}, which unloads no models as {able} do."
            raise ValueError(message)
        return self

    @model_validator(mode="after")
    def _validate_deployed(self) -> Self:
        given = [name for name in ("batching", "scaling") if getattr(self, name) not in (None, Scaling())]
        if given and not self.target.deploys:
            message = (
                f"{' and '.join(given)} must be left out on {self.target.kind}, whose server others run, got one. A "
                "budget is held against that server as it is."
            )
            raise ValueError(message)
        return self


def _list_kinds(quality: str) -> str:
    """Return the names of the targets that have a quality, in words."""
    *first, last = [each.model_fields["kind"].default for each in get_args(AnyTarget) if getattr(each, quality)]
    return f"{', '.join(first)} or {last}"


def read_keys(access: Access) -> dict[str, str]:
    """Return the API keys of an endpoint by their names; raises BadInput for one that is missing or too short."""
    found = {name: _validate_key(name, "environment variable", read_variable(name)) for name in access.environment}
    return found | {name: _validate_key(name, "Prefect Secret block", read_secret(name)) for name in access.secrets}


def read_admin_key(secret: str | None) -> str:
    """Return the gateway's administrator key; raises BadInput where it is missing or too short."""
    if secret is None:
        return _validate_key(ADMIN_KEY, "environment variable", read_variable(ADMIN_KEY))
    return _validate_key(secret, "Prefect Secret block", read_secret(secret))


def _validate_key(name: str, what: str, key: str | None) -> str:
    if key is None or len(key) < KEY_LENGTH_MIN:
        found = "nothing" if not key else f"{len(key)} characters"
        message = (
            f"The {what} {name!r} must hold a key of at least {KEY_LENGTH_MIN} characters on this machine, "
            f"got {found}. Give it the key that is in use, or make one with: openssl rand -hex 32"
        )
        raise BadInput(message)
    return key


def read_variable(name: str) -> str | None:
    """Return the value of an environment variable, None where it is not set."""
    return os.environ.get(name)


def read_secret(name: str) -> str | None:
    """Return the value of a Prefect Secret block, None where there is none of that name."""
    from prefect.blocks.system import Secret  # noqa: PLC0415 - most uses of a spec need no Prefect

    from tasks.common.prefect_server import require_prefect_server  # noqa: PLC0415 - the same

    require_prefect_server(f"The Prefect Secret block {name!r}")

    try:
        block: Any = Secret.load(name)
    except ValueError:
        return None
    return str(block.get())
