"""Calls of one process at once, each with a registry and credentials of its own: by blocks, or those of the process."""

from __future__ import annotations

import logging
import os
import random
from collections import Counter
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest.mock import patch

import mlflow
from pydantic import SecretStr

from tasks.batch.options import BatchOptions
from tasks.batch.run_request import make_request
from tasks.common import blocks
from tasks.common.blocks import OvernightDestination, OvernightRegistry, open_addresses
from tasks.storage import open_storage
from tests.simulation.calls import attempt_apart, publish_run
from tests.simulation.data import CONTRACT, Source, ToyResolved, expected
from tests.simulation.oracle import Oracle
from tests.simulation.scheduler import ActorCondition, Process, Scheduler
from tests.simulation.storage import SimulatedStorage

_LOGGER = logging.getLogger(__name__)
_KEY = "AWS_SECRET_ACCESS_KEY"
# The process has settings, too.
_OWN = "own"
_NAMES = (_OWN, "first", "second")
# The version of the model that each registry has under the alias.
_VERSIONS = {f"http://{name}": version for version, name in enumerate(_NAMES, start=1)}
_PAUSE_SECONDS = 2.0
_OPTIONS = BatchOptions(
    key_columns=("id",), batch_size=4, rows_per_chunk=8, slots=1, memory_mb=1024, max_reject_fraction=1.0
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a call is to find in its process: the address of a registry, and a key."""

    registry: str
    key: str


@dataclass(kw_only=True)
class SettingsWorld:
    """One process, and a destination for each of the callers in it. It is not killed: its settings would go with it."""

    scheduler: Scheduler
    chance: random.Random
    source: Source
    destinations: dict[str, SimulatedStorage]
    calls: int = 3
    refusals: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    # What the call that goes on at a destination is to find.
    _wanted: dict[str, Settings] = field(default_factory=dict)
    _calls: int = 0

    def run(self) -> None:
        """Let a caller call at each destination; afterwards the process must have what it had before."""
        self.source.write_some()
        with self._take_place():
            for url, storage in self.destinations.items():
                storage.on_put = partial(self._see_put, url)
            actors = [
                self.scheduler.spawn(Process(url), url, partial(self._call_often, url)) for url in self.destinations
            ]
            for actor in actors:
                self.scheduler.join(actor).value()
            self._check("the process, once all calls have ended,", Settings(registry=f"http://{_OWN}", key=_OWN))

    @contextmanager
    def _take_place(self) -> Generator[None]:
        """Give the process settings, have blocks from no server, and calls wait by the scheduler."""
        before = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
        process: Any = blocks._ProcessVariables()
        process._changed = ActorCondition(self.scheduler)
        with ExitStack() as stack:
            stack.enter_context(patch.dict(os.environ, {_KEY: _OWN}))
            stack.callback(mlflow.set_tracking_uri, before)  # type: ignore[arg-type]  # None is meant
            stack.enter_context(patch.object(blocks, "_PROCESS", process))
            stack.enter_context(patch.object(blocks, "_load", self._load_block))
            mlflow.set_tracking_uri(f"http://{_OWN}")
            yield

    def _load_block(self, kind: type[Any], _parameter: str, name: str) -> OvernightRegistry | OvernightDestination:
        if kind is OvernightRegistry:
            return OvernightRegistry(tracking_uri=f"http://{name}")
        url = f"sim://{name}"
        return OvernightDestination(address=url, aws_secret_access_key=SecretStr(self._wanted[url].key))

    def _call_often(self, url: str) -> None:
        for _ in range(self.calls):
            registry, key = self.chance.choice(_NAMES), self.chance.choice(_NAMES)
            self._wanted[url] = Settings(registry=f"http://{registry}", key=key)
            model = "models:/toy@champion" if registry == _OWN else f"block:{registry}/toy@champion"
            to = url if key == _OWN else f"block:{url.removeprefix('sim://')}"
            process = Process(f"{url}.{self.scheduler.steps}")
            call = partial(self._call, url, model, to)
            attempt_apart(self.scheduler, process, call, self.refusals, self.violations)
            self.scheduler.sleep(self.chance.expovariate(1 / _PAUSE_SECONDS))

    def _call(self, url: str, model: str, to: str) -> None:
        """Score the rows by what the registry of the process names, as batch_inference does it."""
        began, self._calls = self.scheduler.steps, self._calls + 1
        flow_run = f"flow-{self._calls}"
        with open_addresses(model, self.source.url, to, _LOGGER) as addresses:
            registry = mlflow.get_registry_uri()
            self.scheduler.tell(f"{addresses.model} for {addresses.destination} is asked of {registry}")
            self._check(f"the call for {url}", self._wanted[url])
            resolved: Any = ToyResolved(_VERSIONS[registry])
            request = make_request(resolved, CONTRACT, self.source.url, addresses.destination, _OPTIONS)
            oracle = Oracle(self.destinations[url].root, violations=self.violations)
            rows = {file.path: self.source.rows_of(file.entry) for file in request.snapshot.files}
            version = _VERSIONS[self._wanted[url].registry]
            oracle.ask(request.key, expected(rows, version, _OPTIONS.key_columns))
            storage = open_storage(addresses.destination)
            manifest = publish_run(self.scheduler, request, storage, flow_run, _OPTIONS)
            oracle.check_returned(manifest.run, manifest.key, [request.key], began)

    def _see_put(self, url: str, path: str, is_late: bool) -> None:  # noqa: FBT001 - as the storage calls it
        if not is_late:
            self._check(f"what is writing {url}/{path}", self._wanted[url])

    def _check(self, what: str, wanted: Settings) -> None:
        found = Settings(registry=mlflow.get_registry_uri(), key=os.environ.get(_KEY, ""))
        if found != wanted:
            self.violations.append(f"settings: {what} has {found}, not its own {wanted}")
