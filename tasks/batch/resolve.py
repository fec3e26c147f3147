"""The run of a call: planned once, and found again by the same call. Nothing is scored here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

import pyarrow as pa

from serving.errors import RunDamaged, SourceEmpty
from serving.extras import import_extra
from serving.machine import find_release, utc_now
from serving.model.contract import Contract
from serving.model.interface import Model, Tunable
from serving.model.loading import load_model
from serving.model.processes import ProcessOptions
from serving.model.registry import Resolved
from serving.option_words import give_option
from tasks.batch.challengers import (
    check_kept_columns,
    find_label_kind,
    list_columns_beside,
)
from tasks.batch.dataset import Dataset, Snapshot, open_dataset
from tasks.batch.delta import check_delta
from tasks.batch.destination_source import check_source
from tasks.batch.feature_pins import remove_features
from tasks.batch.feature_sources import (
    OpenFeatures,
    check_spine,
    make_feature_pins,
    narrow_features,
    open_features,
)
from tasks.batch.labels import open_label_table
from tasks.batch.manifest import Manifest, check_manifest_key, find_damaged_parts, find_intact_manifest, find_manifest
from tasks.batch.memory import check_memory, use_jemalloc
from tasks.batch.options import BatchOptions
from tasks.batch.parts import check_names, part_schema
from tasks.batch.plan import (
    ROOT,
    Challenger,
    Plan,
    Versions,
    digest_plan,
    digest_shape,
    make_plan,
    used_columns,
)
from tasks.batch.planned_models import choose_environment, choose_slots, prepare_model_process
from tasks.batch.promotion import check_alias
from tasks.batch.publish import claim_order_number, find_earlier_keys
from tasks.batch.reuse import describe_making, find_earlier_plan, find_earlier_runs, keep_sizes, refer_to_parts
from tasks.batch.run_records import RunStart, check_plan_key, load_plan, load_started_plan, save_plan, save_start
from tasks.batch.run_request import RunRequest
from tasks.batch.staging import choose_copied, list_copied, stage
from tasks.batch.tuning import choose_sizes
from tasks.storage import Storage, check_create_only

# Takes the name of a step, and measures how long the block takes.
Measure = Callable[[str], AbstractContextManager[None]]


class ModelLoader(Protocol):
    """Loads a resolved model, as load_model does."""

    def __call__(
        self, resolved: Resolved, contract: Contract, *, allow_pickle: bool, processes: ProcessOptions
    ) -> Tunable:
        """Return the model; raises ModelUnfit."""
        ...


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


def _open_files(request: RunRequest, snapshot: Snapshot, names: Sequence[str]) -> Dataset:
    """Open files for some columns and the keys, as the options of a request say."""
    options = request.options
    types, may_be_empty = options.partition_types, options.on_empty == "publish"
    return open_dataset(snapshot, names, options.key_columns, request.nullable, types, may_be_empty=may_be_empty)


def _list_names(features: Sequence[OpenFeatures]) -> list[str]:
    """Return the columns that models get from feature tables."""
    return [field.name for each in features for field in each.fields]


def _check_dataset(request: RunRequest, dataset: Dataset, features: Sequence[OpenFeatures]) -> None:
    """Raise SchemaMismatch or BadInput where the columns of a dataset are not those that a request needs."""
    check_spine(dataset, request.options, features)
    fields = [field for each in features for field in each.fields]
    schema = pa.schema([*dataset.schema, *fields])
    where = f"The dataset at {request.snapshot.title}" + (" with its features" if features else "")
    options = request.options
    for contract in (request.contract, *(each.contract for each in request.challengers)):
        contract.check(schema, where)
        check_names(dataset, contract, options)
    check_kept_columns(schema, options, where)
    if (labels := options.labels) is not None and labels.source is None:
        kind = schema.field(labels.column).type
        find_label_kind(labels, request.contract, kind, options.promote_if)


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
    measure: Measure = lambda _step: nullcontext(),
) -> RunState:
    """Return the run of a flow run: planned now, planned before, or complete.

    Args:
        request: What is asked for, or the run that an earlier attempt of the flow run has started.
        storage: The destination.
        flow_run_id: The flow run, which is tied to the run from here on; a complete run leaves no trace of it.
        load: Loads the model that a new plan is made for.
        clock: Says when a new plan is made.
        measure: Measures how long it takes to `load` models and to `tune` them, which is most of a first call.

    Raises:
        RunNameTaken: The name of the run holds a run of another request.
        OvernightError: Its other kinds, where the request can't be carried out; before anything is scored.
    """
    if isinstance(request, RunStart):
        return _find_state(storage, load_started_plan(storage, request), None, is_new=False)
    standing = load_plan(storage, request.run)
    if standing is not None:
        plan = check_plan_key(standing, request.key)
    else:
        made = _plan_run(request, storage, load, clock, measure)
        # Now that the run has its number: one of a later move of the alias gets a higher one.
        if (moved := request.ask_again()) is not None:
            return find_run(moved, storage, flow_run_id, load=load, clock=clock, measure=measure)
        plan = save_plan(storage, made)
    run = _find_state(storage, plan, request.resolved, is_new=standing is None)
    planned = RunStart(run=plan.run, key=plan.key, release=find_release())
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


def _plan_run(
    request: RunRequest, storage: Storage, load: ModelLoader, clock: Callable[[], datetime], measure: Measure
) -> Plan:
    """Make the plan of a request, with its number. What can be refused is refused here, before anything is scored."""
    options = request.options
    check_source(storage, options, request.addresses)
    use_jemalloc()
    prepare_model_process(request.resolved, options)
    opened = open_features(options, request.features, request.contract_of_all)
    dataset = _open_dataset(request, storage, opened)
    _check_dataset(request, dataset, opened)
    features, own = make_feature_pins(opened), narrow_features(opened, request.contract)
    own_features = features if own == opened else make_feature_pins(own)
    if options.promote_if is not None:
        check_alias(request.resolved.pin, options.promote_if)
    if options.labels is not None and options.labels.source is not None:
        labels = open_label_table(options.labels, options.key_columns, dataset.schema, storage.url)
        find_label_kind(options.labels, request.contract, labels.label_type, options.promote_if)
    order_min = _check_table(request, storage, dataset)
    environment, processes = choose_environment(request.resolved, options)
    with measure("load"):
        model = load(request.resolved, request.contract, allow_pickle=options.allow_pickle, processes=processes)
    made_with = describe_making(request.resolved, environment)
    shape = digest_shape(request.resolved.pin, request.contract, options)
    runs = find_earlier_runs(storage, shape, made_with, request.resolved.pin.uri, options)
    earlier = find_earlier_plan(storage, runs)
    sizes = keep_sizes(earlier, model, options, dataset.rows) if earlier else None
    if sizes is None:
        with measure("tune"):
            sizes = choose_sizes(request.resolved, model, request.contract, options, dataset, own_features)
    plan = make_plan(
        key=request.key,
        model=request.resolved.pin,
        contract=request.contract,
        options=options,
        source=request.snapshot,
        dataset=dataset,
        sizes=sizes,
        versions=Versions(environment=environment, made_with=runs.made_with),
        planned_at=clock(),
    )
    plan = plan.model_copy(update={"features": features, "addresses": request.addresses})
    plan = refer_to_parts(storage, plan, runs)
    model = model.with_engine(plan.engine)
    slots = choose_slots(options, model)
    plan, challengers = _plan_challengers(request, plan, dataset, load, slots, measure)
    more = sum(pin.row_bytes for pin in features) - sum(pin.row_bytes for pin in own_features)
    plan = plan.model_copy(update={"beside_bytes": plan.beside_bytes + more})
    check_memory(plan, slots, options, [model, *challengers])
    check_create_only(storage)
    table = _open_table_folder(request, storage, dataset)
    order = claim_order_number(storage, plan.run, above=order_min, table=table)
    return plan.model_copy(update={"order": order})


def _plan_challengers(
    request: RunRequest, plan: Plan, dataset: Dataset, load: ModelLoader, slots: int, measure: Measure
) -> tuple[Plan, list[Model]]:
    """Return the plan with its challengers, and these, loaded. The chunks stay those of a run without.

    Without rows there is nothing to compare, and no challenger in the plan.
    """
    if not request.challengers or not dataset.rows:
        return plan, []
    options = request.options
    found = list_columns_beside(request.contract, request.challengers, options)
    beside = [name for name in found if name not in plan.feature_names]
    names = [*plan.columns, *options.join_columns, *beside]
    with_beside = _open_files(request, dataset.snapshot, names) if beside else dataset
    # As many passes are made side by side as the model makes, each by as many threads.
    limited = options.model_copy(update={"slots": slots})
    planned, models = [], list[Model]()
    for each in request.challengers:
        environment, processes = choose_environment(each.resolved, options)
        with measure("load"):
            model = load(each.resolved, each.contract, allow_pickle=options.allow_pickle, processes=processes)
        with measure("tune"):
            sizes = choose_sizes(each.resolved, model, each.contract, limited, with_beside, plan.features)
        engine = sizes.engine.model_copy(update={"threads": plan.engine.threads})
        planned.append(
            Challenger(
                model=each.pin,
                contract=each.contract,
                columns=tuple(used_columns(each.contract, BatchOptions(), with_beside.schema)),
                batch_size=sizes.batch_size,
                batch_unit=sizes.batch_unit,
                engine=engine,
                environment=environment,
                made_with=describe_making(each.resolved, environment),
            )
        )
        models.append(model.with_engine(engine))
    read = tuple(name for name in beside if name in with_beside.schema.names)
    update: dict[str, object] = {"challengers": tuple(planned), "columns_beside": read}
    update["columns_kept"] = options.columns_kept
    typed = _take_types(dataset.snapshot, with_beside.snapshot)
    groups = [_find_largest(each) for each in (with_beside, dataset)]
    row, reading = (max(0, more - own) for more, own in zip(*groups, strict=True))
    update |= {"snapshot": typed, "beside_bytes": row, "beside_reading": int(reading)}
    plan = plan.model_copy(update=update)
    return plan.model_copy(update={"digest": digest_plan(plan)}), models


def _take_types(snapshot: Snapshot, opened: Snapshot) -> Snapshot:
    """Return a snapshot whose files say what is read as another type, of the columns that challengers read too."""
    files = zip(snapshot.files, opened.files, strict=True)
    typed = tuple(file.model_copy(update={"read_as": other.read_as}) for file, other in files)
    return snapshot.model_copy(update={"files": typed, "types": opened.types})


def _find_largest(dataset: Dataset) -> tuple[float, float]:
    """Return the most bytes of a decoded row, and of what is held of a row group as it is read, of the columns used."""
    groups = [(size, rows) for file in dataset.snapshot.files for size, rows in file.sized_groups if rows]
    row = max((size.decoded / rows for size, rows in groups), default=0.0)
    return row, max((float(size.reading) for size, _ in groups), default=0.0)


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
    return check_delta(storage, schema, request.key, earlier, options.delta_mode)


def _open_table_folder(request: RunRequest, storage: Storage, dataset: Dataset) -> Storage | None:
    """Open where the table lies that a run goes into, None where that is the destination, and no other feeds it."""
    if request.options.output != "iceberg":
        return None
    schema = part_schema(request.contract, request.options, dataset)
    writing = import_extra("tasks.batch.iceberg_table", "iceberg")
    folder: Storage = writing.open_table_folder(storage, schema, request.options)
    return folder


def _open_dataset(request: RunRequest, storage: Storage, features: Sequence[OpenFeatures]) -> Dataset:
    try:
        return _open_rows(request, storage, features)
    except SourceEmpty as error:
        advice = f"Where days without rows are expected, give {give_option('on_empty', 'publish')}."
        message = f"{error} {advice}"
        raise SourceEmpty(message) from None


def _open_rows(request: RunRequest, storage: Storage, features: Sequence[OpenFeatures]) -> Dataset:
    snapshot, options = request.snapshot, request.options
    if snapshot.format != "parquet":
        copied = choose_copied(request.contract_of_all, _list_names(features), options)
        folder, may_be_empty = f"{ROOT}/{request.run}", options.on_empty == "publish"
        how = options.csv, options.missing_columns
        snapshot = stage(snapshot, storage, folder, *copied, *how, may_be_empty=may_be_empty)
    # The source must have the columns of the model that no feature table has.
    names = [column.name for column in remove_features(request.contract, _list_names(features)).columns]
    return _open_files(request, snapshot, [*names, *options.join_columns])


def restage_plan(plan: Plan, storage: Storage) -> Plan:
    """Return a plan whose staged copies are there: a published run that has lost parts needs them once more.

    Raises RunDamaged where they do not come out the same.
    """
    if plan.source.format == "parquet" or not plan.rows:
        return plan
    copies = stage(
        plan.source, storage, plan.folder, *list_copied(plan), plan.options.csv, plan.options.missing_columns
    )
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
