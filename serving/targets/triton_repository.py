"""The folder of a model in Triton's repository: versions that appear whole, and the config.pbtxt for all of them."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import time
from collections.abc import Collection, Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from serving.errors import EndpointFailed
from serving.model.batching import BatchingConfig
from serving.model.graph import AnyRelease, Graph, read_release
from serving.model.release import Release
from serving.protocol.tensors import TensorMetadata, describe_tensors
from serving.targets import ReleaseFiles

CONFIG_FILE = "config.pbtxt"
# The model that averages what those of an ensemble answer.
MEAN, MEAN_VERSION = "mean", "1"
_ENSEMBLE = 'platform: "ensemble"'
# Triton ignores folders of a model whose name is not a number.
_STAGING, _BEFORE = ".staging-", "before-"
_REPLACED_S_MAX, _POLL_S = 2.0, 0.01
_VERSIONS = re.compile(r"(?m)^version_policy.*\bversions: \[([\d, ]*)\]")
_INSTANCES = re.compile(r"(?m)^(instance_group.*\bcount: )(\d+)")


@contextmanager
def replace_version(folder: Path, version: str, rendered: ReleaseFiles) -> Generator[None]:
    """Write the files of a version in one step; where the block fails, the files of before are restored."""
    folder.mkdir(parents=True, exist_ok=True)
    _restore_interrupted(folder)
    staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=folder))
    current, before, new = folder / version, staging / f"{_BEFORE}{version}", staging / "new"
    is_replaced = False
    try:
        _copy_version(rendered, f"{folder.name}/{version}/", new)
        if current.exists():
            current.rename(before)
        new.rename(current)
        is_replaced = True
        yield
    except BaseException:
        if is_replaced:
            shutil.rmtree(current)
        if before.exists():
            before.rename(current)
        raise
    finally:
        shutil.rmtree(staging)
        if not (folder / CONFIG_FILE).exists():
            shutil.rmtree(folder)


def read_releases(folder: Path) -> dict[str, AnyRelease]:
    """Return the releases that a model's config serves, or the graph, by their version, in order.

    Another process may add or remove one meanwhile: the result was served at some moment. Raises EndpointFailed
    where the config names a release that is not there.
    """
    # A version that is being replaced is absent for as long as two renames take.
    deadline = time.monotonic() + _REPLACED_S_MAX
    while True:
        try:
            versions = parse_versions((folder / CONFIG_FILE).read_text())
        except FileNotFoundError:
            return {}
        try:
            return {version: read_release(folder / version) for version in versions}
        except FileNotFoundError as error:
            if time.monotonic() > deadline:
                message = (
                    f"{folder / CONFIG_FILE} must name releases that are there, got no {error.filename}. Put it back, "
                    "or remove the folder and deploy its releases again."
                )
                raise EndpointFailed(message) from None
        time.sleep(_POLL_S)


def replace_file(path: Path, text: str) -> None:
    """Replace a file in one step: a reader finds the text of before or this one."""
    with tempfile.TemporaryDirectory(prefix=_STAGING, dir=path.parent) as staging:
        file = Path(staging) / path.name
        file.write_text(text)
        file.replace(path)


def _restore_interrupted(folder: Path) -> None:
    """Restore the versions that a killed process had set aside, and remove what else it left."""
    for staging in folder.glob(f"{_STAGING}*"):
        for before in staging.glob(f"{_BEFORE}*"):
            current = folder / before.name.removeprefix(_BEFORE)
            if not current.exists():
                before.rename(current)
        shutil.rmtree(staging)


def _copy_version(rendered: ReleaseFiles, prefix: str, folder: Path) -> None:
    """Write the files below a prefix to a folder."""
    for path, content in rendered.files.items():
        if path.startswith(prefix):
            file = folder / path.removeprefix(prefix)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    for path, tree in rendered.trees.items():
        shutil.copytree(tree, folder / path.removeprefix(prefix), copy_function=shutil.copyfile)


def render_config(model: str, release: Release, versions: Collection[str], *, instances: int | None = None) -> str:
    """Return the config of a model with these versions, under the batching, engine and replicas of one of them.

    Promises: the same text for the same values. Several versions serve at once, each by its number.
    """
    inputs, outputs = describe_tensors(release.contract)
    count = max(1, release.scaling.replicas_min) if instances is None else instances
    kind = "KIND_GPU" if release.engine.device == "cuda" else "KIND_CPU"
    lines = (
        f"name: {_quote(model)}",
        'backend: "python"',
        f"max_batch_size: {max(release.rows_max, release.batching.batch_size_max)}",
        *(f"input {_render_tensor(each)}" for each in inputs),
        *(f"output {_render_tensor(each)}" for each in outputs),
        f"version_policy {{ specific {{ versions: [{', '.join(map(str, sorted(map(int, versions))))}] }} }}",
        f"instance_group {{ count: {count} kind: {kind} }}",
        *_render_batching(release.batching),
    )
    return "\n".join(lines) + "\n"


def name_graph(endpoint: str, version: str) -> str:
    """Return the name of a graph among the models; those of its steps have their number, from 1, behind it."""
    return f"{endpoint}.v{version}"


def render_graph_configs(graph: Graph, *, instances: int | None = None) -> dict[str, str]:
    """Return the configs of a graph by model: each step's, the mean's where there is one, and the ensemble's, last.

    Triton calls ensemble what chains models by their tensors, whether they run one after the other or side by side. A
    tensor between models is named after the number of the step that gives it, as in "1.score".
    """
    name = name_graph(graph.endpoint, graph.version)
    configs = {
        f"{name}.{number}": render_config(f"{name}.{number}", step, [step.version], instances=instances)
        for number, step in enumerate(graph.steps, start=1)
    }
    if graph.combine == "mean":
        configs[f"{name}.{MEAN}"] = _render_mean(f"{name}.{MEAN}", graph)
    return {**configs, name: _render_ensemble(name, graph)}


def _render_mean(name: str, graph: Graph) -> str:
    _, outputs = describe_tensors(graph.contract)
    inputs = [
        each.model_copy(update={"name": f"{number}.{each.name}"})
        for number in range(1, len(graph.steps) + 1)
        for each in outputs
    ]
    lines = (
        f"name: {_quote(name)}",
        'backend: "python"',
        f"max_batch_size: {graph.rows_max}",
        *(f"input {_render_tensor(each)}" for each in inputs),
        *(f"output {_render_tensor(each)}" for each in outputs),
        f"version_policy {{ specific {{ versions: [{MEAN_VERSION}] }} }}",
        "instance_group { count: 1 kind: KIND_CPU }",
    )
    return "\n".join(lines) + "\n"


def _render_ensemble(name: str, graph: Graph) -> str:
    inputs, outputs = describe_tensors(graph.contract)
    lines = (
        f"name: {_quote(name)}",
        _ENSEMBLE,
        f"max_batch_size: {graph.rows_max}",
        *(f"input {_render_tensor(each)}" for each in inputs),
        *(f"output {_render_tensor(each)}" for each in outputs),
        f"version_policy {{ specific {{ versions: [{graph.version}] }} }}",
        "ensemble_scheduling {",
        *_render_steps(name, graph),
        "}",
    )
    return "\n".join(lines) + "\n"


def _render_steps(name: str, graph: Graph) -> Iterable[str]:
    """Yield the steps of an ensemble, and which of its tensors are the inputs and outputs of each."""
    outputs = [each.name for each in graph.contract.outputs]
    last = len(graph.steps)
    for number, step in enumerate(graph.steps, start=1):
        taken = [each.name for each in step.contract.inputs]
        given = [each.name for each in step.contract.outputs]
        is_inner = graph.combine == "mean" or number < last
        yield _render_step(
            f"{name}.{number}",
            step.version,
            {each: each if graph.combine == "mean" or number == 1 else f"{number - 1}.{each}" for each in taken},
            {each: f"{number}.{each}" if is_inner else each for each in given},
        )
    if graph.combine == "mean":
        between = [f"{number}.{each}" for number in range(1, last + 1) for each in outputs]
        yield _render_step(
            f"{name}.{MEAN}", MEAN_VERSION, {each: each for each in between}, {each: each for each in outputs}
        )


def _render_step(model: str, version: str, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> str:
    maps = [
        f"{kind}_map {{ key: {_quote(theirs)} value: {_quote(ours)} }}"
        for kind, tensors in (("input", inputs), ("output", outputs))
        for theirs, ours in tensors.items()
    ]
    return f"  step {{ model_name: {_quote(model)} model_version: {version} {' '.join(maps)} }}"


def is_ensemble(config: str) -> bool:
    """Whether a config that was written here is that of a graph."""
    return _ENSEMBLE in config


def parse_versions(config: str) -> tuple[str, ...]:
    """Return the versions that a config which was written here serves, in order."""
    found = _VERSIONS.search(config)
    return tuple(found[1].split(", ")) if found else ()


def parse_instances(config: str) -> int:
    """Return how many instances each version runs by a config that was written here."""
    found = _INSTANCES.search(config)
    return int(found[2]) if found else 1


def set_instances(config: str, instances: int) -> str:
    """Return the same config with another number of instances."""
    return _INSTANCES.sub(rf"\g<1>{instances}", config)


def is_served_as(served: Mapping[str, Any], config: str) -> bool:
    """Whether Triton serves a model as a config says that was written here: its instances and its batching.

    `served` is the config as Triton gives it; an ensemble has neither.
    """
    batching = served.get("dynamic_batching", {})
    found = {
        "count": [str(each["count"]) for each in served.get("instance_group", [])],
        "preferred_batch_size": [str(each) for each in batching.get("preferred_batch_size", [])],
        "max_queue_delay_microseconds": [
            str(batching[name]) for name in batching if name.startswith("max_queue_delay")
        ],
    }
    return found == {name: re.findall(rf"\b{name}: \[?(\d+)", config) for name in found}


def _render_batching(batching: BatchingConfig) -> Iterable[str]:
    """Yield the dynamic batching: a batch starts once it has that many rows, or its oldest request has waited so long.

    max_batch_size can't be that of the batching: it also bounds the rows of one request. The queue has no bound of its
    own, since the gateway has one: with any default_queue_policy Triton 24.10 delays requests by half a second now
    and then (measured: 32 callers, p99 506 ms with it and 13 ms without).
    """
    if batching.batch_size_max > 1:
        yield (
            f"dynamic_batching {{ preferred_batch_size: [{batching.batch_size_max}] "
            f"max_queue_delay_microseconds: {round(batching.wait_ms_max * 1000)} }}"
        )


def _render_tensor(tensor: TensorMetadata) -> str:
    datatype = "STRING" if tensor.datatype == "BYTES" else tensor.datatype
    dims = ", ".join(map(str, tensor.shape[1:]))
    return f"{{ name: {_quote(tensor.name)} data_type: TYPE_{datatype} dims: [{dims}] }}"


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
