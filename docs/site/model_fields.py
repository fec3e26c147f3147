"""An extension of griffe: the fields of a pydantic model become a table below its docstring, read from the source."""

from __future__ import annotations

import ast
from typing import Any

import griffe

# They tell one kind of value from others in JSON, and nobody who writes Python gives them.
LEFT_OUT = {"kind", "model_config"}


class ModelFields(griffe.Extension):
    """Adds the section Attributes to the docstring of a class whose attributes are described by `Field`."""

    def on_class_members(self, *, node: Any, cls: griffe.Class, agent: Any, **kwargs: Any) -> None:  # noqa: ARG002 - griffe's
        """List the fields of a class, with what `Field(description=...)` says and their defaults."""
        lines = [line for attribute in cls.attributes.values() if (line := describe_field(attribute))]
        if lines and cls.docstring:
            cls.docstring.value = "\n".join([cls.docstring.value, "", "Attributes:", *lines])


def describe_field(attribute: griffe.Attribute) -> str | None:
    """Return a field's line in the section, or nothing for what is no described field."""
    options = read_field(attribute.value) or read_field(read_alias(attribute))
    if attribute.name in LEFT_OUT or "description" not in options:
        return None
    default = options.get("default")
    if isinstance(attribute.value, griffe.Expr | str) and not read_field(attribute.value):
        default = str(attribute.value)
    described = " ".join(str(ast.literal_eval(options["description"])).split())
    shown = f" Default: `{default}`." if default not in {None, "None"} else ""
    return f"    {attribute.name}: {described}{shown}"


def read_alias(attribute: griffe.Attribute) -> Any:
    """Return what the module says of an annotation that is a name, such as `Gateway = Annotated[str, Field(...)]`."""
    if not isinstance(attribute.annotation, griffe.ExprName):
        return attribute.annotation
    alias = attribute.module.members.get(attribute.annotation.name)
    return alias.value if isinstance(alias, griffe.Attribute) else None


def read_field(value: Any) -> dict[str, str]:
    """Return the keywords of the call of `Field` within an expression."""
    for part in [value, *value.iterate(flat=False)] if isinstance(value, griffe.Expr) else []:
        if isinstance(part, griffe.ExprCall) and str(part.function) == "Field":
            return {each.name: str(each.value) for each in part.arguments if isinstance(each, griffe.ExprKeyword)}
        if isinstance(part, griffe.Expr) and part is not value and (found := read_field(part)):
            return found
    return {}
