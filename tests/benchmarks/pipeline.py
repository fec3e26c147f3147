"""How far preparing rows overlaps passing them: one slot, and two stages that take a core equally long.

Prints the seconds of the stages one after the other, and of the product's own pipeline, as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from serving.model.contract import Column, Contract, Input, Output
from serving.model.encoding import Encoded
from serving.model.pin import ModelPin
from tasks.batch.chunk_layout import Sizes
from tasks.batch.dataset import open_dataset
from tasks.batch.options import BatchOptions
from tasks.batch.plan import make_plan
from tasks.batch.score import Scorer
from tasks.batch.source import pin_source
from tasks.storage import open_storage

BATCH = 10_000
STAGE_SECONDS = 0.05
WIDTH = 512


class TwoStages:
    """Does the same work, of a twentieth of a second, in each of two stages."""

    slots = 1

    def __init__(self) -> None:
        self.x = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0))
        self.times = 1
        self.times = max(1, round(STAGE_SECONDS / min(self.seconds() for _ in range(20))))

    def seconds(self) -> float:
        start = time.perf_counter()
        self.work()
        return time.perf_counter() - start

    def work(self) -> None:
        # In each thread anew: a product of matrices takes all cores in a thread that has not said so.
        torch.set_num_threads(1)
        for _ in range(self.times):
            torch.mm(self.x, self.x)

    def prepare(self, encoded: Encoded) -> Encoded:
        self.work()
        return encoded

    def predict(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.work()
        return {"score": inputs["a"]}

    @contextmanager
    def slot(self) -> Generator[None]:
        yield


def main() -> None:
    source, destination = sys.argv[1:]
    torch.set_num_threads(1)
    model = TwoStages()
    storage = open_storage(destination)
    plan = a_plan(source, destination)
    blocks = plan.rows // BATCH
    start = time.perf_counter()
    for _ in range(2 * blocks):
        model.work()
    after_each_other = time.perf_counter() - start
    scorer = Scorer(plan=plan, destination=storage, model=model, max_reject_fraction=1.0)
    start = time.perf_counter()
    for shard in scorer.scheduler.begin():
        scorer.score_shard(shard)
    overlapped = time.perf_counter() - start
    print(json.dumps({"after_each_other": after_each_other, "overlapped": overlapped, "blocks": blocks}))


def a_plan(source: str, destination: str):  # noqa: ANN201 - a Plan
    """Plan blocks of one batch: a row is so wide that a block holds no more."""
    value = Column(name="a", dtype="float32")
    contract = Contract(
        inputs=(Input(name="a", dtype="float32", columns=(value,)),), outputs=(Output(name="score", dtype="float32"),)
    )
    options = BatchOptions(rows_per_chunk=4 * BATCH)
    snapshot = pin_source(source, destination)
    return make_plan(
        key="pipeline",
        model=ModelPin(name="two-stages", version="1", model_id=None, source=str(Path.cwd()), digest="0" * 64),
        contract=contract,
        options=options,
        source=snapshot,
        dataset=open_dataset(snapshot, ["a"], ()),
        sizes=Sizes(batch_size=BATCH, slots=1, row_bytes=4096.0, rows_per_second=None),
    )


if __name__ == "__main__":
    main()
