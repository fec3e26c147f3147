"""What the tests of servers with environments of their own share: releases, what they must answer, and requests."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from serving.model.batching import BatchingConfig
from serving.model.encoding import Encoded, Flags
from serving.model.loading import load_model
from serving.model.registry import resolve_model
from serving.model.release import Release
from serving.protocol.oip import decode_response, encode_request
from serving.targets import Address
from serving.targets.folder import FolderHost

Served = tuple[Release, Path]
Arrays = Mapping[str, np.ndarray]


def release_of(uri: str, endpoint: str, **changes: Any) -> Served:
    resolved = resolve_model(uri)
    release = Release(endpoint=endpoint, pin=resolved.pin, contract=resolved.contract({}, {}), **changes)
    return release, resolved.folder


def deploy_all(host: FolderHost, served: Sequence[Served]) -> list[Address]:
    with ThreadPoolExecutor() as threads:
        return list(threads.map(lambda each: host.deploy(*each), served))


def expected_of(served: Served, inputs: Arrays) -> dict[str, Any]:
    """What Model.predict gives in this process."""
    release, _ = served
    model = load_model(resolve_model(release.pin.uri), release.contract).with_engine(release.engine)
    count = len(next(iter(inputs.values())))
    encoded = model.prepare(Encoded(inputs=dict(inputs), flags=Flags.all_good(count), rows=count))
    with model.slot():
        return model.predict(encoded.inputs)


def ask(address: Address, release: Release, inputs: Arrays) -> dict[str, Any]:
    body = encode_request(release.contract, inputs, identity="seven")
    answer = post(address, body.content)
    assert 200 == answer.status_code, answer.text
    assert "seven" == answer.json()["id"]
    return decode_response(answer.content, release.contract, header_length=None)


def post(address: Address, content: bytes, model: str | None = None) -> httpx.Response:
    url = f"{address.url}/v2/models/{model or address.model}/infer"
    headers = {"Content-Type": "application/json"}
    return httpx.post(url, content=content, headers=headers, timeout=60, trust_env=False)


def listening(pid: int | None) -> list[str]:
    """The addresses on which a process listens."""
    if not Path("/proc/net/tcp").exists():
        pytest.skip("what a process listens on is looked up in Linux's /proc")
    ours = {str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()}
    lines = [
        line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    hosts = [line[1].split(":")[0] for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in ours]
    # The kernel writes 32 bits at a time, as the processor has them.
    words = [[bytes.fromhex(host[at : at + 8])[::-1] for at in range(0, len(host), 8)] for host in hosts]
    found = [ipaddress.ip_address(b"".join(each)) for each in words]
    return [str(getattr(each, "ipv4_mapped", None) or each) for each in found]


def rows(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).standard_normal((count, 3), dtype=np.float32)}


def document(**changes: Any) -> dict[str, Any]:
    """A good request for one row of x, with changes to its tensor."""
    return {"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1.0, 2.0, 3.0]} | changes]}


# Each with what the answer must speak of, where the request reaches our own words.
BAD_REQUESTS: dict[str, tuple[Any, str]] = {
    "no JSON": (b'{"inputs": [', ""),
    "no request": (b"[1, 2]", ""),
    "no inputs": ({"inputs": []}, "none of the name 'x'"),
    "a name that is none": (document(name="y"), "'y'"),
    "a datatype that is none": (document(datatype="FP33"), ""),
    "another datatype": (document(datatype="INT32", data=[1, 2, 3]), "must be FP32, got 'INT32'"),
    "a shape of other rows": (document(shape=[1, 2], data=[1.0, 2.0]), r"must be [N, 3]"),
    "no rows": (document(shape=[0, 3], data=[]), "at least one row"),
    "too few values": (document(data=[1.0, 2.0]), "3 values"),
    "text for numbers": (document(data=["a", "b", "c"]), "numbers"),
    "null": (document(data=[1.0, None, 3.0]), "null"),
    "NaN": (b'{"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [NaN, 1, 2]}]}', ""),
    "a number too large": (document(data=[1e300, 0.0, 0.0]), "FP32"),
    "too many rows": (document(shape=[9000, 3], data=[0.0] * 27_000), "at most 4096 rows"),
    "an output that is none": ({**document(), "outputs": [{"name": "rank"}]}, "'rank'"),
}

BATCHING = BatchingConfig(batch_size_max=16, wait_ms_max=20)
