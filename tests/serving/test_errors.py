from __future__ import annotations

import inspect
import re

from serving import errors

KINDS = {name: kind for name, kind in vars(errors).items() if inspect.isclass(kind)}


def test_the_tree_in_the_docstring_is_the_tree_of_the_classes() -> None:
    drawn, path = {}, ["OvernightError"]
    for line in (errors.__doc__ or "").splitlines():
        if match := re.match(r"([| ]*)\+-- (\w+)", line):
            path[len(match[1]) // 4 + 1 :] = [match[2]]
            drawn[match[2]] = path[-2]

    assert {name: kind.__base__.__name__ for name, kind in KINDS.items() if name != "OvernightError"} == drawn | {
        name: "OvernightError" for name in drawn if drawn[name] == "OvernightError"
    }


def test_a_callers_mistake_is_a_value_error_and_nothing_else_is() -> None:
    assert {name for name, kind in KINDS.items() if issubclass(kind, errors.BadInput)} == {
        name for name, kind in KINDS.items() if issubclass(kind, ValueError)
    }


def test_every_error_has_a_docstring() -> None:
    assert all(kind.__doc__ for kind in KINDS.values())
