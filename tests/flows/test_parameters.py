"""What is said of values of parameters that can't be: in words, whatever the rule is that they break."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import pytest
from pydantic import Field, TypeAdapter, ValidationError

import flows
from flows.runtime.parameters import describe_invalid

OPTIONS = [each for name in flows.__all__ if hasattr(each := getattr(flows, name), "model_fields")]


def find_patterns(schema: Any) -> Iterator[str]:
    """Yield each pattern that a text must match, however deep in a schema."""
    inner = schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ()
    if isinstance(schema, dict) and isinstance(schema.get("pattern"), str):
        yield schema["pattern"]
    for each in inner:
        yield from find_patterns(each)


PATTERNS = sorted({found for each in OPTIONS for found in find_patterns(TypeAdapter(each).json_schema())})


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_text_of_the_wrong_form_is_answered_in_words_and_never_by_a_pattern(pattern: str) -> None:
    form: TypeAdapter[str] = TypeAdapter(Annotated[str, Field(pattern=pattern)])
    with pytest.raises(ValidationError) as wrong:
        form.validate_python(" //* ")
    (said,) = describe_invalid(wrong.value, str)

    assert said.removeprefix("  - ").startswith("must be a")
    assert pattern not in said
