"""The run of a call: resolved once, planned once, and found again by the same call. Nothing is scored here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

from serving.errors import ModelUnfit, RunDamaged, SourceEmpty
from serving.extras import import_extra
from serving.model.contract import Contract
from serving.model.interface import Model, Tunable
from serving.model.loading import load_model
from serving.model.registry import Resolved, open_model, resolve_model
from tasks.batch.dataset import Dataset, Snapshot, open_dataset
from tasks.batch.delta import check_delta
from tasks.batch.manifest import Manifest, check_manifest_key, find_damaged_parts, find_intact_manifest, find_manifest
from tasks.batch.memory import check_memory
from tasks.batch.options import BatchOptions
from tasks.batch.parts import check_names, part_schema
from tasks.batch.plan import (
    ROOT,
    Plan,
    RunStart,
    check_plan_key,
    load_plan,
    load_started_plan,
    make_plan,
    run_key,
    save_plan,
    save_start,
)
from tasks.batch.publish import claim_order_number, find_earlier_keys
from tasks.batch.source import TableVersion, pin_source
from tasks.batch.staging import stage
from tasks.batch.tuning import choose_sizes
from tasks.storage import Storage, check_create_only


class ModelLoader(Protocol):
    """Loads a resolved model, as load_model does."""

    def __call__(self, resolved: Resolved, contract: Contract, *, allow_pickle: bool) -> Tunable:
        """Return the model; raises ModelUnfit."""
        ...


def utc_now() -> datetime:
    """Return the time by this machine's clock."""
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRequest:
    """A call, resolved: the model version, the files, the contract between them, and the run key of all that."""

    resolved: Resolved
    snapshot: Snapshot
    contract: Contract
    options: BatchOptions
    key: str

    @property
    def run(self) -> str:
        """The name of the run's folders."""
        return self.options.name or self.key


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRun:
    """A run that this call has planned. Nothing of it is scored yet."""

    plan: Plan
    resolved: Resolved


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumedRun:
    """A run that was planned before and is not complete: some of its parts may be there.

    `resolved` is None where the plan alone names the model. `damaged` lists the parts that a published run has lost.
    """

    plan: Plan
    resolved: Resolved | None
    damaged: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CompleteRun:
    """A run that is published, and whose parts are all there."""

    plan: Plan
    manifest: Manifest


RunState = NewRun | ResumedRun | CompleteRun


def resolve_request(model: str, source: str | Sequence[str], destination: str, options: BatchOptions) -> RunRequest:
    """Resolve the model's alias and list the source, once. Nothing is written.

    Raises:
        ModelNotFound: The registry has no such model, version or alias.
        BadInput: The source or the options can't be used; its kinds say why.
    """
    resolved = resolve_model(model)
    contract = resolved.contract(options.input_columns, options.policies, options.params)
    columns = [*(column.name for column in contract.columns), *options.key_columns]
    version = TableVersion(number=options.source_version, timestamp=options.source_timestamp)
    snapshot = pin_source(source, destination, columns, version, csv=options.csv is not None)
    key = run_key(resolved.pin, snapshot, contract, options)
    return RunRequest(resolved=resolved, snapshot=snapshot, contract=contract, options=options, key=key)


def check_columns(request: RunRequest) -> None:
    """Hold the columns of a Parquet source against a request, by the footer of its first file. Nothing is written.

    Raises SchemaMismatch or BadInput, as planning does, which reads every footer.
    """
    snapshot = request.snapshot
    if snapshot.format != "parquet" or any(file.partition_values for file in snapshot.files):
        # Text is read as it is staged, and the types of partitions are those of all files together.
        return
    first = snapshot.model_copy(update={"files": snapshot.files[:1]})
    names = [column.name for column in request.contract.columns]
    with suppress(SourceEmpty):
        _check_dataset(request, open_dataset(first, names, request.options.key_columns))


def _check_dataset(request: RunRequest, dataset: Dataset) -> None:
    """Raise SchemaMismatch or BadInput where the columns of a dataset are not those that a request needs."""
    request.contract.check(dataset.schema, f"The dataset at {request.snapshot.title}")
    check_names(dataset, request.contract, request.options)


def find_complete_run(storage: Storage, request: RunRequest) -> Manifest | None:
    """Return the manifest of a request whose run is published and has all its parts; None otherwise.

    A few reads and a listing; no file is opened.
    """
    manifest = find_intact_manifest(storage, request.run)
    return manifest if manifest is not None and manifest.key == request.key else None


def find_run(
    request: RunRequest | RunStart,
    storage: Storage,
    flow_run_id: str,
    *,
    load: ModelLoader = load_model,
    clock: Callable[[], datetime] = utc_now,
) -> RunState:
    """Return the run of a flow run: planned now, planned before, or complete.

    Args:
        request: What is asked for, or the run that an earlier attempt of the flow run has started.
        storage: The destination.
        flow_run_id: The flow run, which is tied to the run from here on; a complete run leaves no trace of it.
        load: Loads the model that a new plan is made for.
        clock: Says when a new plan is made.

    Raises:
        RunNameTaken: The name of the run holds a run of another request.
        OvernightError: Its other kinds, where the request can't be carried out; before anything is scored.
    """
    if isinstance(request, RunStart):
        return _find_state(storage, load_started_plan(storage, request), None, is_new=False)
    standing = load_plan(storage, request.run)
    plan = _plan_run(request, storage, load, clock) if standing is None else check_plan_key(standing, request.key)
    run = _find_state(storage, plan, request.resolved, is_new=standing is None)
    planned = RunStart(run=plan.run, key=plan.key)
    start = planned if isinstance(run, CompleteRun) else save_start(storage, flow_run_id, planned)
    # An earlier attempt of this flow run may have written its start meanwhile: that is the one that counts.
    return run if start == planned else find_run(start, storage, flow_run_id)


def _find_state(storage: Storage, plan: Plan, resolved: Resolved | None, *, is_new: bool) -> RunState:
    """Return a planned run as it stands, by one read and a listing. Raises RunNameTaken."""
    manifest = find_manifest(storage, plan.run)
    if manifest is None:
        return NewRun(plan=plan, resolved=resolved) if is_new and resolved else ResumedRun(plan=plan, resolved=resolved)
    check_manifest_key(manifest, plan)
    damaged = find_damaged_parts(storage, manifest)
    if damaged:
        return ResumedRun(plan=plan, resolved=resolved, damaged=damaged)
    return CompleteRun(plan=plan, manifest=manifest)


def _plan_run(request: RunRequest, storage: Storage, load: ModelLoader, clock: Callable[[], datetime]) -> Plan:
    """Make and write the plan of a request. What can be refused is refused here, before anything is scored."""
    dataset = _open_dataset(request, storage)
    _check_dataset(request, dataset)
    order_min = _check_table(request, storage, dataset)
    model = load(request.resolved, request.contract, allow_pickle=request.options.allow_pickle)
    plan = make_plan(
        key=request.key,
        model=request.resolved.pin,
        contract=request.contract,
        options=request.options,
        source=request.snapshot,
        dataset=dataset,
        sizes=choose_sizes(request.resolved, model, request.contract, request.options, dataset),
        planned_at=clock(),
    )
    check_memory(plan, choose_slots(request.options, model.with_engine(plan.engine)), request.options)
    check_create_only(storage)
    order = claim_order_number(storage, plan.run, above=order_min)
    return save_plan(storage, plan.model_copy(update={"order": order}))


def _check_table(request: RunRequest, storage: Storage, dataset: Dataset) -> int:
    """Hold a request against the table that its rows go into; return the highest order number that it holds, or 0."""
    options = request.options
    if options.output == "parquet":
        return 0
    schema = part_schema(request.contract, options, dataset)
    if options.output == "iceberg":
        writing = import_extra("tasks.batch.iceberg_table", "iceberg")
        return int(writing.check_iceberg(storage, schema, request.key, options))
    appends = options.delta_mode == "append"
    earlier = find_earlier_keys(storage, request.resolved.pin, request.snapshot, options) if appends else ()
    return check_delta(storage, schema, request.key, earlier)


def _open_dataset(request: RunRequest, storage: Storage) -> Dataset:
    names = [column.name for column in request.contract.columns]
    snapshot = request.snapshot
    if snapshot.format != "parquet":
        folder = f"{ROOT}/{request.run}"
        snapshot = stage(snapshot, storage, folder, request.contract, request.options.key_columns, request.options.csv)
    return open_dataset(snapshot, names, request.options.key_columns)


def choose_slots(options: BatchOptions, model: Model) -> int:
    """Return how many slots a run has: what the options say, or what suits the model on this machine."""
    return options.slots or model.slots


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


def restage_plan(plan: Plan, storage: Storage) -> Plan:
    """Return a plan whose staged copies are there: a published run that has lost parts needs them once more.

    Raises RunDamaged where they do not come out the same.
    """
    if plan.source.format == "parquet":
        return plan
    copies = stage(plan.source, storage, plan.folder, plan.contract, plan.options.key_columns, plan.options.csv)
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
