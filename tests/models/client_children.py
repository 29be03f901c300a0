"""What other processes do with a client; here since a spawned one imports it by name."""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import Callable
from multiprocessing.queues import SimpleQueue
from typing import Any

from lynearm.client import AsyncTraceClient, Publisher, Subscription, TraceClient
from lynearm.wire.errors import LynearmError

PATIENCE_SECONDS = 60


def run_in_child(method: str, work: Callable[[Any], Any], subject: object) -> Any:
    """What `work(subject)` gives in a child process, or the LynearmError that it raises.

    A caller's event loop stands still: a child forked from a thread of its pool could not end cleanly.

    Args:
        method: "fork" or "spawn".
        work: A function of this module.
        subject: Inherited, or sent by pickle.
    """
    context = multiprocessing.get_context(method)
    answers: SimpleQueue[Any] = context.SimpleQueue()
    child = context.Process(target=_answer, args=(answers, work, subject))
    child.start()
    child.join(PATIENCE_SECONDS)
    if child.exitcode is None:
        child.kill()
        child.join()
        raise TimeoutError(f"{work.__name__} after {method} is still not done")
    if child.exitcode:
        raise ChildProcessError(f"{work.__name__} after {method} ended with {child.exitcode}")
    return answers.get()


def _answer(answers: SimpleQueue[Any], work: Callable[[Any], Any], subject: object) -> None:
    try:
        answers.put(work(subject))
    except LynearmError as error:
        answers.put(error)


def read_all(subject: tuple[TraceClient, str]) -> list[int]:
    client, stream = subject
    with client, client.subscribe(stream, follow=False) as blocks:
        return [one.offset for one in blocks]


def read_all_async(subject: tuple[AsyncTraceClient, str]) -> list[int]:
    async def read() -> list[int]:
        client, stream = subject
        async with client, client.subscribe(stream, follow=False) as blocks:
            return [one.offset async for one in blocks]

    return asyncio.run(read())


def read_on(subscription: Subscription) -> list[int]:
    return [one.offset for one in subscription]


def publish_one(publisher: Publisher) -> None:
    publisher.publish(b"")
