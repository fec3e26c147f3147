"""Ray Data: `map_batches` over a pool of actors, one a core."""

from __future__ import annotations

import os
import secrets
import tempfile
from pathlib import Path

import pyarrow as pa
import ray
import ray.data
import torch

from tests.benchmarks.peer_children.job import measure, read_job
from tests.benchmarks.peer_children.network import load_network, score

CORES = os.cpu_count() or 1


class Scorer:
    """One actor: the network, loaded once, on one thread."""

    def __init__(self, weights: str, features: list[str], actors: str) -> None:
        torch.set_num_threads(1)
        self.network = load_network(weights)
        self.features = features
        (Path(actors) / str(os.getpid())).touch()

    def __call__(self, batch: pa.Table) -> pa.Table:
        scores = score(self.network, [batch[name].to_numpy() for name in self.features])
        return pa.table({"customer": batch["customer"], "score": scores})


def main() -> None:
    job = read_job()

    def run(source: str, destination: str) -> float:
        actors = Path(f"{destination}-actors")
        actors.mkdir(parents=True)
        scored = ray.data.read_parquet(source).map_batches(
            Scorer,
            fn_constructor_args=(job.model, job.columns, str(actors)),
            compute=ray.data.ActorPoolStrategy(size=CORES),
            num_cpus=1,
            batch_size=job.batch_size,
            batch_format="pyarrow",
        )
        scored.write_parquet(destination)
        return min(actor.stat().st_mtime for actor in actors.iterdir())

    # The address of a socket has at most 107 letters, so its folder can't lie below this one.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        start_ray(folder)
        measure(run, job, ray.__version__)
        ray.shutdown()


def start_ray(folder: str) -> None:
    """Start Ray on loopback; its token is in the environment, or it would leave one in the home folder."""
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # The actors hold every core; reading and writing need room beside them, or nothing ever runs.
    ray.init(
        num_cpus=2 * CORES,
        include_dashboard=False,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
        _temp_dir=folder,
    )
    ray.data.DataContext.get_current().enable_progress_bars = False


if __name__ == "__main__":
    main()
