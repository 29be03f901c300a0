"""The processes that `faults.py` kills: a server, a publisher, a worker on a job of prompts, a subscriber.

Each begins where its ledger says that its last life ended, as a program that uses the SDK would. None knows
that it will be killed. They are forked from a process that has imported all this, which costs 10 ms and not
a second.
"""

from __future__ import annotations

import ctypes
import logging
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from faults_ledger import Identity, Ledger, digest_of, read_ledger

from lynearm.client import Publisher, TraceClient
from lynearm.traces import failpoints
from lynearm.traces.config import ServeConfig
from lynearm.traces.server import run_server
from lynearm.wire.errors import PromptFinishedError

STREAM = "s"

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Site:
    """One service with everything that belongs to it."""

    directory: Path
    port: int

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def data(self) -> Path:
        return self.directory / "data"

    @property
    def kept(self) -> Path:
        """What a power failure would leave of `data`."""
        return self.directory / "kept"

    @property
    def unsynced_kill(self) -> Path:
        """While it is there, the server dies before it syncs the catalog's log."""
        return self.directory / "kept.kill"

    def ledger(self, role: str) -> Path:
        return self.directory / f"{role}.ledger"

    @property
    def is_stopping(self) -> bool:
        return (self.directory / "stop").exists()

    def stop(self) -> None:
        (self.directory / "stop").touch()


def serve(site: Site, description: str, ready: Connection) -> None:
    """A server, with failpoints armed as described; `ready` hears when it answers."""
    _begin(site, "server")
    if description:
        os.environ[failpoints.VARIABLE] = description
    # Read by what `power_failure.c` makes, if that is there.
    os.environ |= {"POWER_ROOT": str(site.data), "POWER_SHADOW": str(site.kept)}
    config = ServeConfig(
        data_dir=site.data,
        port=site.port,
        group_milliseconds=2.0,
        # Small enough that a subscriber that was away reads files.
        cache_bytes=1 << 18,
    )
    run_server(config, lambda _: ready.send_bytes(b"ready"))


def publish(site: Site, life: int) -> None:
    """Publishes bursts of blocks, and writes down how many are acknowledged."""
    _begin(site, "publisher")
    maker = f"publisher/{life}"
    rng = random.Random(f"{site.directory}/{maker}")
    ledger = Ledger(site.ledger("publisher"))
    number = 0
    with TraceClient(site.target) as client, client.publisher(STREAM, "publisher") as publisher:
        acks = _Acks(ledger, maker, publisher)
        while not site.is_stopping:
            for _ in range(rng.randint(1, 12)):
                number += 1
                publisher.publish(Identity(maker, number).block())
                acks.note()
            if rng.random() < 0.5:
                publisher.flush()
            acks.note()
            time.sleep(rng.uniform(0, 0.02))
        publisher.flush()
        acks.note()


def work(site: Site, life: int) -> None:
    """Finishes prompts 0, 1, 2, … as a teacher does: whatever the stream does not have yet, in order."""
    _begin(site, "worker")
    rng = random.Random(f"{site.directory}/worker/{life}")
    ledger = Ledger(site.ledger("worker"))
    attempt = 0
    while True:
        attempt += 1
        try:
            return _work_once(site, f"worker/{life}.{attempt}", rng, ledger)
        except PromptFinishedError:
            # What the last life had sent was committed after this one had asked: ask again.
            ledger.write("refused", 1)


def _work_once(site: Site, maker: str, rng: random.Random, ledger: Ledger) -> None:
    with TraceClient(site.target) as client, client.publisher(STREAM, "worker") as publisher:
        acks = _Acks(ledger, maker, publisher)
        client.wait_until_ready()
        finished = _persist(lambda: {int(prompt) for prompt in client.finished_prompts(STREAM)}, client)
        number = prompt = 0
        while not site.is_stopping:
            number += 1
            prompts: list[int] = []
            while len(prompts) < 1 + number % 3:
                if prompt not in finished:
                    prompts.append(prompt)
                prompt += 1
            block = Identity(maker, number, tuple(prompts)).block()
            publisher.publish(block, [str(one) for one in prompts])
            acks.note()
            time.sleep(rng.uniform(0, 0.01))
        publisher.flush()
        acks.note()


def follow(site: Site) -> None:
    """Reads the stream to its end, and writes down each block before it takes the next."""
    _begin(site, "subscriber")
    ledger = Ledger(site.ledger("subscriber"))
    start = len(read_ledger(site.ledger("subscriber")))
    credit_bytes = random.Random(start).choice([1, 100_000, 8 << 20])
    with (
        TraceClient(site.target) as client,
        client.subscribe(STREAM, start=start, credit_bytes=credit_bytes) as blocks,
    ):
        for received in blocks:
            identity = Identity.of(received.block)
            digest = digest_of(received.block)
            ledger.write(received.offset, identity.maker, identity.number, identity.prompts, digest)


class _Acks:
    """Writes to a ledger how many of a publisher's blocks are acknowledged, whenever that has changed."""

    def __init__(self, ledger: Ledger, maker: str, publisher: Publisher) -> None:
        self._ledger = ledger
        self._maker = maker
        self._publisher = publisher
        self._noted = 0

    def note(self) -> None:
        acked = self._publisher.acked_blocks
        if acked > self._noted:
            self._ledger.write(self._maker, acked)
            self._noted = acked


def _persist(ask: Callable[[], set[int]], client: TraceClient) -> set[int]:
    """The answer of a single call, which the SDK leaves to its caller to repeat."""
    while True:
        try:
            return ask()
        except ConnectionError:
            client.wait_until_ready()


def _begin(site: Site, role: str) -> None:
    # The process that this was forked from ends with the benchmark; so must this one.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    log = os.open(site.directory / f"{role}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, sys.stderr.fileno())
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(process)d %(name)s %(message)s")
