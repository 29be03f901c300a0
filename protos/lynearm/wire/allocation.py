"""Memory that was used for one block is used for the next.

glibc takes large memory straight from the system and gives it back when it is freed, and gives back what lies
free at the end of its heap. A process that moves blocks of a megabyte then spends its time on fresh pages,
which the system has to clear: more than half of the CPU time of a fetch, measured on both ends.
"""

from __future__ import annotations

from functools import cache

_LARGEST_LEARNT_BYTES = (32 << 20) - (64 << 10)
"""Just below the largest block from which glibc learns."""


@cache
def keep_freed_memory() -> None:
    """Let this process keep up to 64 MB that it has freed, in place of giving it back to the system at once.

    glibc raises its thresholds to the size of a large block that is freed, and to twice that, so that any
    program which has freed a large array is in this state already: no setting of the user's is touched, and
    MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_ in the environment still rule. The pages of this block
    are never used. Other allocators do not mind.
    """
    bytearray(_LARGEST_LEARNT_BYTES)
