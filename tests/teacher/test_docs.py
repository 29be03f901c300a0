"""docs/teaching.md says what the code does."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from lynearm.cli.main import app
from lynearm.cli.settings import load_settings
from lynearm.teacher.config import TeachConfig
from lynearm.teacher.prompts import parse_prompt

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "teaching.md"
TEXT = DOCUMENT.read_text()


def teach_commands() -> list[list[str]]:
    """The arguments of every `lynearm teach` in the document."""
    blocks = re.findall(r"^```bash\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = [
        line.partition("lynearm teach ")[2].partition(" | ")[0] for line in lines if "lynearm teach" in line
    ]
    return [shlex.split(arguments) for arguments in found]


def test_there_are_commands() -> None:
    assert len(teach_commands()) >= 6


@pytest.mark.parametrize("arguments", teach_commands(), ids=" ".join)
def test_every_command_is_one_that_the_command_line_takes(arguments: list[str]) -> None:
    command = get_command(app).commands["teach"]  # type: ignore[attr-defined]  # a group, which has them
    parsed = command.make_context("teach", list(arguments)).params
    file = ROOT / "docs" / "examples" / "lynearm.toml" if parsed["config"] else None
    load_settings(TeachConfig, "teach", file=file, flags=parsed, assignments=parsed["assignments"] or ())


def test_the_rows_are_prompts() -> None:
    (rows,) = re.findall(r"^```json\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
    text, chat, ids = (parse_prompt(row.encode()) for row in rows.splitlines())
    assert text.text
    assert chat.messages
    assert (ids.prompt_id, len(ids.token_ids)) == ("7", 5)


def test_the_example_runs_as_in_a_notebook(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "models.notebook", str(DOCUMENT)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{TEXT.count('```python')} cells\n"
