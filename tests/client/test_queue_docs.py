"""docs/prompt-queue.md says what the code does: its examples run, one section after the other."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from models.service_process import ServiceProcess
from traces.harness import make_spec
from wire.building import build_trace

from lynearm.client import LeasedPrompt, TraceClient
from lynearm.traces.config import ServeConfig
from lynearm.traces.job_records import MAX_OPEN_LEASES, MAX_UNITS
from lynearm.traces.queue_calls import MAX_CONTENT_BYTES, MAX_PROMPTS
from lynearm.wire.codec import decode_block
from lynearm.wire.specs import CodecSpec
from lynearm.wire.traces import Cursor, Trace
from lynearm.wire.work import MAX_SAMPLES

TEXT = (Path(__file__).parents[2] / "docs" / "prompt-queue.md").read_text()

PROMPTS = 300


@pytest.fixture
def service(tmp_path: Path) -> Iterator[ServiceProcess]:
    with ServiceProcess(tmp_path / "data") as process:
        yield process


def section(title: str) -> list[str]:
    """The code of one section."""
    (body,) = re.findall(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)
    return re.findall(r"```python\n(.*?)```", body, re.DOTALL)


def answer(prompts: Sequence[LeasedPrompt]) -> list[Trace]:
    return [
        build_trace(
            prompt_id=prompt.prompt_id, sample_index=index, positions=2, k=2, tags={"subject": "algebra"}
        )
        for prompt in prompts
        for index in prompt.sample_indices
    ]


def test_the_examples_run(
    service: ServiceProcess,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text("".join(f'{{"prompt": "{number}"}}\n' for number in range(PROMPTS)))
    trained: list[tuple[Sequence[int], float]] = []
    used: list[int] = []
    names: dict[str, Any] = {
        "answer": answer,
        "use": lambda block, used_traces: used.append(len(decode_block(block)) - used_traces),
        "train": lambda examples, weight: trained.append((examples, weight)),
        "examples": range(1000),
        "rank": 1,
        "world_size": 4,
        "done_steps": 0,
        "Cursor": Cursor,
    }

    def run(title: str) -> None:
        for code in section(title):
            target = f"127.0.0.1:{service.port}"
            exec(compile(code.replace("127.0.0.1:7411", target), title, "exec"), names)

    with TraceClient(service.target) as client:
        spec = make_spec("maths")
        client.create_stream(
            type(spec)(spec.name, spec.teacher, spec.tokenizer, CodecSpec("standard", 4), spec.license)
        )
        run("Jobs")
        assert capsys.readouterr().out.split() == ["open", "0", "0", str(4 * PROMPTS)]
        run("Workers")
        assert client.jobs.get("maths", "first-pass").state == "done"
        names["client"] = client
        run("Filters")
        names["publisher"].close()
        client.seal_stream("maths")
        run("Consumers")
        assert sum(used) == 4 * PROMPTS + len(names["traces"])
        assert capsys.readouterr().out == "student-a 0 0 0\n"
        run("Random access")
        run("The same examples for any number of ranks")
        assert [weight for _, weight in trained] == [1 / 256] * 3 + [1 / 232]


def test_the_limits_and_defaults_are_those_of_the_code() -> None:
    assert f"`lease_silence_seconds` ({ServeConfig().lease_silence_seconds:g})" in TEXT
    assert MAX_PROMPTS == 2**32
    assert MAX_CONTENT_BYTES == 1 << 20
    for limit in (MAX_SAMPLES, MAX_UNITS, MAX_OPEN_LEASES):
        assert f"{limit:,}" in TEXT
