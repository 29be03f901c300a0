"""What the system says of other processes."""

from __future__ import annotations

from pathlib import Path


def is_running(process_id: int) -> bool:
    """Whether a process has not ended yet; one that nobody has collected has."""
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
