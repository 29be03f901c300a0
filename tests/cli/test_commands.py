"""The command against a real trace service, over a socket, as people and scripts call it."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from lynearm.cli.main import app
from lynearm.client import TraceClient
from lynearm.wire.codec import encode_block
from lynearm.wire.specs import CodecSpec, StreamSpec, TeacherSpec, TokenizerSpec
from lynearm.wire.traces import SamplingParams, TopK, Trace

VOCAB_SIZE = 128
ENVIRONMENT = {**os.environ, "COLUMNS": "100", "PYTHONUNBUFFERED": "1"}
DEAD_TARGET = "127.0.0.1:1"


def make_spec(name: str) -> StreamSpec:
    return StreamSpec(
        name=name,
        teacher=TeacherSpec("tiny-teacher", "sha256:00", "test", "float32", VOCAB_SIZE, 512),
        tokenizer=TokenizerSpec("tok", bytes(32), b"", VOCAB_SIZE, (2,)),
        codec=CodecSpec("exact", 4),
        license="CC-BY-4.0",
        labels={"purpose": "tests"},
    )


def make_trace(prompt_id: str, text: str = "seven", tokens: int = 3) -> Trace:
    logprobs = np.log(np.array([0.5, 0.25, 0.125, 0.0625], np.float32))
    return Trace(
        prompt_id=prompt_id,
        prompt_token_ids=np.arange(5, dtype=np.int32),
        completion_token_ids=np.full(tokens, 9, np.int32),
        sampled_logprobs=np.full(tokens, logprobs[0], np.float32),
        top_k=TopK(
            token_ids=np.tile(np.array([9, 8, 7, 6], np.int32), (tokens, 1)),
            logprobs=np.tile(logprobs, (tokens, 1)),
            tail_mass=np.full(tokens, 0.0625, np.float32),
        ),
        finish_reason="stop",
        sampling=SamplingParams(temperature=0.8),
        tags={"split": "train"},
        completion_text=text,
    )


def publish(target: str, stream: str, traces: Sequence[Trace]) -> None:
    """A stream of that name with one block for each trace."""
    with TraceClient(target) as client:
        client.create_stream(make_spec(stream), allow_existing=True)
        with client.publisher(stream, "tests") as publisher:
            for trace in traces:
                block = encode_block([trace], codec="exact", vocab_size=VOCAB_SIZE)
                publisher.publish(block, [trace.prompt_id])


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "lynearm.cli.main", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )


def interrupt(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=30)
    return process.returncode, stdout, stderr


def next_line(process: subprocess.Popen[str]) -> str:
    """The next line of standard output."""
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], 60)
    assert ready, "nothing was said for a minute"
    return process.stdout.readline()


@contextmanager
def serving(data_dir: Path, *more: str) -> Generator[tuple[str, subprocess.Popen[str]]]:
    """Address and process of `lynearm serve`."""
    process = start("serve", "--data-dir", str(data_dir), "--port", "0", "--progress", "json", *more)
    try:
        line = next_line(process)
        assert line, process.communicate()[1]
        event = json.loads(line)
        assert (event["role"], event["event"]) == ("serve", "ready")
        yield event["address"], process
    finally:
        if process.returncode is None:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(tmp_path_factory.mktemp("traces")) as (address, _):
        yield address


@pytest.fixture(scope="module")
def stream(target: str) -> str:
    """A stream of two blocks."""
    publish(target, "maths", [make_trace("q1"), make_trace("q2", "eight\n\x1b[31mred", tokens=5)])
    return "maths"


def run(*arguments: str, answer: str | None = None) -> tuple[int, str, str]:
    result = CliRunner(env={"COLUMNS": "100"}).invoke(app, arguments, input=answer)
    return result.exit_code, result.stdout, result.stderr


def test_list_shows_every_stream(target: str, stream: str) -> None:
    code, stdout, _ = run("streams", "list", "--service", target)
    assert code == 0
    assert all(word in stdout for word in (stream, "tiny-teacher", "CC-BY-4.0", "bits/token", "open"))


def test_list_as_json_has_the_counts(target: str, stream: str) -> None:
    _, stdout, _ = run("streams", "list", "--service", target, "--json")
    found = next(one for one in map(json.loads, stdout.splitlines()) if one["name"] == stream)
    assert (found["trace_count"], found["completion_token_count"], found["sealed"]) == (2, 8, False)
    assert found["bits_per_token"] == found["size_bytes"] * 8 / 8


def test_show_tells_everything(target: str, stream: str) -> None:
    code, stdout, _ = run("streams", "show", stream, "--service", target)
    assert code == 0
    assert all(word in stdout for word in ("tiny-teacher", "CC-BY-4.0", "sha256:00", "purpose", "exact"))


def test_the_environment_names_the_service(target: str, stream: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LYNEARM_SERVICE", target)
    assert stream in run("streams", "list")[1]


def test_tail_prints_traces_of_a_range(target: str, stream: str) -> None:
    _, everything, _ = run("streams", "tail", stream, "--from", "start", "--no-follow", "--service", target)
    _, rest, _ = run("streams", "tail", stream, "--from", "1", "--no-follow", "--service", target)
    assert all(word in everything for word in ("q1", "seven", "q2", "eight", "3 tokens", "-0.69"))
    assert "q1" not in rest
    assert "q2" in rest


def test_tail_does_not_let_a_trace_steer_the_terminal(target: str, stream: str) -> None:
    _, stdout, _ = run("streams", "tail", stream, "--from", "start", "--no-follow", "--service", target)
    assert "\x1b" not in stdout
    assert "red" in stdout


def test_tail_as_json_is_one_object_a_trace(target: str, stream: str) -> None:
    _, stdout, _ = run(
        "streams", "tail", stream, "--from", "start", "--no-follow", "--json", "--service", target
    )
    first, second = map(json.loads, stdout.splitlines())
    assert (first["prompt_id"], first["offset"], first["text"], first["tags"]) == (
        "q1",
        0,
        "seven",
        {"split": "train"},
    )
    assert first["mean_logprob"] == pytest.approx(np.log(0.5))
    assert second["text"] == "eight\n\x1b[31mred"


def test_tail_follows_a_live_stream_and_says_how_to_go_on(target: str) -> None:
    publish(target, "live", [make_trace("old")])
    process = start("streams", "tail", "live", "--from", "0", "--json", "--service", target)
    assert json.loads(next_line(process))["prompt_id"] == "old"
    publish(target, "live", [make_trace("new")])
    assert json.loads(next_line(process))["prompt_id"] == "new"
    code, _, stderr = interrupt(process)
    assert code == 130
    assert "--from 2" in stderr
    assert "Traceback" not in stderr


def test_tail_ends_where_a_sealed_stream_ends(target: str) -> None:
    publish(target, "sealed", [make_trace("q1")])
    with TraceClient(target) as client:
        client.seal_stream("sealed")
    code, stdout, _ = run("streams", "tail", "sealed", "--from", "start", "--service", target)
    assert code == 0
    assert "q1" in stdout


def test_blocks_go_as_retain_says(target: str) -> None:
    for number in range(3):
        publish(target, "brief", [make_trace(f"q{number}")])
    code, _, stderr = run(
        "streams", "retain", "brief", "--max-age", "7d", "--max-bytes", "1b", "--service", target
    )
    assert code == 0
    assert "blocks go when older than 168 h 00 min or beyond 1 B" in stderr
    assert run("streams", "collect", "--service", target)[1].startswith("2 blocks of ")
    _, stdout, _ = run("streams", "collect", "--json", "--service", target)
    assert json.loads(stdout) == {"expired_blocks": 0, "expired_bytes": 0, "orphan_objects": 0}
    assert "from offset 2, " in run("streams", "show", "brief", "--service", target)[1]
    assert run("streams", "tail", "brief", "--from", "0", "--no-follow", "--service", target)[0] == 1
    assert "never go" in run("streams", "retain", "brief", "--service", target)[2]


@pytest.mark.parametrize("bound", [("--max-age", "7y"), ("--max-bytes", "-1"), ("--read-by", "no good")])
def test_a_bound_that_makes_no_sense_is_refused(target: str, bound: tuple[str, str]) -> None:
    code, _, stderr = run("streams", "retain", "maths", *bound, "--service", target)
    assert code != 0
    assert bound[1] in stderr


def test_delete_asks_and_takes_no_for_an_answer(target: str) -> None:
    publish(target, "doomed", [make_trace("q1")])
    assert run("streams", "delete", "doomed", "--service", target, answer="n\n")[0] == 1
    assert run("streams", "show", "doomed", "--service", target)[0] == 0
    assert run("streams", "delete", "doomed", "--service", target, answer="y\n")[0] == 0
    assert run("streams", "show", "doomed", "--service", target)[0] == 1


def test_delete_does_not_ask_with_yes(target: str) -> None:
    publish(target, "doomed", [make_trace("q1")])
    assert run("streams", "delete", "doomed", "--yes", "--service", target)[0] == 0


@pytest.mark.parametrize(
    "command",
    [("streams", "show", "absent"), ("streams", "tail", "absent"), ("streams", "delete", "absent", "--yes")],
    ids=lambda command: command[1],
)
def test_an_unknown_stream_is_one_line(target: str, command: tuple[str, ...]) -> None:
    code, stdout, stderr = run(*command, "--service", target)
    assert (code, stdout) == (1, "")
    assert "'absent'" in stderr
    assert stderr.count("\n") == 1


@pytest.mark.parametrize(
    "command",
    [("list",), ("show", "s"), ("tail", "s"), ("delete", "s", "--yes")],
    ids=lambda command: command[0],
)
def test_an_absent_service_is_one_line_with_the_remedy(command: tuple[str, ...]) -> None:
    code, _, stderr = run("streams", *command, "--service", DEAD_TARGET)
    assert code == 1
    assert DEAD_TARGET in stderr
    assert "lynearm serve" in stderr
    assert stderr.count("\n") == 1


def test_debug_adds_the_traceback() -> None:
    _, _, stderr = run("streams", "list", "--service", DEAD_TARGET, "--debug")
    assert "Traceback (most recent call last)" in stderr
    assert stderr.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("start_at", ["later", "-x", "1.5"])
def test_a_wrong_start_is_a_usage_error(target: str, stream: str, start_at: str) -> None:
    code, _, stderr = run("streams", "tail", stream, "--from", start_at, "--service", target)
    assert code == 2
    assert start_at in stderr


def test_a_port_in_use_is_said_in_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        code, _, stderr = run("serve", "--data-dir", str(tmp_path / "d"), "--port", port)
    assert code == 1
    assert port in stderr
    assert "--port" in stderr
    assert "Traceback" not in stderr


def test_an_open_address_needs_insecure(tmp_path: Path) -> None:
    code, _, stderr = run("serve", "--data-dir", str(tmp_path / "d"), "--host", "0.0.0.0", "--port", "0")
    assert code == 2
    assert "--insecure" in stderr


def test_serve_reads_its_file_stops_on_interrupt_and_keeps_what_was_acknowledged(tmp_path: Path) -> None:
    file = tmp_path / "lynearm.toml"
    file.write_text("[serve]\ndrain_seconds = 1.0\n")
    for stage in ("publish", "look"):
        with serving(tmp_path / "d", "--config", str(file)) as (address, process):
            if stage == "publish":
                publish(address, "kept", [make_trace("q1")])
            else:
                assert "kept" in run("streams", "list", "--service", address)[1]
            code, _, stderr = interrupt(process)
            assert code == 0
            assert "Traceback" not in stderr


def test_serve_tells_people_where_it_listens_and_how_it_stopped(tmp_path: Path) -> None:
    process = start("serve", "--data-dir", str(tmp_path / "d"), "--port", "0", "--progress", "plain")
    assert process.stderr is not None
    said = ""
    while "127.0.0.1:" not in said:
        line = process.stderr.readline()
        assert line, said
        said += line
    code, _, stderr = interrupt(process)
    assert code == 0
    assert "stopped" in stderr
    assert str(tmp_path / "d") in stderr


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        (("teach",), "teach needs model, prompts and stream"),
        (
            ("teach", "--model=m", "--prompts=p", "--stream=s", "--presence-penalty=3"),
            "presence_penalty 3.0 is outside -2..2",
        ),
        (
            ("teach", "--model=m", "--prompts=p", "--stream=s", "--stop=a", "--stop=a"),
            "a stop string is there twice",
        ),
        (("teach", "--set", "max_tokns=1"), "did you mean 'max_tokens'"),
        (("train", "--set", "epochs=0"), "epochs is 0"),
        (("train", "--config", "absent.toml"), "cannot read absent.toml"),
        (("serve", "--port", "70000"), "port is 70000"),
        (("export", "mlx", "c", "--out", "o", "--bits", "5"), "bits is 5"),
        (("export", "coreml", "c", "--out", "o", "--set", "block_size=7"), "block_size is 7"),
    ],
)
def test_a_wrong_setting_is_a_usage_error_before_anything_heavy(
    command: tuple[str, ...], complaint: str
) -> None:
    code, stdout, stderr = run(*command)
    assert (code, stdout) == (2, "")
    assert complaint in stderr
    assert stderr.count("\n") == 1


def test_training_on_an_unknown_stream_is_one_line(target: str, tmp_path: Path) -> None:
    code, stdout, stderr = run(
        *("train", "--stream", "absent", "--service", target),
        *("--student", str(tmp_path), "--out", str(tmp_path / "out"), "--progress", "none"),
    )
    assert (code, stdout) == (1, "")
    assert "'absent'" in stderr
    assert stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_training_without_a_service_is_one_line_with_the_remedy(tmp_path: Path) -> None:
    code, _, stderr = run("train", "--stream", "s", "--service", DEAD_TARGET, "--student", str(tmp_path))
    assert code == 1
    assert "lynearm serve" in stderr
    assert stderr.count("\n") == 1


def test_a_malformed_prompt_is_named_by_file_and_line(target: str, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "one"}\n{"prompt": \n')
    code, _, stderr = run(
        *("teach", "--model", str(tmp_path), "--prompts", str(prompts), "--stream", "s", "--license", "MIT"),
        *("--strict", "--service", target, "--progress", "none"),
    )
    assert code == 1
    assert f"{prompts}:2" in stderr
    assert stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "teacher.serve needs model"),
        (("--model", "m", "--bind", "0.0.0.0:7412"), "needs TLS and a token"),
        (("--model", "m", "--bind", "7412"), "bind '7412' is not host:port"),
    ],
)
def test_a_teacher_that_could_not_serve_says_so_before_it_loads(
    arguments: tuple[str, ...], words: str
) -> None:
    code, _, error = run("teacher", "serve", *arguments)
    assert code == 2
    assert words in error
    assert error.count("\n") == 1
