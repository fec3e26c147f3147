"""The gRPC client of the benchmark: callers that each send the next request when they have an answer.

`run_grpc_load` starts processes of this module, `python -m tests.benchmarks.endpoint_grpc`, which take one JSON object
from standard input, print `ready`, wait for a line, and print what they counted as JSON. Each process has one channel,
as a client of gRPC has, and sends bytes that were encoded before. The client is in Python: it takes more processor time
for a request than Envoy or Triton, and bounds the rate. Two processes, one for each core, send all that this machine
lets them. The ratio of two servers is thus nearer to 1 than a client in C would find it.
"""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import grpc

CALLERS, PROCESSES = 32, 2
_METHOD = "/inference.GRPCInferenceService/ModelInfer"
_TIMEOUT_S = 30.0


def encode_grpc_requests(model: str, name: str, rows: Any) -> list[bytes]:
    """Return ModelInfer messages of one float32 row each for the input of this name."""
    from tritonclient.grpc import service_pb2

    found = []
    for row in rows:
        request = service_pb2.ModelInferRequest(model_name=model)
        request.inputs.add(name=name, datatype="FP32", shape=[1, len(row)])
        request.raw_input_contents.append(row.tobytes())
        found.append(request.SerializeToString())
    return found


def run_grpc_load(
    address: str, bodies: Sequence[bytes], seconds: float, metadata: Mapping[str, str] | None = None
) -> float:
    """Return the answers a second of 32 callers at HOST:PORT. Raises RuntimeError for an answer that is an error."""
    order = {
        "address": address,
        "bodies": [base64.b64encode(body).decode() for body in bodies],
        "callers": CALLERS // PROCESSES,
        "metadata": dict(metadata or {}),
        "seconds": seconds,
    }
    command = (sys.executable, "-m", "tests.benchmarks.endpoint_grpc")
    children = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(PROCESSES)
    ]
    try:
        for child in children:
            _write_line(child, json.dumps(order))
        for child in children:
            _read_line(child)
        for child in children:
            _write_line(child, "go")
        counted = [json.loads(_read_line(child)) for child in children]
    finally:
        for child in children:
            child.kill()
            child.communicate()
    return sum(float(each["answers"]) / float(each["seconds"]) for each in counted)


def _write_line(child: subprocess.Popen[str], text: str) -> None:
    assert child.stdin is not None
    child.stdin.write(text + "\n")
    child.stdin.flush()


def _read_line(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    if line := child.stdout.readline():
        return line
    message = f"The gRPC client must print what it counted, but ended with {child.wait()}. Its reason stands above."
    raise RuntimeError(message)


async def _run(order: Mapping[str, Any]) -> None:
    bodies = [base64.b64decode(body) for body in order["bodies"]]
    metadata = tuple(order["metadata"].items())
    options = (("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1))
    async with grpc.aio.insecure_channel(order["address"], options=options) as channel:
        infer = channel.unary_unary(_METHOD)
        await infer(bodies[0], metadata=metadata, timeout=_TIMEOUT_S)
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        sys.stdin.readline()
        began = time.perf_counter()
        until = began + order["seconds"]

        async def call(caller: int) -> int:
            answers = 0
            while time.perf_counter() < until:
                await infer(bodies[(caller + answers) % len(bodies)], metadata=metadata, timeout=_TIMEOUT_S)
                answers += 1
            return answers

        counted = await asyncio.gather(*(call(caller) for caller in range(order["callers"])))
        result = {"answers": sum(counted), "seconds": time.perf_counter() - began}
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    asyncio.run(_run(json.loads(sys.stdin.readline())))
