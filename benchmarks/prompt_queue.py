"""What a prompt costs on its way through the queue, in a job of a million: read, create, lease, finish.

    python benchmarks/prompt_queue.py                  # a million prompts: about 8 minutes of two cores
    python benchmarks/prompt_queue.py --prompts 100000
    python benchmarks/prompt_queue.py --quick          # a few seconds

A server with SQLite, one worker that takes leases and publishes a block for each, and tiny traces: everything
but teacher and codec. Costs are CPU seconds of client and server for a thousand prompts; of leasing and
finishing also those of the first and of the last tenth, whose ratio tells whether a prompt costs more in a
large job than in a small one. Half-way the server is killed, and a client goes on with the job. The last line
is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transport_processes import ServerProcess, cpu_seconds_of
from transport_roles import VOCAB_SIZE, Source, make_stream

from lynearm.client import TraceClient
from lynearm.client.job_calls import JobInfo
from lynearm.client.leases import Lease
from lynearm.teacher.config import TeachConfig
from lynearm.teacher.prompt_job import JobPrompts, PromptJob
from lynearm.traces.config import ServeConfig
from lynearm.wire.codec import encode_block
from lynearm.wire.specs import CodecSpec
from lynearm.wire.traces import TopK, Trace
from lynearm.wire.work import FailedSamples

STREAM, JOB = "benchmark", "all"

_TENTHS = 10


@dataclass(slots=True)
class Cost:
    """What some prompts took."""

    prompts: int
    wall_seconds: float
    client_cpu_seconds: float
    server_cpu_seconds: float

    @property
    def rate(self) -> float:
        """Prompts a second."""
        return self.prompts / max(self.wall_seconds, 1e-9)

    def per_thousand(self, cpu_seconds: float) -> float:
        """Milliseconds of CPU for a thousand prompts."""
        return 1e6 * cpu_seconds / max(self.prompts, 1)

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.prompts + other.prompts,
            self.wall_seconds + other.wall_seconds,
            self.client_cpu_seconds + other.client_cpu_seconds,
            self.server_cpu_seconds + other.server_cpu_seconds,
        )


class Site:
    """A server, and clocks for it and for this process."""

    def __init__(self, data_dir: Path) -> None:
        self.server = ServerProcess(ServeConfig(data_dir=data_dir, port=0))
        self.client = TraceClient(self.server.address)

    def cost(self, prompts: int, work: Callable[[], object]) -> Cost:
        """Do some work on that many prompts."""
        wall, own, theirs = time.perf_counter(), time.process_time(), cpu_seconds_of(self.server.process_id)
        work()
        return Cost(
            prompts,
            time.perf_counter() - wall,
            time.process_time() - own,
            cpu_seconds_of(self.server.process_id) - theirs,
        )

    def kill(self) -> None:
        """As a power failure would; the operating system keeps what was written."""
        self.client.close()
        os.kill(self.server.process_id, 9)


class MebibytesMore:
    """Main memory that a process takes at most beyond what it has now."""

    def __init__(self, process_id: int) -> None:
        self._proc = Path(f"/proc/{process_id}")
        (self._proc / "clear_refs").write_text("5")
        self._before = self._read("VmRSS")

    def __call__(self) -> float:
        return max(self._read("VmHWM") - self._before, 0.0)

    def _read(self, name: str) -> float:
        text = (self._proc / "status").read_text()
        return int(text.split(f"{name}:")[1].split()[0]) / 1024


def write_prompts(path: Path, count: int) -> None:
    with path.open("w") as file:
        # Without ids, as usual: their digests come in no order, which is the harder case for an index.
        file.writelines(f'{{"prompt": "What is {n} plus {n}?"}}\n' for n in range(count))


def tiny_block(units: int) -> bytes:
    """As many traces of one token as a lease has units; the service does not look inside."""
    one = np.ones(1, np.int32)
    rows = TopK(np.array([[7]], np.int32), np.array([[-0.5]], np.float32), np.array([0.4], np.float32))
    traces = [Trace(f"p{n}", one, one, np.array([-0.5], np.float32), rows, "stop") for n in range(units)]
    return encode_block(traces, codec=CodecSpec("standard", 1), vocab_size=VOCAB_SIZE)


def take_leases(site: Site, units: int, count: int) -> Iterator[tuple[list[Lease], Cost]]:
    """Leases of about `count` prompts, some at a time, and what taking them cost."""
    with site.client.prompt_worker(STREAM, JOB, worker="one", max_units=units) as worker:
        taken = 0
        at_once = max(1, min(16, count // (2 * _TENTHS * units)))
        for tenth in range(1, _TENTHS + 1):
            while taken < count * tenth // _TENTHS:
                leases: list[Lease] = []

                def take(leases: list[Lease] = leases) -> None:
                    lease = worker.take()
                    if lease is not None:
                        leases.append(lease)

                cost = site.cost(0, lambda take=take: [take() for _ in range(at_once)])
                if not leases:
                    return
                cost.prompts = sum(len(lease.prompts) for lease in leases)
                taken += cost.prompts
                yield leases, cost


def finish_leases(site: Site, units: int, count: int, tenths: dict[str, list[Cost]]) -> None:
    """Lease and finish about `count` prompts; what each cost, in order."""
    block = tiny_block(units)
    with site.client.publisher(STREAM, "one") as publisher:

        def finish(leases: list[Lease]) -> None:
            for lease in leases:
                done = lease.finish([(prompt.prompt_id, 0) for prompt in lease.prompts])
                publisher.publish(block, finished_work=[done])
            publisher.flush()

        for leases, cost in take_leases(site, units, count):
            tenths["lease"].append(cost)
            prompts = sum(len(lease.prompts) for lease in leases)
            tenths["finish"].append(site.cost(prompts, lambda leases=leases: finish(leases)))


def fail_some(site: Site, count: int) -> tuple[Cost, Cost]:
    """Give prompts up; what that took, and what listing them did."""
    with site.client.prompt_worker(STREAM, JOB, worker="failing", max_units=min(count, 1000)) as worker:

        def fail() -> None:
            for _ in range(max(1, count // 1000)):
                lease = worker.take()
                if lease is not None:
                    worker.fail(
                        lease, [FailedSamples(one.prompt_id, (0,), "too long") for one in lease.prompts]
                    )

        failing = site.cost(count, fail)
    listed: list[FailedSamples] = []
    listing = site.cost(count, lambda: listed.extend(site.client.jobs.failures(STREAM, JOB)))
    listing.prompts = len(listed)
    return failing, listing


def split(costs: list[Cost]) -> tuple[Cost, Cost, Cost]:
    """All of them, the first tenth and the last."""
    tenth = max(1, len(costs) // _TENTHS)
    return tuple(sum(part[1:], part[0]) for part in (costs, costs[:tenth], costs[-tenth:]))  # type: ignore[return-value]


def resume(site: Site, config: TeachConfig, prompts: JobPrompts) -> tuple[Cost, JobInfo | None]:
    """What a command does with a job that is half done before it starts workers."""
    found: list[JobInfo | None] = []

    def look() -> None:
        work = PromptJob(site.client, config, prompts)
        before = site.client.get_stream(STREAM)
        found.append(work.find())
        work.count_finished(before, found[0])

    return site.cost(prompts.count, look), found[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--prompts", type=int, default=1_000_000)
    parser.add_argument("--units", type=int, default=64, help="of a lease, and so of a block")
    parser.add_argument("--quick", action="store_true", help="5000 prompts")
    arguments = parser.parse_args()
    count = 5000 if arguments.quick else arguments.prompts
    with tempfile.TemporaryDirectory() as directory:
        figures = measure(Path(directory), count, arguments.units)
    print(json.dumps(figures))


def measure(directory: Path, count: int, units: int) -> dict[str, float]:
    """All figures; what they mean is printed on the way."""
    path = directory / "prompts.jsonl"
    write_prompts(path, count)
    config = TeachConfig(
        model=str(directory / "none"), prompts=str(path), stream=STREAM, license="MIT", job=JOB, chat=False
    )
    site = Site(directory / "data")
    make_stream(Source(site.server.address, STREAM))
    read: list[JobPrompts] = []
    own = MebibytesMore(os.getpid())
    reading = site.cost(count, lambda: read.append(JobPrompts(config)))
    prompts = read[0]
    read_mebibytes, own, theirs = own(), MebibytesMore(os.getpid()), MebibytesMore(site.server.process_id)
    creating = site.cost(count, lambda: site.client.jobs.create(STREAM, JOB, prompts))
    memory = {"read_client_mib": read_mebibytes, "create_client_mib": own(), "create_server_mib": theirs()}

    tiny_block(units)  # loads the codec, whose memory is not what is measured
    tenths: dict[str, list[Cost]] = {"lease": [], "finish": []}
    own, theirs = MebibytesMore(os.getpid()), MebibytesMore(site.server.process_id)
    finish_leases(site, units, count // 2, tenths)
    memory |= {"work_client_mib": own(), "work_server_mib": theirs()}
    site.kill()
    started = time.perf_counter()
    site = Site(directory / "data")
    site.client.wait_until_ready()
    restart_seconds = time.perf_counter() - started
    resuming, job = resume(site, config, prompts)
    finish_leases(site, units, count // 2 - count // 20, tenths)
    failing, listing = fail_some(site, max(1, count // 100))
    size_bytes = sum(one.stat().st_size for one in (directory / "data").rglob("*") if one.is_file())
    site.kill()

    figures = {"prompts": float(count), "restart_seconds": restart_seconds} | memory
    figures["data_bytes_per_prompt"] = size_bytes / count
    figures["resume_seconds"] = resuming.wall_seconds
    figures["resume_server_cpu_seconds"] = resuming.server_cpu_seconds
    print(f"{count} prompts, leases of {units}; half done: {job.done_units if job else 0}\n")
    print("| step | prompts/s | client CPU, ms per 1000 | server CPU, ms per 1000 | last tenth / first |")
    print("|---|---|---|---|---|")
    steps = {"read": [reading], "create": [creating], **tenths, "fail": [failing], "list_failed": [listing]}
    for name, costs in steps.items():
        whole, first, last = split(costs)
        figures[f"{name}_prompts_per_second"] = whole.rate
        figures[f"{name}_client_ms_per_1000"] = whole.per_thousand(whole.client_cpu_seconds)
        figures[f"{name}_server_ms_per_1000"] = whole.per_thousand(whole.server_cpu_seconds)
        before, after = (one.per_thousand(one.server_cpu_seconds) for one in (first, last))
        growth = after / max(before, 1e-9)
        if len(costs) > 1:
            figures[f"{name}_last_tenth_vs_first"] = growth
        print(
            f"| {name} | {whole.rate:,.0f} | {figures[f'{name}_client_ms_per_1000']:.1f} "
            f"| {figures[f'{name}_server_ms_per_1000']:.1f} | {f'{growth:.2f}' if len(costs) > 1 else ''} |"
        )
    print(
        f"\nmemory beyond the start: {', '.join(f'{name} {value:.0f}' for name, value in memory.items())}; "
        f"{figures['data_bytes_per_prompt']:.0f} bytes on disk a prompt; server back after "
        f"{restart_seconds:.1f} s, command after {resuming.wall_seconds:.2f} s more\n"
    )
    return {name: round(value, 4) for name, value in figures.items()}


if __name__ == "__main__":
    main()
