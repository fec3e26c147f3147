"""Whether a deadline can be met, and by how many workers."""

from __future__ import annotations

import math

from serving.errors import DeadlineImpossible
from tasks.common.formatting import in_words

# With this much of the time planned for work, and two changeovers, there is slack to wait for spot with.
_WORK_SHARE_MAX = 0.8


def workers_needed(
    work_seconds: float, left_seconds: float, changeover_seconds: float, *, workers_max: int, reserve_seconds: float = 0
) -> int:
    """Return the smallest n with (work / n + 2 changeovers) / time left <= 0.8, or all that are allowed.

    `work_seconds` is the work at the rate of one worker. Raises DeadlineImpossible where all that are allowed would not
    be done in time on on-demand machines alone, and ValueError where none is allowed.
    """
    if workers_max < 1:
        msg = f"workers_max must be at least 1, got {workers_max}."
        raise ValueError(msg)
    must_be_possible(
        work_seconds, left_seconds, changeover_seconds, workers=workers_max, reserve_seconds=reserve_seconds
    )
    for_work = _WORK_SHARE_MAX * (left_seconds - reserve_seconds) - 2 * changeover_seconds
    if work_seconds <= 0 or for_work <= 0:
        return 1 if work_seconds <= 0 else workers_max
    # What a product and a quotient are off by must not cost a worker.
    return min(max(math.ceil(work_seconds / for_work - 1e-9), 1), workers_max)


def must_be_possible(
    work_seconds: float, left_seconds: float, changeover_seconds: float, *, workers: int = 1, reserve_seconds: float = 0
) -> None:
    """Raise DeadlineImpossible, with the arithmetic, where on-demand from now on is not done by the deadline."""
    each = work_seconds / workers
    takes = each + changeover_seconds + reserve_seconds if work_seconds > 0 else 0.0
    if takes <= left_seconds + 1e-6:
        return
    reserve = f" and {in_words(reserve_seconds)} of reserve" if reserve_seconds else ""
    after = left_seconds - changeover_seconds - reserve_seconds
    more = f", or allow {math.ceil(work_seconds / after - 1e-9)} workers" if after > 0 else ""
    msg = (
        f"On-demand from now on must be done by the deadline: {in_words(work_seconds)} of work over {workers} worker(s)"
        f" take {in_words(each)}, with {in_words(changeover_seconds)} of changeover{reserve} {in_words(takes)},"
        f" got {in_words(left_seconds)}. Move the deadline by at least {in_words(takes - left_seconds)}{more}."
    )
    raise DeadlineImpossible(msg)
