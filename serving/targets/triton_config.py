"""The config.pbtxt of a model in Triton's repository: one for all versions that take the same tensors."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable

from serving.model.batching import BatchingConfig
from serving.model.release import Release
from serving.protocol.tensors import TensorMetadata, tensors

_VERSIONS = re.compile(r"(?m)^version_policy.*\bversions: \[([\d, ]*)\]")
_INSTANCES = re.compile(r"(?m)^(instance_group.*\bcount: )(\d+)")


def write_config(model: str, release: Release, versions: Collection[str], *, instances: int | None = None) -> str:
    """Return the config of a model with these versions, under the batching, engine and replicas of one of them.

    Promises: the same text for the same values. Several versions serve at once, each by its number.
    """
    inputs, outputs = tensors(release.contract)
    count = max(1, release.scaling.replicas_min) if instances is None else instances
    kind = "KIND_GPU" if release.engine.device == "cuda" else "KIND_CPU"
    lines = (
        f"name: {_quoted(model)}",
        'backend: "python"',
        f"max_batch_size: {max(release.rows_max, release.batching.batch_size_max)}",
        *(f"input {_tensor(each)}" for each in inputs),
        *(f"output {_tensor(each)}" for each in outputs),
        f"version_policy {{ specific {{ versions: [{', '.join(map(str, sorted(map(int, versions))))}] }} }}",
        f"instance_group {{ count: {count} kind: {kind} }}",
        *_batching(release.batching),
    )
    return "\n".join(lines) + "\n"


def versions_of(config: str) -> tuple[str, ...]:
    """Return the versions that a config which was written here serves, in order."""
    found = _VERSIONS.search(config)
    return tuple(found[1].split(", ")) if found else ()


def instances_of(config: str) -> int:
    """Return how many instances a config that was written here has each version run."""
    found = _INSTANCES.search(config)
    return int(found[2]) if found else 1


def with_instances(config: str, instances: int) -> str:
    """Return the same config with another number of instances."""
    return _INSTANCES.sub(rf"\g<1>{instances}", config)


def _batching(batching: BatchingConfig) -> Iterable[str]:
    """Yield the batching in Triton's words: a batch goes once it has that many rows, or its oldest request has waited.

    max_batch_size can't be that of the batching: it also bounds the rows of one request. The queue has no bound of its
    own, which is the gateway's: with any default_queue_policy Triton 24.10 lets requests lie for half a second now
    and then (measured: 32 callers, p99 506 ms with it and 13 ms without).
    """
    if batching.batch_size_max > 1:
        yield (
            f"dynamic_batching {{ preferred_batch_size: [{batching.batch_size_max}] "
            f"max_queue_delay_microseconds: {round(batching.wait_ms_max * 1000)} }}"
        )


def _tensor(tensor: TensorMetadata) -> str:
    datatype = "STRING" if tensor.datatype == "BYTES" else tensor.datatype
    dims = ", ".join(map(str, tensor.shape[1:]))
    return f"{{ name: {_quoted(tensor.name)} data_type: TYPE_{datatype} dims: [{dims}] }}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
