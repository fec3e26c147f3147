"""Daft: a class with a batch method, on its native runner."""

from __future__ import annotations

import os
import sys

import daft
import numpy as np
from daft import DataType, Series, col

from tests.benchmarks.peer_children.job import measure, read_job
from tests.benchmarks.peer_children.network import load_network, score


def main() -> None:
    job = read_job()
    network = load_network(job.model)

    @daft.func.batch(return_dtype=DataType.float32(), batch_size=job.batch_size)
    def predict(*features: Series) -> np.ndarray:
        return score(network, [feature.to_arrow().to_numpy() for feature in features])

    def run(source: str, destination: str) -> None:
        table = daft.read_parquet(f"{source}/*.parquet")
        scored = table.select(col("customer"), predict(*(col(name) for name in job.columns)).alias("score"))
        scored.write_parquet(destination)

    measure(run, job, daft.__version__)
    # Daft's threads at times outlive the interpreter and abort it as it ends, when all is written.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
