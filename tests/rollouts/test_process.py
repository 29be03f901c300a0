"""Processes that end, say nonsense, or say why: what the trainer makes of it."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from lynearm.rollouts import RolloutConfig, RolloutProcess, process
from lynearm.rollouts.messages import (
    Failed,
    Loaded,
    Message,
    Status,
    Stop,
    Taken,
    Weights,
    decode_message,
    encode_message,
)
from lynearm.wire.errors import ConfigError, InternalError, MisalignmentError, TrainingError
from lynearm.wire.traces import Cursor

CONFIG = RolloutConfig("service", "teacher", "stream", Path("run"), prompts="p", start=Cursor(3, 1))
WEIGHTS = Weights("nowhere", 4)


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_PAUSE_SECONDS", 0.0)


def run(code: str, tmp_path: Path) -> RolloutProcess:
    return RolloutProcess(tmp_path, command=(sys.executable, "-c", code))


def wait_for_end(one: RolloutProcess) -> None:
    deadline = time.monotonic() + 60
    while one.is_running:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_process_that_keeps_ending_is_given_up_with_its_last_words(tmp_path: Path) -> None:
    one = run("import sys; print('no room', file=sys.stderr); sys.exit(3)", tmp_path)
    for _ in range(1 + process.MAX_RESTARTS):
        assert one.keep_running(lambda: CONFIG, WEIGHTS)
        wait_for_end(one)
    with pytest.raises(TrainingError, match="started 4 times and keeps ending: it ended with status 3"):
        one.keep_running(lambda: CONFIG, WEIGHTS)
    assert (tmp_path / "rollouts.log").read_text().count("no room") == 1 + process.MAX_RESTARTS


def test_what_another_process_would_say_too_is_raised_at_once(tmp_path: Path) -> None:
    line = encode_message(Failed("MisalignmentError", "another teacher", "serve the first", True))
    one = run(f"import sys; sys.stdout.write({line.decode()!r})", tmp_path)
    one.keep_running(lambda: CONFIG, WEIGHTS)
    wait_for_end(one)
    with pytest.raises(MisalignmentError, match="another teacher: serve the first"):
        one.keep_running(lambda: CONFIG, WEIGHTS)


def test_one_that_publishes_between_its_ends_is_never_given_up(tmp_path: Path) -> None:
    status = encode_message(Status("writing", rollouts=2, tokens=30, scored_tokens=20, divergence=0.5))
    one = run(f"import sys; sys.stdout.write({status.decode()!r})", tmp_path)
    for _ in range(8):
        assert one.keep_running(lambda: CONFIG, WEIGHTS)
        wait_for_end(one)
    one.keep_running(lambda: CONFIG, WEIGHTS)
    one.stop()
    assert one.status.restarts == 8
    assert one.status.rollouts >= 16
    assert one.status.divergence == 0.5


def test_a_process_hears_its_configuration_and_every_message(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "lines = []\n"
        "for line in sys.stdin:\n"
        "    lines.append(line)\n"
        "    if 'Stop' in line: break\n"
        f"Path({str(tmp_path / 'heard')!r}).write_text(''.join(lines))\n"
    )
    one = run(code, tmp_path)
    one.tell(Taken(1, 2))  # Nobody hears it.
    one.keep_running(lambda: CONFIG, WEIGHTS)
    assert not one.keep_running(lambda: CONFIG, WEIGHTS)
    one.tell(Taken(5, 9))
    one.stop()
    first, *others = (tmp_path / "heard").read_bytes().splitlines(keepends=True)
    assert RolloutConfig.from_json(first.decode()) == CONFIG
    assert [decode_message(line) for line in others] == [WEIGHTS, Taken(5, 9), Stop()]


def test_nonsense_on_the_pipe_is_passed_over(tmp_path: Path) -> None:
    loaded = encode_message(Loaded(7, 1e-5)).decode()
    said = f"hello\n{loaded}half a li"
    code = f"import sys; sys.stdout.write({said!r}); sys.stdout.flush(); sys.stdin.read()"
    one = run(code, tmp_path)
    one.keep_running(lambda: CONFIG, WEIGHTS)
    deadline = time.monotonic() + 60
    while one.loaded_step != 7:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    one.stop()


@pytest.mark.parametrize(
    "message",
    [
        Weights("a b\n", 3),
        Taken(1, 2),
        Stop(),
        Loaded(4, 0.5),
        Status("waiting", 1, 2, 3.5),
        Failed("E", "m", "", False),
    ],
)
def test_messages_come_back(message: Message) -> None:
    line = encode_message(message)
    assert line.count(b"\n") == 1
    assert decode_message(line) == message
    assert decode_message(line[:-1]) is None


@pytest.mark.parametrize("line", [b"{}\n", b'{"kind": "Dance"}\n', b'{"kind": "Taken"}\n', b"[]\n", b"x\n"])
def test_a_line_that_is_no_message_is_refused(line: bytes) -> None:
    with pytest.raises(InternalError, match="no message"):
        decode_message(line)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"prompts": ""}, "neither prompts nor prompt_stream"),
        ({"wave": 33}, "wave is 33"),
        ({"support": "both"}, "support is 'both'"),
        ({"top_k": 0}, "top_k is 0"),
        ({"max_staleness": -1}, "max_staleness is -1"),
    ],
)
def test_configurations_out_of_range_are_refused(changes: dict[str, object], problem: str) -> None:
    from dataclasses import replace

    with pytest.raises(ConfigError, match=problem):
        replace(CONFIG, **changes)  # type: ignore[arg-type]  # wrong on purpose


@pytest.mark.parametrize("line", ["", "{}", '{"dance": 1}', "[1]"])
def test_a_configuration_that_is_none_is_refused(line: str) -> None:
    with pytest.raises(ConfigError):
        RolloutConfig.from_json(line)


def test_a_process_ends_with_its_trainer() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "lynearm.rollouts"],
        input=CONFIG.to_json() + "\n" + encode_message(Taken(1, 0)).decode(),
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    assert ended.stdout == ""


def test_a_process_says_why_it_cannot_begin() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "lynearm.rollouts"],
        input='{"dance": 1}\n',
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    message = decode_message(ended.stdout.encode())
    assert isinstance(message, Failed)
    assert (message.error, message.is_lasting, ended.returncode) == ("ConfigError", True, 1)
    assert "dance" in ended.stderr
