from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlflow.sentence_transformers
import mlflow.transformers
import numpy as np
import pyarrow as pa
import pytest
import torch
from mlflow.models import ModelSignature, infer_signature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

from serving.errors import ModelUnfit, SchemaMismatch
from serving.model.contract import ColumnPolicy, Contract
from serving.model.encoding import Encoded, encode
from serving.model.forward import Forward
from serving.model.interface import Engine, Model, Tunable, TuningLimits
from serving.model.loading import PyfuncModel, load_model
from serving.model.registry import resolve_model
from serving.model.text import TextModel
from serving.model.torch_model import has_onednn
from tests.serving.toys import tiny_bert
from tests.support import load_minilm, register_minilm, register_sentence_transformer

transformers = pytest.importorskip("transformers", reason="pip install -e '.[dev]' brings transformers")

Log = Callable[..., str]
Columns = dict[str, tuple[str, ...]]

LONG = "many words that no model reads to their end " * 100


def load(
    uri: str, columns: Columns | None = None, policies: dict[str, ColumnPolicy] | None = None
) -> tuple[Tunable, Contract]:
    resolved = resolve_model(uri)
    contract = resolved.contract(columns or {}, policies or {})
    return load_model(resolved, contract), contract


def prepared(model: Model, contract: Contract, texts: list[str | None]) -> Encoded:
    return model.prepare(encode(contract, pa.table({contract.columns[0].name: pa.array(texts, pa.string())})))


def score(model: Model, contract: Contract, texts: list[str | None], tokens: int = 512) -> dict[str, np.ndarray]:
    with model.slot():
        return Forward(model, contract, tokens).score(prepared(model, contract, texts))


@pytest.fixture(scope="module")
def classify() -> Any:
    return tiny_bert("right")


@pytest.fixture(scope="module")
def log_pipeline(registry: Path, log: Log) -> Log:
    """Registers a pipeline over one input without a name, which gives label and score."""
    text = Schema([ColSpec("string")])
    answer = Schema([ColSpec("string", "label"), ColSpec("double", "score")])

    def log_pipeline(name: str, pipeline: Any, **options: Any) -> str:
        options.setdefault("signature", ModelSignature(text, answer))
        return log(name, mlflow.transformers.log_model, pipeline, **options)

    return log_pipeline


@pytest.fixture(scope="module")
def classes(log_pipeline: Log, classify: Any) -> str:
    return log_pipeline("classes", classify)


def test_embeddings_are_what_encode_makes_of_the_texts(minilm: str, glosses: list[str]) -> None:
    texts = [*glosses, "", LONG, "[PAD] and [SEP]", "naïve 東京 \U0001f600", "  \n"]
    found = score(*load(minilm), texts)["prediction"]

    assert (np.dtype("float32"), (len(texts), 384)) == (found.dtype, found.shape)
    np.testing.assert_allclose(load_minilm().encode(texts), found, rtol=0, atol=1e-5)


def test_tokens_are_counted_without_padding_and_cut_at_the_models_limit(minilm: str) -> None:
    model, contract = load(minilm)
    encoded = prepared(model, contract, ["", "a person", LONG])

    assert [2, 4, 256] == encoded.length_N.tolist()
    assert [(2, 2), (2, 4), (2, 256)] == [tokens.shape for tokens in encoded.inputs["tokens"]]


def test_the_default_prompt_is_put_before_each_text_and_kept_out_of_the_mean(
    registry: Path, glosses: list[str]
) -> None:
    model = load_minilm()
    model.prompts, model.default_prompt_name = {"search": "search for this: "}, "search"
    model.set_pooling_include_prompt(include_prompt=False)
    plain = load_minilm().encode(glosses[:50])
    expected = model.encode(glosses[:50])
    uri = register_sentence_transformer("prompt", model)
    found = score(*load(uri, {"text": ("gloss",)}), glosses[:50])["prediction"]

    assert not np.allclose(plain, expected, atol=1e-2)
    np.testing.assert_allclose(expected, found, rtol=0, atol=1e-5)


def test_embeddings_cut_to_fewer_values_stay_so(registry: Path) -> None:
    model = load_minilm()
    model.truncate_dim = 32
    uri = register_sentence_transformer("short", model)
    found = score(*load(uri, {"text": ("gloss",)}), ["a person", "a place"])["prediction"]

    np.testing.assert_allclose(model.encode(["a person", "a place"]), found, rtol=0, atol=1e-5)


def test_a_null_is_a_reject_and_its_neighbours_are_as_without_it(minilm: str, glosses: list[str]) -> None:
    model, contract = load(minilm)
    texts: list[str | None] = list(glosses[:64])
    texts[5] = texts[40] = None
    encoded = prepared(model, contract, texts)
    with model.slot():
        found = Forward(model, contract, 512).score(encoded)["prediction"]
    good = [row for row, text in enumerate(texts) if text is not None]

    assert {5: ("gloss", "null"), 40: ("gloss", "null")} == {
        int(row): encoded.flags.reasons[encoded.flags.code_N[row] - 1] for row in np.flatnonzero(encoded.flags.code_N)
    }
    np.testing.assert_allclose(load_minilm().encode([texts[row] for row in good]), found[good], rtol=0, atol=1e-5)


def test_a_null_may_become_a_text_but_can_not_be_kept(minilm: str) -> None:
    for null, flagged in (("keep", [0, 1]), ("nothing", [0, 0])):
        model, contract = load(minilm, policies={"gloss": ColumnPolicy(null=null)})

        assert flagged == prepared(model, contract, ["a", None]).flags.code_N.tolist()
    np.testing.assert_allclose(
        load_minilm().encode(["a", "nothing"]), score(model, contract, ["a", None])["prediction"], atol=1e-5
    )


def test_the_same_block_gives_the_same_bytes_from_several_slots_at_once(minilm: str, glosses: list[str]) -> None:
    model, contract = load(minilm)
    work = lambda _: score(model, contract, list(glosses[:100]))["prediction"].tobytes()
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(work, range(3)))

    assert {work(None)} == set(found)


def test_another_engine_gives_the_same_embeddings_within_its_precision(minilm: str, glosses: list[str]) -> None:
    model, contract = load(minilm)
    texts = list(glosses[:50])
    plain = score(model, contract, texts)["prediction"]
    reduced = [
        engine for engine in model.engines(TuningLimits(bfloat16_tolerance=0.1)) if engine.precision == "bfloat16"
    ]
    engines = [engine for engine in model.engines(TuningLimits()) if engine.threads == 1]

    assert has_onednn() == (Engine(linear="onednn") in engines)
    for engine in engines:
        found = score(model.with_engine(engine), contract, texts)["prediction"]
        np.testing.assert_allclose(plain, found, rtol=0, atol=1e-5)
    assert {"torch", "onednn"} == {engine.linear for engine in reduced}
    for engine in reduced:
        half = score(model.with_engine(engine), contract, texts)["prediction"]
        assert np.float32 == half.dtype
        assert 0.999 < (plain * half).sum(axis=1).min() < 0.9999999


def test_a_column_that_is_no_text_does_not_fit(minilm: str) -> None:
    with pytest.raises(SchemaMismatch, match="column 'gloss' must be str, got int64"):
        load(minilm)[1].check(pa.schema([("gloss", pa.int64())]), "The table")


def test_a_signature_that_does_not_know_the_width_is_refused_and_the_message_says_how_to_log_it(registry: Path) -> None:
    uri = register_minilm("default-signature", signature=None)

    with pytest.raises(ModelUnfit, match=r"one output of its 384 values a row, got .*infer_signature\(\[.a text.\]"):
        load(uri)


def test_a_model_logged_with_parameters_runs_through_pyfunc_which_applies_them(registry: Path) -> None:
    model = load_minilm()
    signature = infer_signature(["a", "b"], model.encode(["a", "b"]))
    signature.params = ParamSchema([ParamSpec("batch_size", "long", 8)])
    loaded, contract = load(
        register_sentence_transformer("parameters", model, signature=signature), {"text": ("gloss",)}
    )

    assert isinstance(loaded, PyfuncModel)
    np.testing.assert_allclose(
        model.encode(["a person", ""]), score(loaded, contract, ["a person", ""])["prediction"], rtol=0, atol=1e-5
    )


def test_weights_in_a_pickle_run_no_code(registry: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    uri = register_minilm("pickled-weights")
    (weights,) = resolve_model(uri).folder.rglob("model.safetensors")
    torch.save({"x": Bomb()}, weights.with_name("pytorch_model.bin"), pickle_module=pickle)
    weights.unlink()

    with pytest.raises(ModelUnfit, match="must not need unpickling"):
        load(uri)
    assert not (tmp_path / "ran").exists()


def test_a_pipeline_gives_the_label_and_score_that_it_gives_when_called(
    classes: str, classify: Any, glosses: list[str]
) -> None:
    texts = [*glosses, "", "a person of any place"]
    found = score(*load(classes, {"text": ("gloss",)}), texts)
    expected = list(itertools.chain.from_iterable(classify([text], truncation=True) for text in texts))

    assert {"thing", "person", "place"} == {answer["label"] for answer in expected}
    assert [answer["label"] for answer in expected] == found["label"].tolist()
    np.testing.assert_allclose([answer["score"] for answer in expected], found["score"], rtol=0, atol=1e-5)


def test_a_pipeline_answers_the_same_on_another_engine(classes: str, glosses: list[str]) -> None:
    model, contract = load(classes, {"text": ("gloss",)})
    plain = score(model, contract, list(glosses[:50]))
    for engine in (engine for engine in model.engines(TuningLimits()) if engine.threads == 1):
        found = score(model.with_engine(engine), contract, list(glosses[:50]))

        assert plain["label"].tolist() == found["label"].tolist()
        np.testing.assert_allclose(plain["score"], found["score"], rtol=0, atol=1e-4)


def test_a_text_longer_than_a_pipeline_reads_is_cut(classes: str, classify: Any) -> None:
    model, contract = load(classes, {"text": ("gloss",)})

    assert [32] == prepared(model, contract, [LONG]).length_N.tolist()
    assert classify(LONG, truncation=True)[0]["score"] == pytest.approx(score(model, contract, [LONG])["score"][0])


def test_a_pipeline_that_pads_on_the_left_answers_the_same(log_pipeline: Log, glosses: list[str]) -> None:
    classify = tiny_bert("left")
    uri = log_pipeline("left", classify)
    expected = classify(glosses[:50], truncation=True, batch_size=50)
    model, contract = load(uri, {"text": ("gloss",)})
    found = score(model, contract, list(glosses[:50]), tokens=1 << 20)

    np.testing.assert_allclose([answer["score"] for answer in expected], found["score"], rtol=0, atol=1e-5)


def test_another_task_or_a_pipeline_with_settings_runs_through_pyfunc(
    log_pipeline: Log, classify: Any, classes: str
) -> None:
    texts: list[str | None] = ["a person", "a large place"]
    columns = {"text": ("gloss",)}
    configured, contract = load(
        log_pipeline("configured", classify, model_config={"function_to_apply": "sigmoid"}), columns
    )

    assert isinstance(load(classes, columns)[0], TextModel)
    assert isinstance(configured, PyfuncModel)
    expected = classify(texts, function_to_apply="sigmoid")
    np.testing.assert_allclose(
        [answer["score"] for answer in expected], score(configured, contract, texts)["score"], rtol=0, atol=1e-6
    )
