"""Runs one service with its clients, kills them one after the other, and lets the oracle judge.

Half of what is killed is the server, mostly at a named point of a block's way, else at a random instant, at
times while it starts; at times the power fails too, and takes what it had not synced. What was killed is
started again at once. In the end everything may finish in peace.
"""

from __future__ import annotations

import random
import socket
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from faults_ledger import (
    Identity,
    Reading,
    Verdict,
    digest_of,
    judge,
    read_ledger,
    read_reading,
    stream_spec,
)
from faults_power import lose_unsynced
from faults_processes import KILLED, STALL_SECONDS, FaultFound, Processes, context
from faults_roles import STREAM, Site, follow, publish, serve, work

from lynearm.client import TraceClient
from lynearm.traces import failpoints

POINT_SECONDS = 3.0
"""How long an armed server may take to get to its failpoint; then it is killed wherever it is."""

UNSYNCED_POINT = "catalog.before_sync"
"""A commit is written and not synced: SQLite is there, and no code of ours; `power_failure.c` kills it."""

SLOW_POINT = "catalog.before_commit"

_CLIENTS: dict[str, Callable[..., None]] = {"publisher": publish, "worker": work, "subscriber": follow}


@dataclass(slots=True)
class Outcome:
    """What one site came to."""

    kills: Counter[str] = field(default_factory=Counter[str])
    verdict: Verdict = field(default_factory=Verdict)
    power_failures: int = 0
    """Kills of the server that also took what it had not synced."""
    refused: int = 0
    """Blocks of a worker that came after the same prompts were finished."""


def run_site(directory: Path, kills: int, seed: str, *, power_failures: bool) -> Outcome:
    """Kill that often, then finish and judge.

    Args:
        directory: An empty one.
        kills: How often.
        seed: Of who is killed when, as far as processes repeat themselves.
        power_failures: Whether some kills of the server also take what it has not synced.

    Raises:
        FaultFound: a process ended by itself, or nothing went on.
    """
    rng = random.Random(seed)
    run = _Run(Site(directory, _free_port(rng)), rng, power_failures)
    try:
        run.start()
        for count in range(kills):
            run.kill_one(is_last=count == kills - 1)
        return run.finish()
    finally:
        run.end()


class _Run:
    def __init__(self, site: Site, rng: random.Random, power_failures: bool) -> None:
        self._site = site
        self._rng = rng
        self._power_failures = power_failures
        self._outcome = Outcome()
        self._lives: Counter[str] = Counter()
        self._processes = Processes(site.directory)
        self._point = ""
        self._is_unsynced = False
        """Whether a commit that was never synced is in the data, for the next server to find."""
        self._ready: Connection | None = None

    def start(self) -> None:
        self._start_server("")
        with TraceClient(self._site.target) as client:
            client.wait_until_ready(STALL_SECONDS)
            client.create_stream(stream_spec(STREAM))
        for role in _CLIENTS:
            self._start_client(role)
        self._await_progress()

    def kill_one(self, *, is_last: bool) -> None:
        """Kill somebody; the last one is the server, which then comes back without failpoints."""
        rng = self._rng
        roles = ["server", *_CLIENTS]
        role = "server" if is_last else rng.choices(roles, [6, 2, 2, 2])[0]
        if not self._processes.is_alive("server"):
            role = "server"
        if rng.random() < 0.05 and not is_last:
            self._kill_all()
        elif role == "server":
            self._kill_server()
            self._start_server("" if is_last else self._draw_failpoints())
            # Some are killed again before they serve, or before the clients have noticed.
            if rng.random() < 0.2:
                return
        else:
            time.sleep(rng.uniform(0, 0.1))
            self._processes.kill(role)
            self._outcome.kills[role] += 1
            self._start_client(role)
        self._await_progress(may_meet_point=True)

    def finish(self) -> Outcome:
        """Let everybody finish, and judge what the subscriber and a later reader got."""
        site, outcome = self._site, self._outcome
        site.stop()
        for role in ("publisher", "worker"):
            self._processes.await_success(role)
        with TraceClient(site.target) as client:
            client.wait_until_ready(STALL_SECONDS)
            client.seal_stream(STREAM)
            self._processes.await_success("subscriber")
            finished = {int(prompt) for prompt in client.finished_prompts(STREAM)}
        acked: dict[str, int] = {}
        for role in ("publisher", "worker"):
            for maker, count in read_ledger(site.ledger(role)):
                if maker == "refused":
                    outcome.refused += 1
                else:
                    acked[str(maker)] = int(str(count))
        reading = read_reading(site.ledger("subscriber"))
        outcome.verdict = judge(reading, acked, finished)
        # Once more from the files alone: the memory of the server that wrote them is gone.
        self._processes.kill("server")
        self._start_server("")
        again = judge(self._read_all(), acked, finished)
        again.acked = again.read = 0
        outcome.verdict.add(again)
        return outcome

    def end(self) -> None:
        self._processes.end()

    def _kill_all(self) -> None:
        """Kill everybody in the same instant, as far as there is one."""
        time.sleep(self._rng.uniform(0, 0.1))
        self._processes.kill(*self._processes.roles)
        self._outcome.kills["all four at once"] += 1
        self._fail_power(0.5)
        self._start_server(self._draw_failpoints())
        for role in _CLIENTS:
            self._start_client(role)

    def _draw_failpoints(self) -> str:
        """A point to die at, for most; a slow disk, for some: then more is under way when a client dies."""
        rng = self._rng
        if self._is_unsynced and rng.random() < 0.7:
            # It dies before it has synced a commit of its own, and with it what it found.
            return "store.before_write=kill@1"
        point = "" if rng.random() < 0.35 else rng.choice(failpoints.NAMES)
        drawn = [f"{point}=kill@{rng.randint(1, 8)}"] if point else []
        if rng.random() < 0.25 and point != SLOW_POINT:
            drawn.append(f"{SLOW_POINT}=sleep:0.1")
        return ";".join(drawn)

    def _kill_server(self) -> None:
        if not self._point and self._power_failures and self._rng.random() < 0.3:
            self._point = UNSYNCED_POINT
            self._site.unsynced_kill.touch()
        if self._point:
            self._processes.wait("server", POINT_SECONDS)
        else:
            time.sleep(self._rng.uniform(0, 0.15))
        how = self._point
        if self._processes.is_alive("server"):
            how = "server, any instant" if self._is_ready() else "server, starting"
        self._processes.kill("server")
        self._site.unsynced_kill.unlink(missing_ok=True)
        self._outcome.kills[how] += 1
        was_unsynced, self._is_unsynced = self._is_unsynced, how == UNSYNCED_POINT
        self._fail_power(0.9 if was_unsynced else 0.5)

    def _fail_power(self, probability: float) -> None:
        """Take from the data, at times, what the server has not synced."""
        if not self._power_failures or self._rng.random() > probability:
            return
        self._outcome.power_failures += 1
        self._is_unsynced = False
        lose_unsynced(self._site.data, self._site.kept)

    def _start_server(self, description: str) -> None:
        self._point = description.partition("=")[0] if "=kill" in description else ""
        if self._ready is not None:
            self._ready.close()
        self._ready, theirs = context.Pipe(duplex=False)
        self._processes.start("server", serve, self._site, description, theirs)
        theirs.close()

    def _start_client(self, role: str) -> None:
        self._lives[role] += 1
        arguments = (self._site,) if role == "subscriber" else (self._site, self._lives[role])
        self._processes.start(role, _CLIENTS[role], *arguments)

    def _is_ready(self) -> bool:
        return self._ready is not None and self._ready.poll()

    def _await_progress(self, *, may_meet_point: bool = False) -> None:
        """Wait until blocks were acknowledged to both producers and read, or the server has met its point."""
        ledgers = [self._site.ledger(role) for role in _CLIENTS]
        before = [_size(path) for path in ledgers]
        deadline = time.monotonic() + STALL_SECONDS
        while any(_size(path) <= size for path, size in zip(ledgers, before, strict=True)):
            for role in self._processes.roles:
                if self._processes.is_alive(role):
                    continue
                met_point = role == "server" and self._point and self._processes.exit_code(role) == KILLED
                if may_meet_point and met_point:
                    return
                raise self._processes.ended(role)
            if time.monotonic() > deadline:
                raise FaultFound(
                    f"nothing went on for {STALL_SECONDS:g} s; {self._processes.ended('server')}"
                )
            time.sleep(0.005)

    def _read_all(self) -> Reading:
        reading = Reading()
        with (
            TraceClient(self._site.target) as client,
            client.subscribe(STREAM, follow=False) as blocks,
        ):
            for received in blocks:
                identity = Identity.of(received.block)
                reading.add(received.offset, identity, digest_of(received.block))
        return reading


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _free_port(rng: random.Random) -> int:
    # Below the ports that systems give to outgoing connections: one of those could take the port of a dead
    # server, or even connect to itself.
    while True:
        port = rng.randint(20_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
