"""What Ray runs for each server of a fleet: a process with one trace server in it."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from dataclasses import dataclass

from lynearm.fleet.placement import ServerPlan
from lynearm.fleet.server_thread import ServerState, ServerThread
from lynearm.traces.logs import redact_logs


@dataclass(frozen=True, slots=True)
class ServerReport:
    """What a server says of itself."""

    plan: ServerPlan
    state: ServerState


class TraceServerActor:
    """Serves from its construction on. Ray constructs it again, with the same plan, when its process ends.

    SIGTERM drains and ends the process, as it does with `lynearm serve`; `ray stop` sends it to all that runs
    on a node. Where the node stays, Ray starts the server again: only `drain` ends it for good.

    Args:
        plan: Which server it is.
    """

    def __init__(self, plan: ServerPlan) -> None:
        _set_up_logging(plan)
        self._plan = plan
        self._server = ServerThread(plan.config)
        self._leaving = False
        # Ray constructs actors in the main thread, the only one that may do this.
        signal.signal(signal.SIGTERM, self._on_signal)
        self._server.start()

    def report(self) -> ServerReport:
        """Where it is."""
        return ServerReport(self._plan, self._server.state)

    def drain(self) -> None:
        """Stop serving; returns when all that was acknowledged is durable and the port is free."""
        self._server.stop()
        self._server.join()

    def _on_signal(self, number: int, frame: object) -> None:
        if self._leaving:
            os._exit(1)  # a second signal does not wait, and loses nothing that was acknowledged
        self._leaving = True
        threading.Thread(target=self._leave).start()

    def _leave(self) -> None:
        self.drain()
        # Ray's own way out would take an exception to its main thread.
        os._exit(0)


def _set_up_logging(plan: ServerPlan) -> None:
    """To standard error, which Ray keeps in the node's log folder."""
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(levelname)s: %(message)s")
    logging.getLogger("lynearm").setLevel(logging.INFO)
    redact_logs(plan.config.log_format, debug=False)
