"""Whether a call can work: found out before a server is started for it, since that takes longer than all of this."""

from __future__ import annotations

from prefect.client.base import ServerType, determine_server_type

from serving.errors import SourceEmpty
from tasks.batch.dataset import open_dataset
from tasks.batch.options import BatchOptions
from tasks.batch.parts import check_names
from tasks.batch.resolve import resolve_request
from tasks.common.names import BLOCK
from tasks.common.server_checks import check_servers, list_checks, list_prefect_checks
from tasks.storage import open_storage


def check_call(model: str, source: str, destination: str, options: BatchOptions) -> None:
    """Check a call of batch_inference before anything is started for it.

    Registry, Prefect, destination and source are asked side by side. Where a temporary server is to be started, model,
    source and columns are looked at too, as the flow does at its start: a server that runs lets the flow say the same
    within a second, and keeps it. Of Parquet one footer is read. Nothing is written.

    Raises:
        OvernightError: What the flow would raise at its start.
    """
    parameters = {"model": model, "source": source, "destination": destination}
    check_servers([*list_prefect_checks(), *list_checks(parameters, uses_registry=True)])
    # What a block names, and what a run that is joined has resolved, is known within the flow.
    has_block = any(address.startswith(BLOCK) for address in parameters.values())
    if determine_server_type() is ServerType.EPHEMERAL and not has_block and options.joins is None:
        _check_columns(model, source, destination, options)


def _check_columns(model: str, source: str, destination: str, options: BatchOptions) -> None:
    request = resolve_request(model, source, open_storage(destination).url, options)
    snapshot, contract = request.snapshot, request.contract
    if snapshot.format != "parquet" or any(file.partition_values for file in snapshot.files):
        # Text is read as it is staged, and the types of partitions are those of all files together.
        return
    names = [column.name for column in contract.columns]
    for file in snapshot.files[:1]:
        one = snapshot.model_copy(update={"files": (file,)})
        try:
            dataset = open_dataset(one, names, options.key_columns)
        except SourceEmpty:
            return
        contract.check(dataset.schema, f"The dataset at {snapshot.title}")
        check_names(dataset, contract, options)
