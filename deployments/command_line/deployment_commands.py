"""Commands about a Prefect server: deploy calls and everything that they need, and take up their runs."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deployments.command_line.console import (
    AllowPickle,
    AsJson,
    Key,
    Options,
    build_model,
    is_local,
    keep_stdout,
    make_flags,
    print_json,
    say,
)
from serving.errors import BadInput
from serving.option_words import name_options_by_flags

if TYPE_CHECKING:
    from deployments.apply import Change

_POOL = "overnight"


def add_commands(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command(
        epilog="Examples:\n\n"
        "  overnight deploy\n"
        "  overnight deploy models:/churn@champion s3://lake/customers/ s3://lake/scores/ --key customer "
        '--schedule "0 1 * * *"'
    )(deploy)
    app.command(epilog="Example:\n\n  overnight worker --pool overnight-spot")(worker)


def deploy(  # noqa: PLR0913 - each is an option of the command
    model: Annotated[str | None, typer.Argument(help="The model, as `overnight score` takes it.")] = None,
    source: Annotated[str | None, typer.Argument(help="What is scored. A local path must be there on workers.")] = None,
    destination: Annotated[str | None, typer.Argument(help="Where the predictions go.")] = None,
    *,
    name: Annotated[str | None, typer.Option(help="The deployment's name. Without: that of the model.")] = None,
    schedule: Annotated[
        str | None, typer.Option(help="When it runs, as cron: '0 1 * * *' is every night at one.", metavar="CRON")
    ] = None,
    timezone: Annotated[
        str | None, typer.Option(help="The time zone of the schedule, such as Europe/Berlin. Default: UTC.")
    ] = None,
    pool: Annotated[str, typer.Option(help="The work pool whose workers run it.")] = _POOL,
    key: Key = None,
    allow_pickle: AllowPickle = False,
    options: Options = None,
    show: Annotated[
        str | None,
        typer.Option(
            help="Print a file and do nothing: prefect.yaml with all deployments, or work-pool.json, the base job "
            "template of a Kubernetes pool.",
            metavar="FILE",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Deploy a call of `overnight score` to the Prefect server of PREFECT_API_URL, on a schedule or not.

    The model, the source and the destination are looked for from here too; what is not found is a warning.

    Without arguments it creates every work pool, deployment and automation of Overnight. Twice changes nothing.
    """
    if show is not None:
        sys.stdout.write(read_packaged_file(show))
        return
    given = [each for each in (model, source, destination) if each is not None]
    if len(given) not in (0, 3):
        message = "MODEL, SOURCE and DESTINATION must all be given, or none of them for all of Overnight's deployments."
        raise typer.BadParameter(message)
    if not given and (name or schedule or key or allow_pickle or options or pool != _POOL):
        message = "The options belong to a call, got no MODEL, SOURCE and DESTINATION."
        raise typer.BadParameter(message)
    if timezone is not None and schedule is None:
        message = (
            f"--timezone must go with --schedule, got {timezone!r} alone: a schedule that is not given is removed."
        )
        raise typer.BadParameter(message)
    with keep_stdout(for_json=as_json):
        import asyncio  # noqa: PLC0415 - help needs none

        from deployments.apply import CallDeployment, deploy_call  # noqa: PLC0415 - seconds of imports
        from deployments.apply import deploy as deploy_all  # noqa: PLC0415 - the same

        if model is None or source is None or destination is None:
            changes = asyncio.run(deploy_all())
            _print_changes(changes, None, pool, as_json=as_json)
            return
        with name_options_by_flags(make_flags(("allow_pickle",), "--options", key_columns="--key")):
            said = {"key_columns": key, "allow_pickle": allow_pickle or None}
            parameters = _make_parameters(model, source, destination, said, options)
        call = CallDeployment(
            name=name or choose_name(model),
            parameters=parameters,
            pool=pool,
            cron=schedule,
            timezone=timezone or "UTC",
        )
        changes = asyncio.run(deploy_call(call))
        warnings = list_unseen(parameters)
    _print_changes(changes, f"batch-inference/{call.name}", pool, warnings, as_json=as_json)


def choose_name(model: str) -> str:
    """Return the name of a model without its registry's scheme, its alias and its version."""
    return re.split(r"[@/]", model.removeprefix("models:/"), maxsplit=1)[0] or "call"


def _make_parameters(
    model: str, source: str, destination: str, given: Mapping[str, object], options: str | None
) -> dict[str, Any]:
    from tasks.batch.options import BatchOptions  # noqa: PLC0415 - help needs none

    chosen = build_model(BatchOptions, given, options, "--options")
    parameters = {"model": model, "source": make_absolute(source), "destination": make_absolute(destination)}
    return {**parameters, "options": chosen.model_dump(mode="json", exclude_unset=True)}


def list_unseen(parameters: Mapping[str, Any]) -> list[str]:
    """Return what this machine can't see of a call's model, source and destination, in words; each is asked once.

    The workers may see it all the same: another registry, or another disk. What a block names is not asked.
    """
    from serving.errors import OvernightError  # noqa: PLC0415 - help needs none
    from serving.model.registry import read_version  # noqa: PLC0415 - the same
    from tasks.batch.options import BatchOptions  # noqa: PLC0415 - the same
    from tasks.batch.source import TableVersion, pin_source  # noqa: PLC0415 - the same
    from tasks.common.names import BLOCK  # noqa: PLC0415 - the same
    from tasks.common.server_checks import ServerCheck, check_servers, list_checks  # noqa: PLC0415 - the same

    options = BatchOptions.model_validate(parameters["options"])
    version = TableVersion(number=options.source_version, timestamp=options.source_timestamp)
    questions: dict[str, Callable[[], object]] = {
        "model": lambda: read_version(parameters["model"]),
        "source": lambda: pin_source(
            parameters["source"], parameters["destination"], version=version, csv=options.csv is not None
        ),
        "destination": lambda: None,
    }
    unseen = []
    for name, ask in questions.items():
        address = parameters[name]
        if address.startswith(BLOCK):
            continue
        servers = list_checks({name: address}, uses_registry=name == "model")
        try:
            # Its server first, since clients of a registry and of a store try for minutes.
            check_servers(servers)
            check_servers([ServerCheck(server=f"The store of the {name}", advice="Call again.", ask=ask)])
        except OvernightError as error:
            unseen.append(f"This machine does not see the {name} {address}: {error}")
    return unseen


def make_absolute(address: str) -> str:
    """Return a local path as an absolute one, since a worker has a working folder of its own; an address as it is."""
    if not is_local(address):
        return address
    absolute = str(Path(address).expanduser().absolute())
    return absolute + "/" * (address.endswith("/") and not absolute.endswith("/"))


def _print_changes(
    changes: list[Change], deployment: str | None, pool: str, warnings: Sequence[str] = (), *, as_json: bool
) -> None:
    from prefect.settings import PREFECT_API_URL  # noqa: PLC0415 - help needs none

    from deployments.apply import describe_changes  # noqa: PLC0415 - the same

    if as_json:
        server = str(PREFECT_API_URL.value())
        made = [asdict(change) for change in changes]
        print_json({"server": server, "deployment": deployment, "changes": made, "warnings": list(warnings)})
        return
    sys.stdout.write(describe_changes(changes))
    if deployment is not None:
        for warning in warnings:
            say(f"Warning: {warning}")
        if warnings:
            say("Where the workers do not see it either, every run fails.")
        say(f"A worker takes up its runs:  overnight worker --pool {pool}")
        say(f"Start one now:  prefect deployment run '{deployment}'")


def read_packaged_file(name: str) -> str:
    """Return a file for other programs out of the installed package. Raises BadInput for an unknown name."""
    known = {
        "prefect.yaml": files("deployments") / "prefect.yaml",
        "work-pool.json": files("infra") / "kubernetes" / "work-pool.json",
        "overnight-worker@.service": files("infra") / "systemd" / "overnight-worker@.service",
    }
    if name not in known:
        message = f"A packaged file must be one of {', '.join(known)}, got {name!r}."
        raise BadInput(message)
    return known[name].read_text()


def worker(
    *,
    pool: Annotated[str, typer.Option(help="The work pool to take flow runs from.")] = _POOL,
    name: Annotated[str | None, typer.Option(help="The worker's name in Prefect's pages.")] = None,
    limit: Annotated[int, typer.Option(help="Flow runs side by side; a run takes every core.", min=1)] = 1,
    grace: Annotated[float, typer.Option(help="Seconds that runs get to drain.", min=0)] = 60.0,
    health_port: Annotated[
        int | None, typer.Option(help="Answer GET /health on this port of loopback.", min=1, max=65535)
    ] = None,
    plain_http: Annotated[
        bool, typer.Option("--plain-http", help="Take work from another machine without TLS too.")
    ] = False,
    systemd: Annotated[
        bool, typer.Option("--systemd", help="Print the systemd unit of such a worker, and do nothing.")
    ] = False,
) -> None:
    """Take up flow runs of a work pool until Ctrl-C or SIGTERM, which lets them drain and be scheduled again."""
    if systemd:
        unit = read_packaged_file("overnight-worker@.service")
        sys.stdout.write(unit.replace("/opt/overnight/bin/python", sys.executable))
        return
    from infra.worker import main  # noqa: PLC0415 - help needs none

    named = ["--name", name] if name else []
    watched = ["--health-port", str(health_port)] if health_port else []
    plain = ["--plain-http"] if plain_http else []
    raise typer.Exit(main(["--pool", pool, "--limit", str(limit), "--grace", str(grace), *named, *watched, *plain]))
