"""One measurement in a process of its own: a call of batch_inference, or the loop that one would write by hand."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

FEATURES = tuple(f"f{at:02d}" for at in range(32))


def main() -> None:
    kind, model, source, destination, options = sys.argv[1:]
    ready = {"overnight": overnight, "loop": loop}[kind](model, source, destination, json.loads(options))
    start = time.perf_counter()
    rows = ready()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "rows": rows, "peak_rss_mb": peak}))


def overnight(model: str, source: str, destination: str, options: dict[str, int]) -> Callable[[], int]:
    """A call of batch_inference: modules imported and model resolved and loaded before."""
    from flows.batch import batch_inference
    from serving.model import load_model
    from serving.registry import resolve_model
    from tasks.batch.options import BatchOptions

    resolved = resolve_model(model)
    load_model(resolved, resolved.contract({}, {}))
    chosen = BatchOptions(**{"key_columns": ("customer",), **options})  # type: ignore[arg-type]
    return lambda: batch_inference(model, source, destination, chosen).rows_scored


def loop(model: str, source: str, destination: str, options: dict[str, int]) -> Callable[[], int]:
    """The loop by hand: a row group at a time, stacked, batch by batch on all threads, one file out for one in."""
    import mlflow.pytorch
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch

    network = mlflow.pytorch.load_model(model)
    size = options["batch_size"]
    Path(destination).mkdir(parents=True)

    def run() -> int:
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
        return rows

    SCHEMA = pa.schema([("customer", pa.int64()), ("score", pa.float32())])
    return run


if __name__ == "__main__":
    main()
