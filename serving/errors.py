"""Every error that Overnight raises on purpose, named for the reader's next move.

OvernightError
+-- BadInput(ValueError)     change the call or the data, then call again; nothing was written
|   +-- SourceNotFound       no file at that path, glob or prefix
|   +-- SourceFormat         there are files, but of no format that is known, or of several
|   +-- SourceEmpty          there are files, but no rows
|   +-- SchemaMismatch       columns missing, of the wrong type, or different between files
|   +-- ModelNotFound        no such registered model, version or alias
|   +-- ModelUnfit           the model can't be run as it was logged (no signature, pickled, ...)
|   +-- PlanTooLarge         the plan does not fit in the memory allowed
|   +-- RunNameTaken         the explicit run name already holds a run of another plan
|   +-- DestinationUnusable  the destination can't hold this run
|   +-- NoCompleteRun        there is nothing to open yet
|   +-- DeadlineImpossible   not even on-demand machines alone are done by the deadline
|   +-- LatencyImpossible    no batch size keeps the latency budget at the expected rate
|   +-- BadWorkload          a workload's description, arrivals, prices or promise can't be decided on as they are
|   |   +-- NoFeasibleMode   no mode keeps its promise; the message says what would be needed
|   |   +-- PricesMissing    no price is at hand for a machine, or its source can't be asked
|   +-- BadRequest           a request to an endpoint is none that its model takes; `status` is HTTP's for it
|   +-- SecretExposed        a parameter holds a password or token, which everyone who sees the flow run would see
|   +-- StreamUnfit          a stream, topic, subject or consumer is missing, or has other settings than the call needs
+-- SourceFault              a source file can't be trusted; every other chunk's part stays
|   +-- SourceChanged        it is not the file that the plan was made for
|   +-- SourceCorrupt        it can't be decoded
+-- StorageFault             storage refuses or fails; call again once it is put right, it resumes
|   +-- StorageDenied        the credentials do not allow it
|   +-- StorageFull          no space left
+-- BrokerFault              a message broker refuses for good; what is not acknowledged comes again
|   +-- BrokerDenied         the credentials do not allow it
+-- StreamFault              a stream is not what was read of it before; what is in the sink stays
|   +-- StreamReplaced       it was deleted and made again: its numbers begin again
|   +-- MessagesLost         messages were deleted before they were read
+-- DeploymentMissing        a Prefect deployment or work pool that is named does not exist: make deploy
+-- RunnerUnusable           the workers asked for can't be had or don't live; put it right and call again, it resumes
+-- NightFailed              the batch run of a night failed: mend what it says, then call again, it resumes
+-- ProfileFailed            a figure of a model could not be measured: mend what it says, or state the figure
+-- ApplyFailed              a decision can't be put into effect; what served the workload before serves on
+-- EndpointFailed           a release can't be put up or taken down; what served before serves on
|   +-- VerifyFailed         it answers otherwise than the model, or not at all; it was taken down
|   +-- RolledBack           it failed its rule under traffic; the earlier version has all of it again
+-- Unanswered               an endpoint can't answer a request now: send it again later; `status` is HTTP's for it
+-- DependencyFault          what the model calls or runs on fails; put it right and call again, it resumes
+-- ModelFailed              the model fails on rows as such: mend the model, not the rows
+-- TooManyRejects           more rows were rejected than max_reject_fraction allows
+-- PublishRefused           the parts do not add up to the dataset; nothing was published
+-- RunDamaged               parts of a published run are lost or others, and do not come out the same again
+-- FormatTooNew             a plan, manifest or part was written by a newer Overnight: update Overnight
+-- Interrupted              this process or its machine was told to go; what is done stays, and the same call resumes
+-- DeviceLost               the accelerator is gone: this process must end, another may resume
"""

from serving.redaction import hide_secrets


class OvernightError(Exception):
    """The root of every error that Overnight raises on purpose; secrets in its message are hidden."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(hide_secrets(arg) if isinstance(arg, str) else arg for arg in args))


class BadInput(OvernightError, ValueError):
    """The call or its data must change; nothing was written."""


class SourceNotFound(BadInput):
    """No file at that path, glob or prefix."""


class SourceFormat(BadInput):
    """There are files, but of no format that is known, or of several."""


class SourceEmpty(BadInput):
    """There are files, but no rows."""


class SchemaMismatch(BadInput):
    """Columns are missing, of the wrong type, or different between files."""


class ModelNotFound(BadInput):
    """No such registered model, version or alias."""


class ModelUnfit(BadInput):
    """The model can't be run as it was logged."""


class PlanTooLarge(BadInput):
    """The plan does not fit in the memory allowed."""


class RunNameTaken(BadInput):
    """The explicit run name already holds a run of another plan."""


class DestinationUnusable(BadInput):
    """The destination can't hold this run."""


class NoCompleteRun(BadInput):
    """The destination holds no complete run."""


class DeadlineImpossible(BadInput):
    """Not even on-demand machines alone are done by the deadline."""


class LatencyImpossible(BadInput):
    """No batch size keeps the latency budget at the expected rate."""


class BadWorkload(BadInput):
    """A workload's description, arrivals, prices or promise can't be decided on as they are."""


class NoFeasibleMode(BadWorkload):
    """No mode keeps the promise of the workload; the message says what would be needed."""


class PricesMissing(BadWorkload):
    """No price is at hand for a machine, or the source of prices can't be asked."""


class BadRequest(BadInput):
    """A request to an endpoint is none that its model takes; `status` is what HTTP says of it."""

    def __init__(self, message: str, *, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class SecretExposed(BadInput):
    """A parameter holds a password or token, which everyone who sees the flow run would see."""


class StreamUnfit(BadInput):
    """A stream, topic, subject or consumer is missing, or has other settings than the call needs."""


class SourceFault(OvernightError):
    """A source file can't be trusted; the parts of every other chunk stay."""


class SourceChanged(SourceFault):
    """The file is not the one that the plan was made for."""


class SourceCorrupt(SourceFault):
    """The file can't be decoded."""


class StorageFault(OvernightError):
    """Storage refuses or fails; the run resumes once it is put right."""


class StorageDenied(StorageFault):
    """The credentials do not allow the operation."""


class StorageFull(StorageFault):
    """No space is left."""


class BrokerFault(OvernightError):
    """A message broker refuses for good; what is not acknowledged comes again."""


class BrokerDenied(BrokerFault):
    """The credentials do not allow the operation."""


class StreamFault(OvernightError):
    """A stream is not what was read of it before; what is in the sink stays."""


class StreamReplaced(StreamFault):
    """The stream or topic was deleted and made again, so its numbers begin again."""


class MessagesLost(StreamFault):
    """Messages were deleted, by retention or by hand, before they were read."""


class DeploymentMissing(OvernightError):
    """A Prefect deployment or work pool that is named does not exist."""


class RunnerUnusable(OvernightError):
    """The workers that the call asks for can't be had, or don't live; the run resumes once that is put right."""


class NightFailed(OvernightError):
    """The batch run of a night failed."""


class ProfileFailed(OvernightError):
    """A figure of a model could not be measured, and none is ever invented."""


class ApplyFailed(OvernightError):
    """A decision can't be put into effect; what served the workload before serves on."""


class EndpointFailed(OvernightError):
    """A release can't be put up or taken down; what served before serves on."""


class VerifyFailed(EndpointFailed):
    """A release answers otherwise than its model, or not at all, and was taken down; what served before serves on."""


class RolledBack(EndpointFailed):
    """A release failed its rule under traffic, and was taken down; the earlier version has all of it again."""


class Unanswered(OvernightError):
    """An endpoint can't answer a request now; `status` is what HTTP says of it, `retry_after_s` when to come again."""

    def __init__(self, message: str, *, status: int = 503, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s


class DependencyFault(OvernightError):
    """What the model calls or runs on fails: a connection, a time-out, the operating system; no row is rejected."""


class ModelFailed(OvernightError):
    """The model fails on rows as such."""


class TooManyRejects(OvernightError):
    """More rows were rejected than max_reject_fraction allows."""


class PublishRefused(OvernightError):
    """The parts do not add up to the dataset."""


class RunDamaged(OvernightError):
    """Parts of a published run are lost or others, and do not come out the same again."""


class FormatTooNew(OvernightError):
    """A plan, manifest or part was written in a newer format than this version of Overnight reads: update it."""


class Interrupted(OvernightError):
    """This process or its machine was told to go; what is done stays, and the same call resumes."""


class DeviceLost(OvernightError):
    """The accelerator is gone; this process can't go on."""
