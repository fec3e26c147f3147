"""When a process that loads a model stood still, and when its Python was busy alone."""

from __future__ import annotations

import pytest

from serving.targets.triton_pauses import get_patience_s, is_pause


@pytest.mark.parametrize(
    ("seconds", "wakes", "expected"),
    [
        pytest.param(0.1, 0, False, id="on time"),
        pytest.param(0.69, 0, False, id="too short for Triton to notice"),
        pytest.param(0.75, 1, True, id="stood still, and has reported since"),
        pytest.param(0.75, 2, False, id="reported in time"),
        pytest.param(2.5, 1, True, id="stood still for seconds"),
        pytest.param(2.5, 8, False, id="held the interpreter's lock"),
        pytest.param(60, 180, False, id="held it for a minute, on a busy machine"),
        pytest.param(-3600, 1, False, id="the clock was set back"),
    ],
)
def test_a_process_stood_still_if_its_reports_are_missing(seconds: float, wakes: int, *, expected: bool) -> None:
    assert expected == is_pause(seconds, wakes, 1)


@pytest.mark.parametrize(
    ("seconds", "expected"), [pytest.param(4.6, False, id="is waited for"), pytest.param(4.8, True, id="is given up")]
)
def test_a_release_of_triton_that_waits_five_seconds_gives_it_more_time(seconds: float, *, expected: bool) -> None:
    assert expected == is_pause(seconds, 1, 5)


@pytest.mark.parametrize(
    ("version", "expected"), [(None, 1), ("24.10", 1), ("25.07", 1), ("25.08", 5), ("26.06", 5)], ids=str
)
def test_triton_is_more_patient_from_a_release_on(version: str | None, expected: float) -> None:
    assert expected == get_patience_s(version)
