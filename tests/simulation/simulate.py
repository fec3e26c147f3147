"""One simulation from one seed."""

from __future__ import annotations

import hashlib
import logging
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol
from unittest.mock import patch

from tasks.batch import challengers, key_check, planned_models, upsert
from tasks.batch.options import BatchOptions
from tasks.storage import register_scheme
from tasks.stream import table_commits
from tests.simulation.batch import DESTINATION, FEATURES, OTHER_DESTINATION, OTHER_SOURCE, SOURCE, BatchWorld
from tests.simulation.bits import BitWorld
from tests.simulation.challengers import ChallengerOracle
from tests.simulation.claims import ClaimOracle
from tests.simulation.cleaning import CleaningWorld
from tests.simulation.data import Source, load_toy, open_toy, resolve_toy
from tests.simulation.delta import DeltaOracle
from tests.simulation.features import Features, make_spine
from tests.simulation.gates import GateWorld
from tests.simulation.menu import add_challengers, add_features, make_menu, replace_sources
from tests.simulation.oracle import Oracle
from tests.simulation.outcome import Outcome
from tests.simulation.scheduler import Scheduler, Stuck
from tests.simulation.storage import SimulatedDisk, SimulatedStorage, Weather
from tests.simulation.stream import StreamWorld, make_log

STEPS_MAX = 20_000
_FAULTS = ("error", "refused", "unanswered", "doubled", "late", "torn", "lost", "lag")
_CHANGES = ("change_source", "promote_model")
_MISCHIEF = (
    *("delete_everything", "delete_run", "delete_plan", "delete_starts"),
    *("damage_part", "move_clocks", "give_notice"),
)
_STREAM_MISCHIEF = ("promote_model", "delete_everything", "delete_plan", "damage_part")
_DELIVERY_RATE = 0.1
_STREAM_SHARE, _DELTA_SHARE, _CLEANING_SHARE, _GATE_SHARE = 0.2, 0.5, 0.6, 0.3
_MORE_SHARE = 0.12
_MORE_WORLDS_SHARE = 0.02


class _World(Protocol):
    """What happens in a seed, by a scheduler of its own."""

    scheduler: Scheduler
    refusals: Counter[str]

    @property
    def violations(self) -> list[str]: ...

    def run(self) -> None: ...


def simulate(seed: int) -> Outcome:
    """Simulate what a seed says; the same seed takes the same steps."""
    memory = Path("/dev/shm")  # noqa: S108 - only to be quicker than a disk
    worlds: list[_World] = []
    with tempfile.TemporaryDirectory(prefix="simulation-", dir=memory if memory.is_dir() else None) as scratch:
        for name, make in {"": _make_first, **_MORE_WORLDS}.items():
            chance = random.Random(f"{name} of {seed}" if name else seed)
            # What a seed was without the others, it is with them.
            if name and chance.random() >= _MORE_WORLDS_SHARE:
                continue
            world = make(chance, Path(scratch) / name, seed)
            worlds.append(world)
            try:
                with _toys_for_models():
                    world.scheduler.run(world.run)
            except Stuck:
                world.violations.append(f"no end within {STEPS_MAX} steps")
    # The folder has another name each time.
    trace, violations = (
        tuple(line.replace(scratch, "") for line in lines)
        for lines in (
            [line for world in worlds for line in world.scheduler.trace],
            [violation for world in worlds for violation in world.violations],
        )
    )
    return Outcome(
        seed=seed,
        steps=sum(world.scheduler.steps for world in worlds),
        digest=hashlib.sha256("\n".join(trace).encode()).hexdigest(),
        refusals=sum((world.refusals for world in worlds), Counter[str]()),
        violations=violations,
        trace=trace,
    )


@contextmanager
def _toys_for_models() -> Generator[None]:
    """Have models out of no registry, and no threads of a pool, which would take steps side by side."""
    replaced: list[tuple[ModuleType, str, object]] = [
        (key_check, "map_ahead", _map_in_order),
        (upsert, "map_ahead", _map_in_order),
        (challengers, "resolve_model", resolve_toy),
        (planned_models, "open_model", open_toy),
        (planned_models, "load_model", load_toy),
        # The tables of streams are small, and have lists all the same.
        (table_commits, "PARTS_PER_LIST", 3),
    ]
    with ExitStack() as stack:
        # The warnings of calls would go to the terminal.
        logging.disable(logging.CRITICAL)
        stack.callback(logging.disable, logging.NOTSET)
        for module, name, toy in replaced:
            stack.enter_context(patch.object(module, name, toy))
        yield


def _map_in_order(work: Callable[[Any], Any], items: Iterable[Any], _threads: int) -> Generator[Any]:
    yield from map(work, items)


def _make_first(chance: random.Random, scratch: Path, seed: int) -> _World:
    """Return the world that every seed has."""
    if chance.random() < _STREAM_SHARE:
        return _make_stream(chance, scratch)
    return _make_batch(chance, random.Random(f"more of {seed}"), random.Random(f"types of {seed}"), scratch)


def _make_batch(chance: random.Random, more: random.Random, types: random.Random, scratch: Path) -> BatchWorld:
    """Return a world of batch calls; `more` and `types` make no seed another one that they draw nothing for."""
    scheduler, storages = _make_storages(chance, scratch)
    destination = storages[DESTINATION]
    if chance.random() < 0.3:
        storages[SOURCE].weather = Weather(error=0.02, lag=0.2)
    oracle, weather = Oracle(destination.root), destination.weather
    output: Literal["parquet", "delta"] = "parquet"
    if destination.is_disk and chance.random() < _DELTA_SHARE:
        output = "delta"
    menu = make_menu(chance, output, is_gated=chance.random() < _GATE_SHARE)
    is_challenged, is_flipped, is_joined, has_two_sources = (more.random() < _MORE_SHARE for _ in range(4))
    if is_challenged:
        menu = add_challengers(more, menu)
    is_delta = menu[0].output == "delta"
    # Without other rows or another model there is one run alone.
    mischief = [what for what in _CHANGES if chance.random() < 0.7] + [w for w in _MISCHIEF if chance.random() < 0.4]
    cleaning = CleaningWorld(
        scheduler=scheduler, url=DESTINATION, storage=destination, oracle=oracle, is_table=is_delta
    )
    gates = GateWorld(gate=menu[0].gate, storage=destination, oracle=oracle)
    is_cleaned = chance.random() < _CLEANING_SHARE
    if is_cleaned:
        # More of what makes runs of many that have parts of one another, and less of what takes them all.
        mischief = [what for what in mischief if chance.random() < 0.5] + ["clean", "clean", "change_source"]
    kind = chance.choice(["parquet", "parquet", "csv"])
    is_joined = is_joined and kind == "parquet"
    # A Delta table has its keys in one type for good.
    evolves = kind == "parquet" and not is_delta and types.random() < _MORE_SHARE
    sources = {
        url: Source(
            storages[url], chance, kind, make_spine if is_joined else lambda _ids: {}, types if evolves else None
        )
        for url in ([SOURCE, OTHER_SOURCE] if has_two_sources else [SOURCE])
    }
    menu = replace_sources(more, menu) if has_two_sources else menu
    features = None
    if is_joined:
        features, menu = Features(storages[FEATURES], chance), add_features(more, menu, FEATURES)
        mischief.append("change_features")
    if is_flipped:
        # A gate judges by what footers say, and a table is rewritten from rows: a wrong bit goes on there.
        mischief += ["flip_source"] + ([] if is_delta or menu[0].gate else ["flip_part"] * 2)
    return BatchWorld(
        scheduler=scheduler,
        chance=chance,
        sources=sources,
        features=features,
        inputs={url: storages[url] for url in storages if url != DESTINATION},
        destination=destination,
        oracle=oracle,
        delta=DeltaOracle(oracle, menu[0]) if is_delta else None,
        cleaning=cleaning,
        gates=gates,
        challengers=ChallengerOracle(destination, oracle, loses_parts=bool(weather.torn or weather.lost)),
        bits=BitWorld(
            scheduler=scheduler,
            source=sources[SOURCE],
            source_storage=storages[SOURCE],
            destination=destination,
            oracle=oracle,
            turns_parts="flip_part" in mischief,
        ),
        claims=ClaimOracle(scheduler=scheduler, oracle=oracle, takes_place=_takes_place(menu[0])),
        menu=menu,
        mischief=[what for what in mischief if not (is_delta and what == "damage_part")],
        callers=chance.randint(1, 3),
        mischief_seconds=1.5 if is_cleaned else 4.0,
        calls=chance.randint(2, 5) + 3 * is_cleaned,
    )


def _takes_place(options: BatchOptions) -> bool:
    """Whether a run takes rows of others out of what readers open, and so must have their source."""
    return options.output == "parquet" or not (
        options.delta_mode == "append" or (options.upserts and options.missing_keys == "keep")
    )


def _make_stream(chance: random.Random, scratch: Path) -> StreamWorld:
    scheduler, storages = _make_storages(chance, scratch)
    return StreamWorld(
        scheduler=scheduler,
        chance=chance,
        destination=storages[DESTINATION],
        log=make_log(chance),
        mischief=[what for what in _STREAM_MISCHIEF if chance.random() < 0.2],
        scorers=chance.randint(1, 3),
        attempts=chance.randint(2, 5),
    )


def _make_iceberg(chance: random.Random, scratch: Path, _seed: int) -> _World:
    # A process that has no such world does not import pyiceberg, which takes a second.
    from tests.simulation.iceberg import Bucket, IcebergWorld

    destinations = (DESTINATION, OTHER_DESTINATION)
    scheduler, storages = _make_storages(chance, scratch, [Bucket], (SOURCE,), destinations, late=destinations)
    for url in destinations:
        # pyiceberg trusts in what it has written.
        storages[url].weather = replace(storages[url].weather, torn=0.0, lost=0.0)
    return IcebergWorld(
        scheduler=scheduler,
        chance=chance,
        source=Source(storages[SOURCE], chance, "parquet", lambda _ids: {}),
        destinations={url: storages[url] for url in destinations},
        mode=chance.choice(["append", "replace", "replace"]),
        callers=chance.randint(2, 3),
        calls=2,
    )


def _make_webhooks(chance: random.Random, _scratch: Path, _seed: int) -> _World:
    from tests.simulation.webhooks import WebhookWorld

    scheduler = Scheduler(chance, steps_max=STEPS_MAX, on_step=lambda: None)
    scheduler.kill_rate = chance.choice([0.0, 0.1])
    deployments = ["batch-inference/scores", "batch-inference/reports"][: chance.randint(1, 2)]
    return WebhookWorld(
        scheduler=scheduler, chance=chance, deployments=deployments, error=chance.choice([0.0, 0.2, 0.5])
    )


def _make_backfill(chance: random.Random, scratch: Path, _seed: int) -> _World:
    from tests.simulation.backfills import BackfillWorld

    names = [f"date={at}" for at in range(1, chance.randint(3, 4))]
    inputs, destinations = [f"sim://{name}" for name in names], [f"{DESTINATION}/{name}" for name in names]
    scheduler, storages = _make_storages(chance, scratch, inputs=inputs, destinations=destinations, late=destinations)
    sources = [Source(storages[url], chance, "parquet", lambda _ids: {}) for url in inputs]
    return BackfillWorld(
        scheduler=scheduler,
        chance=chance,
        sources=dict(zip(names, sources, strict=True)),
        destinations={name: storages[url] for name, url in zip(names, destinations, strict=True)},
        callers=chance.randint(1, 2),
    )


def _make_settings(chance: random.Random, scratch: Path, _seed: int) -> _World:
    # A process that has no such world does not import MLflow, which takes a second.
    from tests.simulation.settings import SettingsWorld

    destinations = [f"{DESTINATION}-{at}" for at in range(chance.randint(2, 4))]
    scheduler, storages = _make_storages(chance, scratch, inputs=[SOURCE], destinations=destinations, late=destinations)
    return SettingsWorld(
        scheduler=scheduler,
        chance=chance,
        source=Source(storages[SOURCE], chance, "parquet", lambda _ids: {}),
        destinations={url: storages[url] for url in destinations},
    )


def _make_storages(
    chance: random.Random,
    scratch: Path,
    kinds: Sequence[type[SimulatedStorage]] = (SimulatedDisk, SimulatedStorage),
    inputs: Sequence[str] = (SOURCE, OTHER_SOURCE, FEATURES),
    destinations: Sequence[str] = (DESTINATION,),
    late: Sequence[str] = (SOURCE, DESTINATION),
) -> tuple[Scheduler, dict[str, SimulatedStorage]]:
    """Return storages of one kind, which open_storage opens by their addresses, the destinations with their faults."""
    storages: dict[str, SimulatedStorage] = {}

    def deliver() -> None:
        if chance.random() < _DELIVERY_RATE:
            for url in late:
                storages[url].deliver(int(chance.random() * 10))

    scheduler = Scheduler(chance, steps_max=STEPS_MAX, on_step=deliver)
    kind = chance.choice(kinds)
    for url in (*inputs, *destinations):
        folder = scratch / url.removeprefix("sim://")
        folder.mkdir(parents=True)
        storages[url] = kind(scheduler, url, folder, Weather())
    weather = _make_weather(chance)
    for url in destinations:
        storages[url].weather = weather
    register_scheme("sim", lambda url: storages[url])
    return scheduler, storages


def _make_weather(chance: random.Random) -> Weather:
    """Return some of the faults, each often enough to be met: a seed with all of them seldom comes to an end."""
    rates = {fault: chance.choice([0.01, 0.05]) for fault in _FAULTS if chance.random() < 0.3}
    if chance.random() < 0.6:
        rates["kill"] = chance.choice([0.005, 0.01, 0.03])
    return Weather(**rates, is_create_only=chance.random() >= 0.1)


# Some seeds have some of these worlds besides, each drawn from a generator of its own.
_MORE_WORLDS: dict[str, Callable[[random.Random, Path, int], _World]] = {
    "iceberg": _make_iceberg,
    "webhooks": _make_webhooks,
    "backfill": _make_backfill,
    "settings": _make_settings,
}
