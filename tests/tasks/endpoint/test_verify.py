from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from serving.errors import VerifyFailed
from serving.model.contract import Output
from tasks.endpoint.resolve import Arrays, Sample
from tasks.endpoint.verify import compare_answers, verify_endpoint
from tests.serving.toys import matrix
from tests.tasks.endpoint.values import X, loaded, sample

CONTRACT = matrix(4)


def summed(off: float = 0.0) -> Callable[[Arrays], Arrays]:
    return lambda inputs: {"score": inputs["x"].sum(axis=1) + np.float32(off)}


def test_answers_within_the_tolerance_pass_with_how_far_they_are_off() -> None:
    found = verify_endpoint(summed(1e-6), loaded(example=sample()), rows_max=4, tolerance=1e-5)

    assert (8, 8) == (found.rows_example, found.rows_random)
    assert 0 < found.difference_max < 1e-5


def test_each_row_is_asked_alone_and_in_batches() -> None:
    sizes: list[int] = []

    def ask(inputs: Arrays) -> Arrays:
        sizes.append(len(inputs["x"]))
        return summed()(inputs)

    verify_endpoint(ask, loaded(), rows_max=3, tolerance=1e-5)

    assert [1] * 8 + [3, 3, 2] == sizes


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"score": X.sum(axis=1) + 1}, "as the model itself does within 1e-05"),
        ({"score": np.where(np.arange(8) == 5, np.nan, X.sum(axis=1))}, "got nan"),
        ({"score": X.sum(axis=1)[:7]}, r"in the shape \(8,\), got \(7,\)"),
        ({"other": X.sum(axis=1)}, r"in the shape \(8,\), got None"),
    ],
)
def test_an_answer_that_differs_is_refused_and_the_error_has_both(answer: Arrays, said: str) -> None:
    with pytest.raises(VerifyFailed, match=said):
        compare_answers(CONTRACT, sample(), answer, 1e-5)


def test_the_tolerance_is_relative_to_the_largest_answer() -> None:
    large = sample(np.full(8, 1e6, dtype=np.float32))

    assert 1e-6 == pytest.approx(compare_answers(CONTRACT, large, {"score": np.full(8, 1e6 + 1)}, 1e-5), rel=1e-3)


def test_words_must_be_the_same() -> None:
    contract = matrix(4, Output(name="label", dtype="str"))
    expected = Sample(inputs={"x": X[:2]}, outputs={"label": np.array(["a", "b"], dtype=object)}, rows=2)

    assert 0 == compare_answers(contract, expected, {"label": np.array(["a", "b"], dtype=object)}, 1e-5)
    with pytest.raises(VerifyFailed, match=r"as the model itself does, 'b', got 'c'"):
        compare_answers(contract, expected, {"label": np.array(["a", "c"], dtype=object)}, 1e-5)
