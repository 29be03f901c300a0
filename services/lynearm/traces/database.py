"""What differs between the databases that can hold a catalog.

Connections and threads, what to do when one fails, and how servers that share a database tell each other of
commits; `sqlite` and `postgresql` have one each.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol, TypeVar

from sqlalchemy import Connection

from lynearm.traces.catalog import StreamChange

T = TypeVar("T")


class Database(Protocol):
    """Runs transactions. Every method raises as `Catalog` says where the database fails."""

    @property
    def where(self) -> str:
        """The database, for people; holds no secret."""
        ...

    @property
    def is_shared(self) -> bool:
        """Whether several servers may use it at the same time."""
        ...

    async def write(self, work: Callable[[Connection], T]) -> T:
        """Run `work` in a transaction; durable on return.

        A database may run `work` again where it is certain that the time before left nothing.
        """
        ...

    async def read(self, work: Callable[[Connection], T]) -> T:
        """Run `work`, which changes nothing, in a transaction."""
        ...

    async def settle(self) -> None:
        """Make durable what an earlier process may have committed and not synced, before anybody is told."""
        ...

    def lock_schema(self, connection: Connection) -> None:
        """Keep other servers from preparing the tables until the transaction ends."""
        ...

    def announce(self, connection: Connection, changes: Sequence[StreamChange]) -> None:
        """Tell the servers that listen, when and only if the transaction commits."""
        ...

    def listen(self) -> AsyncIterator[StreamChange | None]:
        """See `Catalog.listen`."""
        ...

    async def close(self) -> None:
        """Wait for transactions under way, then release threads and connections."""
        ...
