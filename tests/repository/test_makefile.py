"""The Makefile's own words: help, and what it says where there is no Python."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    # Under `make test` its flags would reach this make as well.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(
        ["make", *arguments], check=False, cwd=ROOT, env=environment, capture_output=True, text=True
    )


def test_make_alone_lists_the_targets() -> None:
    result = make()
    assert result.returncode == 0
    for target in (
        "setup",
        "demo",
        "test",
        "lint",
        "types",
        "protos",
        "format",
        "requirements",
        "clean",
        "help",
    ):
        assert f"make {target} " in result.stdout


def test_missing_python_is_said_in_one_sentence() -> None:
    result = make("setup", "PYTHON=no-such-python")
    assert result.returncode != 0
    assert "there is no no-such-python here: install Python 3.11" in result.stderr


def test_tests_come_after_the_checks() -> None:
    commands = make("-n", "test").stdout.splitlines()
    assert "bootstrap.py" in "".join(commands[:3])
    assert "pytest" in commands[-1]


def test_ci_runs_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().rstrip().endswith("make test")
