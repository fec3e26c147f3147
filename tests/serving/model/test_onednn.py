from __future__ import annotations

import pytest
import torch

from serving.model import onednn
from serving.model.onednn import through_onednn
from tests.serving.toys import network

pytestmark = pytest.mark.skipif(not onednn.available(), reason="needs a torch that is built with oneDNN")

X = torch.randn(100, 4, generator=torch.Generator().manual_seed(3))


def exported(module: torch.nn.Module) -> torch.fx.GraphModule:
    program = torch.export.export(module, (X,), dynamic_shapes=({0: torch.export.Dim("rows", min=1)},))
    graph = program.module()
    assert isinstance(graph, torch.fx.GraphModule)
    return graph


@pytest.mark.parametrize("make", [lambda module: module, exported], ids=["eager", "exported"])
@pytest.mark.parametrize("rows", [1, 7, 100])
def test_a_module_answers_the_same_within_rounding(make, rows: int) -> None:
    module = make(network())
    copied = through_onednn(module)
    assert copied is not None
    with torch.inference_mode():
        expected, got = module(X[:rows]), copied(X[:rows])

    assert expected.shape == got.shape
    assert 1e-6 > (expected - got).abs().max()


@pytest.mark.parametrize("make", [lambda module: module, exported], ids=["eager", "exported"])
def test_the_copy_shares_the_weights_and_leaves_the_module_alone(make) -> None:
    module = make(network())
    with torch.inference_mode():
        before = module(X)
        copied = through_onednn(module)
        after = module(X)
    assert copied is not None

    assert {p.data_ptr() for p in module.parameters()} == {p.data_ptr() for p in copied.parameters()}
    assert torch.equal(before, after)


def test_columns_that_lie_apart_are_taken_as_they_lie() -> None:
    module = network()
    copied = through_onednn(module)
    assert copied is not None
    apart = torch.empty(4, 116)[:, :100].copy_(X.t()).t()
    with torch.inference_mode():
        assert 1e-6 > (module(X) - copied(apart)).abs().max()


def test_a_module_without_linear_layers_of_float32_is_left() -> None:
    hooked = torch.nn.Sequential(torch.nn.Linear(4, 1))
    hooked[0].register_forward_hook(lambda *_: None)

    assert through_onednn(torch.nn.Sequential(torch.nn.Tanh())) is None
    assert through_onednn(network().double()) is None
    assert through_onednn(hooked) is None


def test_layers_without_bias_and_inside_others_are_found() -> None:
    inner = torch.nn.Sequential(torch.nn.Linear(4, 3, bias=False), torch.nn.Tanh())
    module = torch.nn.ModuleDict({"inner": inner})
    copied = through_onednn(module)
    assert isinstance(copied, torch.nn.ModuleDict)
    with torch.inference_mode():
        assert 1e-6 > (inner(X) - copied["inner"](X)).abs().max()
        assert type(copied["inner"][0]) is not torch.nn.Linear


class ToyIntermediate(torch.nn.Module):
    """As transformers writes the wide layer of a block."""

    def __init__(self, activation: torch.nn.Module) -> None:
        super().__init__()
        self.dense = torch.nn.Linear(4, 8)
        self.intermediate_act_fn = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.intermediate_act_fn(self.dense(x))
        return out


@pytest.mark.parametrize(
    ("activation", "joined"),
    [(torch.nn.GELU(), True), (torch.nn.GELU(approximate="tanh"), False), (torch.nn.Tanh(), False)],
    ids=["exact", "tanh", "another"],
)
def test_an_exact_gelu_behind_the_wide_layer_of_a_block_is_applied_with_it(
    activation: torch.nn.Module, *, joined: bool
) -> None:
    module = torch.nn.Sequential(ToyIntermediate(activation))
    copied = through_onednn(module)
    assert copied is not None
    with torch.inference_mode():
        difference = (module(X) - copied(X)).abs().max()

    assert 1e-6 > difference
    assert joined == isinstance(copied[0].intermediate_act_fn, torch.nn.Identity)
    assert module[0].intermediate_act_fn is activation


def test_under_autocast_the_layers_of_a_module_run_in_bfloat16() -> None:
    module = torch.nn.Sequential(ToyIntermediate(torch.nn.GELU()), torch.nn.Linear(8, 2, bias=False))
    copied = through_onednn(module)
    assert copied is not None
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected, got = module(X), copied(X)

    assert torch.bfloat16 is got.dtype
    assert 0.02 > (expected - got).abs().max()
