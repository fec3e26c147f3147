from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

from serving.errors import BadInput
from serving.model.contract import Contract
from serving.model.encoding import Encoded, encode
from serving.model.forward import Forward
from serving.model.interface import Engine, Model, SlotMemory, Tunable
from serving.model.loading import PyfuncModel, load_model
from serving.model.registry import resolve_model
from tests.generators import (
    CONTEXT,
    ENDS,
    OUTPUTS,
    SIGNATURE,
    load_smollm2,
    make_prompts,
    make_tiny_generator,
    register_generator,
)

pytest.importorskip("transformers", reason="pip install -e '.[dev]' brings transformers")

from serving.model.decoding import choose_likeliest, complete_prompts, count_cache_bytes, draw_tokens
from serving.model.generation import GenerationModel

TOKENS_MAX = 24


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return make_tiny_generator()


@pytest.fixture(scope="module")
def generator(registry: Path, pipeline: Any) -> str:
    return register_generator("generator", pipeline)


def load(uri: str, **params: Any) -> tuple[Tunable, Contract]:
    resolved = resolve_model(uri)
    contract = resolved.contract({}, {}, params)
    return load_model(resolved, contract), contract


def prepared(model: Model, contract: Contract, prompts: Sequence[str | None]) -> Encoded:
    return model.prepare(encode(contract, pa.table({"prompt": pa.array(prompts, pa.string())})))


def complete(model: Model, contract: Contract, prompts: Sequence[str | None], tokens: int = 1024) -> dict[str, Any]:
    encoded = prepared(model, contract, prompts)
    with model.slot():
        found = Forward(model, contract, tokens).score(encoded)
    return {name: value.tolist() for name, value in found.items()}


def generate(pipeline: Any, prompts: Sequence[str], tokens_max: int = TOKENS_MAX) -> list[list[int]]:
    """Return the new tokens that transformers' own `generate` gives for one batch, up to the one that ends each."""
    tokenizer = pipeline.tokenizer
    features = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    features.pop("token_type_ids", None)
    with torch.inference_mode():
        sequences = pipeline.model.generate(**features, max_new_tokens=tokens_max, do_sample=False)
    completions = [sequence[features["input_ids"].shape[1] :].tolist() for sequence in sequences]
    ends = pipeline.model.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else ends
    places = [next((at + 1 for at, token in enumerate(each) if token in ends), len(each)) for each in completions]
    return [each[:stop] for each, stop in zip(completions, places, strict=True)]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_greedy_completions_are_those_of_generate_for_the_same_batch(kind: str) -> None:
    pipeline, prompts = make_tiny_generator(kind), make_prompts(40)
    expected = generate(pipeline, prompts)
    with torch.inference_mode():
        found = complete_prompts(
            pipeline.model,
            [np.array(tokens) for tokens in pipeline.tokenizer(prompts)["input_ids"]],
            tokens_max=TOKENS_MAX,
            pad_token=0,
            choose=choose_likeliest,
            has_ended=lambda tokens: tokens[-1] in ENDS,
        )

    assert expected == found
    assert 5 < len({len(tokens) for tokens in found})


def test_a_registered_model_gives_completions_counts_and_why_they_ended(generator: str, pipeline: Any) -> None:
    prompts = make_prompts(40)
    found = complete(*load(generator), prompts, tokens=1 << 20)
    expected = generate(pipeline, prompts)

    assert [pipeline.tokenizer.decode(each, skip_special_tokens=True) for each in expected] == found["completion"]
    assert [len(prompt) for prompt in prompts] == found["prompt_tokens"]
    assert [len(each) for each in expected] == found["completion_tokens"]
    assert ["stop" if each[-1] in ENDS else "length" for each in expected] == found["finish_reason"]
    assert {"stop", "length"} == set(found["finish_reason"])


def test_torchs_own_kernels_give_the_same_completions(generator: str) -> None:
    model, contract = load(generator)
    prompts = make_prompts(40)

    assert complete(model, contract, prompts) == complete(model.with_engine(Engine()), contract, prompts)


def test_rows_count_their_prompt_and_what_may_be_added_to_it(generator: str) -> None:
    encoded = prepared(*load(generator, max_new_tokens=10), ["abc", "", "a" * 40])

    assert encoded.length_N is not None
    assert [13, 11, 50] == encoded.length_N.tolist()


def test_a_completion_ends_before_a_text_to_stop_at(generator: str) -> None:
    prompts = make_prompts(60)
    greedy = complete(*load(generator), prompts)
    text = max(greedy["completion"], key=len)
    stop = text[3:6]
    found = complete(*load(generator, stop=[stop, "never said"]), prompts)

    stopped = [stop in whole for whole in greedy["completion"]]
    assert any(stopped)
    assert [whole.split(stop)[0] for whole in greedy["completion"]] == found["completion"]
    for whole, short, reason, is_stopped in zip(
        greedy["completion_tokens"], found["completion_tokens"], found["finish_reason"], stopped, strict=True
    ):
        assert (short, reason == "stop") == (short, True) if is_stopped else short == whole
    at = greedy["completion"].index(text)
    assert len(text.split(stop)[0]) + len(stop) == found["completion_tokens"][at]


def test_a_prompt_too_long_for_the_model_is_a_reject_and_its_neighbours_are_as_without_it(generator: str) -> None:
    model, contract = load(generator)
    prompts: list[str | None] = list(make_prompts(30))
    prompts[4], prompts[20] = "a" * (CONTEXT - TOKENS_MAX + 1), None
    prompts[9] = "b" * (CONTEXT - TOKENS_MAX)
    encoded = prepared(model, contract, prompts)
    with model.slot():
        found = Forward(model, contract, 512).score(encoded)
    alone = complete(model, contract, [prompts[row] or "a" for row in range(30) if row not in (4, 20)], tokens=512)

    reasons = {int(row): encoded.flags.reasons[encoded.flags.code_N[row] - 1] for row in (4, 20)}
    assert [4, 20] == np.flatnonzero(encoded.flags.code_N).tolist()
    assert ("prompt", "null") == reasons[20]
    assert "prompt" == reasons[4][0]
    assert f"max_new_tokens=24 exceeds the model's context of {CONTEXT} tokens" in reasons[4][1]
    for name, values in alone.items():
        assert values == [value for row, value in enumerate(found[name].tolist()) if row not in (4, 20)]


def test_draws_depend_on_the_seed_and_the_prompt_and_not_on_the_batch(generator: str) -> None:
    prompts = make_prompts(40)
    sampled = {"do_sample": True, "temperature": 1.5, "top_p": 0.9}
    model, contract = load(generator, **sampled, seed=1)
    found = complete(model, contract, prompts, tokens=1 << 20)["completion"]
    backwards = complete(model, contract, prompts[::-1], tokens=200)["completion"]
    other = complete(*load(generator, **sampled, seed=2), prompts)["completion"]

    assert found == backwards[::-1]
    assert found != other
    assert found != complete(*load(generator), prompts)["completion"]


def test_only_the_likeliest_tokens_are_drawn_and_each_by_its_probability() -> None:
    shares = torch.arange(0, 1, 0.001, dtype=torch.float64)
    chances = torch.tensor([[0.1, 0.5, 0.05, 0.35]], dtype=torch.float64).expand(1000, 4)
    counts = [torch.bincount(draw_tokens(chances, shares, top_p), minlength=4).tolist() for top_p in (1.0, 0.8, 0.01)]

    np.testing.assert_allclose([[100, 500, 50, 350], [0, 588, 0, 412], [0, 1000, 0, 0]], counts, atol=1)


def test_a_setting_that_can_not_be_is_refused_by_name(generator: str) -> None:
    for given, named in (({"temperature": 0.0}, "temperature=0.0"), ({"max_new_tokens": 0}, "max_new_tokens=0")):
        with pytest.raises(BadInput, match=f"got {named}: input should be greater than"):
            load(generator, **given)


def test_the_template_that_a_model_was_logged_with_is_put_around_each_prompt(
    registry: Path, pipeline: Any, generator: str
) -> None:
    uri = register_generator("templated", pipeline, prompt_template="say {prompt}.")
    found = complete(*load(uri), ["abc", "x"])

    assert complete(*load(generator), ["say abc.", "say x."]) == found
    assert [8, 6] == found["prompt_tokens"]


def test_a_signature_may_have_the_completion_alone(registry: Path, pipeline: Any, generator: str) -> None:
    signature = ModelSignature(Schema([ColSpec("string", "prompt")]), Schema([ColSpec("string")]))
    uri = register_generator("alone", pipeline, signature=signature, model_config={"max_new_tokens": 24})
    prompts = make_prompts(5)

    assert complete(*load(generator), prompts)["completion"] == complete(*load(uri), prompts)["prediction"]


def test_what_the_loop_does_not_know_runs_through_pyfunc(registry: Path, pipeline: Any, generator: str) -> None:
    prompt = Schema([ColSpec("string", "prompt")])
    beams = ModelSignature(prompt, OUTPUTS, ParamSchema([ParamSpec("num_beams", "long", 2)]))
    more = ModelSignature(prompt, Schema([ColSpec("string", "completion"), ColSpec("double", "score")]))
    repeating = make_tiny_generator()
    repeating.model.generation_config.repetition_penalty = 1.3
    sliding = make_tiny_generator("llama", sliding_window=8)
    models = {
        "beams": register_generator("beams", pipeline, signature=beams),
        "more": register_generator("more", pipeline, signature=more),
        "full": register_generator("full", pipeline, model_config={"return_full_text": True}),
        "repeating": register_generator("repeating", repeating, signature=SIGNATURE),
        "sliding": register_generator("sliding", sliding),
    }

    assert isinstance(load(generator)[0], GenerationModel)
    assert dict.fromkeys(models, True) == {name: isinstance(load(uri)[0], PyfuncModel) for name, uri in models.items()}


@pytest.mark.machines
def test_smollm2_completes_chats_as_generate_does(registry: Path) -> None:
    pipeline = load_smollm2()
    questions = ["What is the capital of France?", "Name three colors.", "Say hello in Spanish."]
    prompts = [
        pipeline.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        for question in questions
    ]
    expected = generate(pipeline, prompts)
    found = complete(*load(register_generator("smollm2", pipeline)), prompts, tokens=1 << 20)

    assert "The capital of France is Paris." == found["completion"][0]
    assert [pipeline.tokenizer.decode(each, skip_special_tokens=True) for each in expected] == found["completion"]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_memory_of_keys_and_values_is_stated_as_the_model_keeps_them(kind: str) -> None:
    module = make_tiny_generator(kind).model
    with torch.inference_mode():
        cache = module(input_ids=torch.ones((3, 7), dtype=torch.int64), use_cache=True).past_key_values
    kept = sum(each.nbytes for layer in cache.layers for each in (layer.keys, layer.values))

    assert kept == count_cache_bytes(module, 3 * 7)


def test_the_memory_of_a_run_has_the_keys_and_values_of_a_batch_in_each_slot(generator: str, pipeline: Any) -> None:
    model, _ = load(generator)

    assert isinstance(model, SlotMemory)
    assert 3 * count_cache_bytes(pipeline.model, 1024) == model.count_slot_bytes(3, 1024)
