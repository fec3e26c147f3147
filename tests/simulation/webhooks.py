"""Webhooks of a registry whose alias moves: late, doubled and in any order, while Prefect fails to answer."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from types import SimpleNamespace
from unittest.mock import patch

import httpx

from deployments import webhooks
from deployments.webhooks import PATH, AliasTrigger, WebhookConfig, build_app, sign
from tests.simulation.calls import attempt_apart
from tests.simulation.scheduler import Actor, Process, Scheduler

_SECRET = "the secret of the simulation"  # noqa: S105 - of nothing else
_MODEL, _ALIAS, _OTHER_ALIAS = "churn", "champion", "challenger"
_EPOCH = 1_900_000_000
_OTHERS, _DOUBLED = 0.3, 0.4
_LATE_SECONDS, _RETRY_SECONDS, _BEGIN_SECONDS = 5.0, 2.0, 3.0


@dataclass(kw_only=True)
class WebhookWorld:
    """A registry, the receiver of its webhooks, a Prefect server, and the runs that it begins."""

    scheduler: Scheduler
    chance: random.Random
    deployments: list[str]
    error: float
    moves: int = 2
    version: int = 1
    refusals: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    # The version that each run scored, in their order, by deployment; and the runs that Prefect has, by their keys.
    scored: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    _runs: dict[str, Actor] = field(default_factory=dict)

    def run(self) -> None:
        """Move the alias while the events of earlier moves are delivered; check what was scored in the end."""
        parameters = {"model": "models:/{name}@{alias}"}
        triggers = [
            AliasTrigger(model=_MODEL, alias=_ALIAS, deployment=each, parameters=parameters)
            for each in self.deployments
        ]
        config = WebhookConfig(triggers=tuple(triggers))
        self._app = build_app(config, _SECRET, clock=lambda: _EPOCH + self.scheduler.now)
        with patch.object(webhooks, "get_client", self._open_prefect):
            deliveries = []
            for _ in range(self.moves):
                self.version += 1
                self.scheduler.tell(f"the alias moves to version {self.version}")
                deliveries += self._send(_ALIAS)
                if self.chance.random() < _OTHERS:
                    deliveries += self._send(_OTHER_ALIAS)
                self.scheduler.sleep(self.chance.expovariate(1 / _LATE_SECONDS))
            for delivery in deliveries:
                self.scheduler.join(delivery).value()
        for begun in list(self._runs.values()):
            self.scheduler.join(begun).value()
        self._check()

    def _check(self) -> None:
        for deployment in self.deployments:
            scored = self.scored[deployment]
            if len(scored) != self.moves:
                self._violate(f"{self.moves} moves of the alias have {len(scored)} runs of {deployment}")
            if scored[-1:] != [self.version]:
                self._violate(f"the alias names version {self.version}, and {deployment} has scored {scored}")

    def _send(self, alias: str) -> list[Actor]:
        """Send the event of an alias, once or twice, each until it is answered well."""
        delivery = f"{alias}-{self.version}-{self.chance.getrandbits(32):08x}"
        data = {"name": _MODEL, "alias": alias, "version": str(self.version)}
        body = json.dumps({"entity": "model_version_alias", "action": "created", "data": data}).encode()

        def deliver() -> None:
            self.scheduler.sleep(self.chance.expovariate(1 / _LATE_SECONDS))
            while not self._post_apart(delivery, body):
                self.scheduler.sleep(self.chance.expovariate(1 / _RETRY_SECONDS))
            wanted = self.deployments if alias == _ALIAS else []
            if lost := [each for each in wanted if f"{delivery}:{each}" not in self._runs]:
                self._violate(f"{delivery} was answered well, and there is no run of {lost}")

        copies = 1 + (self.chance.random() < _DOUBLED)
        return [self.scheduler.spawn(Process(delivery), f"{delivery}/{at}", deliver) for at in range(copies)]

    def _post_apart(self, delivery: str, body: bytes) -> bool:
        """Send a request, whose receiver may be killed; return whether it was answered well."""
        process = Process(f"{delivery}.{self.scheduler.steps}")
        timestamp = str(int(_EPOCH + self.scheduler.now))
        headers = {
            "X-MLflow-Delivery-Id": delivery,
            "X-MLflow-Timestamp": timestamp,
            "X-MLflow-Signature": sign(_SECRET, delivery, timestamp, body),
        }

        async def post() -> int:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(self._app), base_url="http://sim") as client:
                return (await client.post(PATH, content=body, headers=headers)).status_code

        actor = attempt_apart(self.scheduler, process, lambda: asyncio.run(post()), self.refusals, self.violations)
        self.scheduler.tell(f"{delivery} is answered with {actor.result}")
        if actor.result not in (None, HTTPStatus.OK, HTTPStatus.SERVICE_UNAVAILABLE):
            self._violate(f"{delivery} is answered with {actor.result}")
        return bool(actor.result == HTTPStatus.OK)

    # Prefect, as start_run calls it.

    @asynccontextmanager
    async def _open_prefect(self) -> AsyncGenerator[WebhookWorld]:
        yield self

    async def read_deployment_by_name(self, name: str) -> SimpleNamespace:
        """Return a deployment, unless the server does not answer."""
        self._fail(f"read {name}")
        return SimpleNamespace(id=name)

    async def create_flow_run_from_deployment(
        self, deployment: str, *, parameters: Mapping[str, str], idempotency_key: str, **_tags: object
    ) -> SimpleNamespace:
        """Create a run, once a key, which begins some time later; the answer may not arrive."""
        self._fail(f"create {idempotency_key}")
        if idempotency_key not in self._runs:
            self._runs[idempotency_key] = self.scheduler.spawn(
                Process(idempotency_key), idempotency_key, lambda: self._begin(deployment, parameters["model"])
            )
        self._fail(f"answer {idempotency_key}")
        return SimpleNamespace(id=idempotency_key)

    def _begin(self, deployment: str, model: str) -> None:
        """Begin a run, which then asks the registry for what its parameters name."""
        self.scheduler.sleep(self.chance.expovariate(1 / _BEGIN_SECONDS))
        asked = model == f"models:/{_MODEL}@{_ALIAS}"
        self.scored[deployment].append(self.version if asked else int(model.rpartition("/")[2]))
        self.scheduler.tell(f"{deployment} scores version {self.scored[deployment][-1]}")

    def _fail(self, told: str) -> None:
        self.scheduler.step(f"Prefect: {told}")
        if self.chance.random() < self.error:
            self.scheduler.tell("is unanswered")
            raise httpx.ReadTimeout(told)

    def _violate(self, text: str) -> None:
        self.violations.append(f"webhooks: {text}")
