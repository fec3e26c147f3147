"""Text generation: a causal language model runs over a column of prompts and gives completions with token counts.

Prompts are tokenised ahead of the passes. A batch holds rows of about the same length, counted with the tokens to come.
Importing this imports torch and transformers.

Shapes: N rows; B rows of a batch; L tokens of a prompt.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import transformers
from pydantic import Field, ValidationError, field_validator

from serving.errors import BadInput
from serving.machine import count_cores
from serving.model.contract import Contract, Frozen
from serving.model.decoding import (
    Sampler,
    TokenChooser,
    can_decode,
    choose_likeliest,
    complete_prompts,
    count_cache_bytes,
)
from serving.model.encoding import BatchUnit, Encoded
from serving.model.interface import Engine, TuningLimits
from serving.model.number_casts import Array
from serving.model.outputs import name_outputs
from serving.model.torch_model import copy_with_packed_weights, enter_slot, has_onednn
from serving.option_words import name_option

_TOKENS = "tokens"
_TASK = "text-generation"
_TEXTS_AT_ONCE = 256
# That of transformers' pipeline.
_NEW_TOKENS = 256
# Names of outputs beside the completion, with their kinds of numpy; "O" is text.
_COUNTS = ("prompt_tokens", "completion_tokens")
_FINISH_REASON = "finish_reason"
# Settings of a model's generation_config that this loop reads, or that change no token of greedy or sampled decoding.
_UNDERSTOOD = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "max_length", "max_new_tokens", "transformers_version"),
    *("do_sample", "temperature", "top_k", "top_p", "use_cache", "return_dict_in_generate", "_from_model_config"),
}
_NEUTRAL: Mapping[str, Any] = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences"), 1),
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty", "length_penalty", "typical_p"), 1.0),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "diversity_penalty"), 0),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff"), 0.0),
}
# Rows of a decoding pass for which oneDNN chooses the layout of the weights.
_PACKED_ROWS = 32

_log = logging.getLogger(__name__)
_tokenizer_lock = threading.Lock()


class GenerationSettings(Frozen):
    """How prompts are completed: the params of a model's signature, or of the model_config that it was logged with."""

    max_new_tokens: int = Field(default=_NEW_TOKENS, ge=1, description="The most tokens of a completion.")
    stop: tuple[str, ...] = Field(
        default=(), description="Texts that end a completion, and are no part of it. Empty texts are ignored."
    )
    do_sample: bool = Field(default=False, description="Whether tokens are drawn. Otherwise the likeliest is taken.")
    temperature: float = Field(default=1.0, gt=0, description="Divides the logits before a token is drawn.")
    top_p: float = Field(default=1.0, gt=0, le=1, description="Tokens are drawn from the likeliest of this share.")
    seed: int = Field(default=0, description="Seeds the draws, together with the prompt of each row.")

    @field_validator("stop")
    @classmethod
    def _leave_out_empty(cls, stop: tuple[str, ...]) -> tuple[str, ...]:
        # A signature has to have a default for a list, of which MLflow can't tell the type where it is empty.
        return tuple(text for text in stop if text)


def make_generation_model(loaded: Any, contract: Contract) -> GenerationModel | None:
    """Return a loaded pyfunc model as a generation model, None where it must run through pyfunc.

    It is one where it was logged by MLflow's transformers flavour with the task text-generation, has one text as its
    input, a completion and counts as its outputs, and nothing that this module does not know. Raises BadInput where a
    value of a param is invalid.
    """
    flavor = loaded.metadata.flavors.get("transformers", {})
    one_text = [(value.dtype, value.shape) for value in contract.inputs] == [("str", ())]
    if flavor.get("task") != _TASK or flavor.get("inference_task") or not one_text or not _find_completion(contract):
        return None
    pipeline = loaded.get_raw_model()
    given = _merge_settings(loaded, contract)
    if not _is_plain_pipeline(pipeline) or not given.keys() <= GenerationSettings.model_fields.keys():
        return None
    given.setdefault("max_new_tokens", pipeline.model.generation_config.max_new_tokens or _NEW_TOKENS)
    template = (loaded.metadata.metadata or {}).get("prompt_template")
    context = getattr(pipeline.model.config, "max_position_embeddings", None)
    prompts = PromptReader(tokenizer=pipeline.tokenizer, template=template, context=context)
    return GenerationModel(pipeline.model.eval(), prompts, _check_settings(given), contract)


def _merge_settings(loaded: Any, contract: Contract) -> dict[str, Any]:
    """Return the settings in MLflow's order of precedence: the call's params, the signature's defaults, model_config.

    Without `return_full_text`, which is false here.
    """
    defaults = {spec.name: spec.default for spec in loaded.metadata.signature.params or ()}
    given = {**(loaded.model_config or {}), **defaults, **contract.params}
    if given.get("return_full_text") is False:
        del given["return_full_text"]
    return {name: value for name, value in given.items() if value is not None}


def _check_settings(given: Mapping[str, Any]) -> GenerationSettings:
    try:
        return GenerationSettings.model_validate(given)
    except ValidationError as error:
        (problem, *_) = error.errors()
        name = problem["loc"][0]
        field = GenerationSettings.model_fields[str(name)]
        message = (
            f"{name_option('params')} of a model that generates text must be valid, got {name}={given[str(name)]!r}: "
            f"{problem['msg'].lower()}. {field.description} Correct it there, or in the model's signature."
        )
        raise BadInput(message) from None


def _find_completion(contract: Contract) -> str | None:
    """Return the name of the output that is the completion, None where there are outputs that no model has here."""
    known = {**dict.fromkeys(_COUNTS, False), _FINISH_REASON: True}
    texts = [output.name for output in contract.outputs if output.dtype == "str" and output.name not in known]
    others = [output for output in contract.outputs if output.name not in texts]
    fits = all(known.get(each.name) == (each.dtype == "str") and each.width == 1 for each in others)
    return texts[0] if len(texts) == 1 and fits else None


def _is_plain_pipeline(pipeline: Any) -> bool:
    """Whether the loop gives what a pipeline gives: its model is one for the loop, and it has no other settings."""
    if type(pipeline) is not transformers.TextGenerationPipeline or getattr(pipeline, "assistant_model", None):
        return False
    stated = [getattr(pipeline, f"_{step}_params", {}) for step in ("preprocess", "forward", "postprocess")]
    config = pipeline.model.generation_config.to_diff_dict()
    unknown = {
        name
        for name, value in config.items()
        if value not in (None, False) and name not in _UNDERSTOOD and _NEUTRAL.get(name) != value
    }
    if unknown:
        _log.info("The model runs through pyfunc, since its generation_config has %s.", sorted(unknown))
    return not any(stated) and not unknown and pipeline.tokenizer is not None and can_decode(pipeline.model)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptReader:
    """From the texts of a column to the tokens of prompts, as MLflow and the pipeline make them.

    No chat template is applied, since the pipeline applies one to lists of messages and not to text. A prompt template
    that the model was logged with is. `context` is how many tokens the model reads and writes together, None where it
    has no limit.
    """

    tokenizer: Any
    template: str | None
    context: int | None

    def read(self, texts: Sequence[str]) -> list[Array]:
        """Return the tokens of each text, [L]; at least one token where the tokenizer has one that begins a text."""
        prompts = [self.template.format(prompt=text) for text in texts] if self.template else list(texts)
        found: list[Array] = []
        for start in range(0, len(prompts), _TEXTS_AT_ONCE):
            with _tokenizer_lock:
                tokens = self.tokenizer(prompts[start : start + _TEXTS_AT_ONCE])["input_ids"]
            found += [np.array(each or self._begin(), dtype=np.int64) for each in tokens]
        return found

    def _begin(self) -> list[int]:
        # What `generate` reads in place of an empty prompt.
        return [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]

    def find_problem(self, tokens_L: Array, tokens_max: int) -> str | None:
        """Return why a prompt can't be completed by so many tokens, None where it can."""
        if not len(tokens_L):
            return "a prompt without a token"
        if self.context is not None and len(tokens_L) + tokens_max > self.context:
            return (
                f"a prompt that with max_new_tokens={tokens_max} exceeds the model's context of {self.context} tokens"
            )
        return None


class GenerationModel:
    """Prompts in, completions and token counts out."""

    # Tokens of prompts and of what may be added to them. Large batches stay efficient while rows leave them.
    batch_size, batch_sizes = 8192, (8192,)
    batch_unit: BatchUnit = "tokens"

    def __init__(
        self,
        module: Any,
        prompts: PromptReader,
        settings: GenerationSettings,
        contract: Contract,
        engine: Engine | None = None,
    ) -> None:
        self._module, self._prompts, self._settings, self._contract = module, prompts, settings, contract
        self.engine = engine or _find_engine(module)
        ends = module.generation_config.eos_token_id
        self._ends = frozenset([ends] if isinstance(ends, int) else ends or ())
        # A token takes at least a byte; characters may have up to four, and be cut at both edges.
        longest = max((len(text.encode()) for text in settings.stop), default=0)
        self._tokens_searched = longest + 8
        self._passes = _prepare_module(module, self.engine)

    def prepare(self, encoded: Encoded) -> Encoded:
        """Tokenise N prompts; a null, or a prompt that does not fit the model's context, is a reject."""
        (value,) = self._contract.inputs
        column, tokens_max = value.columns[0].name, self._settings.max_new_tokens
        texts = [text if isinstance(text, str) else None for text in encoded.inputs[value.name]]
        tokens_N = np.empty(len(texts), dtype=object)
        for row, tokens_L in enumerate(self._prompts.read([text or "" for text in texts])):
            problem = "null" if texts[row] is None else self._prompts.find_problem(tokens_L, tokens_max)
            if problem:
                encoded.flags.mark_row(row, column, problem)
            # A reject has the place of the shortest prompt. A good row of its batch takes its place in the pass.
            tokens_N[row] = tokens_L[:1] if problem else tokens_L
        length_N = np.array([max(1, len(tokens_L)) + tokens_max for tokens_L in tokens_N], dtype=np.int64)
        return replace(encoded, inputs={_TOKENS: tokens_N}, length_N=length_N)

    def predict(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Complete tokenised prompts; must be called inside `slot()`."""
        prompts, settings = list(inputs[_TOKENS]), self._settings
        choose: TokenChooser = choose_likeliest
        if settings.do_sample:
            choose = Sampler(prompts, seed=settings.seed, temperature=settings.temperature, top_p=settings.top_p)
        tokenizer = self._prompts.tokenizer
        completions = complete_prompts(
            self._passes,
            prompts,
            tokens_max=settings.max_new_tokens,
            pad_token=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
            choose=choose,
            has_ended=self._has_ended,
        )
        found = {
            str(_find_completion(self._contract)): [self._read_completion(tokens) for tokens in completions],
            "prompt_tokens": [len(prompt) for prompt in prompts],
            "completion_tokens": [len(tokens) for tokens in completions],
            _FINISH_REASON: ["stop" if self._has_ended(tokens) else "length" for tokens in completions],
        }
        return name_outputs(found, self._contract.outputs, len(prompts), np.asarray)

    def _has_ended(self, tokens: Sequence[int]) -> bool:
        """Whether a completion ends in a token that ends texts, or holds a text to stop at."""
        if tokens[-1] in self._ends:
            return True
        if not self._settings.stop:
            return False
        # Most tokens end no text: only the last of them are looked at before all are.
        return self._holds_stop(tokens[-self._tokens_searched :]) and self._holds_stop(tokens)

    def _holds_stop(self, tokens: Sequence[int]) -> bool:
        text = self._decode(tokens)
        return any(stop in text for stop in self._settings.stop)

    def _read_completion(self, tokens: Sequence[int]) -> str:
        """Return the text of a completion, up to the first text to stop at."""
        text = self._decode(tokens)
        return text[: min((text.index(stop) for stop in self._settings.stop if stop in text), default=len(text))]

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self._prompts.tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def slot(self) -> AbstractContextManager[None]:
        """Return the context of the engine, as for any torch module."""
        return enter_slot(self.engine)

    @property
    def slots(self) -> int:
        """The cores over the threads of a slot, as for any torch module; one on a GPU."""
        return 1 if self._module.device.type != "cpu" else max(1, count_cores() // self.engine.threads)

    def count_slot_bytes(self, slots: int, batch_size: int) -> int:
        """Return the memory of keys and values of a batch in each slot; a GPU has them in its own."""
        return slots * count_cache_bytes(self._module, batch_size) if self._module.device.type == "cpu" else 0

    def engines(self, limits: TuningLimits) -> list[Engine]:  # noqa: ARG002 - a tuner compares texts, which differ at ties
        """Return the only one: what another gains is known, and its completions may differ in some rows."""
        return [self.engine]

    def with_engine(self, engine: Engine) -> Self:
        """Return the same model on another engine."""
        return type(self)(self._module, self._prompts, self._settings, self._contract, engine)


def _find_engine(module: Any) -> Engine:
    return Engine(linear="onednn") if module.device.type == "cpu" and has_onednn() else Engine()


@functools.lru_cache(maxsize=2)
def _prepare_module(module: Any, engine: Engine) -> Any:
    """Return what to call for a pass on an engine; torch's own kernels where this machine has no oneDNN."""
    packed = None
    if engine.linear == "onednn" and has_onednn():
        packed = copy_with_packed_weights(module, _PACKED_ROWS)
    return packed or module
