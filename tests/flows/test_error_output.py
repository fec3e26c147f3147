"""What becomes of Prefect's own lines about the end of a flow run."""

from __future__ import annotations

import logging

import pytest

from flows.runtime.error_output import log_errors_shortly_meanwhile


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("Finished in state Running()", "The process ends while the run is Running: what ended it sets"),
        ("Finished in state Cancelling('x')", "The process ends while the run is Cancelling: what ended it sets"),
        ("Finished in state Failed('BadInput: no such file')", "Finished in state Failed()"),
        ("Finished in state Completed()", "Finished in state Completed()"),
    ],
)
def test_a_run_whose_process_is_ended_from_outside_is_not_called_finished(said: str, shown: str) -> None:
    record = logging.LogRecord("prefect.flow_runs", logging.ERROR, __file__, 0, said, (), None)
    with log_errors_shortly_meanwhile():
        assert logging.getLogger("prefect.flow_runs").filter(record)

    assert record.getMessage().startswith(shown)
