"""A micro-batch scored: good rows have the scores of a batch run, the rest is told apart."""

from __future__ import annotations

import numpy as np
import orjson
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from serving.model.contract import Contract
from serving.model.torch_model import TorchModel
from tasks.batch.parts import REJECT_COLUMN, REJECT_REASON
from tasks.stream.decode import Reason, read_arrow
from tasks.stream.score import MicroScorer, build_answers
from tests.tasks.stream.messages import (
    CONTRACT,
    KEYS,
    Clock,
    Sum,
    arrow_rows,
    decoder,
    json_row,
    message,
    score,
    scores,
)


def test_each_json_row_is_answered_with_its_keys_and_its_score() -> None:
    scored = score([json_row(1, 1.5, 2), json_row(2, "3", -1)])

    assert [{"id": 1, "score": 5.5}, {"id": 2, "score": 1.0}] == [
        orjson.loads(answer.payload) for answer in build_answers(scored, CONTRACT, KEYS)
    ]
    assert () == scored.poison


def test_keys_are_answered_as_they_were() -> None:
    keys = ("id", "name", "at")
    sent = json_row(1, name={"first": ["Ä", None]}, at=1.0)

    assert [{"id": 1, "name": {"first": ["Ä", None]}, "at": 1.0, "score": 5.5}] == [
        orjson.loads(answer.payload) for answer in build_answers(score([sent], decoder(keys)), CONTRACT, keys)
    ]


def test_each_arrow_message_is_answered_with_as_many_rows() -> None:
    first, second = build_answers(score([arrow_rows(1, [1.0, 2.0]), arrow_rows(2, [3.0])]), CONTRACT, KEYS)

    assert [1, 2] == [answer.message.position.number for answer in (first, second)]
    assert {"id": [0, 1], "score": [3.0, 4.0], REJECT_COLUMN: [None] * 2, REJECT_REASON: [None] * 2} == read_arrow(
        first.payload
    ).to_pydict()
    assert [5.0] == read_arrow(second.payload)["score"].to_pylist()


def test_a_row_that_breaks_the_contract_or_the_model_is_poison_and_its_neighbours_are_scored() -> None:
    sent = [json_row(1), json_row(2, a=None), json_row(3, a="x"), json_row(4, a=666), message(b"no", 5), json_row(6)]
    scored = score(sent)

    assert [1, 6] == [answer.message.position.number for answer in build_answers(scored, CONTRACT, KEYS)]
    assert [
        (5, "", Reason.NOT_JSON),
        (2, "a", "null"),
        (3, "a", "text that does not parse as float32"),
        (4, "", "ValueError: no row may have an a of 666"),
    ] == [(poison.message.position.number, poison.column, poison.reason) for poison in scored.poison]
    assert [5] == [poison.message.position.number for poison in scored.unreadable]


def test_a_message_of_many_rows_is_poison_where_none_of_them_is_scored() -> None:
    sent = [arrow_rows(1, [1.0, None, 666.0]), arrow_rows(2, [None, None]), arrow_rows(3, [2.0])]
    scored = score(sent)
    first, last = build_answers(scored, CONTRACT, KEYS)

    assert [2] == [poison.message.position.number for poison in scored.poison]
    assert [1, 3] == [first.message.position.number, last.message.position.number]
    assert [3.0, None, None] == read_arrow(first.payload)["score"].to_pylist()
    assert ["a", ""] == [word or "" for word in read_arrow(first.payload)[REJECT_COLUMN].to_pylist()[1:]]
    assert (6, 4) == (scored.rows, scored.rejects)


def test_a_connection_that_fails_for_a_while_makes_poison_of_no_message() -> None:
    class Cut(Sum):
        calls = 0

        def forward(self, x_NF: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            if self.calls <= 15:
                raise ConnectionResetError
            return super().forward(x_NF)

    cut = TorchModel(Cut(), CONTRACT)
    with cut.slot():
        scorer = MicroScorer(cut, CONTRACT, decoder(), 64, Clock())
        slept: list[float] = []
        scorer.forward.sleep = slept.append
        scored = scorer.score([json_row(1), json_row(2)])

    assert () == scored.poison
    assert [5.5, 5.5] == scores(scored.groups[0].predictions["score"])
    assert 100 < sum(slept)


@given(st.lists(st.one_of(st.none(), st.floats(-1e3, 1e3, width=32), st.just(666.0)), min_size=1, max_size=40))
def test_a_row_has_the_same_score_in_any_micro_batch(values: list[float | None]) -> None:
    sent = [json_row(at, a=value) for at, value in enumerate(values)]
    together = {a.message.position.number: a.payload for a in build_answers(score(sent), CONTRACT, KEYS)}
    alone = {
        answer.message.position.number: answer.payload
        for each in sent
        for answer in build_answers(score([each]), CONTRACT, KEYS)
    }

    assert alone == together
    assert {at for at, value in enumerate(values) if value is not None and value != 666} == set(together)


def test_a_float32_comes_out_as_the_float32_that_it_is() -> None:
    (answer,) = build_answers(score([json_row(1, a=0.1, b=0)]), CONTRACT, KEYS)

    assert scores([0.1]) == [orjson.loads(answer.payload)["score"]]


@pytest.mark.parametrize("keys", [(), KEYS])
def test_lists_are_answered_as_lists(keys: tuple[str, ...]) -> None:
    wide = CONTRACT.outputs[0].model_copy(update={"shape": (2,)})
    contract = Contract(inputs=CONTRACT.inputs, outputs=(wide,))
    scored = score([json_row(1)])
    (group,) = scored.groups
    group.predictions["score"] = group.predictions["score"].repeat(2).reshape(1, 2)

    assert [5.5, 5.5] == orjson.loads(build_answers(scored, contract, keys)[0].payload)["score"]


def test_a_null_of_an_output_that_may_be_null_is_answered_as_null() -> None:
    optional = CONTRACT.outputs[0].model_copy(update={"required": False})
    contract = Contract(inputs=CONTRACT.inputs, outputs=(optional,))
    for sent in (json_row(1), arrow_rows(1, [1.0])):
        scored = score([sent])
        scored.groups[0].predictions["score"][:] = np.nan
        (answer,) = build_answers(scored, contract, KEYS)
        found = (
            orjson.loads(answer.payload) if scored.groups[0].group.rows else read_arrow(answer.payload).to_pylist()[0]
        )

        assert None is found["score"]


def test_arrow_answers_have_the_same_schema_with_and_without_rejects() -> None:
    good, bad = (build_answers(score([arrow_rows(1, values)]), CONTRACT, KEYS)[0] for values in ([1.0], [1.0, None]))

    assert read_arrow(good.payload).schema == read_arrow(bad.payload).schema
    assert pa.float32() == read_arrow(good.payload).schema.field("score").type


def test_a_compact_batch_has_positions_keys_and_scores_and_no_payloads() -> None:
    scored = score([json_row(1), arrow_rows(2, [1.0, None]), message(b"no", 3), json_row(4, a=None)])
    light = scored.compact(KEYS)

    assert (scored.rows, scored.rejects) == (light.rows, light.rejects)
    assert [each.position for each in scored.messages] == [each.position for each in light.messages]
    assert [["id"], ["id"]] == [group.group.table.column_names for group in light.groups]
    assert [group.group.table["id"] for group in scored.groups] == [group.group.table["id"] for group in light.groups]
    assert {b""} == {
        message.payload
        for message in (
            *light.messages,
            *(each.message for each in (*light.poison, *light.unreadable)),
            *(message for group in light.groups for message in group.group.messages),
        )
    }
    assert [None, None] == [group.group.rows for group in light.groups]
