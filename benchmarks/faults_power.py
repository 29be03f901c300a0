"""Power failures: what a server has not synced is taken from its files.

`power_failure.c` makes a library that is loaded into servers and keeps, beside the data, what a failure at
this instant would leave of them. It does nothing in processes without `POWER_ROOT` and `POWER_SHADOW`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("power_failure.c")


def build_library(directory: Path) -> Path | None:
    """The library, to be preloaded; None where there is no C compiler, or the library does not suit it."""
    library = directory / "power_failure.so"
    command = ["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(SOURCE)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return library


def lose_unsynced(data: Path, kept: Path) -> None:
    """Put in place of a dead server's data what was kept of it."""
    for name in _files(data) - _files(kept):
        (data / name).unlink()
    for name in _files(kept):
        # Objects never change; there are too many to copy them each time.
        if name.startswith("catalog") or _size(kept / name) != _size(data / name):
            (data / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(kept / name, data / name)
    shutil.rmtree(kept.with_suffix(".pending"), ignore_errors=True)


def _files(directory: Path) -> set[str]:
    return {
        os.path.relpath(os.path.join(parent, name), directory)
        for parent, _, names in os.walk(directory)
        for name in names
    }


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1
