"""One measurement in a process of its own: a call of batch_inference, or the loop that one would write by hand."""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

FEATURES = tuple(f"f{at:02d}" for at in range(32))


Job = Callable[[], dict[str, float]]


def main() -> None:
    kind, model, source, destination, options = sys.argv[1:]
    kinds = {"overnight": overnight, "first": first, "cold": cold, "whole": whole, "loop": loop}
    ready = kinds[kind](model, source, destination, json.loads(options))
    start = time.perf_counter()
    figures = ready()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "peak_rss_mb": peak, **figures}))


def overnight(model: str, source: str, destination: str, options: dict[str, int]) -> Job:
    """A call of batch_inference: modules imported and model resolved and loaded before."""
    from flows import batch_inference
    from serving.model.loading import load_model
    from serving.model.registry import resolve_model
    from tasks.batch.options import BatchOptions

    resolved = resolve_model(model)
    load_model(resolved, resolved.contract({}, {}))
    chosen = BatchOptions(**{"key_columns": ("customer",), **options})  # type: ignore[arg-type]

    def run() -> dict[str, float]:
        report = batch_inference(model, source, destination, chosen)
        steps = {name: report.seconds.get(name, 0.0) for name in ("score", "check keys")}
        return {"rows": report.rows_scored, **steps}

    return run


def first(model: str, source: str, destination: str, options: dict[str, int]) -> Job:
    """A call, and the seconds from its begin until its first part stands."""
    call = overnight(model, source, destination, options)
    return lambda: first_part(call, destination, time.time())


def cold(model: str, source: str, destination: str, options: dict[str, int]) -> Job:
    """The same from the begin of the process, as when a person starts a script: it imports and loads first."""

    def call() -> dict[str, float]:
        return overnight(model, source, destination, options)()

    return lambda: first_part(call, destination, float(os.environ["BEGUN"]))


def whole(model: str, source: str, destination: str, options: dict[str, int]) -> Job:
    """A call in a process that has imported and loaded nothing, and the seconds from the process's begin to its end."""

    def call() -> dict[str, float]:
        from flows import batch_inference
        from tasks.batch.options import BatchOptions

        chosen = BatchOptions(**{"key_columns": ("customer",), **options})  # type: ignore[arg-type]
        batch_inference(model, source, destination, chosen)
        return {"whole": time.time() - float(os.environ["BEGUN"])}

    return call


def first_part(call: Job, destination: str, begun: float) -> dict[str, float]:
    found: list[float] = []

    def watch() -> None:
        while not any(Path(destination).glob("run=*/part-*")):
            time.sleep(0.005)
        found.append(time.time() - begun)

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    figures = call()
    watching.join()
    return {**figures, "first": found[0]}


def loop(model: str, source: str, destination: str, options: dict[str, int]) -> Job:
    """The loop by hand: a row group at a time, stacked, batch by batch on all threads, one file out for one in."""
    import mlflow.pytorch
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch

    network = mlflow.pytorch.load_model(model)
    size = options["batch_size"]
    Path(destination).mkdir(parents=True)

    def run() -> dict[str, float]:
        rows = 0
        with torch.inference_mode():
            for path in sorted(Path(source).glob("*.parquet")):
                file = pq.ParquetFile(path, memory_map=True)
                with pq.ParquetWriter(Path(destination) / path.name, SCHEMA) as writer:
                    for group in range(file.num_row_groups):
                        table = file.read_row_group(group, columns=["customer", *FEATURES])
                        features = torch.from_numpy(np.column_stack([table[name].to_numpy() for name in FEATURES]))
                        scores = [network(features[at : at + size]) for at in range(0, len(features), size)]
                        score = torch.cat(scores)[:, 0].numpy()
                        writer.write_table(pa.table({"customer": table["customer"], "score": score}))
                        rows += len(score)
        return {"rows": rows}

    SCHEMA = pa.schema([("customer", pa.int64()), ("score", pa.float32())])
    return run


if __name__ == "__main__":
    main()
