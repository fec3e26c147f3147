"""The parameters of a flow, before there is a flow run: no secret is taken, and what is wrong is said with the fix."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from serving.errors import BadInput, SecretExposed, list_shortly, suggest_name
from serving.model.contract import Frozen
from serving.option_words import has_flags, name_option
from serving.redaction import HIDDEN, hide_secrets, holds_secret, names_secret

_PROBLEMS_SHOWN, _CHARACTERS_SHOWN = 5, 60

_WORDS = "letters, digits, '_', '.' and '-'"
# What a text must be, in words, by the pattern that it must match.
_WORDS_OF_PATTERNS = {
    r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$": f"at most 64 {_WORDS}, the first a letter or digit",
    r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$": f"at most 63 {_WORDS}, the first a letter or digit",
    r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,47}$": f"at most 48 {_WORDS}, the first a letter or digit",
    r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$": "at most 63 lower-case letters, digits and '-', with no '-' at either end",
    r"^[A-Za-z0-9._-]{1,249}$": f"at most 249 {_WORDS}",
    r"^[A-Za-z0-9_-]{1,64}$": "at most 64 letters, digits, '_' and '-'",
    r"^[^\s.*>/\\]{1,200}$": "at most 200 characters, without spaces, '.', '*', '>', '/' and '\\'",
    r"^[^\s*>]{1,500}$": "at most 500 characters, without spaces, '*' and '>'",
    r"^[^\s]{1,500}$": "at most 500 characters, without spaces",
    r"^[^/]+/[^/]+$": "a flow and a deployment with one '/' between them, such as batch-inference/adhoc",
    r"^(nats|tls)://[^\s]+$": "an address that begins with nats:// or tls://",
    r"^https?://[^\s@]+$": "an address that begins with http:// or https://, without '@'",
    r"^https?://[^/\s?#@]+(/[^\s?#]*)?$": "an address that begins with http:// or https://, without '?', '#' and '@'",
    r"^[a-z0-9]+://\S+$": "an address with its scheme, such as s3://bucket/models",
    r"^[A-Za-z0-9._-]{1,253}:[0-9]{1,5}$": "a host and a port, such as 127.0.0.1:8001",
    r"^([01]?\d|2[0-3]):[0-5]\d$": "a time of day, such as 06:30",
    r"^[a-z]{2}(-[a-z]+)+-\d$": "a region of AWS, such as us-east-1",
    r"^[1-9][0-9]{8}$": "nine digits, the first not 0",
    r"^[0-9a-f]{64}$": "64 hexadecimal digits, in lower case",
}


def refuse_secrets(parameters: Mapping[Any, Any]) -> None:
    """Raise SecretExposed where a parameter holds a password or a token, however deep within it.

    A secret is known by how it is written, and among the parameters of a model by its name too.
    """
    left = [(str(name), value) for name, value in parameters.items()]
    while left:
        name, value = left.pop()
        if isinstance(value, BaseModel):
            value = dict(value)
        if isinstance(value, Mapping):
            left += [(f"{name}.{key}", inner) for key, inner in value.items()]
        elif isinstance(value, list | tuple | set | frozenset):
            left += [(f"{name}.{at}", inner) for at, inner in enumerate(value)]
        elif isinstance(value, str | Path) and (holds_secret(str(value)) or (value and _is_secret_param(name))):
            shown = HIDDEN if _is_secret_param(name) else value
            message = (
                f"The parameter {name} must hold no password, token or key, got {shown}: parameters are kept with the "
                "flow run, and shown to everyone who sees it. Give it in the environment, in a credentials file or "
                "in a Prefect Secret block. Where a deployment holds it, change the password too."
            )
            raise SecretExposed(message)


def _is_secret_param(name: str) -> bool:
    """Return whether a name is that of a secret among the parameters of a model, or deeper: options.params.api_key."""
    place, _, last = name.rpartition(".")
    return "params" in place.split(".") and names_secret(last)


def bind_parameters(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by name.

    Raises BadInput where one is unknown, missing or given twice; one that is a field of an option says so.
    """
    signature = inspect.signature(function)
    for name in kwargs:
        if name not in signature.parameters:
            raise BadInput(_explain_unknown(function, name))
    try:
        return dict(signature.bind(*args, **kwargs).arguments)
    except TypeError as error:
        message = (
            f"{function.__name__} must be called with {_list_parameters(function)}, got a call with {error}. Give each "
            "of those without a default, once."
        )
        raise BadInput(message) from None


def _list_parameters(function: Callable[..., Any]) -> str:
    parameters = inspect.signature(function).parameters.values()
    return ", ".join(each.name if each.default is each.empty else f"{each.name}=..." for each in parameters)


def _explain_unknown(function: Callable[..., Any], name: str) -> str:
    hints = typing.get_type_hints(function)
    names = list(inspect.signature(function).parameters)
    fields = {
        field: (parameter, kind.__name__)
        for parameter in reversed(names)
        for kind in _iter_models(hints.get(parameter))
        for field in kind.model_fields
    }
    refused = f"{function.__name__} must be called with {_list_parameters(function)}, got {name}=..."
    if name in fields:
        parameter, kind_name = fields[name]
        return f"{refused}, which is one of its {parameter}: pass {parameter}={kind_name}({name}=...)."
    meant = suggest_name(name, [*names, *fields])
    near = meant.split("'")[1] if meant else ""
    if near in fields:
        parameter, kind_name = fields[near]
        return f"{refused}; did you mean {parameter}={kind_name}({near}=...)?"
    return f"{refused}{meant or '. Leave it out.'}"


def explain_invalid(function: Callable[..., Any], error: ValidationError) -> BadInput:
    """Return what is wrong with the values of a flow's parameters."""
    hints = typing.get_type_hints(function)
    problems = describe_invalid(error, hints)
    return BadInput(f"The parameters of {function.__name__} must be valid, got:\n" + "\n".join(problems))


def describe_invalid(error: ValidationError, given: Any) -> list[str]:
    """Return a line for each of the first problems: where, what must hold and what arrived.

    Args:
        error: What pydantic says.
        given: The type that was made, or the types of the parameters by name.
    """
    problems = []
    for each in error.errors(include_url=False):
        place = ".".join(map(str, each["loc"]))
        place = name_option(place) if place and has_flags() else place
        if each["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            name = str(each["loc"][-1])
            kinds = _find_kinds(given, each["loc"][:-1])
            known = {field for kind in kinds for model in _iter_models(kind) for field in model.model_fields}
            problems.append(f"{place}: there is no such field{suggest_name(name, known)}")
            continue
        got = repr(each["input"])
        got = got if len(got) <= _CHARACTERS_SHOWN else f"{got[:_CHARACTERS_SHOWN]}..."
        said = _describe_rule(each, given)
        problems.append(
            f"{place}: {said}" if each["type"] in ("value_error", "missing") else f"{place}: {said}, got {got}"
        )
    return list_shortly(list(dict.fromkeys(problem.lstrip(": ") for problem in problems)), _PROBLEMS_SHOWN).split("\n")


def _describe_rule(problem: ErrorDetails, given: Any) -> str:
    """Return what must hold of a value, in words: of a text that has a form, and of one of several kinds."""
    context = problem.get("ctx", {})
    if problem["type"] == "string_pattern_mismatch":
        return f"must be {_WORDS_OF_PATTERNS.get(context['pattern'], 'of the form ' + context['pattern'])}"
    if problem["type"] in ("union_tag_not_found", "union_tag_invalid"):
        name = str(context["discriminator"]).strip("'")
        models = (model for kind in _find_kinds(given, problem["loc"]) for model in _iter_models(kind))
        tags = [typing.get_args(model.model_fields[name].annotation) for model in models if name in model.model_fields]
        listed = ", ".join(dict.fromkeys(str(tag) for each in tags for tag in each))
        return f"its {name} must be one of {listed}"
    return str(problem["msg"]).removeprefix("Value error, ")


def describe_invalid_model(error: ValidationError) -> str:
    """Return what is wrong with the fields of one model, with the names that were meant where it is Overnight's own."""
    problems = "\n".join(describe_invalid(error, find_option_type(error.title)))
    head = "The options must be valid" if has_flags() else f"{error.title} must have valid fields"
    return hide_secrets(f"{head}, got:\n{problems}")


def _find_kinds(given: Any, path: Sequence[int | str]) -> list[Any]:
    """Return the types that a value may have at a path. Tags of unions and numbers are no names."""
    kinds = [given]
    for name in path:
        deeper = [inner for kind in kinds for inner in _find_inner(kind, name)]
        kinds = deeper or kinds
    return kinds


def _find_inner(kind: Any, name: int | str) -> Iterator[Any]:
    if isinstance(kind, Mapping):
        yield from [kind[name]] if name in kind else []
        return
    for model in _iter_models(kind):
        if name in model.model_fields:
            yield model.model_fields[str(name)].annotation


def _iter_models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the pydantic models that an annotation names, within unions and containers too."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from _iter_models(inner)


def find_option_type(name: str) -> type[Frozen] | None:
    """Return the type of Overnight that has this name, None where there is none."""
    left = Frozen.__subclasses__()
    while left:
        kind = left.pop()
        if kind.__name__ == name and kind.__module__.split(".")[0] in ("flows", "serving", "tasks"):
            return kind
        left += kind.__subclasses__()
    return None
