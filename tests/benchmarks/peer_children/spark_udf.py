"""Spark: `predict_batch_udf` over Arrow, one task a core."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pyspark
import torch
from pyspark.ml.functions import predict_batch_udf
from pyspark.sql import SparkSession
from pyspark.sql.functions import col
from pyspark.sql.types import FloatType

from tests.benchmarks.peer_children.job import measure, read_job
from tests.benchmarks.peer_children.network import load_network, score

CORES = os.cpu_count() or 1


def main() -> None:
    job = read_job()
    weights, features = job.model, job.columns

    def make_predict() -> Callable[..., np.ndarray[Any, Any]]:
        torch.set_num_threads(1)
        network = load_network(weights)

        def predict(*columns: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            return score(network, columns)

        # Spark counts parameters and hands over a column for each: half the time of a column of arrays.
        positional = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY) for name in features]
        predict.__signature__ = inspect.Signature(positional)  # type: ignore[attr-defined]
        return predict

    predict = predict_batch_udf(make_predict, return_type=FloatType(), batch_size=job.batch_size)
    spark = open_session(job.batch_size)

    def run(source: str, destination: str) -> None:
        scored = spark.read.parquet(source).select("customer", predict(*map(col, features)).alias("score"))
        scored.write.parquet(destination)

    measure(run, job, pyspark.__version__)
    spark.stop()


def open_session(batch_size: int) -> SparkSession:
    """Start Spark on loopback, without its web page."""
    os.environ["PYSPARK_PYTHON"] = sys.executable
    os.environ["SPARK_LOCAL_IP"] = "127.0.0.1"
    settings = {
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.driver.host": "127.0.0.1",
        "spark.driver.memory": "4g",
        "spark.log.level": "ERROR",
        # The function's batches are cut from Arrow's, which would cap them at 10,000.
        "spark.sql.execution.arrow.maxRecordsPerBatch": str(max(10_000, batch_size)),
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
    }
    builder = SparkSession.builder.master(f"local[{CORES}]").appName("peers")
    for name, value in settings.items():
        builder = builder.config(name, value)
    return builder.getOrCreate()


if __name__ == "__main__":
    main()
