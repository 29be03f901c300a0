"""One log record for each call that ends, with its fields apart for structured logs."""

from __future__ import annotations

import logging

from lynearm.traces.access import RULES, is_open
from lynearm.traces.current_call import Call
from lynearm.traces.observation import Observer

logger = logging.getLogger(__name__)

_REFUSED = frozenset({"UNAUTHENTICATED", "PERMISSION_DENIED"})
_FAILED = frozenset({"INTERNAL", "UNKNOWN", "DATA_LOSS"})


class CallLog(Observer):
    """Logs what an operator wants to find again: long calls, refused ones, and what administrators did.

    Everything else is DEBUG. Holds names of streams and callers, never tokens, prompts or completions.
    """

    def end_call(self, call: Call) -> None:
        """See `Observer`."""
        level = _level(call)
        if not logger.isEnabledFor(level):
            return
        caller = "" if call.caller is None else call.caller.name
        logger.log(
            level,
            "%s by %s on %s: %s after %.3f s",
            call.method.rpartition("/")[2],
            caller or "nobody known",
            repr(call.stream[:140]) if call.stream else "no stream",
            call.reason or call.status,
            call.elapsed_seconds,
            extra={
                "status": call.status,
                "reason": call.reason,
                "seconds": round(call.elapsed_seconds, 6),
                "received_bytes": call.received_bytes,
                "sent_bytes": call.sent_bytes,
            },
        )


def _level(call: Call) -> int:
    if is_open(call.method):
        return logging.DEBUG
    if call.status in _FAILED:
        return logging.WARNING
    rule = RULES.get(call.method)
    is_administrative = rule is not None and rule.permissions == ("admin",)
    return logging.INFO if call.is_long or is_administrative or call.status in _REFUSED else logging.DEBUG
