"""The options that the calls of a simulation choose from."""

from __future__ import annotations

import random
from typing import Literal

from tasks.batch.feature_table import FeatureTable
from tasks.batch.options import BatchOptions, Reuse, TableMode
from tests.simulation.gates import make_gate

_UPSERTS, _CHALLENGED, _SCORED_AGAIN, _JOINED, _REPLACED = 0.6, 0.7, 0.5, 0.6, 0.3
# The first two may be the model of a run too: such a call is refused.
_CHALLENGER_VERSIONS = range(3, 8)


def make_menu(
    chance: random.Random, output: Literal["parquet", "delta"], *, is_gated: bool = False
) -> list[BatchOptions]:
    """Return the options that calls choose from: the same call with other slots, and one or two others."""
    upserts = output == "delta" and chance.random() < _UPSERTS
    keys = ("id",) if upserts else chance.choice([("id",), ()])
    mode: TableMode = "upsert" if upserts else chance.choice(["append", "replace"])
    name = chance.choice([None, None, "nightly"]) if output == "parquet" else None
    base = BatchOptions(
        key_columns=keys,
        name=name,
        batch_size=chance.choice([2, 4]),
        rows_per_chunk=chance.choice([4, 8, 12]),
        slots=chance.randint(1, 4),
        memory_mb=1024,
        max_reject_fraction=1.0,
        output=output,
        delta_mode=mode if output == "delta" else "append",
        missing_keys=chance.choice(["keep", "keep", "delete", "mark"]) if upserts else "keep",
        gate=make_gate(chance) if is_gated else None,
    )
    menu = [base, base.model_copy(update={"slots": chance.choice([n for n in (1, 2, 3, 4) if n != base.slots])})]
    if chance.random() < 0.6:
        menu.append(base.model_copy(update={"rows_per_chunk": chance.choice([4, 8, 12]), "name": None}))
    if chance.random() < 0.4:
        menu.append(base.model_copy(update={"batch_size": chance.choice([2, 4]), "workers": 2}))
    return menu


def add_challengers(chance: random.Random, menu: list[BatchOptions]) -> list[BatchOptions]:
    """Return the options with one or two challengers in most of them, of which some score every row themselves."""
    return [_add_challengers(chance, options) if chance.random() < _CHALLENGED else options for options in menu]


def _add_challengers(chance: random.Random, options: BatchOptions) -> BatchOptions:
    versions = chance.sample(_CHALLENGER_VERSIONS, chance.randint(1, 2))
    addresses = tuple(f"models:/toy/{version}" for version in versions)
    reuse: Reuse = "none" if chance.random() < _SCORED_AGAIN else "same"
    return options.model_copy(update={"challengers": addresses, "reuse": reuse})


def add_features(chance: random.Random, menu: list[BatchOptions], source: str) -> list[BatchOptions]:
    """Return the options with a feature table at an address in some of them."""
    age = chance.choice([None, "20m"])
    table = FeatureTable(source=source, join_keys=("entity",), time="known", max_age=age)
    joined = {"features": (table,), "spine_time": "t"}
    return [options.model_copy(update=joined) if chance.random() < _JOINED else options for options in menu]


def replace_sources(chance: random.Random, menu: list[BatchOptions]) -> list[BatchOptions]:
    """Return the options, of which some are to replace the predictions of another source."""
    replaces = {"other_source": "replace"}
    return [options.model_copy(update=replaces) if chance.random() < _REPLACED else options for options in menu]
