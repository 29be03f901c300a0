"""`ray job submit -- lynearm teach …` on a real Ray with its job server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from models.ray_start import patiently
from models.service_process import ServiceProcess, unused_target
from models.tiny_llama import build_tiny_llama

from lynearm.client import TraceClient
from lynearm.wire.codec import decode_block

pytestmark = [
    pytest.mark.slow,
    # Ray leaves its child processes to the interpreter's end.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

PATIENCE_SECONDS = 400
"""With a busy machine; nothing here asserts a time."""

TOKEN_VARIABLE = "LYNEARM_TEST_RAY_JOB"
"""In the environment of every process that the cluster starts, whoever its parent is."""


@pytest.fixture
def job_server() -> Iterator[str]:
    """Address of the job server of a one-node Ray; no process of it is left at the end."""
    from ray.cluster_utils import Cluster

    token = uuid.uuid4().hex
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(TOKEN_VARIABLE, token)
        patch.setenv("RAY_worker_niceness", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.delenv("RAY_ADDRESS", raising=False)
        head = {
            "num_cpus": 1,
            "object_store_memory": 80 << 20,
            "include_dashboard": True,
            "dashboard_port": int(unused_target().rpartition(":")[2]),
        }
        cluster = patiently(lambda: Cluster(initialize_head=True, head_node_args=head))
        try:
            yield f"http://{cluster.head_node.webui_url}"
        finally:
            cluster.shutdown()
    assert not processes_that_stay(token), "processes of the cluster are left"


def processes_that_stay(token: str) -> list[str]:
    """Command lines of processes with the token in their environment that do not end by themselves soon."""
    deadline = time.monotonic() + 60
    while True:
        found: list[str] = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            try:
                if f"{TOKEN_VARIABLE}={token}".encode() in (entry / "environ").read_bytes():
                    found.append((entry / "cmdline").read_text().replace("\0", " "))
            except OSError:
                continue
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.5)


def test_a_submitted_job_answers_every_prompt_on_the_cluster(
    job_server: str, service: ServiceProcess, tmp_path: Path
) -> None:
    model = build_tiny_llama(tmp_path / "tiny")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "".join(json.dumps({"id": f"p{n}", "prompt": f"What is {n}?"}) + "\n" for n in range(20))
    )
    command = [
        *(sys.executable, "-m", "lynearm.cli.main", "teach", "--progress", "json"),
        *("--model", str(model), "--prompts", str(prompts), "--stream", "lessons"),
        *("--license", "MIT", "--service", service.target, "--threads", "1"),
        *("--max-model-len", "128", "--max-tokens", "16", "--completions", "2"),
        *("--tail-draws", "2"),
    ]
    submitted = subprocess.run(
        [
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "job",
            "submit",
            "--address",
            job_server,
            "--",
            *command,
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_SECONDS,
    )
    assert submitted.returncode == 0, submitted.stdout[-3000:] + submitted.stderr[-3000:]
    events = [json.loads(line) for line in submitted.stdout.splitlines() if line.startswith('{"role"')]
    assert events[-1]["event"] == "teach_report"
    assert (events[-1]["completed"], events[-1]["restarts"], events[-1]["sealed"]) == (20, 0, True)
    with TraceClient(service.target) as client, client.subscribe("lessons", follow=False) as blocks:
        dictionaries = client.dictionaries("lessons")
        traces = [trace for one in blocks for trace in decode_block(one.block, dictionaries=dictionaries)]
    wanted = sorted((f"p{n}", sample) for n in range(20) for sample in (0, 1))
    assert sorted((trace.prompt_id, trace.sample_index) for trace in traces) == wanted
    for trace in traces:
        drawn = trace.top_k.tail_draws
        assert drawn is not None
        assert drawn.shape == (trace.completion_token_ids.size, 2)
        assert (drawn >= 0).all()
        assert not (drawn[:, :, None] == trace.top_k.token_ids[:, None]).any()
