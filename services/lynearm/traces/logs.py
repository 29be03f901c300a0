"""Logs for programs: one JSON object a line, with the call on whose behalf something was logged.

Only an entry point calls `redact_logs`. What looks like a token is cut out of every record, whoever wrote it:
a second line of defence, since nothing should log one.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Literal

from lynearm.traces.current_call import current_call
from lynearm.traces.tokens import redact

FIELDS = ("status", "reason", "seconds", "received_bytes", "sent_bytes")
"""Of records that say more than a message."""


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON. Keys: time, level, logger, message; where known, those of the call."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        entry: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry |= _call_fields()
        entry |= {name: getattr(record, name) for name in FIELDS if hasattr(record, name)}
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return redact(json.dumps(entry, ensure_ascii=False, default=str))


class TokenFilter(logging.Filter):
    """Cuts tokens out of records that are shown as text."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Every record passes, with its message redacted."""
        record.msg, record.args = redact(record.getMessage()), ()
        return True


def redact_logs(log_format: Literal["text", "json"], *, debug: bool) -> None:
    """Let no handler show a token; as JSON, replace all handlers by one that writes to standard error.

    Args:
        log_format: "text" leaves the handlers that there are.
        debug: Log everything, rather than from INFO on; as text, the level stays as it is.
    """
    root = logging.getLogger()
    if log_format == "text":
        for handler in root.handlers:
            handler.addFilter(TokenFilter())
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(handlers=[handler], force=True, level=logging.WARNING)
    logging.getLogger("lynearm").setLevel(logging.DEBUG if debug else logging.INFO)
    logging.captureWarnings(True)


def _call_fields() -> dict[str, object]:
    call = current_call()
    if call is None:
        return {}
    fields = {
        "method": call.method,
        "caller": "" if call.caller is None else call.caller.name,
        "stream": call.stream[:140],
        "producer": "" if call.target is None else call.target.producer_id[:140],
        "trace_id": call.trace_id,
    }
    return {name: value for name, value in fields.items() if value}
