"""Keep the instances of every endpoint on a Triton between its bounds, and alive, by the measured queue.

`python -m serving.targets.triton_autoscale --repository R` does so until SIGTERM or Ctrl-C. The bounds are those of
each endpoint's newest release.
"""

from __future__ import annotations

import argparse
import logging
import signal
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from serving.errors import EndpointFailed
from serving.model.release import Release
from serving.targets.triton import TritonHost
from serving.targets.triton_scale import InstanceScaler

_EVERY_S = 5.0
# By its name also where it is run as a program, which has another.
_log = logging.getLogger("serving.targets.triton_autoscale")


def main(arguments: Sequence[str] | None = None) -> None:
    """Look after one Triton."""
    parser = argparse.ArgumentParser(prog="python -m serving.targets.triton_autoscale", description=__doc__)
    parser.add_argument("--repository", type=Path, required=True, help="Triton's model repository")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="its HTTP door")
    parser.add_argument("--grpc", default="127.0.0.1:8001", help="its gRPC door, HOST:PORT")
    parser.add_argument("--metrics", default="http://127.0.0.1:8002/metrics", help="its metrics")
    parser.add_argument("--seconds", type=float, default=_EVERY_S, help="between two looks")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("serving").setLevel(logging.INFO)
    over = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: over.set())
    host = TritonHost(repository=options.repository, url=options.url, grpc=options.grpc)
    autoscale(host, options.metrics, over, every_s=options.seconds)


def autoscale(host: TritonHost, metrics_url: str, over: threading.Event, *, every_s: float) -> None:
    """Look after every endpoint of a repository until `over`, those that come meanwhile too.

    A look that fails is told to the log, and the next one comes.
    """
    scalers: dict[str, InstanceScaler] = {}
    _log.info("looking after %s", host.repository)
    while not over.wait(every_s):
        scalers = {
            endpoint: _scaler(scalers.get(endpoint), host, metrics_url, release)
            for endpoint, release in _newest(host).items()
        }
        for endpoint, scaler in [*scalers.items()]:
            try:
                scaler.look()
            except (EndpointFailed, OSError) as error:
                _log.warning("%s: its instances stay as they are: %s", endpoint, error)
                # What was measured before says nothing of what comes after.
                del scalers[endpoint]


def _newest(host: TritonHost) -> dict[str, Release]:
    try:
        return host.newest()
    except OSError as error:
        # A version that was on its way out, most likely.
        _log.warning("%s must be readable, got: %s", host.repository, error)
        return {}


def _scaler(known: InstanceScaler | None, host: TritonHost, metrics_url: str, release: Release) -> InstanceScaler:
    if known is not None:
        return replace(known, scaling=release.scaling, batching=release.batching)
    return InstanceScaler(
        host=host,
        metrics_url=metrics_url,
        endpoint=release.endpoint,
        scaling=release.scaling,
        batching=release.batching,
    )


if __name__ == "__main__":
    main()
