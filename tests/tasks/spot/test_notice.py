"""What a notice is called."""

from __future__ import annotations

import pytest

from tasks.spot.notice import Notice, sigterm


@pytest.mark.parametrize(
    ("notice", "cause", "words"),
    [
        (sigterm(30), "SIGTERM", "SIGTERM: this process is to end within 30 s"),
        (
            Notice(source="AWS", action="terminate", seconds_left=117.3),
            "AWS (terminate)",
            "AWS is going to terminate this machine in 117 s",
        ),
        (
            Notice(source="AWS", action="rebalance recommendation", seconds_left=120, certain=False),
            "AWS (rebalance recommendation)",
            "AWS sees this machine at risk (rebalance recommendation)",
        ),
    ],
)
def test_a_notice_is_told_in_a_word_and_in_a_sentence(notice: Notice, cause: str, words: str) -> None:
    assert (cause, words) == (notice.cause, notice.words)
