"""The error tree. Every error names the field, the value and the remedy.

    PromptyardError                 reason (error_reason.proto)      gRPC status
    ├── InvalidInputError           INVALID_INPUT                    INVALID_ARGUMENT
    ├── TaskNotFoundError           TASK_NOT_FOUND                   NOT_FOUND
    ├── TaskExistsError             TASK_EXISTS                      ALREADY_EXISTS
    ├── TaskOutOfServiceError       TASK_OUT_OF_SERVICE              UNAVAILABLE
    ├── NoPromptError               TASK_HAS_NO_PROMPT               FAILED_PRECONDITION
    ├── IncompatibleModelError      INCOMPATIBLE_MODEL               FAILED_PRECONDITION
    ├── RefusedError                REGISTRATION_REFUSED             FAILED_PRECONDITION
    ├── CorruptArtifactError        CORRUPT_ARTIFACT                 DATA_LOSS
    ├── CatalogError                CATALOG_UNAVAILABLE              UNAVAILABLE
    │   └── CatalogBusyError        CATALOG_BUSY                     ABORTED
    ├── StorageError                STORAGE_FAILED                   INTERNAL
    ├── OverloadedError             OVERLOADED                       RESOURCE_EXHAUSTED
    ├── UnauthenticatedError        UNAUTHENTICATED                  UNAUTHENTICATED
    └── ForbiddenError              PERMISSION_DENIED                PERMISSION_DENIED

`Unknown` is a decision, not an error. The mapping to gRPC lives in `router.wire` alone.
"""

from __future__ import annotations

_SHOWN_VALUE_CHARACTERS = 80


class PromptyardError(Exception):
    """An error with a stable reason and a message for people.

    `field` is where the bad value came from (a request field, a flag, a file), `value` what was
    found there, `remedy` what to do about it.
    """

    reason = "INTERNAL"

    def __init__(self, field: str, value: object, remedy: str) -> None:
        self.field = field
        self.value = shorten(value)
        self.remedy = remedy
        super().__init__(f"{field}: {self.value}; {remedy}")

    def __reduce__(self) -> tuple[type[PromptyardError], tuple[str, str, str]]:
        """So that another process can be told: an exception is made from its message otherwise."""
        return type(self), (self.field, self.value, self.remedy)


class InvalidInputError(PromptyardError):
    """Something given by a caller is malformed or over a limit."""

    reason = "INVALID_INPUT"


class TaskNotFoundError(PromptyardError):
    """No task of this name (and revision) is in the catalog."""

    reason = "TASK_NOT_FOUND"


class TaskExistsError(PromptyardError):
    """A task of this name exists already."""

    reason = "TASK_EXISTS"


class TaskOutOfServiceError(PromptyardError):
    """The task is in the catalog, but its artifacts could not be loaded."""

    reason = "TASK_OUT_OF_SERVICE"


class NoPromptError(PromptyardError):
    """The task was registered for routing only, or no base model is loaded."""

    reason = "TASK_HAS_NO_PROMPT"


class IncompatibleModelError(PromptyardError):
    """A catalog or a prompt was made for another encoder or base model."""

    reason = "INCOMPATIBLE_MODEL"


class RefusedError(PromptyardError):
    """A registration did not pass its quality checks and was not forced."""

    reason = "REGISTRATION_REFUSED"


class CorruptArtifactError(PromptyardError):
    """A stored file is missing, damaged, or not what its record says."""

    reason = "CORRUPT_ARTIFACT"


class CatalogError(PromptyardError):
    """The catalog cannot be opened or read."""

    reason = "CATALOG_UNAVAILABLE"


class CatalogBusyError(CatalogError):
    """Another registration holds the catalog for longer than we wait."""

    reason = "CATALOG_BUSY"


class StorageError(PromptyardError):
    """The disk is full, or a file cannot be written."""

    reason = "STORAGE_FAILED"


class OverloadedError(PromptyardError):
    """A queue is full. `retry_after` (seconds) is when to come back."""

    reason = "OVERLOADED"

    def __init__(self, field: str, value: object, remedy: str, retry_after: float = 0.1) -> None:
        super().__init__(field, value, remedy)
        self.retry_after = retry_after


class UnauthenticatedError(PromptyardError):
    """A call bears no token that the server knows."""

    reason = "UNAUTHENTICATED"


class ForbiddenError(PromptyardError):
    """A token is known, but lacks the role that the call needs."""

    reason = "PERMISSION_DENIED"


def shorten(value: object) -> str:
    """`value` as one line that is short enough for a message."""
    text = " ".join(str(value).split())
    if len(text) > _SHOWN_VALUE_CHARACTERS:
        text = text[:_SHOWN_VALUE_CHARACTERS] + "…"
    return text
