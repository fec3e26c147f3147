from __future__ import annotations

from typing import Any

import pytest
import torch

from serving.model.exported import checked_once

X = torch.randn(100, 4, generator=torch.Generator().manual_seed(3))
ROWS = torch.export.Dim("rows", min=2, max=50)


class Named(torch.nn.Module):
    """Two inputs, and outputs that are nested."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 2)

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> dict[str, Any]:
        return {"sum": self.linear(left) + right, "both": (left, right.sum())}


def exported() -> Any:
    torch.manual_seed(0)
    shapes = ({0: ROWS}, {0: ROWS})
    return torch.export.export(Named().eval(), (X[:8], X[:8, :2]), dynamic_shapes=shapes).module()


@pytest.mark.parametrize("rows", [2, 7, 50])
def test_every_call_answers_as_the_module_does(rows: int) -> None:
    module = exported()
    quick = checked_once(module)
    with torch.inference_mode():
        expected = module(X[:rows], X[:rows, :2])
        for got in (quick(X[:rows], X[:rows, :2]) for _ in range(3)):
            assert torch.equal(expected["sum"], got["sum"])
            assert torch.equal(expected["both"][1], got["both"][1])


def test_inputs_that_the_export_does_not_allow_are_refused_after_others_have_passed() -> None:
    quick = checked_once(exported())
    quick(X[:8], X[:8, :2])
    quick(X[:8], X[:8, :2])

    for left, right in ((51, 51), (8, 7)):
        with pytest.raises(AssertionError, match="Guard failed"):
            quick(X[:left], X[:right, :2])
    with pytest.raises(RuntimeError, match="dtype"):
        quick(X[:8].double(), X[:8, :2])


def test_the_module_keeps_its_checks_and_its_weights_are_shared() -> None:
    module = exported()
    quick = checked_once(module)
    with torch.inference_mode():
        for _ in range(2):
            quick(X[:8], X[:8, :2])
        module.linear.weight.zero_()
        got = quick(X[:8], X[:8, :2])

    assert torch.equal(got["sum"], module(X[:8], X[:8, :2])["sum"])
    with pytest.raises(AssertionError, match="Guard failed"):
        module(X[:51], X[:51, :2])


def test_what_is_no_exported_graph_over_tensors_is_left_as_it_is() -> None:
    plain = torch.nn.Linear(4, 1)
    traced = torch.fx.symbolic_trace(plain)

    class Nested(torch.nn.Module):
        def forward(self, both: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            return both[0] + both[1]

    nested = torch.export.export(Nested(), ((X, X),)).module()

    assert all(checked_once(module) is module for module in (plain, traced, nested))
