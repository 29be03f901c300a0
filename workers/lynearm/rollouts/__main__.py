"""`python -m lynearm.rollouts`: a rollout process. A trainer starts it and talks to it over pipes.

The first line of standard input is its configuration, the others are messages; its own go to what was its
standard output. What libraries print goes to standard error, which the trainer keeps in a file. When the
input ends, the trainer has ended.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable

from lynearm.rollouts.config import RolloutConfig
from lynearm.rollouts.messages import Failed, Message, Stop, decode_message, encode_message
from lynearm.wire.allocation import keep_freed_memory
from lynearm.wire.errors import (
    AccessDeniedError,
    AuthenticationError,
    InvalidInputError,
    LynearmError,
    MissingDependencyError,
    PreconditionError,
    StreamNotFoundError,
)

_LASTING = (
    InvalidInputError,
    PreconditionError,
    MissingDependencyError,
    StreamNotFoundError,
    AuthenticationError,
    AccessDeniedError,
)
"""What another process would come to as well."""

logger = logging.getLogger(__name__)


def main() -> int:
    """Run until the trainer says stop, or ends."""
    # Ctrl-C in a terminal reaches the whole group: the trainer finishes its step, and says when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    send = _take_output()
    try:
        config = RolloutConfig.from_json(sys.stdin.buffer.readline().decode())
        keep_freed_memory()
        from lynearm.rollouts.worker import RolloutWorker

        worker = RolloutWorker(config, send)
        threading.Thread(target=_listen, args=(worker.receive,), name="hear-trainer", daemon=True).start()
        worker.run()
    except LynearmError as error:
        logger.exception("the rollout process ends")
        lasting = isinstance(error, _LASTING)
        send(Failed(type(error).__name__, error.message, error.remedy, lasting))
        return 1
    return 0


def _listen(receive: Callable[[Message], None]) -> None:
    for line in sys.stdin.buffer:
        message = decode_message(line)
        if message is not None:
            receive(message)
    receive(Stop())


def _take_output() -> Callable[[Message], None]:
    """Keep standard output for messages; whoever prints writes to standard error from now on."""
    output = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    lock = threading.Lock()

    def send(message: Message) -> None:
        with lock:
            try:
                output.write(encode_message(message))
            except BrokenPipeError:
                # The trainer has ended; its input says so too.
                logger.info("the trainer does not listen any more")

    return send


if __name__ == "__main__":
    # Threads that wait for a service that is away must not hold the end up.
    status = main()
    sys.stderr.flush()
    os._exit(status)
