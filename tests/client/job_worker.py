"""A worker of a job in a process of its own, to be killed or frozen; and what its blocks hold.

Run as a program: target, name of the worker, units of a lease, seconds that a unit takes. It prints a line
for each lease that it gets, and for each block that it hands over.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

from lynearm.client import TraceClient
from lynearm.wire.blocks import BlockHeader, checksum, join_block, split_block
from lynearm.wire.errors import LeaseSupersededError, ProducerFencedError

Unit = tuple[str, int]

UNITS_PER_BLOCK = 3


def block_of(units: Sequence[Unit], worker: str) -> bytes:
    """A block that stands for the traces of these units."""
    payload = json.dumps({"worker": worker, "units": units}).encode()
    header = BlockHeader(2, "exact", len(units), 3, 5, len(payload), checksum(payload))
    return join_block(header, payload)


def read_stream(client: TraceClient, stream: str = "s") -> Iterator[tuple[str, list[Unit]]]:
    """(worker, units) of each block."""
    with client.subscribe(stream, follow=False) as subscription:
        for received in subscription:
            _, payload = split_block(received.block)
            content = json.loads(bytes(payload))
            yield content["worker"], [(prompt_id, index) for prompt_id, index in content["units"]]


def work(target: str, name: str, max_units: int, unit_seconds: float) -> None:
    """Answer prompts until the job is done; after losing a lease, go on with other work."""
    with (
        TraceClient(target) as client,
        client.prompt_worker("s", "j", worker=name, max_units=max_units) as worker,
    ):
        publisher = client.publisher("s", name)
        for lease in worker:
            units = [(one.prompt_id, index) for one in lease.prompts for index in one.sample_indices]
            print("leased", json.dumps(units), flush=True)
            try:
                for start in range(0, len(units), UNITS_PER_BLOCK):
                    part = units[start : start + UNITS_PER_BLOCK]
                    time.sleep(unit_seconds * len(part))
                    publisher.publish(block_of(part, name), finished_work=[lease.finish(part)])
                    print("published", json.dumps(part), flush=True)
                publisher.flush()
            except (LeaseSupersededError, ProducerFencedError) as error:
                print("refused", type(error).__name__, flush=True)
                worker.release([lease])
                publisher = client.publisher("s", name)
        publisher.close()


class WorkerProcess:
    """Such a program, running."""

    def __init__(self, target: str, name: str, *, max_units: int = 12, unit_seconds: float = 0.01) -> None:
        arguments = [target, name, str(max_units), str(unit_seconds)]
        self._process = subprocess.Popen(
            [sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True
        )

    def wait_for(self, word: str) -> str:
        """The rest of the next line that begins with a word."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(word):
                return line.removeprefix(word).strip()
        raise AssertionError(f"the worker ended without {word!r}")

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        self._process.kill()
        self._close()

    def wait(self, timeout_seconds: float = 60) -> list[str]:
        """What else it prints until it ends well."""
        assert self._process.stdout is not None
        lines = self._process.stdout.read().splitlines()
        assert self._process.wait(timeout_seconds) == 0
        self._close()
        return lines

    def _close(self) -> None:
        self._process.wait(30)
        if self._process.stdout is not None:
            self._process.stdout.close()


if __name__ == "__main__":
    work(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
