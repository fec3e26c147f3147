"""A run: what a call amounts to, found without scoring anything, and planned once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from serving.errors import ModelUnfit, RunDamaged
from serving.model.contract import Contract
from serving.model.interface import Model, Tunable
from serving.model.loading import load_model
from serving.model.registry import Resolved, open_model, resolve_model
from tasks.batch.dataset import Dataset, Snapshot, open_dataset
from tasks.batch.delta import check_delta
from tasks.batch.options import BatchOptions, Ray
from tasks.batch.parts import check_names, part_schema
from tasks.batch.plan import (
    Plan,
    check_fits,
    check_plan_key,
    load_plan,
    make_plan,
    memory_bytes,
    run_key,
    save_plan,
)
from tasks.batch.publish import (
    Manifest,
    check_manifest_key,
    claim_order_number,
    find_damaged_parts,
    find_earlier_keys,
    find_intact_manifest,
    find_manifest,
)
from tasks.batch.source import pin_source
from tasks.batch.staging import stage
from tasks.batch.tuning import choose_sizes
from tasks.storage import Storage, check_create_only


class ModelLoader(Protocol):
    """How a resolved model becomes one that predicts, as load_model does it."""

    def __call__(self, resolved: Resolved, contract: Contract, *, allow_pickle: bool) -> Tunable:
        """Return the model; raises ModelUnfit."""
        ...


def utc_now() -> datetime:
    """Return the time by this machine's clock."""
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRequest:
    """A call, pinned: the model version, the files, the contract between them, and the key of all that."""

    resolved: Resolved
    snapshot: Snapshot
    contract: Contract
    options: BatchOptions
    key: str

    @property
    def run(self) -> str:
        """The name of the run's folders."""
        return self.options.name or self.key


def resolve_request(model: str, source: str, destination: str, options: BatchOptions) -> RunRequest:
    """Resolve the model and list the source, once. Raises BadInput's kinds; nothing is written."""
    resolved = resolve_model(model)
    contract = resolved.contract(options.input_columns, options.policies)
    snapshot = pin_source(source, destination)
    key = run_key(resolved.pin, snapshot, contract, options)
    return RunRequest(resolved=resolved, snapshot=snapshot, contract=contract, options=options, key=key)


def find_complete_run(storage: Storage, call: RunRequest) -> Manifest | None:
    """Return the manifest if this very call has been answered already, and its parts are there.

    A few reads and a listing; nothing is opened.
    """
    manifest = find_intact_manifest(storage, call.run)
    return manifest if manifest is not None and manifest.key == call.key else None


def plan_run(
    call: RunRequest, storage: Storage, *, load: ModelLoader = load_model, clock: Callable[[], datetime] = utc_now
) -> Plan:
    """Return the plan of a call: the one that is written already, or a new one, written first.

    Everything that can be refused is refused here, before anything is scored. `load` loads the model that the plan is
    made for, `clock` says when that is.
    """
    standing = load_plan(storage, call.run)
    if standing is not None:
        return check_plan_key(standing, call.key)
    dataset = _open_dataset(call, storage)
    call.contract.check(dataset.schema, f"The dataset at {call.snapshot.title}")
    check_names(dataset, call.contract, call.options)
    order_held = 0
    if call.options.output == "delta":
        appends = call.options.delta_mode == "append"
        earlier = find_earlier_keys(storage, call.resolved.pin, call.snapshot, call.options) if appends else ()
        order_held = check_delta(storage, part_schema(call.contract, call.options, dataset), call.key, earlier)
    model = load(call.resolved, call.contract, allow_pickle=call.options.allow_pickle)
    plan = make_plan(
        key=call.key,
        model=call.resolved.pin,
        contract=call.contract,
        options=call.options,
        source=call.snapshot,
        dataset=dataset,
        sizes=choose_sizes(call.resolved, model, call.contract, call.options, dataset),
        planned_at=clock(),
    )
    check_memory(plan, choose_slots(call.options, model.with_engine(plan.engine)), call.options)
    check_create_only(storage)
    order = claim_order_number(storage, plan.run, above=order_held)
    return save_plan(storage, plan.model_copy(update={"order": order}))


def choose_slots(options: BatchOptions, model: Model) -> int:
    """Return how many slots a run has: what the options say, or what suits the model on this machine."""
    return options.slots or model.slots


def check_memory(plan: Plan, slots: int, options: BatchOptions) -> int:
    """Return the bytes that the run's data takes at its peak; raises PlanTooLarge where they are not to be had."""
    needed = memory_bytes(plan, slots)
    elsewhere = isinstance(options.runner, Ray) and options.runner.address is not None
    allowed = options.memory_mb << 20 if options.memory_mb else None if elsewhere else free_memory()
    if allowed is not None:
        check_fits(needed, allowed, plan, slots)
    return needed


def _open_dataset(call: RunRequest, storage: Storage) -> Dataset:
    names = [column.name for column in call.contract.columns]
    snapshot = call.snapshot
    if snapshot.format != "parquet":
        check_create_only(storage)
        folder = f"_overnight/{call.run}"
        snapshot = stage(snapshot, storage, folder, call.contract, call.options.key_columns)
    return open_dataset(snapshot, names, call.options.key_columns)


def load_planned_model(plan: Plan, resolved: Resolved | None, options: BatchOptions) -> Model:
    """Load the model of a plan on the engine that the plan is tied to, from its files if they are open already."""
    model = load_model(resolved or open_planned_model(plan), plan.contract, allow_pickle=options.allow_pickle)
    return model.with_engine(plan.engine)


def open_planned_model(plan: Plan) -> Resolved:
    """Open the very model version that a plan was made for; raises ModelUnfit where its files are others."""
    pin = plan.model
    resolved = open_model(name=pin.name, version=pin.version, source=pin.source)
    if resolved.pin.digest != pin.digest:
        message = (
            f"The files of {pin.uri} must be those that run {plan.run} was planned for (digest {pin.digest[:12]}), "
            f"got digest {resolved.pin.digest[:12]}. Put them back, or start a new run."
        )
        raise ModelUnfit(message)
    return resolved


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The plan of a call, and what is published of it: the manifest, and the parts that are gone or cut short since."""

    plan: Plan
    resolved: Resolved | None
    manifest: Manifest | None
    damaged: tuple[str, ...]

    @property
    def complete(self) -> Manifest | None:
        """The manifest, where every part that it lists is there."""
        return None if self.damaged else self.manifest


def find_published(storage: Storage, plan: Plan, resolved: Resolved | None) -> Found:
    """Return what is published of a plan: one read and a listing; nothing is opened.

    Raises RunNameTaken where a run of another call was published under its name.
    """
    manifest = find_manifest(storage, plan.run)
    if manifest is not None:
        check_manifest_key(manifest, plan)
    damaged = () if manifest is None else find_damaged_parts(storage, manifest)
    return Found(plan=plan, resolved=resolved, manifest=manifest, damaged=damaged)


def restage_plan(plan: Plan, storage: Storage) -> Plan:
    """Return a plan whose staged copies are there: a published run that has lost parts needs them once more.

    Raises RunDamaged where they do not come out the same.
    """
    if plan.source.format == "parquet":
        return plan
    copies = stage(plan.source, storage, plan.folder, plan.contract, plan.options.key_columns)
    tags = {file.path: file.tag for file in copies.files}
    if lost := [file.path for file in plan.snapshot.files if file.path not in tags]:
        message = (
            f"The copies of the source that run {plan.run} was scored from must come out the same again, got others in "
            f"place of {', '.join(lost[:3])}. Call again with the versions that made the run, or delete run={plan.run} "
            f"and {plan.folder} below the destination, and call again for all of it."
        )
        raise RunDamaged(message)
    # A copy is named by its content: one of the same name holds the same bytes, whenever it was made.
    files = tuple(file.model_copy(update={"tag": tags[file.path]}) for file in plan.snapshot.files)
    return plan.model_copy(update={"snapshot": plan.snapshot.model_copy(update={"files": files})})


def free_memory(read: Callable[[Path], str] = Path.read_text) -> int | None:
    """Return the bytes that this process may still take: what is available, within its cgroup.

    None where the system does not say (macOS).
    """
    try:
        lines = dict(line.split(":", 1) for line in read(Path("/proc/meminfo")).splitlines())
    except OSError:
        return None
    available = int(lines["MemAvailable"].split()[0]) << 10
    try:
        limit, used = (read(Path("/sys/fs/cgroup") / name).strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return available
    return available if limit == "max" else min(available, int(limit) - int(used))
