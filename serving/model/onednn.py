"""Linear layers through oneDNN: torch sends float32 ones to the BLAS that it was built with, which may be half as fast.

Measured on an AMD EPYC (Zen 5) with torch 2.13 for CPU, whose BLAS is MKL: 32-256-256-1 at batch 1024 on two
cores, 1.5 million rows a second through MKL and 3.0 through oneDNN. The sums are taken in another order: the
last digit may differ.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional


def available() -> bool:
    """Whether this build of torch has oneDNN and the operator that torch.compile uses it by."""
    return bool(torch.backends.mkldnn.is_available()) and hasattr(  # type: ignore[no-untyped-call]
        torch.ops.mkldnn, "_linear_pointwise"
    )


def through_onednn(module: nn.Module) -> nn.Module | None:
    """Return a copy of a module, its weights shared, whose float32 linear layers run through oneDNN.

    None where it has no such layer.
    """
    shared = {id(value): value for value in (*module.parameters(), *module.buffers())}
    with warnings.catch_warnings():
        # torch deprecates a check that its own copying makes.
        warnings.simplefilter("ignore", FutureWarning)
        copied = copy.deepcopy(module, shared)
    replaced = _in_graph(copied) if isinstance(copied, fx.GraphModule) else _in_tree(copied)
    return copied if replaced else None


def _in_graph(module: fx.GraphModule) -> bool:
    linear = [node for node in module.graph.nodes if node.target is torch.ops.aten.linear.default and _is_float(node)]
    for node in linear:
        x, weight, bias = (*node.args, None)[:3]
        rectified = _only_rectified(node)
        node.target = torch.ops.mkldnn._linear_pointwise.default  # noqa: SLF001 - what torch.compile's own code calls
        node.args = (x, weight, bias, "relu" if rectified else "none", [], "")
        if rectified:
            rectified.replace_all_uses_with(node)
            module.graph.erase_node(rectified)
    module.recompile()
    return bool(linear)


def _only_rectified(node: fx.Node) -> fx.Node | None:
    """Return the ReLU that alone takes what a layer gives: oneDNN applies it while the values are at hand."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].target is torch.ops.aten.relu.default else None


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return value is not None and value.dtype is torch.float32


def _in_tree(module: nn.Module) -> bool:
    parents = [
        (parent, name) for parent in module.modules() for name, child in parent.named_children() if _plain(child)
    ]
    for parent, name in parents:
        activation = "gelu" if _is_intermediate(parent) else "none"
        setattr(parent, name, _Linear(getattr(parent, name), activation))
        if activation != "none":
            parent.intermediate_act_fn = nn.Identity()
    return bool(parents)


def _is_intermediate(parent: nn.Module) -> bool:
    """Whether this is the wide layer of a transformers model, which does nothing but GELU(dense(x)).

    Its passes are a sixth faster where oneDNN applies the GELU: measured with MiniLM on two cores (AMD EPYC, Zen 4).
    """
    if not type(parent).__name__.endswith("Intermediate"):
        return False
    children = dict(parent.named_children())
    activation = children.get("intermediate_act_fn")
    exact = getattr(activation, "act", None) is functional.gelu or (
        type(activation) is nn.GELU and activation.approximate == "none"
    )
    return exact and children.keys() == {"dense", "intermediate_act_fn"}


def _plain(child: nn.Module) -> bool:
    hooked = child._forward_hooks or child._forward_pre_hooks  # noqa: SLF001 - a hook wants torch's own call
    return type(child) is nn.Linear and child.weight.dtype is torch.float32 and not hooked


class _Linear(nn.Module):
    def __init__(self, linear: Any, activation: str) -> None:
        super().__init__()
        self.weight, self.bias, self.activation = linear.weight, linear.bias, activation
        self._halves: tuple[Any, Any] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight, self.bias
        if torch.is_autocast_enabled("cpu"):
            # Autocast does not know the operator.
            x, (weight, bias) = x.bfloat16(), self._in_half()
        # What is said last picks GELU's exact form, and means nothing to the others.
        values: Any = (x, weight, bias, self.activation, [], "none")
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(*values)  # noqa: SLF001
        return out

    def _in_half(self) -> tuple[Any, Any]:
        if self._halves is None:
            bias = self.bias
            self._halves = self.weight.detach().bfloat16(), None if bias is None else bias.detach().bfloat16()
        return self._halves
