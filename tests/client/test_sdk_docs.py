"""docs/sdk.md says what the code does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from models.service_process import ServiceProcess

ROOT = Path(__file__).parents[2]


def test_the_examples_run_as_in_a_notebook(shared_service: ServiceProcess) -> None:
    document = ROOT / "docs" / "sdk.md"
    done = subprocess.run(
        [sys.executable, "-m", "models.notebook", str(document), f"127.0.0.1:7411={shared_service.target}"],
        cwd=ROOT / "tests",
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{document.read_text().count('```python')} cells\n"
