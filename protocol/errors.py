"""Every error of Commonweight, in one tree; each with a code that never changes and a sentence a person can act on.

    CommonweightError
    ├── Refusal             the other side sent or asked something that is not allowed; sending it again won't help
    │   ├── DocumentRefused     an envelope, signature or payload does not hold
    │   ├── AccessRefused       who you are, or what you run, is not admitted
    │   ├── WorkRefused         a lease, claim or round rule
    │   └── BytesRefused        an uploaded or downloaded file is not what it must be
    ├── TryLater            nothing is wrong with the request; the same request can succeed later
    ├── LocalProblem        something on this machine: settings, disk, device, files
    └── Bug                 a mistake of ours; never shown in detail to the other side

`status` names the gRPC status that carries the error; `protocol.service` maps both ways by `code`.
"""

from collections.abc import Iterator
from typing import ClassVar, Final


class CommonweightError(Exception):
    """Base of every error. `str(error)` is the public sentence; `private` goes to our own log only."""

    code: ClassVar[str] = "COMMONWEIGHT"
    status: ClassVar[str] = "INTERNAL"
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str = "", *, private: str = "") -> None:
        self.message = message or (type(self).__doc__ or "").strip().splitlines()[0]
        self.private = private
        super().__init__(self.message)


# --- Refusal -------------------------------------------------------------------------------------------------


class Refusal(CommonweightError):
    """The request is refused; sending the same again will not help."""

    code = "REFUSED"
    status = "INVALID_ARGUMENT"


class DocumentRefused(Refusal):
    """A signed document does not hold."""

    code = "DOCUMENT_REFUSED"


class EnvelopeInvalid(DocumentRefused):
    """The envelope is malformed or too large."""

    code = "ENVELOPE_INVALID"


class SignatureInvalid(DocumentRefused):
    """No valid signature by the key that must have signed this."""

    code = "SIGNATURE_INVALID"
    status = "UNAUTHENTICATED"


class FormatUnknown(DocumentRefused):
    """The document is of a kind or format that this version does not know; a newer Commonweight may be needed."""

    code = "FORMAT_UNKNOWN"


class PayloadInvalid(DocumentRefused):
    """The document's content does not have the form that its kind asks for."""

    code = "PAYLOAD_INVALID"


class TakedownsDiffer(DocumentRefused):
    """The list of pictures taken down is not the one that was signed for, or the run has rewritten its past."""

    code = "TAKEDOWNS_DIFFER"


class AccessRefused(Refusal):
    """This peer is not admitted."""

    code = "ACCESS_REFUSED"
    status = "PERMISSION_DENIED"


class JoinStringInvalid(AccessRefused):
    """The join string is not of the form cw1:HOST:PORT:RUNID; copy it again from the run's page."""

    code = "JOIN_STRING_INVALID"
    status = "INVALID_ARGUMENT"


class EndpointUntrusted(AccessRefused):
    """The server could not prove that it speaks for the run in the join string; nothing was sent to it."""

    code = "ENDPOINT_UNTRUSTED"


class DelegationInvalid(AccessRefused):
    """The key was not, or is no longer, delegated by the key above it."""

    code = "DELEGATION_INVALID"


class WrongRun(AccessRefused):
    """The document belongs to another run."""

    code = "WRONG_RUN"


class SessionRequired(AccessRefused):
    """This call needs a session; the worker opens a new one by itself."""

    code = "SESSION_REQUIRED"
    status = "UNAUTHENTICATED"


class NonceUnknown(AccessRefused):
    """The session nonce is unknown, used, or older than a minute; ask for a new one."""

    code = "NONCE_UNKNOWN"
    status = "UNAUTHENTICATED"


class NumericsMismatch(AccessRefused):
    """This worker computes with other numerics than the run; install the version that the message names."""

    code = "NUMERICS_MISMATCH"
    status = "FAILED_PRECONDITION"


class TermsNotAccepted(AccessRefused):
    """The run's terms were not accepted, or have changed; start the worker again to read and accept them."""

    code = "TERMS_NOT_ACCEPTED"
    status = "FAILED_PRECONDITION"


class OwnerBanned(AccessRefused):
    """A referee's finding banned this owner; `commonweight worker receipts` says why, `worker appeal` asks another."""

    code = "OWNER_BANNED"


class AuditorRequired(AccessRefused):
    """This call is for the run's auditors; the run's root key delegates them."""

    code = "AUDITOR_REQUIRED"


class WorkRefused(Refusal):
    """A rule about leases, claims or rounds forbids this."""

    code = "WORK_REFUSED"
    status = "FAILED_PRECONDITION"


class LeaseUnknown(WorkRefused):
    """No such lease was given to this device."""

    code = "LEASE_UNKNOWN"
    status = "NOT_FOUND"


class LeaseEnded(WorkRefused):
    """This lease was handed back or is settled; ask for a new unit."""

    code = "LEASE_ENDED"


class ClaimConflict(WorkRefused):
    """A different claim for this lease was received before; the first one stands and this one is kept as evidence."""

    code = "CLAIM_CONFLICT"
    status = "ALREADY_EXISTS"


class ClaimMismatch(WorkRefused):
    """The claim does not fit its lease: artifacts, sizes or digests are not those that the lease allows."""

    code = "CLAIM_MISMATCH"


class ClaimUnknown(WorkRefused):
    """No such claim by this device; send the claim before its sketch and its bytes."""

    code = "CLAIM_UNKNOWN"
    status = "NOT_FOUND"


class SketchInvalid(WorkRefused):
    """The sketch is not 1,024 finite fp32 numbers."""

    code = "SKETCH_INVALID"
    status = "INVALID_ARGUMENT"


class StepOutOfOrder(WorkRefused):
    """The steps of a claim are claim, sketch, bytes, in this order."""

    code = "STEP_OUT_OF_ORDER"


class RoundTooOld(WorkRefused):
    """The unit's round is too many rounds behind; its work cannot be merged any more."""

    code = "ROUND_TOO_OLD"


class AuditUnknown(WorkRefused):
    """This auditor has no such claim to judge; it was settled meanwhile, or given to somebody else."""

    code = "AUDIT_UNKNOWN"
    status = "NOT_FOUND"


class AppealRefused(WorkRefused):
    """This verdict can't be appealed: only a rejection after a referee's replay can, once, within 14 days."""

    code = "APPEAL_REFUSED"


class RunFinished(WorkRefused):
    """The run has published its last planned checkpoint; there is no more work. Thank you."""

    code = "RUN_FINISHED"


class BytesRefused(Refusal):
    """A file is not what it must be."""

    code = "BYTES_REFUSED"


class SketchMismatch(BytesRefused):
    """The uploaded delta does not have the sketch that was sent for it before."""

    code = "SKETCH_MISMATCH"


class UploadOffsetWrong(BytesRefused):
    """The chunk does not start where the stored bytes end; ask for the offset and continue from there."""

    code = "UPLOAD_OFFSET_WRONG"
    status = "OUT_OF_RANGE"


class DigestMismatch(BytesRefused):
    """The bytes do not have the SHA-256 that was signed for them."""

    code = "DIGEST_MISMATCH"
    status = "DATA_LOSS"


class DeltaTruncated(BytesRefused):
    """The delta is shorter than the run's schema implies."""

    code = "DELTA_TRUNCATED"


class DeltaOversized(BytesRefused):
    """The delta is longer than the run's schema implies."""

    code = "DELTA_OVERSIZED"


class DeltaStreamCorrupt(BytesRefused):
    """The delta's compressed stream does not unpack to what the run's schema implies."""

    code = "DELTA_STREAM_CORRUPT"


class DeltaSchemaMismatch(BytesRefused):
    """The delta's header is not the one that the run's schema, codec and unit imply."""

    code = "DELTA_SCHEMA_MISMATCH"


class DeltaNotFinite(BytesRefused):
    """The delta holds NaN or an infinity; a GPU with failing memory or too much overclocking can do that."""

    code = "DELTA_NOT_FINITE"


class DeltaCodeIllegal(BytesRefused):
    """The delta holds a code or scale that no encoder writes."""

    code = "DELTA_CODE_ILLEGAL"


class ContentMismatch(BytesRefused):
    """The delta's codes and scales do not have the content digest that was claimed."""

    code = "CONTENT_MISMATCH"


class ShardCorrupt(BytesRefused):
    """A data shard does not have its promised form."""

    code = "SHARD_CORRUPT"
    status = "DATA_LOSS"


class CheckpointCorrupt(BytesRefused):
    """A checkpoint file does not have its promised form or bytes."""

    code = "CHECKPOINT_CORRUPT"
    status = "DATA_LOSS"


# --- TryLater ------------------------------------------------------------------------------------------------


class TryLater(CommonweightError):
    """The request is fine; the same request can succeed later. `retry_after_ms` says when to try."""

    code = "TRY_LATER"
    status = "UNAVAILABLE"

    def __init__(self, message: str = "", *, private: str = "", retry_after_ms: int = 5_000) -> None:
        super().__init__(message, private=private)
        self.retry_after_ms = retry_after_ms


class Unreachable(TryLater):
    """The coordinator could not be reached; finished work is kept on disk and sent when it answers again."""

    code = "UNREACHABLE"


class NotServed(Unreachable):
    """The public site answers, and has no such file: not yet, or not any more."""

    code = "NOT_SERVED"


class AnswerInvalid(TryLater):
    """The coordinator's answer does not hold; it was not believed, and the question is asked again later."""

    code = "ANSWER_INVALID"


class ServerBusy(TryLater):
    """The coordinator has its hands full; nothing is wrong with the request."""

    code = "SERVER_BUSY"
    status = "RESOURCE_EXHAUSTED"


class RateLimited(TryLater):
    """Too many calls in a short time from this device or address."""

    code = "RATE_LIMITED"
    status = "RESOURCE_EXHAUSTED"


class CoordinatorRestarting(TryLater):
    """A part of the coordinator has ended and is being started again; nothing is lost, ask again in some seconds."""

    code = "COORDINATOR_RESTARTING"


class CoordinatorDiskFull(TryLater):
    """The coordinator is short of disk space and takes no uploads now; keep the delta and send it later."""

    code = "COORDINATOR_DISK_FULL"


class RequestTooSlow(TryLater):
    """The call's message did not follow its headers within ten seconds."""

    code = "REQUEST_TOO_SLOW"
    status = "DEADLINE_EXCEEDED"


class UploadTooSlow(TryLater):
    """The upload brought less than 12 KiB a second and was cut; it resumes where it stopped."""

    code = "UPLOAD_TOO_SLOW"
    status = "DEADLINE_EXCEEDED"


class UploadInProgress(TryLater):
    """Another connection is sending this artifact now; wait until it ends."""

    code = "UPLOAD_IN_PROGRESS"


# --- LocalProblem --------------------------------------------------------------------------------------------


class LocalProblem(CommonweightError):
    """Something on this machine needs its owner."""

    code = "LOCAL_PROBLEM"
    status = "FAILED_PRECONDITION"


class UsageError(LocalProblem):
    """The command was not used as it is meant."""

    code = "USAGE"
    exit_code = 2


class ConfigInvalid(LocalProblem):
    """A setting is wrong: the message names the setting, its value, and what would be right."""

    code = "CONFIG_INVALID"
    exit_code = 2


class DirectoryNotARun(LocalProblem):
    """The directory holds no run; `commonweight coordinator init DIR` makes one."""

    code = "DIRECTORY_NOT_A_RUN"
    exit_code = 2


class DirectoryInUse(LocalProblem):
    """Another process uses this directory."""

    code = "DIRECTORY_IN_USE"


class DirectoryNotEmpty(LocalProblem):
    """The directory is not empty; nothing was overwritten."""

    code = "DIRECTORY_NOT_EMPTY"
    exit_code = 2


class BackupDamaged(LocalProblem):
    """The backup is unfinished or damaged, so nothing was restored; take another backup."""

    code = "BACKUP_DAMAGED"


class DatabaseTooNew(LocalProblem):
    """The database was written by a newer Commonweight."""

    code = "DATABASE_TOO_NEW"


class DiskFull(LocalProblem):
    """The disk is full; nothing was lost. Free some space and start again."""

    code = "DISK_FULL"


class CacheTooSmall(LocalProblem):
    """The cache cap is smaller than what one unit needs."""

    code = "CACHE_TOO_SMALL"


class MemoryTooSmall(LocalProblem):
    """The run's units do not fit the memory of this machine; `commonweight worker doctor` says what does."""

    code = "MEMORY_TOO_SMALL"


class KeyUnreadable(LocalProblem):
    """A key file is missing or damaged."""

    code = "KEY_UNREADABLE"


class ConsentNeeded(LocalProblem):
    """The run's terms and licence must be accepted first."""

    code = "CONSENT_NEEDED"


class DeviceUnavailable(LocalProblem):
    """The asked-for device is not there; --device cpu works everywhere."""

    code = "DEVICE_UNAVAILABLE"


class NetworksMissing(LocalProblem):
    """The run's shards hold captions alone, and the text encoders that hear them are not here."""

    code = "NETWORKS_MISSING"


class PackageMissing(LocalProblem):
    """A package that this command needs is not installed."""

    code = "PACKAGE_MISSING"


class SelfTestFailed(LocalProblem):
    """This machine does not compute the golden merge to the same bits, so it must not train or merge."""

    code = "SELF_TEST_FAILED"


class TrainingDiverged(LocalProblem):
    """Training gave a loss that is not a number; the unit was dropped and nothing was sent."""

    code = "TRAINING_DIVERGED"


class UnitAbandoned(LocalProblem):
    """Training of the unit was stopped on request; the unit was handed back."""

    code = "UNIT_ABANDONED"


class RebuildDiffers(LocalProblem):
    """The checkpoint that follows from the deltas and manifests is not the one that was published."""

    code = "REBUILD_DIFFERS"


class HistoryDiffers(LocalProblem):
    """What was published is not what the database remembers; an old backup was restored over a newer run."""

    code = "HISTORY_DIFFERS"


class DatasetInvalid(LocalProblem):
    """The prepared data set is not what its curator signed for; copy it again from where it came."""

    code = "DATASET_INVALID"


class TakedownRefused(LocalProblem):
    """This picture can't be taken down."""

    code = "TAKEDOWN_REFUSED"


class DeltasPruned(LocalProblem):
    """The deltas of that round are kept as digests only; it cannot be rebuilt any more."""

    code = "DELTAS_PRUNED"


class LogDiffers(LocalProblem):
    """The run's public log breaks the run's own rules, or was changed; keep a copy of it and ask its operator."""

    code = "LOG_DIFFERS"


class TargetMissed(LocalProblem):
    """A measured result fell short of its target."""

    code = "TARGET_MISSED"


# --- Bug -----------------------------------------------------------------------------------------------------


class Bug(CommonweightError):
    """Something went wrong on our side; please report it with the time at which it happened."""

    code = "INTERNAL"
    status = "INTERNAL"


class IllegalTransition(Bug):
    """A lifecycle was asked for a move that its table does not have."""

    code = "ILLEGAL_TRANSITION"


class StaleRow(Bug):
    """A stored row was changed by somebody else between reading and writing."""

    code = "STALE_ROW"


def all_errors(root: type[CommonweightError] = CommonweightError) -> Iterator[type[CommonweightError]]:
    """Yield every class under `root`, families before their members."""
    for kind in root.__subclasses__():
        yield kind
        yield from all_errors(kind)


ERRORS_BY_CODE: Final[dict[str, type[CommonweightError]]] = {
    CommonweightError.code: CommonweightError,
    **{kind.code: kind for kind in all_errors()},
}
"""Every error class by its stable code."""
