"""What may watch a server: its calls, its catalog and its store.

The parts that are watched do not know it: calls pass `interception`, and catalog, store and committer are
wrapped when the server opens.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, cast

from lynearm.traces.catalog import Catalog, CommitOutcome, NewBlock, WrittenGroup, blocks_of
from lynearm.traces.commit import GroupCommitter, PendingOffset
from lynearm.traces.current_call import Call
from lynearm.traces.store import BlockStore, Span, StoredObject

_Catalog = TypeVar("_Catalog", bound=Catalog)
_Store = TypeVar("_Store", bound=BlockStore)


@dataclass(slots=True)
class Operation:
    """Something that catalog or store did."""

    part: Literal["catalog", "store"]
    name: str
    """Of the method."""
    block_count: int = 0
    """Blocks written, read or committed; 0 where it is about none."""
    size_bytes: int = 0
    error: Exception | None = None
    begun_seconds: float = field(default_factory=time.monotonic)
    seconds: float = 0.0


class Observer:
    """Told of everything; each method does nothing unless it is overridden. On the event loop's thread."""

    def begin_call(self, call: Call) -> None:
        """A call begins; its caller is not known yet. What is set in the task's context stays there."""

    def received(self, call: Call, size_bytes: int) -> None:
        """A message came."""

    def sent(self, call: Call, size_bytes: int) -> None:
        """A message went out."""

    def end_call(self, call: Call) -> None:
        """A call that began ends; its status says how."""

    def end_operation(self, operation: Operation) -> None:
        """Catalog or store did something, or failed to."""

    def committed(self, blocks: Sequence[NewBlock], outcomes: Sequence[CommitOutcome]) -> None:
        """A group was committed."""

    def answered(self, seconds: float) -> None:
        """A block got its offset or its refusal, so long after it came."""

    def reloaded(self, what: str, ok: bool) -> None:
        """A changed file was taken over, or could not be. On any thread."""


def heeding(observers: Sequence[Observer], event: str) -> tuple[Observer, ...]:
    """Those of the observers that do something at an event, the name of a method of `Observer`.

    Some events come with every block, and a server that shows no metrics has nobody who minds them.
    """
    return tuple(
        observer for observer in observers if getattr(type(observer), event) is not getattr(Observer, event)
    )


@dataclass(frozen=True, slots=True)
class Observation:
    """All that watches one server."""

    observers: tuple[Observer, ...] = ()

    def reloaded(self, what: str, ok: bool) -> None:
        """Tell all observers of a changed file. On any thread."""
        for observer in self.observers:
            observer.reloaded(what, ok)

    # Any: what is returned passes on every attribute, and so is of the type that it was given.

    def watch_catalog(self, catalog: _Catalog) -> _Catalog:
        """The catalog, watched."""
        watched: Any = _WatchedCatalog(catalog, self.observers)
        return cast("_Catalog", watched) if self.observers else catalog

    def watch_store(self, store: _Store) -> _Store:
        """The store, watched."""
        watched: Any = _WatchedStore(store, self.observers)
        return cast("_Store", watched) if self.observers else store

    def watch_committer(self, committer: GroupCommitter) -> GroupCommitter:
        """The committer, watched."""
        observers = heeding(self.observers, "answered")
        watched: Any = _WatchedCommitter(committer, observers)
        return cast("GroupCommitter", watched) if observers else committer


UNWATCHED = Observation()


class _Watched:
    """Passes everything on, and times every coroutine. Made of attributes, so that new methods need no line.

    Args:
        inner: What is watched.
        part: What it is.
        observers: Who watches.
    """

    # Any, in this class and those below: the attributes of the inner object.

    def __init__(self, inner: Any, part: Literal["catalog", "store"], observers: Sequence[Observer]) -> None:
        self._inner = inner
        self._part: Literal["catalog", "store"] = part
        self._observers = observers

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if not inspect.iscoroutinefunction(found):
            return found

        @functools.wraps(found)
        async def watched(*args: Any, **kwargs: Any) -> Any:
            return await self._time(Operation(self._part, name), found(*args, **kwargs))

        setattr(self, name, watched)
        return watched

    async def _time(
        self, operation: Operation, work: Awaitable[Any], measure: Callable[[Any], None] = lambda _: None
    ) -> Any:
        try:
            result = await work
            measure(result)
            return result
        except Exception as error:
            operation.error = error
            raise
        finally:
            operation.seconds = time.monotonic() - operation.begun_seconds
            for observer in self._observers:
                observer.end_operation(operation)


class _WatchedStore(_Watched):
    def __init__(self, store: BlockStore, observers: Sequence[Observer]) -> None:
        super().__init__(store, "store", observers)

    async def write(self, blocks: Sequence[bytes | memoryview]) -> StoredObject:
        operation = Operation("store", "write", len(blocks), sum(map(len, blocks)))
        stored: StoredObject = await self._time(operation, self._inner.write(blocks))
        return stored

    async def read(self, key: str, spans: Sequence[Span]) -> list[bytes]:
        operation = Operation("store", "read", len(spans))

        def measure(blocks: list[bytes]) -> None:
            operation.size_bytes = sum(map(len, blocks))

        found: list[bytes] = await self._time(operation, self._inner.read(key, spans), measure)
        return found


class _WatchedCatalog(_Watched):
    def __init__(self, catalog: Catalog, observers: Sequence[Observer]) -> None:
        super().__init__(catalog, "catalog", observers)

    async def commit(self, groups: Sequence[WrittenGroup]) -> list[CommitOutcome]:
        blocks = blocks_of(groups)
        operation = Operation("catalog", "commit", len(blocks))
        outcomes: list[CommitOutcome] = await self._time(operation, self._inner.commit(groups))
        for observer in self._observers:
            observer.committed(blocks, outcomes)
        return outcomes


class _WatchedCommitter:
    def __init__(self, committer: GroupCommitter, observers: Sequence[Observer]) -> None:
        self._committer = committer
        self._observers = observers

    async def submit(self, block: NewBlock, data: bytes | memoryview) -> PendingOffset:
        begun_seconds = time.monotonic()

        def answer(_: PendingOffset) -> None:
            for observer in self._observers:
                observer.answered(time.monotonic() - begun_seconds)

        pending = await self._committer.submit(block, data)
        pending.add_done_callback(answer)
        return pending

    def __getattr__(self, name: str) -> Any:
        return getattr(self._committer, name)
