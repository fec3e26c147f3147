"""sentence-transformers: `encode` over the whole table, on all threads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import sentence_transformers

from tests.benchmarks.peer_children.job import measure, read_job


def main() -> None:
    job = read_job()
    model = sentence_transformers.SentenceTransformer(job.model, device="cpu")
    (text,) = job.columns

    def run(source: str, destination: str) -> None:
        table = pq.read_table(source)
        vectors_ND = model.encode(table[text].to_pylist(), batch_size=job.batch_size, show_progress_bar=False)
        values = pa.array(vectors_ND.astype(np.float32, copy=False).ravel())
        embedding = pa.FixedSizeListArray.from_arrays(values, vectors_ND.shape[1])
        Path(destination).mkdir(parents=True)
        scored = pa.table({"gloss_id": table["gloss_id"], "embedding": embedding})
        pq.write_table(scored, Path(destination) / "glosses.parquet")

    measure(run, job, sentence_transformers.__version__)


if __name__ == "__main__":
    main()
