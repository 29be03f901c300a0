"""A worker whose raylet has ended ends, also where nobody collects what is left of the raylet."""

from __future__ import annotations

import subprocess
import sys
import time

from models.processes import is_running

CHILD = """
import sys, time
from lynearm.teacher.orphans import end_with_parent
end_with_parent()
print(open("/proc/self/stat").read().split()[0], flush=True)
time.sleep(60)
"""

PARENT = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", sys.argv[1]])
time.sleep(60)
"""


def test_a_process_ends_with_the_one_that_started_it() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        try:
            time.sleep(1.5)
            assert is_running(child)
        finally:
            parent.kill()
        # Not collected yet: what is left of the parent is still in the list of processes.
        deadline = time.monotonic() + 30
        while is_running(child) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not is_running(child)
