"""The client of the benchmark: wrk, in a process of its own, the same for every server."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CONNECTIONS = 32

_SCRIPT = """
local bodies = {%s}
local requests, at = {}, 0
init = function()
  for i, body in ipairs(bodies) do
    requests[i] = wrk.format("POST", nil, {["Content-Type"] = "application/json"%s}, body)
  end
end
request = function()
  at = at %% #requests + 1
  return requests[at]
end
done = function(summary, latency)
  local lost = summary.errors
  io.write(string.format(
    '\\nJSON {"seconds": %%f, "requests": %%d, "p50_ms": %%f, "p99_ms": %%f, "errors": %%d}\\n',
    summary.duration / 1e6, summary.requests, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    lost.connect + lost.read + lost.write + lost.status + lost.timeout))
end
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What wrk saw: answers a second, the milliseconds of 50 and 99 in 100 of them, and what was no answer."""

    per_second: float
    p50_ms: float
    p99_ms: float
    errors: int


def missing() -> str | None:
    """Say how to get wrk where it is missing."""
    return None if shutil.which("wrk") else "wrk is missing: apt-get install wrk"


def wrk(url: str, bodies: Sequence[bytes], seconds: int, key: str | None = None) -> Load:
    """Send the bodies in turn over 32 connections, each as soon as it has its answer. wrk knows whole seconds alone."""
    header = f', ["Authorization"] = "Bearer {key}"' if key else ""
    quoted = ", ".join(f"[==[{body.decode()}]==]" for body in bodies)
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "post.lua"
        script.write_text(_SCRIPT % (quoted, header))
        command = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds}s", "--timeout", "30s", "-s", str(script), url]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.rpartition("JSON ")[2])
    good = found["requests"] - found["errors"]
    return Load(
        per_second=good / found["seconds"], p50_ms=found["p50_ms"], p99_ms=found["p99_ms"], errors=found["errors"]
    )


def median(loads: Sequence[Load]) -> Load:
    """Return the median of each figure, and all errors."""
    return Load(
        per_second=statistics.median(load.per_second for load in loads),
        p50_ms=statistics.median(load.p50_ms for load in loads),
        p99_ms=statistics.median(load.p99_ms for load in loads),
        errors=sum(load.errors for load in loads),
    )
