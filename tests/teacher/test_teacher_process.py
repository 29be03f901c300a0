"""`lynearm teacher serve` as users run it: a process, which may be told to stop, or killed."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lynearm.client import ScoreSettings, StudentCompletion, TeacherClient
from lynearm.wire.errors import ServiceUnavailableError


def start(model: Path, log: Path) -> tuple[subprocess.Popen[str], str]:
    """A served teacher and its address."""
    arguments = ["teacher", "serve", "--model", str(model), "--bind", "127.0.0.1:0", "--progress", "json"]
    options = ["--threads", "1", "--max-model-len", "128", "--top-k", "16", "--license", "Apache-2.0"]
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "lynearm.cli.main", *arguments, *options],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, log.read_text()
    return process, str(json.loads(line)["address"])


def completions() -> Iterator[StudentCompletion]:
    for number in itertools.count():
        ids = np.random.default_rng(number).integers(5, 384, (4, 30)).astype(np.int32)
        yield StudentCompletion(f"c-{number}", ids[0], ids[1], ids[2:].T)


@pytest.mark.slow
def test_a_client_is_told_when_its_teacher_is_killed(tiny_model: Path, tmp_path: Path) -> None:
    process, target = start(tiny_model, tmp_path / "first.log")
    try:
        settings = ScoreSettings(top_k=4)
        with TeacherClient(target, patience_seconds=0.5) as client:
            assert client.describe().license == "Apache-2.0"
            iteration = client.score(completions(), settings, max_in_flight=100)
            for _ in range(10):
                next(iteration)
            process.send_signal(signal.SIGKILL)
            with pytest.raises(ServiceUnavailableError, match="no teacher answers") as told:
                for _ in iteration:
                    pass
            assert "lynearm teacher serve" in told.value.remedy
    finally:
        process.kill()
        process.wait(30)
        assert process.stdout is not None
        process.stdout.close()


@pytest.mark.slow
def test_a_teacher_that_is_told_to_stop_ends_in_order(tiny_model: Path, tmp_path: Path) -> None:
    log = tmp_path / "teacher.log"
    process, target = start(tiny_model, log)
    try:
        with TeacherClient(target, patience_seconds=0.5) as client:
            iteration = client.score(completions(), ScoreSettings(top_k=4), max_in_flight=100)
            next(iteration)
            process.send_signal(signal.SIGTERM)
            with pytest.raises(ServiceUnavailableError):
                for _ in iteration:
                    pass
        assert process.wait(60) == 0, log.read_text()
        assert "Traceback" not in log.read_text()
    finally:
        process.kill()
        process.wait(30)
        assert process.stdout is not None
        process.stdout.close()
