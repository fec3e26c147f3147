"""Toy networks and models for the tests of serving, and contracts for them made by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from mlflow.models import Model, ModelSignature
from mlflow.types import Schema, TensorSpec

from serving.model.contract import Column, ColumnPolicy, Contract, Input, Output

REJECT, KEEP = ColumnPolicy(), ColumnPolicy(null="keep")


def tensor(dtype: str, *shape: int, name: str | None = None) -> TensorSpec:
    return TensorSpec(np.dtype(dtype), (-1, *shape), name)


SCORE = Schema([tensor("float32", 1, name="score")])


def logged(inputs: Schema | None, outputs: Schema | None = SCORE, metadata: dict[str, object] | None = None) -> Model:
    """The description of a model as MLflow keeps it, without the model."""
    return Model(signature=ModelSignature(inputs, outputs), metadata=metadata)


def column(dtype: str, name: str = "a", *, shape: tuple[int, ...] = (), policy: ColumnPolicy = REJECT) -> Column:
    return Column(name=name, dtype=dtype, shape=shape, policy=policy)


def alone(*columns: Column) -> Contract:
    """A contract in which every column is an input of its own."""
    inputs = tuple(Input(name=c.name, dtype=c.dtype, shape=c.shape, columns=(c,)) for c in columns)
    return Contract(inputs=inputs, outputs=(Output(name="score", dtype="float32"),))


def stacked(*columns: Column, outputs: tuple[Output, ...] = (Output(name="score", dtype="float32"),)) -> Contract:
    """A contract in which the columns are one input x."""
    value = Input(name="x", dtype=columns[0].dtype, shape=(len(columns),), columns=columns)
    return Contract(inputs=(value,), outputs=outputs)


def matrix(width: int, *outputs: Output) -> Contract:
    """A contract of `width` float32 columns c0, c1, ... and a score, unless other outputs are given."""
    columns = [column("float32", f"c{at}") for at in range(width)]
    return stacked(*columns, outputs=outputs or (Output(name="score", dtype="float32"),))


def network(width: int = 4, *, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(width, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)).eval()


class Several(torch.nn.Module):
    """Answers with a tuple, or with the same by name."""

    def __init__(self, *, named: bool) -> None:
        super().__init__()
        self.named = named

    def forward(self, x: torch.Tensor) -> object:
        total, wide = x.sum(dim=1, keepdim=True), torch.cat([x, -x], dim=1)
        return {"wide": wide, "total": total} if self.named else (total, wide)


class Careless(torch.nn.Module):
    """A network that learns where it should only answer."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 4), layer, torch.nn.Linear(4, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class Picky(torch.nn.Module):
    """A network that raises where any first value is 1, and answers NaN where it is 2."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.inner = network(width)
        self.rows_seen: list[int] = []

    def forward(self, x_NF: torch.Tensor) -> torch.Tensor:
        self.rows_seen.append(len(x_NF))
        if (x_NF[:, 0] == 1).any():
            message = f"no row may begin with 1 <{object()!r}>"
            raise ValueError(message)
        return torch.where(x_NF[:, :1] == 2, torch.nan, self.inner(x_NF))


_UNKNOWN = "[UNK]"
_WORDS = ["[PAD]", _UNKNOWN, "[CLS]", "[SEP]", "a", "of", "the", "or", "in", "small", "large", "used", "person", "any"]


def tiny_bert(padding_side: str) -> Any:
    """A text-classification pipeline over a tiny BERT with random weights, which reads 32 tokens."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast, pipeline

    words = Tokenizer(models.WordLevel({word: at for at, word in enumerate(_WORDS)}, unk_token=_UNKNOWN))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {"pad_token": "[PAD]", "unk_token": _UNKNOWN, "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, model_max_length=32, padding_side=padding_side, **special
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(_WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        id2label={0: "thing", 1: "person", 2: "place"},
        initializer_range=1.0,
    )
    return pipeline("text-classification", model=BertForSequenceClassification(config).eval(), tokenizer=tokenizer)
