"""A process that moves blocks uses the same memory for each."""

import os
import platform
import subprocess
import sys

import pytest

CHILD = """
import resource
from lynearm.wire.allocation import keep_freed_memory

def count_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        blocks = [b"x" * (1 << 20) for _ in range(8)]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

count_faults()
before = count_faults()
keep_freed_memory()
count_faults()
print(before, count_faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have thresholds of their own")
def test_memory_of_blocks_is_used_again_rather_than_given_back() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    said = subprocess.run(
        [sys.executable, "-c", CHILD], check=True, capture_output=True, text=True, env=environment
    ).stdout
    before, after = map(int, said.split())
    if before < 2000:
        pytest.skip("this system hands out pages so large that it never mattered")
    assert after < before / 10
