"""What several of the catalog's transactions need to write SQL."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from sqlalchemy import Connection

_MAX_VARIABLES = 500
"""Values per IN list: SQLite compiles a statement for each length, and old builds stop at 999."""

MAX_INTEGER = (1 << 63) - 1
"""Of SQL; what is larger is in no row, and must not be asked for."""

T = TypeVar("T")


def chunks(values: Iterable[T]) -> Iterator[list[T]]:
    """The values in lists that fit into a statement."""
    remaining = list(values)
    for start in range(0, len(remaining), _MAX_VARIABLES):
        yield remaining[start : start + _MAX_VARIABLES]


def inserted_key(connection: Connection, statement: Any) -> int:
    """The key that an INSERT … RETURNING of one row gives."""
    # Any: SQLAlchemy's type of INSERT … RETURNING names private generics.
    return int(connection.execute(statement).scalar_one())
