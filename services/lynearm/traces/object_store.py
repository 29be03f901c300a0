"""Blocks in an object store: S3 and what speaks its protocol, Google Cloud Storage, Azure.

An object is written by one conditional PUT under a new random key, so it is there whole or not at all, and
never written over. A write that may or may not have arrived is done again under another key: what became of
the first never matters, and the collector finds it. Every request has a deadline, and retries are counted.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from collections.abc import AsyncIterator, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

from lynearm.traces.object_errors import http_status, typed_error
from lynearm.traces.object_location import connect, describe
from lynearm.traces.store import Span, StoredObject, new_identity, spans_of
from lynearm.wire.errors import ConfigError, StoreUnavailableError

logger = logging.getLogger(__name__)

WRITE_TRIES = 3

MERGE_BYTES = 256 << 10
"""Spans closer to each other are read by one request: the gap costs less than a request."""

IDENTITY_KEY = "lynearm-store"

_LIST_COUNT = 1000
_RANGE_NOT_SATISFIABLE = 416
_KEY_PATTERN = re.compile(r"[0-9a-f]{2}/([0-9a-f]{32})")


class ObjectBlockStore:
    """A `BlockStore` in an object store. Make one with `open`.

    Args:
        store: obstore's store of the bucket and prefix.
        where: The store, for people.
    """

    is_shared = True

    def __init__(self, store: Any, where: str) -> None:
        # Any: obstore's stores are a union that each of its functions narrows anew.
        self._store = store
        self.where = where

    @classmethod
    async def open(cls, url: str, *, several_writers: bool) -> ObjectBlockStore:
        """Reach the store, and find out whether it keeps what it promises.

        Args:
            url: s3://bucket/prefix, gs://bucket/prefix or az://container/prefix. Credentials come from the
                environment or the machine's identity, as obstore finds them.
            several_writers: Refuse a store that ignores create-only writes.

        Raises:
            ConfigError: the URL cannot be understood, or the store ignores create-only writes.
            MissingDependencyError: obstore is not installed.
            StorageError: the bucket is missing, or may not be written.
            StoreUnavailableError: the store cannot be reached.
        """
        store = cls(connect(url), describe(url))
        if not await store._creates_only():
            problem = f"block store {store.where} ignores create-only writes (If-None-Match)"
            if several_writers:
                raise ConfigError(
                    problem, "use a store that honours them, or one server with a catalog in SQLite"
                )
            logger.warning("%s: keep to one server", problem)
        return store

    async def write(self, blocks: Sequence[bytes | memoryview]) -> StoredObject:
        """See `BlockStore.write`."""
        import obstore
        from obstore.exceptions import AlreadyExistsError

        # A group is one request: obstore would send an iterable in parts, which are not created at once.
        data = b"".join(blocks)
        for _ in range(WRITE_TRIES):
            key = secrets.token_hex(16)
            with self._typed_errors():
                try:
                    await obstore.put_async(self._store, _path(key), data, mode="create", use_multipart=False)
                except AlreadyExistsError:
                    # Nobody else makes this key: a first request arrived, and its answer was lost.
                    logger.warning("block store %s: object %s is written once more", self.where, key)
                else:
                    return StoredObject(key, spans_of(blocks))
        raise StoreUnavailableError(
            f"block store {self.where}: {WRITE_TRIES} writes were not answered", "publish again"
        )

    async def read(self, key: str, spans: Sequence[Span]) -> list[bytes]:
        """See `BlockStore.read`."""
        runs = list(merge_spans(spans))
        with self._typed_errors():
            reads = (self._read_run(key, run.position, run.length) for run in runs)
            found = dict(zip(runs, await asyncio.gather(*reads), strict=True))
        return [_cut(found, span) for span in spans]

    async def delete(self, key: str) -> None:
        """See `BlockStore.delete`."""
        import obstore

        with self._typed_errors():
            try:
                await obstore.delete_async(self._store, _path(key))
            except FileNotFoundError:
                logger.debug("object %s was gone already", key)

    async def list_keys(self, min_age_seconds: float = 0) -> AsyncIterator[list[str]]:
        """See `BlockStore.list_keys`; ages are by the store's clock and this machine's."""
        latest = datetime.now(UTC) - timedelta(seconds=min_age_seconds)
        with self._typed_errors():
            async for batch in self._store.list(chunk_size=_LIST_COUNT):
                found = (
                    _KEY_PATTERN.fullmatch(one["path"]) for one in batch if one["last_modified"] <= latest
                )
                yield [match[1] for match in found if match]

    async def identity(self) -> str:
        """See `BlockStore.identity`."""
        import obstore
        from obstore.exceptions import AlreadyExistsError

        made = new_identity().encode()
        with self._typed_errors():
            try:
                await obstore.put_async(self._store, IDENTITY_KEY, made, mode="create", use_multipart=False)
            except AlreadyExistsError:
                logger.debug("block store %s has its identity", self.where)
            found = await obstore.get_async(self._store, IDENTITY_KEY)
            return bytes(await found.bytes_async()).decode()

    async def close(self) -> None:
        """See `BlockStore.close`; obstore keeps no connection that would need it."""

    async def _read_run(self, key: str, position: int, length: int) -> bytes:
        import obstore
        from obstore.exceptions import GenericError

        # Not `get_ranges`: where an object is shorter than it was, its merged reads panic.
        try:
            found = await obstore.get_range_async(self._store, _path(key), start=position, length=length)
        except GenericError as error:
            if http_status(error) == _RANGE_NOT_SATISFIABLE:
                return b""
            raise
        return bytes(found)

    async def _creates_only(self) -> bool:
        """Whether a second create of the same key is refused; also whether the bucket can be written."""
        import obstore
        from obstore.exceptions import AlreadyExistsError

        probe = f"probes/{secrets.token_hex(16)}"
        with self._typed_errors():
            await obstore.put_async(self._store, probe, b"first", mode="create", use_multipart=False)
            try:
                await obstore.put_async(self._store, probe, b"second", mode="create", use_multipart=False)
            except AlreadyExistsError:
                return True
            finally:
                await obstore.delete_async(self._store, probe)
        return False

    @contextmanager
    def _typed_errors(self) -> Generator[None]:
        from obstore.exceptions import BaseError

        try:
            yield
        except (BaseError, FileNotFoundError) as error:
            # Not `from error`: the text of obstore's errors holds request URLs, which may be signed.
            raise typed_error(error, self.where) from None


def merge_spans(spans: Sequence[Span]) -> Iterator[Span]:
    """The fewest ranges that cover ascending spans, where small gaps are read along."""
    run: Span | None = None
    for span in spans:
        if run is not None and span.position - (run.position + run.length) <= MERGE_BYTES:
            run = Span(run.position, span.position + span.length - run.position)
            continue
        if run is not None:
            yield run
        run = span
    if run is not None:
        yield run


def _cut(found: Mapping[Span, bytes], span: Span) -> bytes:
    for run, data in found.items():
        start = span.position - run.position
        if 0 <= start < run.length:
            return data[start : start + span.length]
    return b""


def _path(key: str) -> str:
    return f"{key[:2]}/{key}"
