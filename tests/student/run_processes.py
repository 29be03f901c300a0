"""Training runs in processes of their own, which may be killed, and which may be the ranks of one run.

They come from a server process that has torch and transformers loaded: a start costs no import.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess

from lynearm.student.config import TrainConfig

_PRELOADED = ["lynearm.student.trainer", "transformers.models.llama.modeling_llama"]


def start_run(config: TrainConfig, environment: dict[str, str] | None = None) -> BaseProcess:
    """`run_train` in a process of its own."""
    return _start(environment or {}, train, config)


def run_ranks(config: TrainConfig, world_size: int) -> None:
    """A whole run by several ranks."""
    join(start_ranks(world_size, train, config))


def start_ranks(world_size: int, target: Callable[..., None], *arguments: object) -> list[BaseProcess]:
    """Ranks that find each other, and what each of them calls."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = int(listener.getsockname()[1])
    shared = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [_start(shared | {"RANK": str(rank)}, target, *arguments) for rank in range(world_size)]


def train(config: TrainConfig) -> None:
    """What each process of a run calls."""
    from lynearm.student.trainer import run_train

    run_train(config)


def join(processes: Sequence[BaseProcess]) -> None:
    """Until all have ended well."""
    try:
        for process in processes:
            process.join(300)
            assert process.exitcode == 0, f"a run ended with {process.exitcode}"
    finally:
        for process in processes:
            process.kill()


def _start(environment: dict[str, str], target: Callable[..., None], *arguments: object) -> BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    process = context.Process(target=_call, args=(environment, target, arguments))
    process.start()
    return process


def _call(environment: dict[str, str], target: Callable[..., None], arguments: tuple[object, ...]) -> None:
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    target(*arguments)
