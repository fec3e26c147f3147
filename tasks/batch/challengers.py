"""Challengers of a run: resolved once, pinned, and refused where they can't be compared with its model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from serving.errors import BadInput, SchemaMismatch, name_input, suggest_name
from serving.model.contract import Contract, Output, is_text
from serving.model.pin import ModelPin
from serving.model.registry import Resolved, resolve_model
from serving.option_words import name_option
from tasks.batch.challenger_rules import LabelKind, Labels, PromoteIf
from tasks.batch.options import BatchOptions

OutputKind = Literal["number", "class", "list of numbers", "list of classes"]

_log = logging.getLogger(__name__)

_COLUMNS_SHOWN = 20
_OF_CLASSES = ("accuracy", "log_loss", "auc")


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestedChallenger:
    """A challenger of a call, resolved: its pinned version, and the contract that the call's options give it."""

    resolved: Resolved
    contract: Contract

    @property
    def pin(self) -> ModelPin:
        """Its pinned version."""
        return self.resolved.pin


def resolve_challengers(
    champion: Resolved, contract: Contract, options: BatchOptions
) -> tuple[RequestedChallenger, ...]:
    """Resolve the challengers of a call, each alias once, and hold them against the model of the run.

    An alias that names the model of the run itself is left out, with a warning.

    Raises:
        ModelNotFound: The registry has no such model, version or alias.
        BadInput: A challenger is the model itself, given twice, generates text, or puts out something else.
        ModelUnfit: Its signature does not suffice.
    """
    if not options.challengers:
        return ()
    _refuse_generation(champion, "The model of a run with challengers")
    found: dict[str, RequestedChallenger] = {}
    for address in options.challengers:
        resolved = resolve_model(address)
        pin = resolved.pin
        if pin.uri == champion.pin.uri and "@" in address:
            # As after a promotion: the next night has nothing to compare.
            _log.warning("The challenger %s is %s, as the model of the run is: it is left out.", address, pin.uri)
            continue
        if pin.uri == champion.pin.uri:
            message = (
                f"A challenger must be another version than the model of the run, got {address}, which is the model. "
                "Leave it out, or name another version."
            )
            raise BadInput(message)
        if pin.uri in found:
            message = f"Each challenger must be given once, got {pin.uri} twice: by {address} too. Leave one out."
            raise BadInput(message)
        _refuse_generation(resolved, "A challenger")
        with name_input(f"The challenger {pin.uri} must be scored by the options of the run, got"):
            own = resolved.contract(options.input_columns, options.column_policies, options.params)
        _check_outputs(champion.pin, contract, pin, own)
        found[pin.uri] = RequestedChallenger(resolved=resolved, contract=own)
    requested = tuple(found.values())
    others = [each.pin.uri for each in requested if each.pin.name != champion.pin.name]
    if options.promote_if is not None and others:
        message = (
            f"Challengers must be versions of {champion.pin.name!r} where promote_if is given, since an alias names a "
            f"version of one model; got {others[0]}. Leave it out, or promote by hand."
        )
        raise BadInput(message)
    return requested


def pin_challengers(options: BatchOptions, challengers: Sequence[RequestedChallenger]) -> BatchOptions:
    """Return options that name challengers by their versions, which no alias changes; without any, nothing of them."""
    if not challengers:
        return options.model_copy(update={"challengers": (), "segment_columns": (), "labels": None, "promote_if": None})
    return options.model_copy(update={"challengers": tuple(each.pin.uri for each in challengers)})


def _refuse_generation(resolved: Resolved, what: str) -> None:
    flavors = resolved.mlmodel.flavors
    if flavors.get("transformers", {}).get("task") == "text-generation":
        message = (
            f"{what} must put out numbers or classes that can be compared, got {resolved.pin.uri}, which generates "
            "text. Score it at a destination of its own, without challengers."
        )
        raise BadInput(message)


def describe_kind(output: Output) -> OutputKind:
    """Return what an output is to a comparison: a floating-point number is a number, anything else a class."""
    is_number = output.dtype.startswith("float")
    if output.width == 1:
        return "number" if is_number else "class"
    return "list of numbers" if is_number else "list of classes"


def pair_outputs(champion: Contract, challenger: Contract) -> list[tuple[Output, Output]]:
    """Return the outputs that are compared: by name, or the only one of each model, whatever its name."""
    if len(champion.outputs) == len(challenger.outputs) == 1:
        return [(champion.outputs[0], challenger.outputs[0])]
    others = {output.name: output for output in challenger.outputs}
    return [(output, others[output.name]) for output in champion.outputs if output.name in others]


def _check_outputs(champion: ModelPin, contract: Contract, challenger: ModelPin, own: Contract) -> None:
    """Raise BadInput where two models do not put out the same: numbers beside classes, or others by name."""
    pairs = pair_outputs(contract, own)
    if len(pairs) != len(contract.outputs) or len(pairs) != len(own.outputs):
        message = (
            f"A challenger must have the outputs of the model, {[each.name for each in contract.outputs]}, got "
            f"{challenger.uri} with {[each.name for each in own.outputs]}. Log it with those names, or leave it out."
        )
        raise BadInput(message)
    for ours, theirs in pairs:
        if (describe_kind(ours), ours.shape) != (describe_kind(theirs), theirs.shape):
            message = (
                f"A challenger must put out what the model does, but {ours.name!r} of {champion.uri} is a "
                f"{describe_kind(ours)} ({ours.dtype} {ours.shape}), and {theirs.name!r} of {challenger.uri} a "
                f"{describe_kind(theirs)} ({theirs.dtype} {theirs.shape}). Leave it out, or choose another version."
            )
            raise BadInput(message)


def list_columns_beside(
    contract: Contract, challengers: Sequence[RequestedChallenger], options: BatchOptions
) -> tuple[str, ...]:
    """Return the columns that are read for challengers alone: their inputs, and those that are compared by.

    Those of feature tables are among them: which ones that are is not known before the tables are open.
    """
    own = {*(column.name for column in contract.columns), *options.key_columns}
    wanted = [column.name for each in challengers for column in each.contract.columns]
    return tuple(name for name in dict.fromkeys([*wanted, *options.columns_kept]) if name not in own)


def check_kept_columns(schema: pa.Schema, options: BatchOptions, where: str) -> None:
    """Raise SchemaMismatch where columns that are compared by are missing, or hold no plain values."""
    for name in options.columns_kept:
        what = "a segment" if name in options.segment_columns else "the labels"
        check_plain_column(schema, name, what, where)


def check_plain_column(schema: pa.Schema, name: str, what: str, where: str) -> None:
    """Raise SchemaMismatch unless a table has a column once, of numbers, texts, booleans or times."""
    if len(schema.get_all_field_indices(name)) != 1:
        message = (
            f"{where} must hold the column {name!r} of {what} once, got {schema.names.count(name)} of "
            f"{schema.names[:_COLUMNS_SHOWN]}{suggest_name(name, schema.names) or '.'}"
        )
        raise SchemaMismatch(message)
    kind = schema.field(name).type
    if pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        message = f"The column {name!r} of {what} must hold numbers, texts, booleans or times, got {kind} in {where}."
        raise SchemaMismatch(message)


def find_label_kind(labels: Labels, contract: Contract, given: pa.DataType, rule: PromoteIf | None) -> LabelKind:
    """Return what labels of a type are to the predictions of a model, by what the call says of it.

    Raises BadInput where models have several outputs, or predictions, labels and the metric of a rule do not fit.
    """
    if len(contract.outputs) != 1:
        message = (
            f"Models must have one output to be measured by labels, got {[each.name for each in contract.outputs]}. "
            "Leave labels out."
        )
        raise BadInput(message)
    output = contract.outputs[0]
    kind = describe_kind(output)
    is_number = pa.types.is_integer(given) or pa.types.is_floating(given) or pa.types.is_decimal(given)
    chosen: LabelKind = labels.kind or ("regression" if kind == "number" and is_number else "classification")
    # Columns of text formats are text until they are compared.
    if chosen == "regression" and not (kind == "number" and (is_number or is_text(given))):
        message = (
            f"Labels and predictions of a regression must be numbers, got labels of {given} and a {kind} "
            f"({output.dtype}). Correct {name_option('labels')}.kind or .column."
        )
        raise BadInput(message)
    if kind == "list of classes":
        message = f"A prediction must be a class, or numbers, to be measured by labels, got a {kind}. Leave labels out."
        raise BadInput(message)
    if rule is not None and (rule.metric in _OF_CLASSES) != (chosen == "classification"):
        message = (
            f"The metric of promote_if must be one of a {chosen}, got {rule.metric!r}. Choose another, or say by "
            "labels.kind what the labels are."
        )
        raise BadInput(message)
    if rule is not None and kind == "class" and rule.metric in ("log_loss", "auc"):
        message = (
            f"The metric {rule.metric!r} must be that of probabilities, but the models put out classes "
            f"({output.dtype}). Choose 'accuracy'."
        )
        raise BadInput(message)
    return chosen
