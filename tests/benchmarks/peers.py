"""`make bench-peers`: Overnight beside what else scores a table, as tables and one JSON object on the last line.

The customers of `make bench-batch` for Ray Data, Daft, Spark and a loop by hand; real glosses and the real
MiniLM for sentence-transformers. Every figure comes from a process of its own, in turn, at the best batch
size of each; what a peer imports, starts and loads is not counted, and its answers must equal Overnight's.
PEERS=loop,daft takes some, ROWS and GLOSSES fewer rows.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from infra.local.venv import VenvFailed, make_venv
from tests.benchmarks.glosses import find_minilm, make_glosses, register_minilm
from tests.benchmarks.peer_environment import CHILDREN, peer_environment
from tests.benchmarks.race import Contender, Course, race, reason
from tests.benchmarks.shared import (
    FEATURES,
    FOLDER,
    ROUNDS,
    ROWS,
    console,
    machine,
    make_customers,
    make_models,
    measure,
    open_registry,
    prefect,
)

GLOSSES = int(os.environ.get("GLOSSES", "8192"))
LOOP = "loop"
# Each with its file below peer_children: a module, and requirements of the same name.
TABLE_PEERS = {"daft": "daft_udf", "raydata": "ray_data", "spark": "spark_udf"}
TEXT_PEERS = {"sentence_transformers": "sentence_encode"}
TABLE_BATCHES = (512, 2048, 8192, 65_536)
TEXT_BATCHES = (32, 64, 128)
WANTED = {
    "mlp_vs_loop": 1.35,
    "mlp_vs_daft": 1.45,
    "mlp_vs_raydata": 5,
    "mlp_vs_spark": 5,
    "text_vs_sentence_transformers": 1.35,
    "text_bf16_vs_sentence_transformers": 2.2,
}
# What a call says to compute in bfloat16: MiniLM's embeddings have a length of 1, a number of one about 0.05.
BF16_OPTIONS: dict[str, Any] = {"bfloat16_tolerance": 0.01}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """What the contenders of one race share."""

    address: str  # of the registered model
    weights: Path  # of the same model, for peers
    warm_up: Path
    key: str
    columns: tuple[str, ...]


def main() -> None:
    """Run both races, and print their tables and the figures as JSON."""
    chosen = choose_peers()
    open_registry()
    venvs, faults = make_venvs(chosen)
    races: dict[str, tuple[int, list[Contender]]] = {}
    with prefect():
        if chosen & {LOOP, *TABLE_PEERS}:
            races["mlp"] = ROWS, race_customers(chosen, venvs)
        try:
            if venvs.keys() & TEXT_PEERS.keys():
                races["text"] = GLOSSES, race_glosses(venvs)
        except RuntimeError as error:
            faults |= dict.fromkeys(chosen & TEXT_PEERS.keys(), str(error))
    figures = {name: value for prefix, (_, them) in races.items() for name, value in compare(prefix, them).items()}
    show(races, figures, faults)
    told = {prefix: {one.name: tell(one, rows) for one in them} for prefix, (rows, them) in races.items()}
    print(json.dumps({"rows": ROWS, "glosses": GLOSSES, "machine": machine(), **figures, **told, "missing": faults}))


def choose_peers() -> set[str]:
    """Return the peers that the environment asks for, by default all."""
    known = {LOOP, *TABLE_PEERS, *TEXT_PEERS}
    chosen = set(os.environ.get("PEERS", ",".join(known)).replace(" ", "").split(","))
    if chosen - known:
        sys.exit(f"PEERS must name some of {sorted(known)}, got {sorted(chosen - known)}")
    return chosen


def make_venvs(chosen: set[str]) -> tuple[dict[str, Path], dict[str, str]]:
    """Return the environment of each peer, and the reason of each that has none."""
    venvs, faults = {}, {}
    for name, module in (TABLE_PEERS | TEXT_PEERS).items():
        if name not in chosen:
            continue
        if name == "spark" and shutil.which("java") is None:
            faults[name] = "Java must be there, got none: apt-get install -y default-jre-headless"
            continue
        try:
            with console.status(f"installing {name}"):
                venvs[name] = make_venv(CHILDREN / f"{module}.txt", FOLDER / "peers" / name)
        except VenvFailed as error:
            faults[name] = f"its environment must install, got: {reason(error)}"
    return venvs, faults


def race_customers(chosen: set[str], venvs: Mapping[str, Path]) -> list[Contender]:
    """Race over the synthetic customers."""
    few, many = make_customers(min(ROWS, 1_000_000)), make_customers(ROWS)
    address = make_models()["mlp"]
    ground = Ground(
        address=address,
        weights=export_weights(address),
        warm_up=make_warm_up(few),
        key="customer",
        columns=FEATURES,
    )
    contenders = [Contender(name="overnight", ours=True, run=partial(run_overnight, ground, {}))]
    if LOOP in chosen:
        contenders.append(Contender(name=LOOP, run=partial(run_loop, ground), batches=TABLE_BATCHES))
    contenders += [
        Contender(name=name, run=partial(run_peer, ground, venvs[name], module), batches=TABLE_BATCHES)
        for name, module in TABLE_PEERS.items()
        if name in venvs
    ]
    race(Course(title=f"{ROWS:,} customers", few=few, many=many, key=ground.key), contenders)
    return contenders


def race_glosses(venvs: Mapping[str, Path]) -> list[Contender]:
    """Race over the glosses of WordNet; raises RuntimeError without them."""
    few, many, warm_up = make_glosses(min(GLOSSES, 2048)), make_glosses(GLOSSES), make_glosses(64)
    weights = find_minilm(venvs["sentence_transformers"])
    os.environ["HF_HUB_OFFLINE"] = "1"
    address, fault = "", ""
    try:
        address = register_minilm(weights)
    except ImportError as error:
        fault = f"its environment must have sentence-transformers, got: {error}"
    ground = Ground(address=address, weights=weights, warm_up=warm_up, key="gloss_id", columns=("gloss",))
    half = Contender(name="overnight_bf16", ours=True, rounded=True, run=partial(run_overnight, ground, BF16_OPTIONS))
    contenders = [Contender(name="overnight", ours=True, run=partial(run_overnight, ground, {})), half]
    for ours in contenders:
        ours.fault = fault
    contenders += [
        Contender(name=name, run=partial(run_peer, ground, venvs[name], module), batches=TEXT_BATCHES)
        for name, module in TEXT_PEERS.items()
    ]
    race(Course(title=f"{GLOSSES:,} glosses", few=few, many=many, key=ground.key), contenders)
    return contenders


def export_weights(address: str) -> Path:
    """Save the weights of the registered network beside it, for peers that load it without MLflow."""
    import mlflow.pytorch
    import torch

    weights = FOLDER / "peers" / "mlp.pt"
    weights.parent.mkdir(parents=True, exist_ok=True)
    torch.save(dict(mlflow.pytorch.load_model(address).state_dict()), weights)
    return weights


def make_warm_up(customers: Path) -> Path:
    """Write a few rows in two files for each core, so that every worker of a peer gets some."""
    import polars as pl

    folder = FOLDER / "peers" / "warm-up"
    folder.mkdir(parents=True, exist_ok=True)
    files = 2 * (os.cpu_count() or 1)
    rows = pl.scan_parquet(customers / "*.parquet").head(files * 1024).collect()
    for at in range(files):
        rows[at * 1024 : (at + 1) * 1024].write_parquet(folder / f"customers-{at:03d}.parquet")
    return folder


def run_overnight(
    ground: Ground, options: Mapping[str, Any], source: Path, destination: Path, _batch: int
) -> dict[str, Any]:
    """Call batch_inference; it chooses its batch size by itself."""
    return _run_batch_child("overnight", ground, source, destination, {"key_columns": (ground.key,), **options})


def run_loop(ground: Ground, source: Path, destination: Path, batch: int) -> dict[str, Any]:
    """Run the loop that one would write by hand."""
    return _run_batch_child("loop", ground, source, destination, {"batch_size": batch})


def _run_batch_child(
    kind: str, ground: Ground, source: Path, destination: Path, options: Mapping[str, Any]
) -> dict[str, Any]:
    where = (ground.address, str(source), str(destination))
    return measure([sys.executable, "-m", "tests.benchmarks.batch_child", kind, *where, json.dumps(options)])


def run_peer(ground: Ground, venv: Path, module: str, source: Path, destination: Path, batch: int) -> dict[str, Any]:
    """Run a peer in its own environment."""
    job = {
        "source": str(source),
        "warm_up": str(ground.warm_up),
        "destination": str(destination),
        "model": str(ground.weights),
        "columns": ground.columns,
        "batch_size": batch,
    }
    command = [str(venv / "bin/python"), "-m", f"tests.benchmarks.peer_children.{module}", json.dumps(job)]
    return measure(command, peer_environment())


def compare(prefix: str, contenders: list[Contender]) -> dict[str, float]:
    """Return how many times faster Overnight was than each peer, where both came through."""
    return {
        f"{prefix}{us.name.removeprefix('overnight')}_vs_{peer.name}": round(
            peer.median_seconds() / us.median_seconds(), 3
        )
        for us in contenders
        for peer in contenders
        if us.ours and not peer.ours and not us.fault and not peer.fault
    }


def tell(contender: Contender, rows: int) -> dict[str, Any]:
    """Return what is known of a contender, for the JSON."""
    if contender.fault:
        return {"fault": contender.fault}
    return {
        "rows_per_second": round(rows / contender.median_seconds(), 1),
        "batch": contender.batch or None,
        "version": contender.version,
        "agreement": contender.worst_agreement(),
        "seconds": [round(seconds, 3) for seconds in contender.seconds],
    }


def show(
    races: Mapping[str, tuple[int, list[Contender]]], figures: Mapping[str, float], faults: Mapping[str, str]
) -> None:
    """Print who ran how fast, and the figures beside what is wanted; who is missing is named with the reason."""
    speeds = Table(title=f"medians of {ROUNDS}; {machine()}", title_justify="left")
    for name in ("race", "who", "version", "batch", "rows a second", "differs by"):
        speeds.add_column(name, overflow="fold")
    out = dict(faults)
    for prefix, (rows, contenders) in races.items():
        for one in contenders:
            found = tell(one, rows)
            speed = f"{found['rows_per_second']:,.0f}" if "rows_per_second" in found else "out"
            speeds.add_row(prefix, one.name, one.version, str(one.batch or "own"), speed, one.worst_agreement())
            out |= {f"{prefix}: {one.name}": one.fault} if one.fault else {}
    for name in faults:
        speeds.add_row("", name, "", "", "missing", "")
    compared = Table(title="Overnight's rows a second over theirs", title_justify="left")
    for name in ("figure", "measured", "wanted"):
        compared.add_column(name)
    for name, wanted in WANTED.items():
        compared.add_row(name, f"{figures[name]:,}" if name in figures else "", f"at least {wanted}")
    Console().print(speeds, *(f"{name} is out: {fault}" for name, fault in out.items()), compared)


if __name__ == "__main__":
    main()
