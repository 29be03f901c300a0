"""Everything that lynearm raises on purpose, in one tree.

    LynearmError                            gRPC status
    ├── InvalidInputError (ValueError)      INVALID_ARGUMENT
    │   ├── ConfigError                     INVALID_ARGUMENT
    │   ├── PromptFileError                 INVALID_ARGUMENT
    │   └── PromptTooLongError              INVALID_ARGUMENT
    ├── CodecError (ValueError)             INVALID_ARGUMENT
    │   ├── CorruptBlockError               DATA_LOSS
    │   └── UnsupportedFormatError          UNIMPLEMENTED
    ├── StreamNotFoundError (LookupError)   NOT_FOUND
    ├── DictionaryNotFoundError (LookupError)  NOT_FOUND
    ├── AttachmentNotFoundError (LookupError)  NOT_FOUND
    ├── JobNotFoundError (LookupError)      NOT_FOUND
    ├── ConsumerNotFoundError (LookupError)  NOT_FOUND
    ├── OffsetNotFoundError (LookupError)   OUT_OF_RANGE
    │   └── OffsetExpiredError              OUT_OF_RANGE
    ├── StreamExistsError                   ALREADY_EXISTS
    ├── SequenceConflictError               ALREADY_EXISTS
    ├── JobExistsError                      ALREADY_EXISTS
    ├── RequestConflictError                ALREADY_EXISTS
    ├── DictionaryConflictError             ALREADY_EXISTS
    ├── PreconditionError                   FAILED_PRECONDITION
    │   ├── StreamSealedError               FAILED_PRECONDITION
    │   ├── ProducerFencedError             FAILED_PRECONDITION
    │   ├── SequenceGapError                FAILED_PRECONDITION
    │   ├── PromptFinishedError             FAILED_PRECONDITION
    │   ├── UnknownDictionaryError          FAILED_PRECONDITION
    │   ├── JobIncompleteError              FAILED_PRECONDITION
    │   ├── JobCancelledError               FAILED_PRECONDITION
    │   ├── LeaseSupersededError            FAILED_PRECONDITION
    │   ├── CursorBackwardsError            FAILED_PRECONDITION
    │   ├── DistillationForbiddenError      FAILED_PRECONDITION
    │   └── MisalignmentError               FAILED_PRECONDITION
    ├── AuthenticationError (PermissionError)  UNAUTHENTICATED
    ├── AccessDeniedError (PermissionError)  PERMISSION_DENIED
    ├── LimitError                          RESOURCE_EXHAUSTED
    │   ├── RateLimitedError                RESOURCE_EXHAUSTED
    │   └── StreamLimitError                RESOURCE_EXHAUSTED
    ├── DictionaryLimitError                RESOURCE_EXHAUSTED
    ├── LeaseLimitError                     RESOURCE_EXHAUSTED
    ├── LagLimitError                       RESOURCE_EXHAUSTED
    ├── StorageFullError (OSError)          RESOURCE_EXHAUSTED
    ├── StorageError (OSError)              INTERNAL
    ├── ServiceUnavailableError (ConnectionError)  UNAVAILABLE
    │   ├── CatalogUnavailableError         UNAVAILABLE
    │   └── StoreUnavailableError           UNAVAILABLE
    │   └── DrainingError                   UNAVAILABLE
    ├── DeadlineError (TimeoutError)        DEADLINE_EXCEEDED
    ├── MissingDependencyError (ImportError)  (local only)
    ├── CheckpointError (ValueError)        (local only)
    ├── ParityError (ValueError)            (local only)
    ├── TeacherError (RuntimeError)         INTERNAL
    ├── TrainingError (RuntimeError)        (local only)
    ├── FleetError (RuntimeError)           (local only)
    └── InternalError (RuntimeError)        INTERNAL

Each error carries the message (what is wrong, with the value), and a remedy (what to do about it).
The status of a class is its `status_code`; `error_from_status` is the inverse. Errors cross Ray and
process borders by pickle, and gRPC by status, message and the class's name in trailing metadata, beside
which `status.encode_status` says the same as a google.rpc.Status.
"""

from __future__ import annotations

from typing import ClassVar

ERROR_NAME_METADATA_KEY = "lynearm-error"
"""Trailing metadata key under which a server names the class that it raised."""

REMEDY_METADATA_KEY = "lynearm-remedy-bin"
"""Trailing metadata key of the remedy, UTF-8; `-bin` since metadata text must be ASCII."""


class LynearmError(Exception):
    """Root of every error that lynearm raises on purpose.

    Args:
        message: What is wrong, with the value and what was expected; no final full stop.
        remedy: What the reader can do about it; empty where nothing can be said.
    """

    status_code: ClassVar[str] = "INTERNAL"

    retry_seconds: float | None = None
    """When the same call may succeed; None where trying again changes nothing."""

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message, remedy)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}: {self.remedy}" if self.remedy else self.message


class InvalidInputError(LynearmError, ValueError):
    """A value that the caller gave is outside what is allowed."""

    status_code = "INVALID_ARGUMENT"


class ConfigError(InvalidInputError):
    """A configuration file or flag holds something that no role understands."""


class PromptFileError(InvalidInputError):
    """A line of a prompt file is not a prompt; the message names file and line."""


class PromptTooLongError(InvalidInputError):
    """A prompt leaves no room for a completion in the teacher's context."""


class CodecError(LynearmError, ValueError):
    """A trace cannot be encoded, or bytes are not a block."""

    status_code = "INVALID_ARGUMENT"


class CorruptBlockError(CodecError):
    """Bytes were a block once: a checksum, a size or a count does not hold."""

    status_code = "DATA_LOSS"


class UnsupportedFormatError(CodecError):
    """The block was written in a format version or codec mode that this reader does not know."""

    status_code = "UNIMPLEMENTED"


class StreamNotFoundError(LynearmError, LookupError):
    """No stream of that name."""

    status_code = "NOT_FOUND"


class DictionaryNotFoundError(LynearmError, LookupError):
    """The stream holds no codec dictionary of that digest."""

    status_code = "NOT_FOUND"


class AttachmentNotFoundError(LynearmError, LookupError):
    """The stream has no attachment of that name."""

    status_code = "NOT_FOUND"


class JobNotFoundError(LynearmError, LookupError):
    """The stream has no job of that name."""

    status_code = "NOT_FOUND"


class ConsumerNotFoundError(LynearmError, LookupError):
    """The stream has no consumer of that name."""

    status_code = "NOT_FOUND"


class OffsetNotFoundError(LynearmError, LookupError):
    """The stream has no block at that offset."""

    status_code = "OUT_OF_RANGE"


class OffsetExpiredError(OffsetNotFoundError):
    """The block at that offset went by the stream's retention; the message names the first that is kept."""


class StreamExistsError(LynearmError):
    """A stream of that name exists with another spec."""

    status_code = "ALREADY_EXISTS"


class SequenceConflictError(LynearmError):
    """A publish reuses a sequence number for other bytes."""

    status_code = "ALREADY_EXISTS"


class JobExistsError(LynearmError):
    """A job of that name exists with other prompts or another number of samples."""

    status_code = "ALREADY_EXISTS"


class RequestConflictError(LynearmError):
    """The name of a request is in use, or was lately, for another one."""

    status_code = "ALREADY_EXISTS"


class DictionaryConflictError(LynearmError):
    """The stream holds another dictionary of the same digest."""

    status_code = "ALREADY_EXISTS"


class PreconditionError(LynearmError):
    """The request is well formed but the state of the system forbids it."""

    status_code = "FAILED_PRECONDITION"


class StreamSealedError(PreconditionError):
    """The stream was sealed: it takes no more blocks."""


class ProducerFencedError(PreconditionError):
    """A newer epoch of the same producer has taken over."""


class SequenceGapError(PreconditionError):
    """A publish skips sequence numbers: a block before it was lost on the way."""


class PromptFinishedError(PreconditionError):
    """A publish finishes a prompt, or a sample of one, that is in the stream already."""


class UnknownDictionaryError(PreconditionError):
    """A publish names a codec dictionary that the stream does not hold."""


class JobIncompleteError(PreconditionError):
    """Prompts of a job are still to be added."""


class JobCancelledError(PreconditionError):
    """Somebody ended the job before it was done."""


class LeaseSupersededError(PreconditionError):
    """A lease is over: its units were given to another worker, given back, or are all done."""


class CursorBackwardsError(PreconditionError):
    """A consumer would store a cursor before the one that it has stored."""


class DistillationForbiddenError(PreconditionError):
    """A stream's terms forbid to train a student on it."""


class MisalignmentError(PreconditionError):
    """Teacher and student do not share tokenizer, template, vocabulary or logprob conventions."""


class AuthenticationError(LynearmError, PermissionError):
    """The call carries no token, or none that the service knows."""

    status_code = "UNAUTHENTICATED"


class AccessDeniedError(LynearmError, PermissionError):
    """The token is known, and does not cover what the call asks for."""

    status_code = "PERMISSION_DENIED"


class LimitError(LynearmError):
    """The call exceeds a limit of the service; nothing was changed."""

    status_code = "RESOURCE_EXHAUSTED"


class RateLimitedError(LimitError):
    """The caller asks more often, or sends more, than it may; it may go on after `retry_seconds`."""

    retry_seconds = 1.0


class StreamLimitError(LimitError):
    """The service holds as many streams as it may; the new one was not made."""


class DictionaryLimitError(LynearmError):
    """A stream would hold more codec dictionaries than it may; the new one was not kept."""

    status_code = "RESOURCE_EXHAUSTED"


class LeaseLimitError(LynearmError):
    """A job has as many open leases as it may."""

    status_code = "RESOURCE_EXHAUSTED"


class LagLimitError(LynearmError):
    """A consumer is as far behind as the stream allows, and the publisher did not want to wait for it."""

    status_code = "RESOURCE_EXHAUSTED"


class StorageFullError(LynearmError, OSError):
    """The block store has no room left; nothing of the refused block was kept."""

    status_code = "RESOURCE_EXHAUSTED"
    retry_seconds = 5.0


class StorageError(LynearmError, OSError):
    """The block store or the catalog failed; nothing of the refused block was kept."""

    status_code = "INTERNAL"


class ServiceUnavailableError(LynearmError, ConnectionError):
    """No trace service answers at the address, or it went away."""

    status_code = "UNAVAILABLE"
    retry_seconds = 1.0


class DrainingError(ServiceUnavailableError):
    """The server is on its way down and takes no new calls; another one, or its successor, will."""


class CatalogUnavailableError(ServiceUnavailableError):
    """The catalog's database cannot be reached, or went away: what was asked for may have happened or not."""


class StoreUnavailableError(ServiceUnavailableError):
    """The object store of the blocks cannot be reached, or does not answer; nothing was acknowledged."""


class DeadlineError(LynearmError, TimeoutError):
    """The service did not answer in time."""

    status_code = "DEADLINE_EXCEEDED"


class MissingDependencyError(LynearmError, ImportError):
    """An optional part is not installed; the remedy names the extra."""


class CheckpointError(LynearmError, ValueError):
    """A directory is not a checkpoint that can be loaded, resumed or exported."""


class ParityError(LynearmError, ValueError):
    """An exported package does not compute what the checkpoint computes."""


class TeacherError(LynearmError, RuntimeError):
    """The teacher's engine or its Ray actor failed."""


class TrainingError(LynearmError, RuntimeError):
    """The processes of a training run were lost, and could not be kept running."""


class FleetError(LynearmError, RuntimeError):
    """Ray cannot be reached, or a trace server on it does not come up."""


class InternalError(LynearmError, RuntimeError):
    """A fault of lynearm's own; please report it."""


def error_from_status(status_code: str, message: str, name: str = "", remedy: str = "") -> LynearmError:
    """The typed error behind a gRPC status.

    Args:
        status_code: Name of the gRPC status code, for example "NOT_FOUND".
        message: The status message.
        name: Class name from `ERROR_NAME_METADATA_KEY`; empty when the peer named none.
        remedy: Text from `REMEDY_METADATA_KEY`.

    Returns:
        An instance of the named class; else of the most general class with that status.
    """
    classes = _classes_by_name()
    if name in classes:
        return classes[name](message, remedy)
    for general in _GENERAL_BY_STATUS:
        if general.status_code == status_code:
            return general(message, remedy)
    return InternalError(f"{status_code}: {message}", remedy)


_GENERAL_BY_STATUS: tuple[type[LynearmError], ...] = (
    InvalidInputError,
    CorruptBlockError,
    UnsupportedFormatError,
    StreamNotFoundError,
    OffsetNotFoundError,
    StreamExistsError,
    PreconditionError,
    AuthenticationError,
    AccessDeniedError,
    LimitError,
    ServiceUnavailableError,
    DeadlineError,
)


def _classes_by_name() -> dict[str, type[LynearmError]]:
    found: dict[str, type[LynearmError]] = {}
    pending: list[type[LynearmError]] = [LynearmError]
    while pending:
        cls = pending.pop()
        found[cls.__name__] = cls
        pending.extend(cls.__subclasses__())
    return found
