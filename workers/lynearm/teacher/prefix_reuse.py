"""Keeps vLLM's prefix cache from swallowing positions whose distributions are wanted.

A cached position has keys and values but no hidden state, and so no row: what vLLM returns for one is memory
that nobody wrote. A request may therefore say up to which position its prefix may come from the cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

from lynearm.teacher.vllm_internals import version_problem

Untyped: TypeAlias = Any
"""An object of vLLM, which ships no types that a strict checker accepts."""

PREFIX_LIMIT_KEY = "lynearm_prefix_limit"
"""Under which a request's extra arguments hold the number of tokens that may come from the cache."""


def limit_prefix_reuse() -> bool:
    """Make vLLM's cache look-up heed `PREFIX_LIMIT_KEY`, for the whole process.

    It replaces one method, for requests that say so alone, in known versions, where it looks as expected.

    Returns:
        False where it does not: then nothing was changed, and nothing heeds the limit.
    """
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    manager: Untyped = KVCacheManager
    original: Untyped = getattr(manager, "get_computed_blocks", None)
    if getattr(original, "heeds_limit", False):
        return True
    if version_problem() or not callable(original):
        return False
    if list(inspect.signature(original).parameters) != ["self", "request"]:
        return False

    def get_computed_blocks(self: Untyped, request: Untyped) -> Untyped:
        extra: dict[str, Any] = getattr(request.sampling_params, "extra_args", None) or {}
        limit = extra.get(PREFIX_LIMIT_KEY)
        if limit is None:
            return original(self, request)
        coordinator = self.coordinator
        coordinator.find_longest_cache_hit = _limited(coordinator.find_longest_cache_hit, int(limit))
        try:
            return original(self, request)
        finally:
            del coordinator.find_longest_cache_hit  # the class's own is there again

    replacement: Untyped = get_computed_blocks
    replacement.heeds_limit = True
    manager.get_computed_blocks = replacement
    return True


def _limited(find: Callable[[Untyped, int], Untyped], limit: int) -> Callable[[Untyped, int], Untyped]:
    def find_limited(block_hashes: Untyped, max_cache_hit_length: int) -> Untyped:
        return find(block_hashes, min(max_cache_hit_length, limit))

    return find_limited
