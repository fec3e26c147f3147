from __future__ import annotations

from serving.model.interface import Engine


def test_an_engine_in_words_names_what_differs_from_the_default() -> None:
    assert "one thread a slot" == str(Engine())
    assert "2 threads a slot, oneDNN" == str(Engine(threads=2, linear="onednn"))
    assert "bfloat16, compiled" == str(Engine(precision="bfloat16", compiled=True))
