"""A torch module as a model, on each engine that this machine offers. Importing this imports torch.

Linear layers through oneDNN: torch sends float32 ones to the BLAS that it was built with, which may be half as fast.
Measured on an AMD EPYC (Zen 5) with torch 2.13 for CPU, whose BLAS is MKL: 32-256-256-1 at batch 1024 on two cores,
1.5 million rows a second through MKL and 3.0 through oneDNN. Sums are taken in another order, so the last digit may
differ.

Exported modules: torch.export wraps a graph in checks of its inputs' shapes and in the packing of nested arguments.
Measured on two cores (AMD EPYC, Zen 4), 32-256-256-1 at batch 1024: 5 % of a pass. The checks depend on shapes and
types alone, so they are made once for each kind of inputs.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import fx, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from serving.machine import count_cores
from serving.model.contract import Contract
from serving.model.encoding import BatchUnit, Encoded
from serving.model.interface import Arrays, Engine, TuningLimits
from serving.model.outputs import name_outputs

_DEFAULT_ENGINE = Engine()
# The name that torch.export gives the module of its checks.
_GUARDS = "_guards_fn"


class TorchModel:
    """A torch module, called with its inputs in the signature's order."""

    # Measured best for small networks on two cores, where nothing else is known.
    batch_size, batch_sizes = 1024, (64, 256, 512, 1024, 2048, 4096, 8192)
    engine = _DEFAULT_ENGINE
    batch_unit: BatchUnit = "rows"

    def __init__(self, module: Any, contract: Contract, engine: Engine = _DEFAULT_ENGINE) -> None:
        self._module, self._contract, self._engine = module, contract, engine
        self._passes = prepare_module(module, engine)

    def prepare(self, encoded: Encoded) -> Encoded:
        """Return the inputs as they are."""
        return encoded

    def predict(self, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Run one forward pass; must be called inside `slot()`."""
        tensors = [torch.from_numpy(inputs[value.name]) for value in self._contract.inputs]
        rows = tensors[0].shape[0]
        return name_outputs(self._passes(*tensors), self._contract.outputs, rows, to_numpy)

    def slot(self) -> AbstractContextManager[None]:
        """Return the context of the engine: inference mode, intra-op threads and precision are set for each thread."""
        return enter_slot(self._engine)

    @property
    def slots(self) -> int:
        """The cores over the threads of a slot: measured faster than one stream over all cores."""
        return max(1, count_cores() // self._engine.threads)

    def engines(self, limits: TuningLimits) -> list[Engine]:
        """Return the engines worth trying, as `list_engines` does."""
        return list_engines(self._module, limits)

    def with_engine(self, engine: Engine) -> Self:
        """Return the same model on another engine; the weights are shared."""
        return type(self)(self._module, self._contract, engine)


def to_numpy(tensor: Any) -> npt.NDArray[Any]:
    """Return a tensor's values, without a copy where numpy has their type: bfloat16 becomes float32."""
    return np.asarray((tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy())


def list_engines(module: Any, limits: TuningLimits) -> list[Engine]:
    """Return the engines worth trying for a module: torch's own kernels, then others, then what the limits allow."""
    found = [Engine()]
    if has_onednn() and copy_with_onednn(module) is not None:
        found.append(Engine(linear="onednn"))
    if limits.compiled:
        found.append(Engine(compiled=True))
    if limits.bfloat16_tolerance is not None:
        # An exported graph whose layers run through oneDNN is tied to float32.
        reduced = [engine for engine in found if engine.linear == "torch" or not isinstance(module, fx.GraphModule)]
        found += [engine.model_copy(update={"precision": "bfloat16"}) for engine in reduced]
    # Where the caller sets the number of slots, each has one thread.
    if limits.slots or (cores := count_cores()) == 1:
        return found
    return found + [engine.model_copy(update={"threads": cores}) for engine in found]


@functools.lru_cache(maxsize=8)
def prepare_module(module: Any, engine: Engine) -> Any:
    """Return what to call for a pass on an engine.

    A plan made on a machine with oneDNN runs through torch's own kernels on one without.
    """
    if engine.linear == "onednn" and has_onednn():
        module = copy_with_onednn(module) or module
    return torch.compile(module, dynamic=True) if engine.compiled else check_inputs_once(module)


@contextmanager
def enter_slot(engine: Engine) -> Generator[None]:
    """Enter what an engine needs in the thread of one slot, and leave the thread as it was."""
    reduced = engine.precision == "bfloat16"
    before = torch.get_num_threads()
    torch.set_num_threads(engine.threads)
    try:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16) if reduced else nullcontext():
            yield
    finally:
        torch.set_num_threads(before)


def has_onednn() -> bool:
    """Whether this build of torch has oneDNN and the operator that torch.compile uses it by."""
    return bool(torch.backends.mkldnn.is_available()) and hasattr(  # type: ignore[no-untyped-call]
        torch.ops.mkldnn, "_linear_pointwise"
    )


def copy_with_onednn(module: nn.Module) -> nn.Module | None:
    """Return a copy of a module, its weights shared, whose float32 linear layers run through oneDNN.

    None where it has no such layer.
    """
    copied = _copy_sharing_weights(module)
    replaced = _replace_in_graph(copied) if isinstance(copied, fx.GraphModule) else _replace_in_modules(copied)
    return copied if replaced else None


def _copy_sharing_weights(module: nn.Module) -> nn.Module:
    shared = {id(value): value for value in (*module.parameters(), *module.buffers())}
    with warnings.catch_warnings():
        # torch deprecates a check that its own copying makes.
        warnings.simplefilter("ignore", FutureWarning)
        return copy.deepcopy(module, shared)


def copy_with_packed_weights(module: nn.Module, rows: int) -> nn.Module | None:
    """Return a copy of a module whose linear layers keep their weights in the layout that oneDNN computes with.

    That takes the memory of those weights once more. It pays where passes have few rows, as those of a decode loop do:
    without it the layout is made in each pass. `rows` is how many a pass is expected to have.

    None where the module has no linear layer of float32 or bfloat16.
    """
    copied = _copy_sharing_weights(module)
    places = [
        (parent, name)
        for parent in copied.modules()
        for name, child in parent.named_children()
        if _is_unhooked_linear(child) and child.weight.dtype in (torch.float32, torch.bfloat16)
    ]
    with torch.inference_mode():
        for parent, name in places:
            setattr(parent, name, _PackedLinear(getattr(parent, name), rows))
    return copied if places else None


def _replace_in_graph(module: fx.GraphModule) -> bool:
    linear = [node for node in module.graph.nodes if node.target is torch.ops.aten.linear.default and _is_float32(node)]
    for node in linear:
        x, weight, bias = (*node.args, None)[:3]
        relu = _find_sole_relu(node)
        node.target = torch.ops.mkldnn._linear_pointwise.default  # noqa: SLF001 - what torch.compile's own code calls
        node.args = (x, weight, bias, "relu" if relu else "none", [], "")
        if relu:
            relu.replace_all_uses_with(node)
            module.graph.erase_node(relu)
    module.recompile()
    return bool(linear)


def _find_sole_relu(node: fx.Node) -> fx.Node | None:
    """Return the ReLU that is the only user of a layer's output: oneDNN applies it within the layer."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].target is torch.ops.aten.relu.default else None


def _is_float32(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return value is not None and value.dtype is torch.float32


def _replace_in_modules(module: nn.Module) -> bool:
    parents = [
        (parent, name)
        for parent in module.modules()
        for name, child in parent.named_children()
        if _is_unhooked_linear(child) and child.weight.dtype is torch.float32
    ]
    for parent, name in parents:
        activation = "gelu" if _is_intermediate(parent) else "none"
        setattr(parent, name, _OneDnnLinear(getattr(parent, name), activation))
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


def _is_unhooked_linear(child: nn.Module) -> bool:
    hooked = child._forward_hooks or child._forward_pre_hooks  # noqa: SLF001 - a hook wants torch's own call
    return type(child) is nn.Linear and not hooked


class _OneDnnLinear(nn.Module):
    """A linear layer through oneDNN, with its activation."""

    def __init__(self, linear: Any, activation: str) -> None:
        super().__init__()
        self.weight, self.bias, self.activation = linear.weight, linear.bias, activation
        self._bfloat16: tuple[Any, Any] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight, self.bias
        if torch.is_autocast_enabled("cpu"):
            # Autocast does not know the operator.
            x, (weight, bias) = x.bfloat16(), self._bfloat16_weights()
        # The last value selects the exact form of GELU; the other activations ignore it.
        values: Any = (x, weight, bias, self.activation, [], "none")
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(*values)  # noqa: SLF001
        return out

    def _bfloat16_weights(self) -> tuple[Any, Any]:
        if self._bfloat16 is None:
            bias = self.bias
            self._bfloat16 = self.weight.detach().bfloat16(), None if bias is None else bias.detach().bfloat16()
        return self._bfloat16


class _PackedLinear(nn.Module):
    """A linear layer through oneDNN, whose weight is in oneDNN's own layout."""

    def __init__(self, linear: nn.Linear, rows: int) -> None:
        super().__init__()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)  # noqa: SLF001 - as above
        self._bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values: Any = (x, self._weight, self._bias, "none", [], "none")
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(*values)  # noqa: SLF001
        return out


def check_inputs_once(module: Any) -> Any:
    """Return a callable with the module's results that checks each kind of inputs once.

    Returns the module itself where it is not an exported graph over tensors alone.
    """
    info = getattr(getattr(module, "graph", None), "_codegen", None)
    info = getattr(info, "pytree_info", None)
    if not isinstance(module, fx.GraphModule) or info is None:
        return module
    inputs = sum(node.op == "placeholder" for node in module.graph.nodes)
    flat = pytree.tree_structure(((0,) * inputs, {}))
    return _CheckedOnce(module, info.out_spec) if info.in_spec == flat else module


class _CheckedOnce:
    """A graph that checks its inputs the first time that their shapes and types are seen."""

    def __init__(self, module: fx.GraphModule, out_spec: pytree.TreeSpec) -> None:
        self._checked, self._plain, self._out_spec = module, _copy_without_checks(module), out_spec
        self._passed: set[tuple[tuple[torch.Size, torch.dtype], ...]] = set()

    def __call__(self, *inputs: torch.Tensor) -> Any:
        kind = tuple((value.shape, value.dtype) for value in inputs)
        if kind in self._passed:
            return pytree.tree_unflatten(self._plain(*inputs), self._out_spec)
        answer = self._checked(*inputs)
        self._passed.add(kind)
        return answer


def _copy_without_checks(module: fx.GraphModule) -> fx.GraphModule:
    """Return the graph alone, its weights shared: it takes tensors, and returns a tuple of them."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    for node in list(graph.nodes):
        if node.op == "call_module" and node.target == _GUARDS and not node.users:
            graph.erase_node(node)
    return fx.GraphModule(module, graph)
