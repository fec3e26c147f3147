"""The decode loop of a causal language model: one batch of prompts, a token a row in each pass, until every row ended.

A row that has ended leaves the batch, so that the passes after it are smaller. A static batch would compute all of its
rows until the last of them has ended. Keys and values are written into memory that was taken once for all tokens to
come, where `transformers` copies them for each token. Importing this imports torch and transformers.

Shapes: B rows of a batch, n of them that have not ended; L tokens of the longest prompt; T tokens with those to come;
V tokens of the vocabulary.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from serving.model.number_casts import Array

# What the loop passes to a model in each pass, beside the cache.
_ARGUMENTS = {"input_ids", "attention_mask", "position_ids"}
# The cache had the second name in the first releases of transformers 5.
_CACHE_NAMES = ("cache", "past_key_values")
_LAST_LOGITS_ONLY = "logits_to_keep"
# Prompts that are read in one pass: those of a batch are in order of length, so few of them need little padding.
_PROMPTS_AT_ONCE = 8


class TokenChooser(Protocol):
    """Chooses the next token of each row."""

    def __call__(self, logits_nV: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """Return a token for each of the n rows that have not ended, [n]; `rows` are their numbers in the batch."""
        ...


def can_decode(module: Any) -> bool:
    """Whether a model is one that the loop can run: a decoder whose layers keep the keys and values of every token.

    Models that keep another state, as those with sliding windows do, are none.
    """
    if not module.can_generate() or module.config.is_encoder_decoder:
        return False
    accepted = inspect.signature(module.forward).parameters.keys()
    plain = all(type(layer) is DynamicLayer for layer in DynamicCache(config=module.config).layers)
    return plain and accepted >= _ARGUMENTS and not accepted.isdisjoint(_CACHE_NAMES)


def complete_prompts(
    module: Any,
    prompts: Sequence[Array],
    *,
    tokens_max: int,
    pad_token: int,
    choose: TokenChooser,
    has_ended: Callable[[Sequence[int]], bool],
) -> list[list[int]]:
    """Return the tokens that a model adds to each of B prompts.

    Args:
        module: A causal language model of transformers for which `can_decode` holds.
        prompts: The tokens of each prompt, at least one.
        tokens_max: The most tokens that are added to a prompt, at least one.
        pad_token: What is put before prompts that are shorter than others. The model does not attend to it.
        choose: Chooses the next tokens.
        has_ended: Whether a completion with these tokens is complete. Called after each token.
    """
    completions: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))
    batch = _RunningBatch(module, prompts, tokens_max, pad_token)
    logits_nV = batch.read_prompts()
    while True:
        tokens_n = choose(logits_nV, rows)
        for row, token in zip(rows, tokens_n.tolist(), strict=True):
            completions[row].append(token)
        if len(completions[rows[0]]) == tokens_max:
            return completions
        ended = {place for place, row in enumerate(rows) if has_ended(completions[row])}
        if len(ended) == len(rows):
            return completions
        if ended:
            moves = _plan_moves(ended, len(rows))
            for source, target in moves:
                rows[target] = rows[source]
                tokens_n[target] = tokens_n[source]
            rows, tokens_n = rows[: len(rows) - len(ended)], tokens_n[: len(rows) - len(ended)]
            batch.remove_rows(moves, len(rows))
        logits_nV = batch.read_tokens(tokens_n)


def _plan_moves(ended: set[int], count: int) -> list[tuple[int, int]]:
    """Return which rows move to which places, so that those which have not ended are the first of `count` rows.

    Only as many rows are moved as have ended.
    """
    left = count - len(ended)
    sources = (place for place in range(left, count) if place not in ended)
    return list(zip(sources, sorted(place for place in ended if place < left), strict=True))


def count_cache_bytes(module: Any, tokens: int) -> int:
    """Return the memory of the keys and values of so many tokens, those of padding included."""
    config = module.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * _count_layers(module) * heads * width * module.dtype.itemsize * tokens)


def _count_layers(module: Any) -> int:
    return len(DynamicCache(config=module.config).layers) or int(module.config.num_hidden_layers)


class _RunningBatch:
    """The rows of a batch that have not ended, what the model has read of them, and the passes over them."""

    def __init__(self, module: Any, prompts: Sequence[Array], tokens_max: int, pad_token: int) -> None:
        self._module = module
        self._rows, self._read = len(prompts), max(len(prompt) for prompt in prompts)
        tokens_BL = np.full((self._rows, self._read), pad_token, dtype=np.int64)
        mask_BT = np.ones((self._rows, self._read + tokens_max), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            # Padding is on the left, so that the next token of every row has the same place.
            tokens_BL[row, self._read - len(prompt) :] = prompt
            mask_BT[row, : self._read - len(prompt)] = 0
        self._tokens_BL = torch.from_numpy(tokens_BL).to(module.device)
        self._mask_BT = torch.from_numpy(mask_BT).to(module.device)
        self._layers: list[Any] = [_RowsLayer(self._read + tokens_max) for _ in range(_count_layers(module))]
        accepted = inspect.signature(module.forward).parameters
        cache_name = next(name for name in _CACHE_NAMES if name in accepted)
        self._options: dict[str, Any] = {cache_name: Cache(layers=self._layers), "use_cache": True}
        if _LAST_LOGITS_ONLY in accepted:
            self._options[_LAST_LOGITS_ONLY] = 1

    def read_prompts(self) -> torch.Tensor:
        """Read every prompt and return the logits of its next token, [B, V]."""
        edges = [*range(0, self._rows, _PROMPTS_AT_ONCE), self._rows]
        logits_BV = torch.cat([self._read_some(start, stop) for start, stop in itertools.pairwise(edges)])
        for layer in self._layers:
            layer.show_rows(self._rows)
        return logits_BV

    def _read_some(self, start: int, stop: int) -> torch.Tensor:
        """Read the prompts of some rows, which are of about the same length, with the padding that these need."""
        mask_bL = self._mask_BT[start:stop, : self._read]
        first = self._read - int(mask_bL.sum(-1).max())
        mask_bL = mask_bL[:, first:]
        for layer in self._layers:
            layer.choose_place(start, first, self._rows)
        return self._call(self._tokens_BL[start:stop, first:], mask_bL, (mask_bL.cumsum(-1) - 1).clamp(min=0))

    def read_tokens(self, tokens_n: torch.Tensor) -> torch.Tensor:
        """Read one more token of each row and return the logits of the next, [n, V]."""
        self._read += 1
        mask_nL = self._mask_BT[: self._rows, : self._read]
        return self._call(tokens_n[:, None], mask_nL, mask_nL.sum(-1, keepdim=True) - 1)

    def remove_rows(self, moves: Sequence[tuple[int, int]], count: int) -> None:
        """Move rows to other places, then go on with the first `count` rows alone."""
        self._rows = count
        sources, targets = [source for source, _ in moves], [target for _, target in moves]
        if moves:
            self._mask_BT[targets] = self._mask_BT[sources]
        for layer in self._layers:
            layer.keep_rows(sources, targets, count)

    def _call(self, tokens_nL: torch.Tensor, mask_nL: torch.Tensor, position_nL: torch.Tensor) -> torch.Tensor:
        outputs = self._module(
            input_ids=tokens_nL, attention_mask=mask_nL, position_ids=position_nL, return_dict=True, **self._options
        )
        logits_nV: torch.Tensor = outputs.logits[:, -1]
        return logits_nV.float()


class _RowsLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """The keys and values of one layer, in memory for all tokens to come, from which rows can be taken."""

    def __init__(self, tokens_max: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tokens_max, self._read = tokens_max, 0
        self._row, self._first, self._rows = 0, 0, 0
        self._buffers: list[torch.Tensor] = []

    def choose_place(self, row: int, first: int, rows: int) -> None:
        """Have the next tokens be the first of rows from `row` on, out of `rows`, whose first tokens are at `first`."""
        self._row, self._first, self._rows = row, first, rows
        self._read = first

    def get_seq_length(self) -> int:
        """Return how many tokens of each row the model has read."""
        return self._read - self._first

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the keys and values of more tokens, and return those of all."""
        start, self._read = self._read, self._read + key_states.shape[-2]
        row, stop = self._row, self._row + len(key_states)
        if not self._buffers:
            shape = (self._rows, key_states.shape[1], self._tokens_max)
            # Zeros, since what a row does not attend to is multiplied by zero.
            self._buffers = [states.new_zeros((*shape, states.shape[-1])) for states in (key_states, value_states)]
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[row:stop, :, start : self._read] = states
        keys, values = (buffer[row:stop, :, self._first : self._read] for buffer in self._buffers)
        self.keys, self.values = keys, values
        return keys, values

    def keep_rows(self, sources: Sequence[int], targets: Sequence[int], count: int) -> None:
        """Move rows to other places, then keep the first `count`."""
        for buffer in self._buffers if sources else ():
            buffer[targets, :, : self._read] = buffer[sources, :, : self._read]
        self.show_rows(count)

    def show_rows(self, count: int) -> None:
        """Have the next tokens be of the first `count` rows, of which all tokens count."""
        self._row, self._first = 0, 0
        self.keys, self.values = (buffer[:count, :, : self._read] for buffer in self._buffers)


def choose_likeliest(logits_nV: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:  # noqa: ARG001 - a TokenChooser
    """Return the likeliest token of each row, [n]: greedy decoding."""
    return logits_nV.argmax(-1)


class Sampler:
    """Draws tokens by their probabilities, each row from a generator of its own.

    A generator is seeded with the call's seed and the row's prompt. So a row gets the same draws in any batch, in any
    order and in every attempt; two rows with the same prompt get the same completion.
    """

    def __init__(self, prompts: Sequence[Array], *, seed: int, temperature: float, top_p: float) -> None:
        self._generators = [np.random.Generator(np.random.PCG64(_make_row_seed(seed, prompt))) for prompt in prompts]
        self._temperature, self._top_p = temperature, top_p

    def __call__(self, logits_nV: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """Return a token for each of n rows, [n]."""
        share_n = torch.tensor([self._generators[row].random() for row in rows], dtype=torch.float64)
        chance_nV = (logits_nV / self._temperature).softmax(-1, dtype=torch.float64)
        return draw_tokens(chance_nV, share_n.to(chance_nV.device), self._top_p)


def draw_tokens(chance_nV: torch.Tensor, share_n: torch.Tensor, top_p: float) -> torch.Tensor:
    """Return the token of each of n rows at a share of what its likeliest tokens sum up to, [n].

    Args:
        chance_nV: The probabilities of each row, float64.
        share_n: A number in [0, 1) for each row, which decides what is drawn.
        top_p: The likeliest tokens count until their probabilities sum up to this; 1 for all.
    """
    order_nV = None
    if top_p < 1:
        chance_nV, order_nV = chance_nV.sort(dim=-1, descending=True, stable=True)
        before_nV = chance_nV.cumsum(-1) - chance_nV
        chance_nV = chance_nV.where(before_nV < top_p, 0)
    sums_nV = chance_nV.cumsum(-1)
    # The last sum may be a little more or less than one.
    place_n1 = torch.searchsorted(sums_nV, share_n[:, None] * sums_nV[:, -1:], right=True)
    place_n1 = place_n1.clamp(max=chance_nV.shape[-1] - 1)
    return (place_n1 if order_nV is None else order_nV.gather(-1, place_n1))[:, 0]


def _make_row_seed(seed: int, prompt: Array) -> int:
    content = f"{seed}\0".encode() + np.ascontiguousarray(prompt, dtype="<i8").tobytes()
    return int.from_bytes(hashlib.sha256(content).digest()[:16], "little")
