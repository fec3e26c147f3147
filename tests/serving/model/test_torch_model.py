from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from serving.machine import count_cores
from serving.model.interface import Engine, TuningLimits
from serving.model.torch_model import TorchModel, check_inputs_once, copy_with_onednn, has_onednn
from tests.serving.toys import matrix, network

ROWS = torch.randn(100, 4, generator=torch.Generator().manual_seed(3))
X = ROWS[:64].numpy()
RowsModule = Callable[[torch.nn.Module], torch.nn.Module]


def scores(engine: Engine) -> np.ndarray:
    model = TorchModel(network(), matrix(4)).with_engine(engine)
    with model.slot():
        return model.predict({"x": X})["score"]


def test_engines_begin_with_torchs_own_kernels_and_hold_what_the_limits_allow() -> None:
    model = TorchModel(network(), matrix(4))
    few, many = model.engines(TuningLimits()), model.engines(TuningLimits(bfloat16_tolerance=0.1, compiled=True))

    assert Engine() == few[0] == many[0]
    assert {"float32"} == {engine.precision for engine in few}
    assert {False} == {engine.compiled for engine in few}
    assert {"float32", "bfloat16"} == {engine.precision for engine in many}
    assert has_onednn() == (Engine(linear="onednn") in few)
    assert Engine(precision="bfloat16", compiled=True) in many


def test_slots_that_are_counted_by_the_caller_have_a_thread_each() -> None:
    assert {1} == {engine.threads for engine in TorchModel(network(), matrix(4)).engines(TuningLimits(slots=1))}


def test_slots_times_threads_are_the_cores() -> None:
    model = TorchModel(network(), matrix(4))

    assert count_cores() == model.slots
    assert 1 == model.with_engine(Engine(threads=count_cores())).slots


def test_an_engine_gives_the_same_predictions_within_its_precision() -> None:
    plain = scores(Engine())

    assert np.array_equal(plain, scores(Engine()))
    assert 1e-6 > np.abs(plain - scores(Engine(linear="onednn"))).max()
    reduced = scores(Engine(precision="bfloat16"))
    assert np.float32 == reduced.dtype
    assert 0 < np.abs(plain - reduced).max() < 0.05


@pytest.mark.machines
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++, which torch.compile calls")
def test_a_compiled_model_takes_batches_of_any_size() -> None:
    model = TorchModel(network(), matrix(4)).with_engine(Engine(compiled=True))
    with model.slot():
        got = [model.predict({"x": X[:rows]})["score"] for rows in (64, 7, 1)]

    assert all(1e-5 > np.abs(scores(Engine())[: len(some)] - some).max() for some in got)


def test_a_slot_has_the_threads_of_its_engine_and_gives_them_back() -> None:
    before = torch.get_num_threads()
    with TorchModel(network(), matrix(4)).with_engine(Engine(threads=3)).slot():
        inside = torch.get_num_threads()

    assert (3, before) == (inside, torch.get_num_threads())
    assert not torch.is_inference_mode_enabled()


needs_onednn = pytest.mark.skipif(not has_onednn(), reason="needs a torch that is built with oneDNN")


def export(module: torch.nn.Module) -> torch.fx.GraphModule:
    program = torch.export.export(module, (ROWS,), dynamic_shapes=({0: torch.export.Dim("rows", min=1)},))
    graph = program.module()
    assert isinstance(graph, torch.fx.GraphModule)
    return graph


@needs_onednn
@pytest.mark.parametrize("make", [lambda module: module, export], ids=["eager", "exported"])
@pytest.mark.parametrize("rows", [1, 7, 100])
def test_a_module_answers_the_same_within_rounding(make: RowsModule, rows: int) -> None:
    module = make(network())
    copied = copy_with_onednn(module)
    assert copied is not None
    with torch.inference_mode():
        expected, got = module(ROWS[:rows]), copied(ROWS[:rows])

    assert expected.shape == got.shape
    assert 1e-6 > (expected - got).abs().max()


@needs_onednn
@pytest.mark.parametrize("make", [lambda module: module, export], ids=["eager", "exported"])
def test_the_copy_shares_the_weights_and_leaves_the_module_alone(make: RowsModule) -> None:
    module = make(network())
    with torch.inference_mode():
        before = module(ROWS)
        copied = copy_with_onednn(module)
        after = module(ROWS)
    assert copied is not None

    assert {p.data_ptr() for p in module.parameters()} == {p.data_ptr() for p in copied.parameters()}
    assert torch.equal(before, after)


@needs_onednn
def test_columns_with_gaps_between_them_are_taken_without_a_copy() -> None:
    module = network()
    copied = copy_with_onednn(module)
    assert copied is not None
    apart = torch.empty(4, 116)[:, :100].copy_(ROWS.t()).t()
    with torch.inference_mode():
        assert 1e-6 > (module(ROWS) - copied(apart)).abs().max()


@needs_onednn
def test_a_module_without_plain_linear_layers_of_float32_is_not_copied() -> None:
    hooked = torch.nn.Sequential(torch.nn.Linear(4, 1))
    hooked[0].register_forward_hook(lambda *_: None)

    assert copy_with_onednn(torch.nn.Sequential(torch.nn.Tanh())) is None
    assert copy_with_onednn(network().double()) is None
    assert copy_with_onednn(hooked) is None


@needs_onednn
def test_layers_without_bias_and_inside_others_are_found() -> None:
    inner = torch.nn.Sequential(torch.nn.Linear(4, 3, bias=False), torch.nn.Tanh())
    module = torch.nn.ModuleDict({"inner": inner})
    copied = copy_with_onednn(module)
    assert isinstance(copied, torch.nn.ModuleDict)
    with torch.inference_mode():
        assert 1e-6 > (inner(ROWS) - copied["inner"](ROWS)).abs().max()
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


@needs_onednn
@pytest.mark.parametrize(
    ("activation", "joined"),
    [(torch.nn.GELU(), True), (torch.nn.GELU(approximate="tanh"), False), (torch.nn.Tanh(), False)],
    ids=["exact", "tanh", "another"],
)
def test_an_exact_gelu_behind_the_wide_layer_of_a_block_is_applied_with_it(
    activation: torch.nn.Module, *, joined: bool
) -> None:
    module = torch.nn.Sequential(ToyIntermediate(activation))
    copied = copy_with_onednn(module)
    assert copied is not None
    with torch.inference_mode():
        difference = (module(ROWS) - copied(ROWS)).abs().max()

    assert 1e-6 > difference
    assert joined == isinstance(copied[0].intermediate_act_fn, torch.nn.Identity)
    assert module[0].intermediate_act_fn is activation


@needs_onednn
def test_under_autocast_the_layers_of_a_module_run_in_bfloat16() -> None:
    module = torch.nn.Sequential(ToyIntermediate(torch.nn.GELU()), torch.nn.Linear(8, 2, bias=False))
    copied = copy_with_onednn(module)
    assert copied is not None
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected, got = module(ROWS), copied(ROWS)

    assert torch.bfloat16 is got.dtype
    assert 0.02 > (expected - got).abs().max()


class Nested(torch.nn.Module):
    """Two inputs, and outputs that are nested."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 2)

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> dict[str, Any]:
        return {"sum": self.linear(left) + right, "both": (left, right.sum())}


def export_named() -> Any:
    torch.manual_seed(0)
    rows = torch.export.Dim("rows", min=2, max=50)
    shapes = ({0: rows}, {0: rows})
    return torch.export.export(Nested().eval(), (ROWS[:8], ROWS[:8, :2]), dynamic_shapes=shapes).module()


@pytest.mark.parametrize("rows", [2, 7, 50])
def test_every_call_answers_as_the_module_does(rows: int) -> None:
    module = export_named()
    once = check_inputs_once(module)
    with torch.inference_mode():
        expected = module(ROWS[:rows], ROWS[:rows, :2])
        for got in (once(ROWS[:rows], ROWS[:rows, :2]) for _ in range(3)):
            assert torch.equal(expected["sum"], got["sum"])
            assert torch.equal(expected["both"][1], got["both"][1])


def test_inputs_that_the_export_does_not_allow_are_refused_after_others_have_passed() -> None:
    once = check_inputs_once(export_named())
    once(ROWS[:8], ROWS[:8, :2])
    once(ROWS[:8], ROWS[:8, :2])

    for left, right in ((51, 51), (8, 7)):
        with pytest.raises(AssertionError, match="Guard failed"):
            once(ROWS[:left], ROWS[:right, :2])
    with pytest.raises(RuntimeError, match="dtype"):
        once(ROWS[:8].double(), ROWS[:8, :2])


def test_the_module_keeps_its_checks_and_its_weights_are_shared() -> None:
    module = export_named()
    once = check_inputs_once(module)
    with torch.inference_mode():
        for _ in range(2):
            once(ROWS[:8], ROWS[:8, :2])
        module.linear.weight.zero_()
        got = once(ROWS[:8], ROWS[:8, :2])

    assert torch.equal(got["sum"], module(ROWS[:8], ROWS[:8, :2])["sum"])
    with pytest.raises(AssertionError, match="Guard failed"):
        module(ROWS[:51], ROWS[:51, :2])


def test_a_module_that_is_not_an_exported_graph_over_tensors_is_returned_unchanged() -> None:
    plain = torch.nn.Linear(4, 1)
    traced = torch.fx.symbolic_trace(plain)

    class Nested(torch.nn.Module):
        def forward(self, both: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            return both[0] + both[1]

    nested = torch.export.export(Nested(), ((ROWS, ROWS),)).module()

    assert all(check_inputs_once(module) is module for module in (plain, traced, nested))
