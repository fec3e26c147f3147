"""A call of batch_inference, resolved once: which model version it means, which files, and the key of its run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from serving.model.contract import Contract
from serving.model.registry import Resolved, find_version, resolve_model
from tasks.batch.challengers import RequestedChallenger, list_columns_beside, pin_challengers, resolve_challengers
from tasks.batch.dataset import Snapshot
from tasks.batch.destination_source import list_addresses
from tasks.batch.feature_sources import pin_features
from tasks.batch.options import BatchOptions
from tasks.batch.plan import run_key
from tasks.batch.source import TableVersion, pin_source


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRequest:
    """A call, resolved: the model version, the files, the contract between them, and the run key of all that.

    `addresses` are those of the source in full. `features` are the snapshots of the feature tables, in the order of the
    options, which name challengers by their versions. `ask_again` resolves the call once more where its alias names
    another version by then, else returns None.
    """

    resolved: Resolved
    snapshot: Snapshot
    contract: Contract
    options: BatchOptions
    key: str
    addresses: tuple[str, ...] = ()
    features: tuple[Snapshot, ...] = ()
    challengers: tuple[RequestedChallenger, ...] = ()
    ask_again: Callable[[], RunRequest | None] = field(default=lambda: None, compare=False)

    @property
    def run(self) -> str:
        """The name of the run's folders."""
        return self.options.name or self.key

    @property
    def contract_of_all(self) -> Contract:
        """The contract of the model with the inputs of its challengers too."""
        return self.contract.with_inputs_of(each.contract for each in self.challengers)

    @property
    def nullable(self) -> frozenset[str]:
        """The columns that are null in files of the source that lack them, where others have them."""
        return self.options.list_nullable(self.contract_of_all)


def resolve_request(model: str, source: str | Sequence[str], destination: str, options: BatchOptions) -> RunRequest:
    """Resolve the model's alias and list the source. Nothing is written.

    Raises:
        ModelNotFound: The registry has no such model, version or alias.
        BadInput: The source or the options can't be used; its kinds say why.
    """
    resolved = resolve_model(model)
    contract = resolved.contract(options.input_columns, options.column_policies, options.params)

    def ask_again() -> RunRequest | None:
        is_same = find_version(model) == resolved.pin.version
        return None if is_same else resolve_request(model, source, destination, options)

    return replace(make_request(resolved, contract, source, destination, options), ask_again=ask_again)


def make_request(
    resolved: Resolved, contract: Contract, source: str | Sequence[str], destination: str, options: BatchOptions
) -> RunRequest:
    """List the source of a call whose model is resolved, and return the request. Nothing is written.

    Raises BadInput where the source or the options can't be used; its kinds say why.
    """
    challengers = resolve_challengers(resolved, contract, options)
    options = pin_challengers(options, challengers) if options.challengers else options
    columns = [*(column.name for column in contract.columns), *options.copied_columns]
    columns += list_columns_beside(contract, challengers, options)
    version = TableVersion(number=options.source_version, timestamp=options.source_timestamp)
    snapshot = pin_source(source, destination, columns, version, csv=options.csv is not None)
    features = pin_features(options, destination, contract.with_inputs_of(each.contract for each in challengers))
    compared = [(each.pin, each.contract) for each in challengers]
    key = run_key(resolved.pin, snapshot, contract, options, features, compared)
    return RunRequest(
        resolved=resolved,
        snapshot=snapshot,
        contract=contract,
        options=options,
        key=key,
        addresses=list_addresses(source),
        features=features,
        challengers=challengers,
    )
