"""Which vLLM's internals this package may touch.

The public interface of vLLM serves every version, more slowly. What this package replaces inside it is
private, and may change with any release: so it is replaced only in versions whose source was read and tested
against, and there only if it has the shape that was found.
"""

from __future__ import annotations

import functools
import logging

logger = logging.getLogger(__name__)

KNOWN_VERSIONS = ("0.32",)
"""Minor versions of vLLM whose internals are known."""


def version_problem() -> str:
    """Why the vLLM that is installed is to be left as it is; empty when it is a known one."""
    import vllm

    version = str(getattr(vllm, "__version__", ""))
    if any(version == known or version.startswith(f"{known}.") for known in KNOWN_VERSIONS):
        return ""
    return f"its internals are known in {' and '.join(KNOWN_VERSIONS)} only"


@functools.cache
def say_slower(reason: str) -> None:
    """Log, once in a process, that vLLM's public and slower way is taken, and why."""
    import vllm

    logger.warning(
        "vllm %s: %s; taking logprobs by its public interface, which is slower", vllm.__version__, reason
    )
