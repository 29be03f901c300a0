"""What the errors of object stores mean for a block store. No message holds a signed URL."""

from __future__ import annotations

import re

from lynearm.wire.errors import LynearmError, StorageError, StorageFullError, StoreUnavailableError

_INSUFFICIENT_STORAGE = 507
_NO_ROOM = re.compile(r"<Code>\w*(StorageFull|QuotaExceeded)\w*</Code>")
"""What stores other than Amazon's say: theirs are never full."""


def typed_error(error: Exception, where: str) -> LynearmError:
    """The error of a request that failed; `where` is the store, for people."""
    from obstore.exceptions import PermissionDeniedError, UnauthenticatedError

    said = first_line(error)
    problem = f"block store {where}: {said}"
    if isinstance(error, PermissionDeniedError | UnauthenticatedError):
        return StorageError(problem, "check the credentials in the environment, and what they allow")
    if isinstance(error, FileNotFoundError):
        missing = "create the bucket, or correct its name" if "NoSuchBucket" in str(error) else ""
        return StorageError(problem, missing or "restore the object from a copy")
    if http_status(error) == _INSUFFICIENT_STORAGE or _NO_ROOM.search(str(error)):
        return StorageFullError(problem, "free space or raise the quota, then publish again")
    return StoreUnavailableError(problem, "try again; look at the store if that does not help")


def http_status(error: Exception) -> int | None:
    """Of the HTTP response; obstore tells it in the text alone."""
    found = re.search(r"status code: (\d{3}) ", first_line(error))
    return int(found[1]) if found else None


def first_line(error: Exception) -> str:
    """What an error of obstore says, without the dump of its causes and the parameters of a signed URL."""
    lines = str(error).splitlines() or [type(error).__name__]
    return re.sub(r"\?[^\s\"']*", "", lines[0])[:500]
