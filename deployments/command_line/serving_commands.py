"""Commands about models and endpoints: check a model, put it online, retire it, choose how its workload is served."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from deployments.command_line.console import (
    AllowPickle,
    AsJson,
    build_model,
    keep_stdout,
    make_flags,
    print_json,
    print_table,
    print_text,
    read_document,
    say,
    show_own_lines,
    show_status,
)
from serving.errors import BadInput
from serving.option_words import name_options_by_flags

Gateway = Annotated[str | None, typer.Option(help="The URL of the gateway.", envvar="OVERNIGHT_GATEWAY", metavar="URL")]
Target = Annotated[
    str | None,
    typer.Option(
        help='The model server, as JSON or @FILE: {"kind": "triton", "repository": "/srv/models"}.',
        envvar="OVERNIGHT_TARGET",
        metavar="JSON|@FILE",
    ),
]


def add_commands(app: typer.Typer) -> None:
    """Add the commands of this module."""
    endpoints = typer.Typer()
    endpoints.callback(
        invoke_without_command=True,
        no_args_is_help=True,
        epilog="Examples:\n\n"
        "  overnight endpoint --name churn --model models:/churn@champion --latency-ms 50 --rate 200\n"
        "  overnight endpoint --spec @churn.yaml\n"
        "  overnight endpoint retire churn",
    )(endpoint)
    endpoints.command(epilog="Example:\n\n  overnight endpoint retire churn")(retire)
    app.add_typer(endpoints, name="endpoint")
    app.command(
        epilog="Example:\n\n  overnight choose workload.yaml\n\n"
        "Where workload.yaml is, for requests that must be answered within 50 ms:\n\n"
        "  name: churn\n"
        "  model: models:/churn@champion\n"
        "  consumer: {kind: requests, latency_ms: 50}\n"
        "  arrivals: {kind: rate, per_second: 5}\n"
        "  machines: [{kind: c7i.large, speed: 1, prices: {on_demand: 0.0893}}]",
    )(choose)
    models = typer.Typer(help="Look at a registered model.", no_args_is_help=True)
    models.command("check", epilog="Example:\n\n  overnight model check models:/churn@champion")(check)
    models.command(
        epilog="Examples:\n\n"
        "  overnight model tuning models:/churn@champion\n"
        "  overnight model tuning models:/churn@champion --drop"
    )(tuning)
    app.add_typer(models, name="model")


def endpoint(  # noqa: PLR0913 - each is an option of the command
    ctx: typer.Context,
    *,
    name: Annotated[str | None, typer.Option(help="The endpoint's name, by which callers ask for it.")] = None,
    model: Annotated[str | None, typer.Option(help="The model, as `overnight score` takes it.")] = None,
    latency_ms: Annotated[
        float | None, typer.Option(help="Milliseconds within which a request is to be answered; needs --rate.")
    ] = None,
    rate: Annotated[float | None, typer.Option(help="Rows a second that are expected of all callers together.")] = None,
    keep_warm: Annotated[
        str | None, typer.Option(help="Seconds after the last request until the model is unloaded, or auto.")
    ] = None,
    canary: Annotated[
        float | None, typer.Option(help="Percent of the traffic that a new version gets first; else all at once.")
    ] = None,
    canary_requests: Annotated[
        int | None, typer.Option(help="Requests that the canary must answer before it gets the rest; 100.")
    ] = None,
    canary_seconds: Annotated[
        float | None, typer.Option(help="Seconds after which a canary with fewer requests is rolled back; 600.")
    ] = None,
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="Leave the canary to the gateway, which decides by the same rule.")
    ] = False,
    api_key: Annotated[
        list[str] | None,
        typer.Option(help="An environment variable that holds a key of callers; again for each further one."),
    ] = None,
    no_api_key: Annotated[
        bool, typer.Option("--no-api-key", help="Take the keys off: all who reach the gateway may call the endpoint.")
    ] = False,
    allow_pickle: AllowPickle = False,
    gateway: Gateway = None,
    target: Target = None,
    spec: Annotated[
        str | None,
        typer.Option(help="Any further fields of EndpointSpec, as JSON, or @FILE.", metavar="JSON|@FILE"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Put a registered model behind an endpoint, or another version of it; twice changes nothing.

    What is not given stays as the endpoint has it, keys of callers included.

    The key of the gateway's administrator comes from OVERNIGHT_ADMIN_KEY.
    """
    if ctx.invoked_subcommand is not None:
        return
    if name is None and spec is None:
        message = "An endpoint needs --name and --model, or --spec with both of them."
        raise typer.BadParameter(message)
    flags = make_flags(
        ("name", "model", "keep_warm", "allow_pickle", "gateway", "target"),
        "--spec",
        **{
            "budget.latency_ms": "--latency-ms",
            "budget.rate": "--rate",
            "rollout.canary.percent": "--canary",
            "rollout.canary.requests_min": "--canary-requests",
            "rollout.canary.seconds_max": "--canary-seconds",
        },
    )
    with keep_stdout(for_json=as_json), name_options_by_flags(flags):
        from tasks.endpoint.spec import EndpointSpec  # noqa: PLC0415 - help needs none

        document = {} if spec is None else read_document(spec, "--spec")
        # What the environment says is for endpoints whose spec says nothing of it.
        surroundings = {
            "gateway": gateway,
            "target": None if target is None else read_document(target, "--target"),
        }
        given = {
            "name": name,
            "model": model,
            "budget": _make_budget(latency_ms, rate),
            "keep_warm": _parse_keep_warm(keep_warm),
            "allow_pickle": allow_pickle or None,
            "rollout": _make_canary(canary, canary_requests, canary_seconds, wait=not no_wait),
            "access": _make_access(api_key or (), anyone=no_api_key),
            **{field: value for field, value in surroundings.items() if field not in document},
        }
        chosen = build_model(EndpointSpec, given, spec, "--spec")
        with show_status("Loading Prefect and MLflow"):
            from flows.endpoint import online_endpoint  # noqa: PLC0415 - seconds of imports

        show_own_lines()
        served = online_endpoint(chosen)
    if as_json:
        print_json(served.model_dump(mode="json"))
    else:
        print_text(f"{served.summary}\nAsk it at:  {served.url}")


def _make_budget(latency_ms: float | None, rate: float | None) -> dict[str, float] | None:
    if (latency_ms is None) != (rate is None):
        message = "A budget needs both --latency-ms and --rate, got one of them."
        raise BadInput(message)
    return None if latency_ms is None or rate is None else {"latency_ms": latency_ms, "rate": rate}


def _make_access(variables: Sequence[str], *, anyone: bool) -> dict[str, object] | None:
    if variables and anyone:
        message = f"Only one of --api-key and --no-api-key must be given, got both: --api-key {' '.join(variables)}."
        raise BadInput(message)
    return {"environment": variables, "anyone": anyone} if variables or anyone else None


def _make_canary(
    percent: float | None, requests: int | None, seconds: float | None, *, wait: bool
) -> dict[str, object] | None:
    rule = {name: value for name, value in (("requests_min", requests), ("seconds_max", seconds)) if value is not None}
    if percent is not None:
        return {"kind": "canary", "percent": percent, "wait": wait, **rule}
    if rule or not wait:
        message = "--canary-requests, --canary-seconds and --no-wait must be of a canary, got no --canary PERCENT."
        raise BadInput(message)
    return None


def _parse_keep_warm(text: str | None) -> float | str | None:
    if text in (None, "auto"):
        return text
    try:
        return float(str(text))
    except ValueError:
        message = f"--keep-warm must be seconds, or auto, got {text!r}."
        raise BadInput(message) from None


def retire(
    name: Annotated[str, typer.Argument(help="The endpoint's name.", metavar="NAME")],
    *,
    gateway: Gateway = None,
    target: Target = None,
    as_json: AsJson = False,
) -> None:
    """Take an endpoint out of service, and all of its versions off their model server."""
    with keep_stdout(for_json=as_json):
        with show_status("Loading Prefect and MLflow"):
            from flows.endpoint import retire_endpoint  # noqa: PLC0415 - seconds of imports
            from tasks.endpoint.spec import GATEWAY  # noqa: PLC0415 - the same
            from tasks.endpoint.targets import read_target  # noqa: PLC0415 - the same

        show_own_lines()
        host = None if target is None else read_target(read_document(target, "--target"))
        versions = retire_endpoint(name, host, gateway or GATEWAY)
    if as_json:
        print_json({"name": name, "versions": list(versions)})
    else:
        print_text(
            f"{name} is retired: " + (f"no longer serves {', '.join(versions)}" if versions else "there was none")
        )


def choose(
    workload: Annotated[str, typer.Argument(help="The workload, as @FILE or JSON.", metavar="@FILE|JSON")],
    *,
    apply: Annotated[
        str | None,
        typer.Option(
            help="Put the decision into effect with this ApplyConfig, as JSON or @FILE.", metavar="JSON|@FILE"
        ),
    ] = None,
    plot: Annotated[str | None, typer.Option(help="Where the plot is written, as a PNG.", metavar="FILE")] = None,
    allow_pickle: AllowPickle = False,
    as_json: AsJson = False,
) -> None:
    """Choose the mode that serves a workload at the lowest cost (online, batch, streaming), and say why in figures."""
    with keep_stdout(for_json=as_json), name_options_by_flags(make_flags(["allow_pickle"])):
        from tasks.batch.options import BatchOptions  # noqa: PLC0415 - help needs none
        from tasks.scheduler.deployment_plan import ApplyConfig  # noqa: PLC0415 - help needs none
        from tasks.scheduler.workload import Workload  # noqa: PLC0415 - the same

        # A path is meant by the name of a file too: a workload is rarely written on a command line.
        document = workload if workload.lstrip().startswith(("{", "@")) else f"@{workload}"
        described = build_model(Workload, {}, document, "the workload")
        config = build_model(ApplyConfig, {}, apply, "--apply")
        with show_status("Loading Prefect and MLflow"):
            from flows.scheduler import choose_mode  # noqa: PLC0415 - seconds of imports
            from tasks.scheduler.profile import ProfileOptions  # noqa: PLC0415 - the same
            from tasks.scheduler.report import render_decision  # noqa: PLC0415 - the same

        show_own_lines()
        measured_with = ProfileOptions(batch_options=BatchOptions(allow_pickle=allow_pickle))
        decision = choose_mode(
            described,
            apply=apply is not None,
            apply_config=config,
            profile_options=measured_with,
            plot_file=plot,
        )
    if as_json:
        print_json(decision.model_dump(mode="json"))
        return
    from rich.markdown import Markdown  # noqa: PLC0415 - JSON needs none

    print_text(Markdown(render_decision(decision)))


def check(
    model: Annotated[str, typer.Argument(help="The model, as `overnight score` takes it.", metavar="MODEL")],
    *,
    allow_pickle: AllowPickle = False,
    as_json: AsJson = False,
) -> None:
    """Say whether a model would load here: its inputs and outputs, the packages that it lacks, and its pickles.

    The exit code is 0 only where it loads.
    """
    with keep_stdout(for_json=as_json), name_options_by_flags(make_flags(["allow_pickle"])):
        from serving.model.model_check import check_model  # noqa: PLC0415 - seconds of imports

        say(f"Loading {model}")
        found = check_model(model, allow_pickle=allow_pickle)
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        print_table([{"": name, "value": value} for name, value in found.list_figures()], header=False)
        for problem in found.problems:
            print_text(problem)
        if found.install is not None:
            print_text(f"Its own versions:  {found.install}")
    if not found.loads:
        raise typer.Exit(1)


def tuning(
    model: Annotated[str, typer.Argument(help="The model, as `overnight score` takes it.", metavar="MODEL")],
    *,
    drop: Annotated[
        bool, typer.Option("--drop", help="Drop them: the next run that is long enough measures again.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show the sizes of batches and slots that runs have measured to be fastest and keep with a model version."""
    with keep_stdout(for_json=as_json):
        from serving.model.registry import delete_tags, read_version  # noqa: PLC0415 - seconds of imports
        from serving.model.tuner import list_tunings  # noqa: PLC0415 - the same

        found = read_version(model)
        tunings = list_tunings(found.tags)
        if drop:
            delete_tags(model, tunings)
    kept = [each for each in tunings.values() if each is not None]
    uri = f"models:/{found.name}/{found.version}"
    if as_json:
        print_json({"model": uri, "tunings": [each.model_dump(mode="json") for each in kept], "dropped": drop})
        return
    if kept:
        print_table(
            [
                {
                    "machine": each.machine,
                    "slots": str(each.slots),
                    "batch size": f"{each.batch_size:,}",
                    "rows/s": f"{each.rows_per_second:,.0f}",
                    "engine": str(each.engine),
                }
                for each in kept
            ],
            uri,
        )
    if drop:
        print_text(f"{uri} keeps no tuning any more: {len(tunings)} were dropped.")
    elif not kept:
        print_text(f"{uri} keeps no tuning.")
