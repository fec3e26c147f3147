"""Text models: texts are tokenised ahead of the passes and batched by tokens. Importing this imports torch.

Shapes: N rows; K numbers for each of L tokens of a text (its id, and its type where the tokenizer gives one);
B rows of a batch; D values of an embedding.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Protocol, Self

import numpy as np
import torch

from serving.errors import ModelUnfit
from serving.machine import count_cores
from serving.model.contract import Contract
from serving.model.encoding import BatchUnit, Encoded
from serving.model.interface import Engine, Tunable, TuningLimits
from serving.model.number_casts import Array
from serving.model.outputs import name_outputs
from serving.model.torch_model import enter_slot, list_engines, prepare_module

_TOKENS = "tokens"
_PADDED = ("input_ids", "token_type_ids")
_MASK = "attention_mask"
_TEXTS_AT_ONCE = 256
# A tokenizer without a limit has 10**30 there.
_LIMIT_MAX = 1 << 31

_DEFAULT_ENGINE = Engine()

# A fast tokenizer raises "Already borrowed" where one thread sets padding or truncation while another uses it.
_tokenizer_lock = threading.Lock()


class Network(Protocol):
    """A tokenizer and the network behind it."""

    tokenizer: Any
    keys: tuple[str, ...]
    module: Any

    def tokenise(self, texts: list[str]) -> Iterator[Array]:
        """Yield the tokens of each text without padding, [K, L] in the order of `keys`."""
        ...

    def forward(self, features: dict[str, Any]) -> Any:
        """Return the network's outputs for B padded rows, each feature a tensor [B, L]."""
        ...

    def with_module(self, module: Any) -> Self:
        """Return the same network with another form of its module."""
        ...


def make_text_model(loaded: Any, contract: Contract) -> Tunable | None:
    """Return a loaded pyfunc model as a text model, None where it must run through pyfunc.

    A text model turns one text into embeddings, classes or a completion. A model of embeddings or classes with
    parameters runs through pyfunc, which applies them. Raises ModelUnfit where the signature has other outputs than the
    model, BadInput where a parameter of a model that generates text has an invalid value.
    """
    flavors = loaded.metadata.flavors
    if flavors.get("transformers", {}).get("task") == "text-generation":
        from serving.model.generation import make_generation_model  # noqa: PLC0415 - seconds of imports of transformers

        return make_generation_model(loaded, contract)
    one_text = [(value.dtype, value.shape) for value in contract.inputs] == [("str", ())]
    if not one_text or loaded.metadata.signature.params or loaded.model_config:
        return None
    network: Network | None = None
    if "sentence_transformers" in flavors:
        network = _make_embeddings(loaded.get_raw_model(), contract)
    elif flavors.get("transformers", {}).get("task") == "text-classification":
        network = _make_classes(loaded.get_raw_model())
    return None if network is None else TextModel(network, contract)


class TextModel:
    """Texts in, embeddings or classes out: each batch is padded to the longest of its rows."""

    # Measured best for MiniLM on two cores, where nothing else is known.
    batch_size, batch_sizes = 512, (256, 512, 1024, 2048)
    batch_unit: BatchUnit = "tokens"
    engine = _DEFAULT_ENGINE

    def __init__(self, network: Network, contract: Contract, engine: Engine = _DEFAULT_ENGINE) -> None:
        self._network, self._contract, self._engine = network, contract, engine
        self._passes = network.with_module(prepare_module(network.module, engine))
        tokenizer = network.tokenizer
        pads = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
        self._pad_K = np.array([pads[key] for key in network.keys])
        self._left = tokenizer.padding_side == "left"

    def prepare(self, encoded: Encoded) -> Encoded:
        """Tokenise N texts; a null, which no text model takes, is a reject."""
        (value,) = self._contract.inputs
        texts = [text if isinstance(text, str) else None for text in encoded.inputs[value.name]]
        for row, text in enumerate(texts):
            if text is None:
                encoded.flags.mark_row(row, value.columns[0].name, "null")
        tokens_N = np.empty(len(texts), dtype=object)
        with _tokenizer_lock:
            for row, tokens_KL in enumerate(self._network.tokenise([text or "" for text in texts])):
                tokens_N[row] = tokens_KL
        length_N = np.array([tokens_KL.shape[1] for tokens_KL in tokens_N], dtype=np.int64)
        return replace(encoded, inputs={_TOKENS: tokens_N}, length_N=length_N)

    def predict(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run one forward pass over tokenised rows; must be called inside `slot()`."""
        tokens_B = inputs[_TOKENS]
        answer = self._passes.forward(self._pad(tokens_B))
        return name_outputs(answer, self._contract.outputs, len(tokens_B), np.asarray)

    def _pad(self, tokens_B: Array) -> dict[str, Any]:
        # A batch of texts without any token still needs a length of one.
        longest = max(1, *(tokens_KL.shape[1] for tokens_KL in tokens_B))
        padded_KBL = np.empty((len(self._pad_K), len(tokens_B), longest), dtype=np.int64)
        padded_KBL[:] = self._pad_K[:, None, None]
        mask_BL = np.zeros((len(tokens_B), longest), dtype=np.int64)
        for row, tokens_KL in enumerate(tokens_B):
            length = tokens_KL.shape[1]
            where = slice(longest - length, None) if self._left else slice(length)
            padded_KBL[:, row, where] = tokens_KL
            mask_BL[row, where] = 1
        features = dict(zip(self._network.keys, torch.from_numpy(padded_KBL), strict=True))
        return features | {_MASK: torch.from_numpy(mask_BL)}

    def slot(self) -> AbstractContextManager[None]:
        """Return the context of the engine, as for any torch module."""
        return enter_slot(self._engine)

    @property
    def slots(self) -> int:
        """The cores over the threads of a slot, as for any torch module; one on a GPU."""
        if self._network.module.device.type != "cpu":
            return 1
        return max(1, count_cores() // self._engine.threads)

    def engines(self, limits: TuningLimits) -> list[Engine]:
        """Return the engines worth trying, as for any torch module."""
        return list_engines(self._network.module, limits)

    def with_engine(self, engine: Engine) -> Self:
        """Return the same model on another engine; the weights are shared."""
        return type(self)(self._network, self._contract, engine)


def _make_embeddings(module: Any, contract: Contract) -> _EmbeddingNetwork | None:
    """Return a SentenceTransformer as a network, None where its first module is not a tokenizer and transformer."""
    module.eval()
    prompt = None if module.default_prompt_name is None else module.prompts.get(module.default_prompt_name)
    features = dict(module.preprocess(["a"], prompt=prompt))
    keys = _find_token_keys(features)
    if keys is None or getattr(module.tokenizer, "pad_token_id", None) is None:
        return None
    tensors = {key: features.pop(key) for key in (*keys, _MASK)}
    network = _EmbeddingNetwork(module, prompt, keys, rest=features)
    with enter_slot(_DEFAULT_ENGINE):
        width = network.forward(tensors).shape[1]
    if [output.width for output in contract.outputs] != [width]:
        found = {output.name: output.shape for output in contract.outputs}
        message = (
            f"A sentence-transformers model must be logged with a signature of one output of its {width} values a "
            f'row, got {found}. Log it with signature=infer_signature(["a text"], model.encode(["a text"])).'
        )
        raise ModelUnfit(message)
    return network


def _find_token_keys(features: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return the features that hold a number for each token, None where one of them can't be padded here."""
    tensors = {key for key, value in features.items() if hasattr(value, "shape")}
    if not {"input_ids", _MASK} <= tensors <= {*_PADDED, _MASK} or features["input_ids"].ndim != 2:  # noqa: PLR2004 - [B, L]
        return None
    return tuple(key for key in _PADDED if key in tensors)


class _EmbeddingNetwork:
    """A SentenceTransformer: the results of `encode`, prompt included."""

    def __init__(self, module: Any, prompt: str | None, keys: tuple[str, ...], rest: dict[str, Any]) -> None:
        self.tokenizer = module.tokenizer
        self.keys = keys
        self.module = module
        self._prompt = prompt
        # Features that are the same for every batch, such as the length of the prompt.
        self._rest = rest

    def tokenise(self, texts: list[str]) -> Iterator[Array]:
        """Yield what `encode` would pass to the transformer, without the padding."""
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            features = self.module.preprocess(texts[start : start + _TEXTS_AT_ONCE], prompt=self._prompt)
            padded_KnL = np.stack([features[key].numpy() for key in self.keys])
            for row, mask_L in enumerate(features[_MASK].numpy() != 0):
                yield padded_KnL[:, row, mask_L]

    def with_module(self, module: Any) -> Self:
        """Return the same network with another form of its module."""
        return type(self)(module, self._prompt, self.keys, self._rest)

    def forward(self, features: dict[str, Any]) -> Any:
        """Return the embeddings of B rows, [B, D] float32."""
        device = self.module.device
        features = self._rest | {key: value.to(device) for key, value in features.items()}
        embedding_BD = self.module(features)["sentence_embedding"]
        return embedding_BD[:, : self.module.truncate_dim].float().cpu().numpy()


def _make_classes(pipeline: Any) -> _ClassNetwork | None:
    """Return a text-classification pipeline as a network, None where its batches can't be padded."""
    import transformers  # noqa: PLC0415 - seconds of imports that few models need

    is_subclass = type(pipeline) is not transformers.TextClassificationPipeline
    if is_subclass or getattr(pipeline.tokenizer, "pad_token_id", None) is None:
        return None
    keys = _find_token_keys(pipeline.preprocess("a"))
    return None if keys is None else _ClassNetwork(pipeline, keys)


class _ClassNetwork:
    """A text-classification pipeline: its label and score for each text, as a DataFrame."""

    def __init__(self, pipeline: Any, keys: tuple[str, ...]) -> None:
        self.tokenizer = pipeline.tokenizer
        self.keys = keys
        self.module = pipeline.model.eval()
        self._pipeline = pipeline

    def tokenise(self, texts: list[str]) -> Iterator[Array]:
        """Yield the tokens of each text, truncated where the tokenizer has a limit, since a longer text would fail."""
        truncation = self.tokenizer.model_max_length < _LIMIT_MAX
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            features = self.tokenizer(texts[start : start + _TEXTS_AT_ONCE], truncation=truncation)
            for several in zip(*(features[key] for key in self.keys), strict=True):
                yield np.array(several, dtype=np.int64)

    def with_module(self, module: Any) -> Self:
        """Return the same network with another form of its module."""
        pipeline = copy.copy(self._pipeline)
        pipeline.model = module
        return type(self)(pipeline, self.keys)

    def forward(self, features: dict[str, Any]) -> Any:
        """Return the label and the score of B rows."""
        import pandas as pd  # noqa: PLC0415 - as everywhere that only some models need it

        logits_BC = self._pipeline.forward(features)["logits"]
        return pd.DataFrame([self._pipeline.postprocess({"logits": logits_C[None]}) for logits_C in logits_BC])
