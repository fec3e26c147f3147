"""How long other callers wait while one abuses the gateway: their 99th percentile before, meanwhile and afterwards.

The callers have the right key and send 100 requests a second to one endpoint on the tuned Triton. The abuser is a
process of its own on the same machine. The processor time that it takes itself is not the gateway's doing, so that it
has a control: the same process takes the same time by sending to a socket that only discards. All of it is repeated in
rounds, and each percentile is that of all rounds together.
"""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.endpoint_abuser import KINDS, Abuser
from tests.benchmarks.endpoint_gateway import KEY, Setup, serve_behind_gateway
from tests.benchmarks.endpoint_servers import Served
from tests.benchmarks.figures import show
from tests.benchmarks.shared import console

_PHASES = ("before", "during", "control", "after")
# Closed connections are gone by then.
_SETTLE_S = 0.5


def abuse_figures(model: Served, folder: Path, *, seconds: int, rounds: int) -> dict[str, Any]:
    """Measure each abuse in turn, in front of one and the same Triton."""
    found = {kind: _Abuse() for kind in KINDS}
    with serve_behind_gateway(model, folder / "abuse") as setup:
        for number in range(rounds):
            for kind, abuse in found.items():
                console.print(f"round {number + 1}: {kind}")
                abuse.measure(setup, kind, seconds)
    table = {
        kind: {"growth": abuse.growth("during"), "growth of the control": abuse.growth("control"), **abuse.as_json()}
        for kind, abuse in found.items()
    }
    show("other callers beside one that abuses the gateway", table, {"growth": "at most 1.2"})
    return {
        "abuse_p99_growth": {kind: abuse.growth("during") for kind, abuse in found.items()},
        "abuse_p99_growth_of_control": {kind: abuse.growth("control") for kind, abuse in found.items()},
        "abuse": {kind: abuse.as_json() for kind, abuse in found.items()},
    }


class _Abuse:
    """What the other callers waited in each phase, and what the abuser did."""

    def __init__(self) -> None:
        self.samples_ms: dict[str, list[float]] = {phase: [] for phase in _PHASES}
        self.counted: Counter[str] = Counter()
        self.cpu_s: dict[str, float] = dict.fromkeys(("during", "control"), 0.0)

    def measure(self, setup: Setup, kind: str, seconds: int) -> None:
        """Measure one round."""
        port = int(setup.gateway.url.rpartition(":")[2])
        order: dict[str, Any] = {"kind": kind, "seconds": seconds, "port": port, "endpoint": setup.gateway.model}
        order["key"] = KEY
        self._observe(setup, "before", seconds)
        with Abuser(order) as abuser:
            self._observe(setup, "during", seconds)
        self.counted.update(abuser.report["counted"])
        self.cpu_s["during"] += abuser.report["cpu_s"]
        time.sleep(_SETTLE_S)
        self._observe(setup, "after", seconds)
        with Abuser({**order, "cpu_s": abuser.report["cpu_s"]}) as control:
            self._observe(setup, "control", seconds)
        self.cpu_s["control"] += control.report["cpu_s"]

    def _observe(self, setup: Setup, phase: str, seconds: int) -> None:
        self.samples_ms[phase] += setup.measure_latency("gateway", seconds)

    def p99_ms(self, phase: str) -> float:
        """Return the 99th percentile of a phase in all rounds."""
        return float(np.percentile(self.samples_ms[phase], 99))

    def growth(self, phase: str) -> float:
        """Return the 99th percentile of a phase over that before the abuse."""
        return round(self.p99_ms(phase) / self.p99_ms("before"), 2)

    def as_json(self) -> dict[str, Any]:
        """Return the percentiles, what the abuser counted, and its seconds of processor time."""
        return {
            "p99_ms": {phase: round(self.p99_ms(phase), 2) for phase in _PHASES},
            "p50_ms": {phase: round(float(np.median(self.samples_ms[phase])), 2) for phase in _PHASES},
            "abuser": dict(self.counted),
            "cpu_s": {phase: round(value, 2) for phase, value in self.cpu_s.items()},
        }
