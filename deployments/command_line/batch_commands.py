"""Commands about batch runs: score a table, list the runs of a destination and their rejects, verify one."""

from __future__ import annotations

import shlex
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deployments.command_line.console import (
    AsJson,
    Challengers,
    Key,
    Options,
    build_model,
    describe_by,
    is_local,
    keep_stdout,
    make_flags,
    print_json,
    print_table,
    print_text,
    say,
    show_own_lines,
    show_status,
)
from serving.machine import pause_garbage_collection
from serving.option_words import name_options_by_flags

if TYPE_CHECKING:
    from tasks.batch.options import BatchOptions
    from tasks.batch.report import BatchReport
    from tasks.batch.runs import RunSummary
    from tasks.batch.verify import RunVerification
    from tasks.storage import Storage

Model = Annotated[
    str,
    typer.Argument(
        help="models:/NAME@ALIAS or models:/NAME/VERSION of the registry of MLFLOW_TRACKING_URI.", metavar="MODEL"
    ),
]
Source = Annotated[
    str,
    typer.Argument(help="A file, folder, glob or address of Parquet, Arrow, CSV or JSON lines.", metavar="SOURCE"),
]
Destination = Annotated[
    str, typer.Argument(help="The folder or address that has the predictions.", metavar="DESTINATION")
]
_DAMAGES_SHOWN = 20
# The kinds of damage that no advice to delete a file fits: the file must stay, or is gone already.
_KEPT_KINDS = ("manifest", "plan", "order", "table", "missing", "challenger")


def add_commands(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command(
        cls=describe_by("tasks.batch.options:BatchOptions"),
        epilog="Example:\n\n  overnight score models:/churn@champion s3://lake/in/ s3://lake/scores/ --key customer",
    )(score)
    app.command(epilog="Example:\n\n  overnight runs s3://lake/scores/")(runs)
    app.command(epilog="Example:\n\n  overnight rejects s3://lake/scores/ --output rejects.parquet")(rejects)
    app.command(epilog="Example:\n\n  overnight costs s3://lake/scores/ --output costs.html")(costs)
    app.command(epilog="Example:\n\n  overnight approve s3://lake/scores/ RUN --reason 'prices were raised'")(approve)
    app.command(epilog="Example:\n\n  overnight verify s3://lake/scores/ && echo whole")(verify)


def score(  # noqa: PLR0913 - each is an option of the command
    model: Model,
    source: Source,
    destination: Destination,
    *,
    key: Key = None,
    output: Annotated[str | None, typer.Option()] = None,
    name: Annotated[str | None, typer.Option()] = None,
    rescore: Annotated[str | None, typer.Option()] = None,
    batch_size: Annotated[int | None, typer.Option()] = None,
    slots: Annotated[int | None, typer.Option()] = None,
    memory_mb: Annotated[int | None, typer.Option()] = None,
    max_reject_fraction: Annotated[float | None, typer.Option()] = None,
    allow_pickle: Annotated[bool | None, typer.Option("--allow-pickle")] = None,
    experiment: Annotated[str | None, typer.Option()] = None,
    challenger: Challengers = None,
    options: Options = None,
    as_json: AsJson = False,
) -> None:
    """Score every row of a table with a registered model, and publish the predictions in one commit.

    The same call again is the same run: it resumes, or finds itself complete.
    """
    given = {
        "key_columns": key,
        "output": output,
        "name": name,
        "rescore": rescore,
        "batch_size": batch_size,
        "slots": slots,
        "memory_mb": memory_mb,
        "max_reject_fraction": max_reject_fraction,
        "allow_pickle": allow_pickle,
        "experiment": experiment,
        "challengers": challenger,
    }
    flags = make_flags(given, "--options", key_columns="--key", challengers="--challenger")
    with keep_stdout(for_json=as_json), name_options_by_flags(flags):
        from tasks.batch.options import BatchOptions  # noqa: PLC0415 - help needs none

        chosen = build_model(BatchOptions, given, options, "--options")
        with show_status("Checking model, source and destination"), pause_garbage_collection():
            _check_call(model, source, destination, chosen)
            from flows.batch import batch_inference  # noqa: PLC0415 - seconds of imports
        show_own_lines()
        report = batch_inference(model, source, destination, chosen)
    _print_report(report, as_json=as_json)


def _check_call(model: str, source: str, destination: str, options: BatchOptions) -> None:
    """Raise before the flow is imported what it would raise at its start, and have the model's process start meanwhile.

    Registry and stores must answer, the model must be registered, and a source on this machine must be there. A Prefect
    server keeps calls that fail, so that the flow itself finds the model or the source missing where there is one.
    """
    from flows.runtime.parameters import refuse_secrets  # noqa: PLC0415 - seconds of imports
    from serving.errors import OvernightError, ServerUnreachable  # noqa: PLC0415 - the same
    from serving.model.process_handle import FIRST_PROCESSES  # noqa: PLC0415 - the same
    from tasks.common.server_checks import check_servers, list_checks, list_prefect_checks  # noqa: PLC0415 - the same

    parameters = {"model": model, "source": source, "destination": destination}
    refuse_secrets(parameters)
    try:
        if is_local(source) and not Path(source).expanduser().exists():
            from tasks.batch.source import pin_source  # noqa: PLC0415 - seconds of imports

            # Raises BadInput where a glob selects nothing, or a path is none.
            pin_source(source, destination, csv=options.csv is not None)
        if find_spec("torch") is None and options.environment != "model":
            # Every model runs in processes here. The first imports MLflow while this one does, to ask for the model.
            FIRST_PROCESSES.prepare(sys.executable)
        checks = list_checks(parameters, uses_registry=True)
        check_servers(checks)
        _find_model(model, options)
    except ServerUnreachable:
        # One message names all of those that do not answer. The flow asks Prefect's, which takes a second to import.
        check_servers([*list_prefect_checks(), *checks])
        raise
    except OvernightError:
        if not list_prefect_checks():
            raise


def _find_model(model: str, options: BatchOptions) -> None:
    """Raise ModelNotFound where the registry does not have a model; start the process of one that runs in processes."""
    from serving.model.registry import resolve_kept_model  # noqa: PLC0415 - seconds of imports
    from tasks.batch.planned_models import prepare_model_process  # noqa: PLC0415 - the same
    from tasks.common.names import BLOCK  # noqa: PLC0415 - the same

    if not model.startswith(BLOCK) and (resolved := resolve_kept_model(model)) is not None:
        prepare_model_process(resolved, options)


def _print_report(report: BatchReport, *, as_json: bool) -> None:
    if as_json:
        print_json({**report.model_dump(mode="json"), "rows_rejected": report.rows_rejected})
        return
    print_table(report.table(), f"Run {report.run}", header=False)
    print_text(f"Read the predictions:  {report.read_with}\nThe report with its plot:  {report.report}")


def runs(destination: Destination, *, as_json: AsJson = False) -> None:
    """List the runs of a destination, the newest first, with what each has come to.

    The exit code is 0 only where there is one, and none is damaged.
    """
    from tasks.batch.runs import list_runs  # noqa: PLC0415 - help needs none
    from tasks.storage import open_storage  # noqa: PLC0415 - the same

    storage = open_storage(destination)
    found = list_runs(storage)
    if as_json:
        print_json({"destination": storage.url, "runs": [each.model_dump(mode="json") for each in found]})
    elif not found:
        say(f"{storage.url} has no run. Correct the address, or make one:  overnight score MODEL SOURCE DESTINATION")
    else:
        print_table([_list_figures(each) for each in found])
        for each in found:
            if each.note:
                say(f"Run {each.run} is {each.state}: {each.note}")
    if damaged := [each.run for each in found if each.state == "damaged"]:
        command = shlex.join(["overnight", "verify", destination, "--run", damaged[0]])
        which = f"the first of {len(damaged)} damaged runs" if len(damaged) > 1 else "it"
        say(f"See what of {which} is damaged, and how to repair it:  {command}")
    if damaged or not found:
        raise typer.Exit(1)


def _list_figures(run: RunSummary) -> dict[str, str]:
    is_whole = run.rows_done == run.rows
    return {
        "run": run.run,
        "model": run.model or "",
        "rows": f"{run.rows:,}" if is_whole else f"{run.rows_done:,} of {run.rows:,}",
        "rejects": "" if run.rows_rejected is None else f"{run.rows_rejected:,}",
        "parts": f"{run.parts:,}" if run.parts == run.parts_planned else f"{run.parts:,} of {run.parts_planned:,}",
        "state": run.state,
        "planned (UTC)": f"{run.planned_at:%Y-%m-%d %H:%M}" if run.planned_at else "",
        "order": str(run.order or ""),
    }


def rejects(
    destination: Destination,
    *,
    run: Annotated[
        str | None, typer.Option(help="The run, which need not be complete. Without: the newest complete one.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Write the rows to this new file, with their columns in the source, to correct and score them.",
            metavar="FILE.parquet|FILE.csv",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Count the rows that a run has rejected by column and reason, and write them as the source has them with --output.

    Such a row has the columns that the run reads, keys first, then reject_column and reject_reason.
    """
    from tasks.batch.reject_rows import list_rejects, write_rejects  # noqa: PLC0415 - help needs none
    from tasks.storage import open_storage  # noqa: PLC0415 - the same

    found = list_rejects(destination, run)
    rows = write_rejects(destination, output, found.run) if output is not None and found.rejects else 0
    if as_json:
        figures = {**found.model_dump(mode="json"), "rows_rejected": found.rows_rejected}
        print_json({"destination": open_storage(destination).url, **figures, "output": str(output) if rows else None})
        return
    if not found.rejects:
        print_text(f"Run {found.run} has no rejects.")
        return
    print_table(
        [{"column": each.column or "model", "reason": each.reason, "rows": f"{each.rows:,}"} for each in found.rejects]
    )
    print_text(f"Of the {found.rows:,} rows in the parts of run {found.run}, {found.rows_rejected:,} are rejects.")
    if rows:
        print_text(
            f"{rows:,} rows are in {output} as the source has them. Correct them in the source itself, or there, and "
            "upsert that file into a table."
        )
        return
    command = ["overnight", "rejects", destination, "--run", found.run, "--output", "rejects.parquet"]
    print_text(f"Write these rows as the source has them:  {shlex.join(command)}")


def costs(
    destinations: Annotated[
        list[str], typer.Argument(help="The folders or addresses that have predictions.", metavar="DESTINATION...")
    ],
    *,
    output: Annotated[
        Path | None, typer.Option(help="Write a page with table and plot to this file, as HTML.", metavar="FILE")
    ] = None,
    prefect: Annotated[
        bool, typer.Option("--prefect", help="Show the table among the artifacts of the Prefect server too.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List what the published runs of destinations cost, beside on-demand machines alone and an always-on endpoint.

    A cost is known where nights were given prices, or where OVERNIGHT_DOLLARS_PER_HOUR was set on the machine.
    """
    from tasks.batch.cost_report import (  # noqa: PLC0415 - help needs none
        DestinationCosts,
        list_notes,
        make_cost_page,
        publish_costs,
        sum_costs,
        tabulate_costs,
    )
    from tasks.batch.costs import read_run_costs  # noqa: PLC0415 - the same
    from tasks.storage import open_storage  # noqa: PLC0415 - the same

    storages = [open_storage(each) for each in destinations]
    found = [DestinationCosts(destination=each.url, runs=read_run_costs(each)) for each in storages]
    with_runs = [each for each in found if each.runs]
    for each in found:
        if not each.runs:
            say(f"{each.destination} has no published run. `overnight runs` lists the others.")
        elif not as_json:
            print_table(tabulate_costs(each.runs), each.destination)
            print_text("\n".join([sum_costs(each.runs), *(f"  {note}" for note in list_notes(each.runs))]))
    if output is not None and with_runs:
        output.write_bytes(make_cost_page(with_runs))
        say(f"The page with the plot:  {output}")
    if prefect and with_runs:
        publish_costs(with_runs)
    if as_json:
        by_destination = {each.destination: [run.model_dump(mode="json") for run in each.runs] for each in found}
        print_json({"destinations": by_destination})


def verify(
    destination: Destination,
    *,
    run: Annotated[str | None, typer.Option(help="The run to verify. Without: the newest that was published.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Verify every run of the destination.")] = False,
    sample: Annotated[
        str | None,
        typer.Option(
            help="Score some of the parts again that the run has from earlier runs, or that bear no digest, such as "
            "1%, 100% or 20, and compare the bytes.",
            metavar="PERCENT|COUNT",
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Chooses the same parts again. Without: others each time.")] = None,
    as_json: AsJson = False,
) -> None:
    """Open every part of a run and hold it against the manifest and the plan; name all that is damaged.

    With --sample, parts of earlier runs, and those of earlier releases, which bear no digest of their bytes, are scored
    again with the model of the plan, which must load here.

    The exit code is 0 only where what was verified is complete, and nothing of it is damaged.
    """
    from tasks.batch.verify import choose_runs, verify_run  # noqa: PLC0415 - help needs none
    from tasks.storage import open_storage  # noqa: PLC0415 - the same

    if sample is not None:
        from tasks.batch.part_proof import count_sample  # noqa: PLC0415 - the same

        count_sample(sample, 1)
    storage = open_storage(destination)
    verified = []
    for each in choose_runs(storage, run, every=every):
        say(f"Reading run {each}")
        result = verify_run(storage, each)
        verified.append(result if sample is None else _prove(storage, result, sample, seed, for_json=as_json))
    if as_json:
        print_json({"destination": storage.url, "runs": [each.model_dump(mode="json") for each in verified]})
    else:
        for result in verified:
            _print_verification(result, storage)
    if any(result.state != "complete" for result in verified):
        raise typer.Exit(1)


def approve(
    destination: Destination,
    run: Annotated[str, typer.Argument(help="The run that its gate has refused, as `overnight runs` lists it.")],
    *,
    by: Annotated[str, typer.Option(help="Who approves it; kept beside the run.")] = "",
    reason: Annotated[str, typer.Option(help="Why; kept beside the run.")] = "",
    as_json: AsJson = False,
) -> None:
    """Approve a run that its gate has refused: the same call then publishes it, and scores nothing again.

    What is approved is exactly what it was refused for last. With other figures it is refused again.
    """
    from tasks.batch.gate_records import approve_run  # noqa: PLC0415 - help needs none
    from tasks.storage import open_storage  # noqa: PLC0415 - the same

    storage = open_storage(destination)
    refusal = approve_run(storage, run, by, reason)
    if as_json:
        print_json({"destination": storage.url, **refusal.model_dump(mode="json")})
        return
    say(f"Run {run} is approved although, beside {refusal.baseline}:")
    for finding in refusal.findings:
        say(f"  {finding}")
    say("Make the call again that scored it, or resume its flow run where that waits: it publishes the run.")


def _prove(
    storage: Storage, result: RunVerification, sample: str, seed: int | None, *, for_json: bool
) -> RunVerification:
    """Score some parts again; a model may print, too."""
    import secrets  # noqa: PLC0415 - help needs none

    say(f"Scoring {sample} of the parts that run {result.run} has from earlier runs, or that bear no digest")
    chosen = secrets.randbelow(1 << 32) if seed is None else seed
    with keep_stdout(for_json=for_json):
        from tasks.batch.part_proof import prove_reused_parts  # noqa: PLC0415 - a model's libraries

        return prove_reused_parts(storage, result, sample, seed=chosen)


def _advise_repair(result: RunVerification, storage: Storage) -> list[str]:
    """Return the lines that say how a damaged run is repaired, with the command that deletes its damaged files."""
    from tasks.storage import LocalStorage  # noqa: PLC0415 - help needs none

    kinds = {damage.kind for damage in result.damages}
    if kinds <= {"manifest", "plan", "order"}:
        return ["  Put the record back as it was written. Where that can't be done, score again with --rescore TEXT."]
    if kinds == {"challenger"}:
        stands = "The run itself is whole, and the comparison that was made of its challengers stands."
        return [f"  {stands} To compare once more, score again with --rescore TEXT."]
    if kinds <= {"manifest", "plan", "order", "table"}:
        return ["  Repair the table as is said above, and put the other records back as they were written."]
    again = f"make the call again that scored the run, with {result.model}" if result.model else "make the call again"
    then = f"{again}: it scores those parts again, and publishes what was there before."
    paths = (damage.path for damage in result.damages if damage.kind not in _KEPT_KINDS)
    files = [storage.address(path) for path in dict.fromkeys(paths)]
    if not files:
        return [f"  {then[0].upper()}{then[1:]}"]
    if isinstance(storage, LocalStorage):
        left = f" and so on for {len(files) - _DAMAGES_SHOWN} more" if len(files) > _DAMAGES_SHOWN else ""
        return [
            f"  Delete the damaged files:  {shlex.join(['rm', *files[:_DAMAGES_SHOWN]])}{left}",
            f"  Then {then}",
        ]
    listed = ", ".join(files[:_DAMAGES_SHOWN]) + (" and more" if len(files) > _DAMAGES_SHOWN else "")
    return [f"  Delete the damaged objects {listed}.", f"  Then {then}"]


def _print_verification(result: RunVerification, storage: Storage) -> None:
    counts = f"{result.parts_read:,} of {result.parts:,} parts were read, {result.rows_read:,} of {result.rows:,} rows"
    lines = [f"Run {result.run} is {result.state}: {counts} are in parts that are as they must be."]
    lines += [f"  {damage.kind}: {damage.path}: {damage.message}" for damage in result.damages[:_DAMAGES_SHOWN]]
    if len(result.damages) > _DAMAGES_SHOWN:
        lines.append(f"  and {len(result.damages) - _DAMAGES_SHOWN} more; --json has all of them.")
    if result.damages:
        lines += _advise_repair(result, storage)
    print_text("\n".join([*lines, *(f"  note: {note}" for note in result.notes)]))
