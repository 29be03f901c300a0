"""Wakes who waits on this server for what other servers commit.

Invariant: a tail learns only of what the catalog holds: from a change that was told after its commit, or
from the catalog itself, which is read whenever a change may have been missed.
"""

from __future__ import annotations

import logging
from contextlib import aclosing
from typing import TYPE_CHECKING, cast

from lynearm.traces.catalog import Catalog, StreamChange, stream_not_found
from lynearm.traces.reader import BlockCache
from lynearm.traces.tail import Tails
from lynearm.wire.errors import LynearmError, StreamNotFoundError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

logger = logging.getLogger(__name__)


async def follow_catalog(catalog: Catalog, tails: Tails, cache: BlockCache) -> None:
    """Pass on what other servers commit, for ever; returns at once where none can.

    Args:
        catalog: Where they commit.
        tails: Of the streams in use here.
        cache: Loses the blocks of deleted streams.
    """
    changes = cast("AsyncGenerator[StreamChange | None]", catalog.listen())
    async with aclosing(changes):
        async for change in changes:
            if change is None:
                await _catch_up(catalog, tails, cache)
            else:
                _apply(change, tails, cache)


def _apply(change: StreamChange, tails: Tails, cache: BlockCache) -> None:
    if change.state == "deleted":
        tails.end(change.stream_id, stream_not_found(change.stream_name))
        cache.drop_stream(change.stream_id)
    else:
        tails.advance(change.stream_id, change.next_offset, sealed=change.state == "sealed")


async def _catch_up(catalog: Catalog, tails: Tails, cache: BlockCache) -> None:
    stream_ids = tails.stream_ids()
    if not stream_ids:
        return
    try:
        found = await catalog.find_progress(stream_ids)
    except LynearmError as error:
        logger.warning("readers are not woken for now: %s", error)
        return
    for stream_id in stream_ids:
        if stream_id in found:
            _apply(found[stream_id], tails, cache)
        else:
            tails.end(stream_id, StreamNotFoundError("the stream was deleted", "choose another one"))
            cache.drop_stream(stream_id)
