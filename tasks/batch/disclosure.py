"""What a run tells of its rows outside of its destination: with disclose="nothing", no value of any row.

Parts and manifest keep every reject's own reason, whatever a call says. This module makes what leaves the destination
of them: the reasons in reports and messages, what a gate says, and the errors that end a call.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Generator, Iterable
from contextlib import contextmanager

from serving.errors import (
    ApprovalNeeded,
    BadInput,
    Interrupted,
    ModelNotFound,
    OvernightError,
    PlanTooLarge,
    ReleaseMismatch,
    RunNameTaken,
    RunnerUnusable,
    SchemaMismatch,
    ServerUnreachable,
    SourceEmpty,
    SourceNotFound,
    StorageFault,
    TooManyRejects,
)
from serving.option_words import give_option
from tasks.batch.gate import Finding
from tasks.batch.manifest import RejectCount
from tasks.batch.options import Disclose
from tasks.batch.part_footer import Reasons

# What a model raised, as `describe_error` writes it.
_RAISED = re.compile(r"(?P<kind>[A-Za-z_]\w*): .*", re.DOTALL)
# These tell of addresses, names, types, sizes and counts. Any other error may quote a row, as those of packages do.
_WITHOUT_VALUES = (
    *(ApprovalNeeded, Interrupted, ModelNotFound, PlanTooLarge, ReleaseMismatch, RunNameTaken, RunnerUnusable),
    *(SchemaMismatch, ServerUnreachable, SourceEmpty, SourceNotFound, StorageFault, TooManyRejects),
)


def shorten_reasons(reasons: Reasons) -> Reasons:
    """Return rejects by column and the kind of error that a model raised, without its message."""
    short: Reasons = Counter()
    for (column, reason), rows in reasons.items():
        raised = None if column else _RAISED.fullmatch(reason)
        short[column, raised["kind"] if raised else reason] += rows
    return short


def shorten_counts(counts: Iterable[RejectCount]) -> tuple[RejectCount, ...]:
    """Return the rejects of a manifest by column and kind of error, the most frequent first."""
    short = shorten_reasons(Counter({(count.column, count.reason): count.rows for count in counts}))
    return tuple(RejectCount(column=column, reason=reason, rows=rows) for (column, reason), rows in short.most_common())


def shorten_finding(finding: Finding) -> Finding:
    """Return what a gate says without the least and greatest values of a column, which are those of single rows."""
    if finding.rule not in ("range", "expression"):
        return finding
    text = f"it breaks a rule of the kind {finding.rule}" if finding.outcome == "broken" else "it can't be judged"
    return finding.model_copy(update={"value": None, "allowed": None, "text": text})


@contextmanager
def withhold_values(disclose: Disclose) -> Generator[None]:
    """Have an error of the block say its kind alone where it may quote rows and `disclose` is "nothing"."""
    try:
        yield
    except Exception as error:
        if disclose == "values" or isinstance(error, _WITHOUT_VALUES) or type(error) is BadInput:
            raise
        message = (
            f"{type(error).__name__}: what it says may quote rows, which states, logs and lineage are not to have. "
            f"Make the same call with {give_option('disclose', 'values')} where that may be read: it resumes the run."
        )
        raise (type(error) if isinstance(error, OvernightError) else OvernightError)(message) from None
