"""What the errors of PostgreSQL mean for a catalog. No message holds a password."""

from __future__ import annotations

from sqlalchemy import URL
from sqlalchemy.exc import DBAPIError

from lynearm.wire.errors import (
    CatalogUnavailableError,
    ConfigError,
    LynearmError,
    StorageError,
    StorageFullError,
)

# The error codes of PostgreSQL's manual, appendix A.
_DISK_FULL = "53100"
_LOST_RACES = frozenset({"40001", "40P01", "23505"})
"""Serialisation failure, deadlock, a unique key that another transaction took first: rolled back."""

_FOR_A_WHILE = ("08", "40", "53", "55P03", "57")
"""Connection, transaction rolled back, resources, lock not available, intervention of an operator."""

_IDLE_IN_TRANSACTION = "25P03"
_READ_ONLY = "25006"

_CONNECT_REMEDIES = (
    ("password", "check the user, and the password in PGPASSWORD, a PGPASSFILE or the URL"),
    ("pg_hba.conf", "let this host, user and database in with a line in the database's pg_hba.conf"),
    ("does not exist", "create it (`createdb`, `createuser`), or correct the URL"),
    ("certificate", "name the root certificate with ?sslrootcert=… in the URL"),
    ("resolve", "correct the host in the URL"),
    ("refused", "start PostgreSQL there, or correct host and port in the URL"),
    ("too many", "raise the database's max_connections: a server takes up to 9"),
)


def may_repeat(error: DBAPIError, *, committing: bool) -> bool:
    """Whether a transaction certainly left nothing, and another try may succeed."""
    if _code(error) in _LOST_RACES:
        return True
    return error.connection_invalidated and not committing


def database_error(error: DBAPIError, url: URL, *, committing: bool) -> LynearmError:
    """The typed error of a failed transaction.

    Args:
        error: What SQLAlchemy raised.
        url: Of the database.
        committing: Whether the commit had been sent.
    """
    code = _code(error)
    problem = f"catalog {describe(url)}: {_without_password(str(error.orig), url)}"
    if code == _DISK_FULL and not committing:
        return StorageFullError(problem, "free space on the database's disk, then try again")
    if error.connection_invalidated or code.startswith((*_FOR_A_WHILE, _IDLE_IN_TRANSACTION)):
        if committing:
            return CatalogUnavailableError(
                f"{problem}; whether the transaction was committed is not known", "try again"
            )
        return CatalogUnavailableError(problem, "try again; look at the database if that does not help")
    if not code:
        return _connect_error(error, problem)
    remedy = "look at the database's log"
    if code == _READ_ONLY:
        remedy = "name the primary, or several hosts with ?target_session_attrs=read-write"
    elif code.startswith(("42501", "3F")):
        remedy = "let the user create and change tables in the schema"
    return StorageError(problem, remedy)


def describe(url: URL) -> str:
    """A database's URL without password and parameters."""
    host = url.host or url.query.get("host") or "localhost"
    hosts = host if isinstance(host, str) else ",".join(host)
    user = f"{url.username}@" if url.username else ""
    port = f":{url.port}" if url.port else ""
    return f"postgresql://{user}{hosts}{port}/{url.database or ''}"


def _connect_error(error: DBAPIError, problem: str) -> LynearmError:
    if "invalid connection option" in problem or "invalid URI" in problem:
        return ConfigError(problem, "see libpq's manual for the parameters that a URL may have")
    said = problem.lower()
    for sign, remedy in _CONNECT_REMEDIES:
        if sign in said:
            return CatalogUnavailableError(problem, remedy)
    return CatalogUnavailableError(problem, "start the database, or correct the URL")


def _code(error: DBAPIError) -> str:
    """The SQLSTATE; empty where the database itself said nothing."""
    return getattr(error.orig, "sqlstate", None) or ""


def _without_password(message: str, url: URL) -> str:
    # One line: libpq breaks its messages.
    message = "; ".join(line.strip() for line in message.splitlines() if line.strip())
    query = url.query.get("password", ())
    for secret in (url.password, *((query,) if isinstance(query, str) else query)):
        if secret:
            message = message.replace(secret, "***")
    return message
