"""When a process that loads a model stood still, and when its Python was busy alone."""

from __future__ import annotations

import pytest

from serving.targets.triton_pauses import is_pause


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
    assert expected == is_pause(seconds, wakes)
