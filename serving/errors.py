"""Every error that Overnight raises on purpose, named for the reader's next move.

OvernightError
+-- BadInput(ValueError)     change the call or the data, then call again; nothing was written
|   +-- SourceNotFound       no file at that path, glob or prefix
|   +-- SourceFormat         the files are of an unknown format, or of several formats
|   +-- SourceEmpty          the files have no rows
|   +-- SchemaMismatch       columns missing, of the wrong type, or different between files
|   +-- ModelNotFound        no such registered model, version or alias
|   +-- ModelUnfit           the model can't be run as it was logged (no signature, pickled, ...)
|   +-- EnvironmentUnusable  the Python environment of a model can't be made here: uv, Python, the index or space
|   +-- PlanTooLarge         the plan does not fit in the memory allowed
|   +-- RunNameTaken         the explicit run name already holds a run of another plan
|   +-- DestinationUnusable  the destination can't hold this run
|   +-- NoCompleteRun        the destination has no complete run to open
|   +-- DeadlineImpossible   even on-demand machines alone would miss the deadline
|   +-- LatencyImpossible    no batch size keeps the latency budget at the expected rate
|   +-- BadWorkload          no mode can be chosen for a workload with this description, arrivals, prices or promise
|   |   +-- NoFeasibleMode   no mode keeps its promise; the message says what would be needed
|   |   +-- PricesMissing    a machine has no price, or the source of prices can't be read
|   +-- BadRequest           a request to an endpoint that its model does not take; `status` is the HTTP status
|   +-- SecretExposed        a parameter holds a password or token, which everyone who can see the flow run could read
|   +-- StreamUnfit          a stream, topic, subject or consumer is missing, or has other settings than the call needs
+-- SourceFault              a source file can't be used; the parts of other chunks stay
|   +-- SourceChanged        it changed after the plan was made
|   +-- SourceCorrupt        it can't be decoded
+-- StorageFault             storage refuses or fails; fix it and call again, the run resumes
|   +-- StorageDenied        the credentials do not allow it
|   +-- StorageFull          no space left
+-- BrokerFault              a message broker refuses for good; messages that are not acknowledged are delivered again
|   +-- BrokerDenied         the credentials do not allow it
+-- StreamFault              a stream is not the one that was read before; what is in the sink stays
|   +-- StreamReplaced       it was deleted and created again, so its numbers start over
|   +-- MessagesLost         messages were deleted before they were read
+-- ServerUnreachable        MLflow, Prefect or a store does not answer: start it, or correct the setting that names it
+-- DeploymentMissing        a Prefect deployment or work pool that is named does not exist: overnight deploy
+-- RunnerUnusable           the requested workers can't be started or don't survive; fix it and call again, it resumes
+-- CapacityUnusable         machines can't be asked for or counted: fix the cause and call again, the run resumes
+-- ReleaseMismatch          a worker is of another release than the run that it joins: install that release there
+-- AlreadyRunning           another call does this work now: wait until it has ended, or stop it
+-- BackfillFailed           pieces of a backfill failed: fix their causes and call again, complete ones are passed over
+-- NightFailed              the batch run of a night failed: fix the cause and call again, it resumes
+-- ProfileFailed            a figure of a model could not be measured: fix the cause, or state the figure
+-- ApplyFailed              a decision can't be applied; what served the workload before still serves it
+-- EndpointFailed           a release can't be deployed or removed; what served before still serves
|   +-- BudgetBroken         it answers later than its budget allows, measured under load; it was removed
|   +-- VerifyFailed         its predictions differ from the model's, or it does not answer; it was removed
|   +-- RolledBack           it failed its rollout rule; the earlier version has all traffic again
+-- Unanswered               an endpoint can't answer a request now: send it again later; `status` is the HTTP status
+-- DependencyFault          what the model calls or runs on fails; fix it and call again, the run resumes
+-- ModelFailed              the model fails on every row, or on batches: fix the model, not the rows
+-- TooManyRejects           more rows were rejected than max_reject_fraction allows
+-- PublishRefused           the parts do not add up to the dataset; nothing was published
|   +-- KeysUnfit            rows are to replace others by key, and keys are doubled or null: correct the source
+-- ApprovalNeeded           the run breaks a rule of its gate; nothing was published until it is approved
+-- RunDamaged               parts of a published run are lost or changed, and scoring again gives other bytes
+-- FormatTooNew             a plan, manifest or part was written by a newer Overnight: update Overnight
+-- Interrupted              this process or its machine was told to stop; the same call resumes
+-- DeviceLost               the accelerator failed: this process must end, another may resume
"""

import difflib
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager

from serving.redaction import hide_secrets

_LINES_MAX = 8
_CUTOFF = 0.6


class OvernightError(Exception):
    """The root of every error that Overnight raises on purpose; secrets in its message are hidden."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(hide_secrets(arg) if isinstance(arg, str) else arg for arg in args))

    def _render_traceback_(self) -> list[str]:
        """Return what a notebook shows of it: IPython asks an exception for this method before it lists frames."""
        return describe_error(self).split("\n")


def describe_error(error: BaseException) -> str:
    """Return an error as a person reads it: its kind and its message, of a long one the first lines."""
    lines = f"{type(error).__name__}: {error}".split("\n")
    more = len(lines) - _LINES_MAX
    return "\n".join(lines[:_LINES_MAX] + ([f"... and {more} lines more"] if more > 0 else []))


def shorten_error(error: Exception, characters_max: int = 300) -> str:
    """Return what an error says on one line, without a full stop; its kind where it says nothing."""
    return (" ".join(str(error).split()) or type(error).__name__)[:characters_max].rstrip(".")


@contextmanager
def name_input(what: str) -> Generator[None]:
    """Have the message of any BadInput of the block begin with what it is about."""
    try:
        yield
    except BadInput as error:
        message = f"{what}: {error}"
        raise type(error)(message) from error


def suggest_name(name: str, known: Iterable[str]) -> str:
    """Return a question with the known name that is nearest to an unknown one; nothing where none is near it."""
    by_form = {each.lower(): each for each in known}
    near = difflib.get_close_matches(name.lower(), list(by_form), n=1, cutoff=_CUTOFF)
    return f"; did you mean {by_form[near[0]]!r}?" if near else ""


def list_shortly(items: Sequence[str], shown_max: int = 5) -> str:
    """Return indented lines of at most so many items, and how many there are more."""
    more = len(items) - shown_max
    return "\n".join([f"  - {item}" for item in items[:shown_max]] + ([f"  - and {more} more"] if more > 0 else []))


class BadInput(OvernightError, ValueError):
    """The call or its data must change; nothing was written."""


class SourceNotFound(BadInput):
    """No file at that path, glob or prefix."""


class SourceFormat(BadInput):
    """The files are of an unknown format, or of several formats."""


class SourceEmpty(BadInput):
    """The files have no rows."""


class SchemaMismatch(BadInput):
    """Columns are missing, of the wrong type, or different between files."""


class ModelNotFound(BadInput):
    """No such registered model, version or alias."""


class ModelUnfit(BadInput):
    """The model can't be run as it was logged."""


class EnvironmentUnusable(BadInput):
    """The Python environment of a model can't be made here: uv, a version of Python, the index or space is missing."""


class PlanTooLarge(BadInput):
    """The plan does not fit in the memory allowed."""


class RunNameTaken(BadInput):
    """The explicit run name already holds a run of another plan."""


class DestinationUnusable(BadInput):
    """The destination can't hold this run."""


class NoCompleteRun(BadInput):
    """The destination holds no complete run."""


class DeadlineImpossible(BadInput):
    """Even on-demand machines alone would miss the deadline."""


class LatencyImpossible(BadInput):
    """No batch size keeps the latency budget at the expected rate."""


class BadWorkload(BadInput):
    """No mode can be chosen for a workload with this description, arrivals, prices or promise."""


class NoFeasibleMode(BadWorkload):
    """No mode keeps the promise of the workload; the message says what would be needed."""


class PricesMissing(BadWorkload):
    """A machine has no price, or the source of prices can't be read."""


class BadRequest(BadInput):
    """A request to an endpoint that its model does not take; `status` is the HTTP status."""

    def __init__(self, message: str, *, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class SecretExposed(BadInput):
    """A parameter holds a password or token, which everyone who can see the flow run could read."""


class StreamUnfit(BadInput):
    """A stream, topic, subject or consumer is missing, or has other settings than the call needs."""


class SourceFault(OvernightError):
    """A source file can't be used; the parts of other chunks stay."""


class SourceChanged(SourceFault):
    """The file changed after the plan was made."""


class SourceCorrupt(SourceFault):
    """The file can't be decoded."""


class StorageFault(OvernightError):
    """Storage refuses or fails; once it is fixed, the same call resumes the run."""


class StorageDenied(StorageFault):
    """The credentials do not allow the operation."""


class StorageFull(StorageFault):
    """No space is left."""


class BrokerFault(OvernightError):
    """A message broker refuses for good; messages that are not acknowledged are delivered again."""


class BrokerDenied(BrokerFault):
    """The credentials do not allow the operation."""


class StreamFault(OvernightError):
    """A stream is not the one that was read before; what is in the sink stays."""


class StreamReplaced(StreamFault):
    """The stream or topic was deleted and created again, so its numbers start over."""


class MessagesLost(StreamFault):
    """Messages were deleted, by retention or by hand, before they were read."""


class ServerUnreachable(OvernightError):
    """MLflow, Prefect or a store that the call needs does not answer."""


class DeploymentMissing(OvernightError):
    """A Prefect deployment or work pool that is named does not exist."""


class RunnerUnusable(OvernightError):
    """The requested workers can't be started or don't survive; once that is fixed, the same call resumes."""


class AlreadyRunning(OvernightError):
    """Another call does this work at the same destination."""


class BackfillFailed(OvernightError):
    """Pieces of a backfill failed; the others are complete, and the same call goes on with what is left."""


class NightFailed(OvernightError):
    """The batch run of a night failed."""


class CapacityUnusable(OvernightError):
    """Machines can't be asked for, or counted; once that is fixed, the same call resumes."""


class ReleaseMismatch(OvernightError):
    """A worker is of another release of Overnight than the run that it joins."""


class ProfileFailed(OvernightError):
    """A figure of a model could not be measured; no figure is ever invented."""


class ApplyFailed(OvernightError):
    """A decision can't be applied; what served the workload before still serves it."""


class EndpointFailed(OvernightError):
    """A release can't be deployed or removed; what served before still serves."""


class BudgetBroken(EndpointFailed):
    """A release answers later than its budget allows, measured under load; it was removed, and what served serves."""


class VerifyFailed(EndpointFailed):
    """A release differs from its model, or does not answer; it was removed, and what served before still serves."""


class RolledBack(EndpointFailed):
    """A release failed its rollout rule and was removed; the earlier version has all traffic again."""


class Unanswered(OvernightError):
    """An endpoint can't answer a request now; `status` is the HTTP status, `retry_after_s` when to try again."""

    def __init__(self, message: str, *, status: int = 503, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s


class DependencyFault(OvernightError):
    """What the model calls or runs on fails (a connection, a time-out, the operating system); no row is rejected."""


class ModelFailed(OvernightError):
    """The model fails on every row it was given, or on batches whose rows are good."""


class TooManyRejects(OvernightError):
    """More rows were rejected than max_reject_fraction allows."""


class PublishRefused(OvernightError):
    """The parts do not add up to the dataset."""


class KeysUnfit(PublishRefused):
    """Rows are to be put into a table by their keys, but keys occur more than once or hold nulls."""


class ApprovalNeeded(OvernightError):
    """The run breaks a rule of its gate; nothing is published until somebody approves it."""


class RunDamaged(OvernightError):
    """Parts of a published run are lost or changed, and scoring them again gives other bytes."""


class FormatTooNew(OvernightError):
    """A plan, manifest or part was written in a newer format than this version of Overnight reads: update it."""


class Interrupted(OvernightError):
    """This process or its machine was told to stop; finished work stays, and the same call resumes."""


class DeviceLost(OvernightError):
    """The accelerator failed; this process can't go on."""
