"""What a run takes from an earlier one: its sizes, so that chunks stay as they were, and the parts of those that did.

A part bears the digest of what it is made of: model, contract, options, versions, processor, batches and the bytes of
its rows. Where the plan of a new run has a chunk of the same digest, the part that an earlier run has made is the one
that this run would make, byte for byte, and the plan refers to it.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import TypeVar

from serving.errors import DestinationUnusable, FormatTooNew
from serving.faults import PROCESS_ENDED, TOOK_LONGER
from serving.machine import describe_arithmetic, find_release
from serving.model.contract import Frozen
from serving.model.environment_choice import Environment
from serving.model.interface import Tunable
from serving.model.registry import Resolved
from serving.model.requirements import check_requirements, read_model_environment
from tasks.batch.chunk_layout import Sizes, choose_chunk_rows
from tasks.batch.dataset import map_parallel
from tasks.batch.delta import list_table_files
from tasks.batch.manifest import OTHER_REASONS, Manifest, ManifestPart
from tasks.batch.options import BatchOptions
from tasks.batch.part_footer import read_footer
from tasks.batch.parts import ChunkId, list_reused_parts
from tasks.batch.plan import Plan, ReusedPart, digest_chunk, manifest_path
from tasks.batch.run_records import OrderNumber, list_order_numbers, load_plan, read_record
from tasks.storage import Entry, Storage

R = TypeVar("R", bound=Frozen)

# A run refers to all that it has from earlier ones: the newest few have what the others had.
_RUNS_MAX = 8
# Boundaries of an earlier run are kept while chunks are not so many times larger or smaller than a run's own.
_SIZES_APART_MAX = 8
_SHOWN = 3
# How reasons of rejects begin that say what a process of the model or its machine did, and no error of the model's.
_OF_THE_MACHINE = (PROCESS_ENDED, TOOK_LONGER, "MemoryError")


@dataclass(frozen=True, slots=True, kw_only=True)
class EarlierRuns:
    """Complete runs of the same model and options, the newest first, and their machine and versions.

    `note` says in words why there are none, where there is something to say.
    """

    manifests: tuple[Manifest, ...] = ()
    made_with: tuple[str, ...]
    note: str


def describe_making(resolved: Resolved, environment: Environment) -> tuple[str, ...]:
    """Return versions and processor that decide the bytes of parts.

    Of an environment of the model's own the model's files decide the versions, and their digest is in the plan.
    """
    packages = {"overnight": find_release(), "python": platform.python_version()}
    packages |= {name: version(name) for name in ("numpy", "pyarrow")}
    if resolved.needs_torch:
        packages["torch"] = version("torch")
    if environment == "caller" and not resolved.is_torch:
        checks = check_requirements(read_model_environment(resolved.folder))
        packages |= {each.name: each.installed for each in checks if each.installed}
    return (describe_arithmetic(), *(f"{name} {packages[name]}" for name in sorted(packages)))


def find_earlier_runs(
    storage: Storage, shape: str, made_with: tuple[str, ...], model: str, options: BatchOptions
) -> EarlierRuns:
    """Return the earlier runs of a destination whose parts a new run may have.

    Args:
        storage: The destination.
        shape: Digest of model, contract and options.
        made_with: Versions and processor here.
        model: The model's address, for words.
        options: What the caller allows to be reused, and the kind of output.
    """
    nothing = EarlierRuns(made_with=made_with, note="")
    if options.reuse == "none":
        return replace(nothing, note="reuse is 'none'.")
    if note := _describe_unfit_table(options):
        return replace(nothing, note=note)
    runs = _list_newest(storage, options.output)
    if not runs:
        return nothing
    alike = [run for run in runs if run.shape == shape]
    if not alike:
        other = runs[0].model.uri
        differs = f"it was scored by {other}" if other != model else "its options, columns or signature were others"
        return replace(nothing, note=f"run {runs[0].run} is none of this model and these options: {differs}.")
    kept = made_with if options.reuse == "same" else alike[0].made_with
    same = tuple(run for run in alike if run.made_with == kept)
    if not same:
        differ = sorted(set(made_with) ^ set(alike[0].made_with))
        note = f"run {alike[0].run} was made with other versions, or on another processor: {', '.join(differ)[:300]}."
        return replace(nothing, note=note)
    return EarlierRuns(manifests=same, made_with=kept, note="")


def _describe_unfit_table(options: BatchOptions) -> str:
    """Say why a run can't refer to files that are in its table already; nothing where it can."""
    if options.output == "iceberg":
        return "its rows go into an Iceberg table, by files of their own."
    if options.table_mode == "append":
        return (
            "its rows are appended to a Delta table, which can't have a file twice; delta_mode 'replace' reuses parts."
        )
    return ""


def _list_newest(storage: Storage, output: str) -> list[Manifest]:
    """Return the manifests of the newest complete runs with rows of a kind of output that read, the newest first."""
    paths = list_order_numbers(storage)[-_RUNS_MAX:]
    holders = map_parallel(storage, lambda path: _read_if_whole(storage, path, OrderNumber), paths)
    names = list(dict.fromkeys(holder.run for holder in reversed(holders) if holder is not None))
    manifests = map_parallel(storage, lambda run: _read_if_whole(storage, manifest_path(run), Manifest), names)
    found = [manifest for manifest in manifests if manifest is not None and manifest.rows and manifest.output == output]
    return sorted(found, key=lambda manifest: manifest.position, reverse=True)


def _read_if_whole(storage: Storage, path: str, kind: type[R]) -> R | None:
    with suppress(DestinationUnusable, FormatTooNew):
        return read_record(storage, path, kind)
    return None


def keep_sizes(earlier: Plan, model: Tunable, options: BatchOptions, rows: int) -> Sizes | None:
    """Return the sizes by which an earlier run was cut, for a dataset of so many rows.

    None where a run of so many rows is better cut otherwise, or the model does not run here as it did then.
    """
    tuning = earlier.tuning
    sizes = Sizes(
        batch_size=earlier.batch_size,
        slots=options.slots or (tuning.slots if tuning else model.slots),
        row_bytes=earlier.row_bytes,
        rows_per_second=tuning.rows_per_second / tuning.slots if tuning else None,
        engine=earlier.engine,
        tuning=tuning,
        batch_unit=earlier.batch_unit,
    )
    now = choose_chunk_rows(rows, replace(sizes, slots=sizes.slots * options.workers))
    is_near = now / _SIZES_APART_MAX <= earlier.rows_per_chunk <= now * _SIZES_APART_MAX
    fits = earlier.engine.device == model.engine.device
    return (
        replace(sizes, rows_per_chunk=earlier.rows_per_chunk) if fits and (is_near or options.rows_per_chunk) else None
    )


def find_earlier_plan(storage: Storage, runs: EarlierRuns) -> Plan | None:
    """Return the plan of the newest of the runs, None where there is none that reads any more."""
    with suppress(DestinationUnusable, FormatTooNew):
        return load_plan(storage, runs.manifests[0].run) if runs.manifests else None
    return None


def refer_to_parts(storage: Storage, plan: Plan, runs: EarlierRuns) -> Plan:
    """Return a plan that refers to the parts that earlier runs have made of the same, where they are there.

    It refers to each part once; where its rows go into a Delta table, to files of the current version alone.
    """
    if not runs.manifests:
        return plan.model_copy(update={"reuse_note": runs.note})
    made = {part.chunk: part for run in reversed(runs.manifests) for part in run.parts if part.chunk}
    digests = {at: digest_chunk(plan, chunk) for at, chunk in plan.chunks.items()}
    found = {at: made[digest] for at, digest in digests.items() if digest in made}
    held = _keep_held(storage, plan.options.output, found)
    reused = tuple(ReusedPart(shard=at[0], place=at[1], path=p.path) for at, p in held.items())
    referring = plan.model_copy(update={"reused": reused})
    there = {at: e for at, e in list_reused_parts(storage, referring).items() if e.size == held[at].bytes}
    doubtful = _find_doubtful(storage, referring, there, runs)
    standing = tuple(part for part in reused if (at := (part.shard, part.place)) in there and at not in doubtful)
    told = [
        (len(digests) - len(found), "the files of {:,} chunks are new or changed"),
        (len(found) - len(held), "{:,} parts are another chunk's, or no files of the Delta table any more"),
        (len(held) - len(there), "{:,} parts are gone or cut short"),
        (len(doubtful), "{:,} parts have rows that ended the model's process, or took too long"),
    ]
    reasons = ", and ".join(words.format(count) for count, words in told if count)
    names = ", ".join(run.run for run in runs.manifests[:_SHOWN])
    note = f"since {names}, {reasons}." if reasons else ""
    return plan.model_copy(update={"reused": standing, "reuse_note": note})


def _keep_held(storage: Storage, output: str, found: Mapping[ChunkId, ManifestPart]) -> dict[ChunkId, ManifestPart]:
    """Return the parts, each for one chunk; where the output is a Delta table, those that it has as they were made.

    Two chunks are made of the same where a file of the source is a copy of another: a reader that is given one part
    twice may take it once. The file of a part that the table has given up may be deleted by a vacuum at any time.
    """
    free = {part.path: part.bytes for part in found.values()}
    if found and output == "delta":
        free = dict(list_table_files(storage).whole)
    return {at: part for at, part in found.items() if free.pop(part.path, None) == part.bytes}


def _find_doubtful(
    storage: Storage, plan: Plan, there: Mapping[ChunkId, Entry], runs: EarlierRuns
) -> frozenset[ChunkId]:
    """Return the chunks whose parts have rejects that another try may not have, by what the machine did."""
    reasons = {count.reason for run in runs.manifests for count in run.rejects}
    if OTHER_REASONS not in reasons and not any(map(_may_pass_again, reasons)):
        return frozenset()
    chunks = list(there)
    footers = map_parallel(storage, lambda at: read_footer(storage, plan, plan.chunk(at), there[at]), chunks)
    return frozenset(
        at
        for at, footer in zip(chunks, footers, strict=True)
        if footer is None or any(_may_pass_again(reason) for _, reason in footer.rejects)
    )


def _may_pass_again(reason: str) -> bool:
    return reason.startswith(_OF_THE_MACHINE)
