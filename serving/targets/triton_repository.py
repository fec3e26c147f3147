"""The folders of a model in Triton's repository: versions that appear whole, a config that is replaced whole."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import time
from collections.abc import Collection, Generator, Iterable
from contextlib import contextmanager
from pathlib import Path

from serving.errors import EndpointFailed
from serving.model.batching import BatchingConfig
from serving.model.release import RELEASE_FILE, Release
from serving.protocol.tensors import TensorMetadata, describe_tensors
from serving.targets import Rendered

CONFIG_FILE = "config.pbtxt"
# Triton passes over folders of a model that are no numbers.
_STAGING, _BEFORE = ".staging-", "before-"
_REPLACED_S_MAX, _POLL_S = 2.0, 0.01


@contextmanager
def replaced(folder: Path, version: str, rendered: Rendered) -> Generator[None]:
    """Put the files of a version in their place, whole; on an error what was there before comes back."""
    folder.mkdir(parents=True, exist_ok=True)
    _tidy(folder)
    staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=folder))
    place, before, new = folder / version, staging / f"{_BEFORE}{version}", staging / "new"
    placed = False
    try:
        _copy(rendered, f"{folder.name}/{version}/", new)
        if place.exists():
            place.rename(before)
        new.rename(place)
        placed = True
        yield
    except BaseException:
        if placed:
            shutil.rmtree(place)
        if before.exists():
            before.rename(place)
        raise
    finally:
        shutil.rmtree(staging)
        if not (folder / CONFIG_FILE).exists():
            shutil.rmtree(folder)


def read_releases(folder: Path) -> dict[str, Release]:
    """Return the releases that a model's config serves, by their version, in order.

    Another process may put or drop one meanwhile: what is returned was served at some moment. Raises EndpointFailed
    where the config names a release that is not there.
    """
    # A version that is replaced is away for as long as two renames take.
    deadline = time.monotonic() + _REPLACED_S_MAX
    while True:
        try:
            versions = versions_of((folder / CONFIG_FILE).read_text())
        except FileNotFoundError:
            return {}
        try:
            return {version: _read_release(folder / version) for version in versions}
        except FileNotFoundError as error:
            if time.monotonic() > deadline:
                message = (
                    f"{folder / CONFIG_FILE} must name releases that are there, got no {error.filename}. Put it back, "
                    "or remove the folder and deploy its releases again."
                )
                raise EndpointFailed(message) from None
        time.sleep(_POLL_S)


def _read_release(folder: Path) -> Release:
    return Release.model_validate_json((folder / RELEASE_FILE).read_text())


def write_whole(path: Path, text: str) -> None:
    """Replace a file, so that a reader finds the one before or this one."""
    with tempfile.TemporaryDirectory(prefix=_STAGING, dir=path.parent) as staging:
        file = Path(staging) / path.name
        file.write_text(text)
        file.replace(path)


def _tidy(folder: Path) -> None:
    """Put right what a process that was killed here has left: a version set aside comes back, the rest goes."""
    for staging in folder.glob(f"{_STAGING}*"):
        for before in staging.glob(f"{_BEFORE}*"):
            place = folder / before.name.removeprefix(_BEFORE)
            if not place.exists():
                before.rename(place)
        shutil.rmtree(staging)


def _copy(rendered: Rendered, prefix: str, to: Path) -> None:
    for path, content in rendered.files.items():
        if path.startswith(prefix):
            file = to / path.removeprefix(prefix)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    for path, tree in rendered.trees.items():
        shutil.copytree(tree, to / path.removeprefix(prefix), copy_function=shutil.copyfile)


_VERSIONS = re.compile(r"(?m)^version_policy.*\bversions: \[([\d, ]*)\]")
_INSTANCES = re.compile(r"(?m)^(instance_group.*\bcount: )(\d+)")


def write_config(model: str, release: Release, versions: Collection[str], *, instances: int | None = None) -> str:
    """Return the config of a model with these versions, under the batching, engine and replicas of one of them.

    Promises: the same text for the same values. Several versions serve at once, each by its number.
    """
    inputs, outputs = describe_tensors(release.contract)
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
