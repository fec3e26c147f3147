"""Commands about a Kubernetes cluster: render its manifests, and bring a Prefect server on it up to date."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deployments.command_line.console import AsJson, keep_stdout, print_json, say
from serving.errors import BadInput, OvernightError

if TYPE_CHECKING:
    from infra.kubernetes import Reference


class RendererMissing(OvernightError):
    """There is no program that builds manifests; the message says how to get one."""


def add_commands(app: typer.Typer) -> None:
    """Add the commands of this module."""
    kubernetes = typer.Typer(help="Run Overnight on a Kubernetes cluster.", no_args_is_help=True)
    kubernetes.command(
        epilog="Example:\n\n  overnight kubernetes render --overlay cpu-spot --output manifests/ "
        "--image overnight=registry/overnight:0.1.0 --image postgres=docker.io/library/postgres@sha256:DIGEST ..."
    )(render)
    kubernetes.command(
        epilog="Example:\n\n  overnight kubernetes deploy --pools pools/ --image registry/overnight:0.1.0"
    )(deploy)
    app.add_typer(kubernetes, name="kubernetes")


def render(
    *,
    overlay: Annotated[
        str, typer.Option(help="The machines that runs are on: cpu-spot, or gpu-spot with a GPU each.")
    ] = "cpu-spot",
    image: Annotated[
        list[str] | None,
        typer.Option(
            help="An image, by its name in the manifests; again for each of them. Those that others build must be "
            "pinned by a digest.",
            metavar="NAME=IMAGE",
        ),
    ] = None,
    endpoints: Annotated[
        Path | None,
        typer.Option(
            help="Add the rollouts and RayServices that `overnight endpoint` has left in this folder of a target.",
            metavar="DIR",
        ),
    ] = None,
    without: Annotated[
        list[str] | None,
        typer.Option(help="A component to leave out: endpoints, gateway or ray; again for each.", metavar="COMPONENT"),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Write a file for each component into this folder. Without: all on stdout.", metavar="DIR"),
    ] = None,
) -> None:
    """Render the manifests of Overnight for a cluster, and say what must be on it before. Needs kubectl or kustomize.

    Nothing is applied: `kubectl apply -f DIR` does that.
    """
    from infra.kubernetes import (  # noqa: PLC0415 - help needs none
        KustomizeMissing,
        ManifestRefused,
        list_references,
        parse_images,
        render_overlay,
        write_documents,
    )
    from infra.kubernetes.render import dump_documents  # noqa: PLC0415 - the same

    try:
        images = parse_images(image or ())
        documents = render_overlay(overlay, images, endpoints=endpoints, without=without or ())
        written = [] if output is None else write_documents(documents, output)
    except ManifestRefused as refused:
        raise BadInput(str(refused)) from None
    except KustomizeMissing as missing:
        raise RendererMissing(str(missing)) from None
    if output is None:
        sys.stdout.write(dump_documents(documents))
    else:
        say(f"{len(documents)} manifests in {len(written)} files. Put them into force:  kubectl apply -f {output}")
    made = {(each["kind"], each["metadata"].get("namespace"), each["metadata"]["name"]) for each in documents}
    for each in list_references(documents):
        if (each.kind, each.namespace, each.name) not in made:
            say(describe_missing(each))


def describe_missing(reference: Reference) -> str:
    """Return a line about what must be on the cluster, since the manifests refer to it and do not hold it."""
    keys = f" with {', '.join(reference.keys)}" if reference.keys else ""
    must = "may be there" if reference.is_optional else "must be there before"
    return f"{reference.kind} {reference.namespace}/{reference.name}{keys} {must}."


def deploy(
    *,
    pools: Annotated[
        Path,
        typer.Option(help="A folder with NAME.yaml for each work pool, as infra/kubernetes/base/pools.", metavar="DIR"),
    ],
    image: Annotated[
        str, typer.Option(help="The image of flow runs.", envvar="OVERNIGHT_FLOW_RUN_IMAGE", metavar="IMAGE")
    ],
    as_json: AsJson = False,
) -> None:
    """Deploy all of Overnight to the Prefect server of PREFECT_API_URL, with work pools that start Jobs of Kubernetes.

    Twice changes nothing. A pool of another type is never changed.
    """
    with keep_stdout(for_json=as_json):
        import asyncio  # noqa: PLC0415 - help needs none
        from dataclasses import asdict  # noqa: PLC0415 - the same

        from deployments.apply import deploy as deploy_all  # noqa: PLC0415 - seconds of imports
        from deployments.apply import describe_changes  # noqa: PLC0415 - the same
        from deployments.kubernetes_pools import read_kubernetes_pools  # noqa: PLC0415 - the same

        changes = asyncio.run(deploy_all(pools=read_kubernetes_pools(pools, image)))
    if as_json:
        print_json({"changes": [asdict(change) for change in changes]})
    else:
        sys.stdout.write(describe_changes(changes))
