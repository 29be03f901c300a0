"""A job on three nodes while nodes come and go, the service is away, and a prompt kills its engine."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from models.faulty_worker import POISON, FaultyWorker
from models.processes import is_running
from models.ray_start import patiently
from models.service_process import ServiceProcess
from models.teaching import teach_config
from models.tiny_llama import build_tiny_llama

from lynearm.client import TraceClient
from lynearm.teacher import TeachProgress, WorkerStatus, ray_actor, run_teach
from lynearm.teacher.job_file import parse_job_file
from lynearm.teacher.run_several import TeachersFailedError, run_several
from lynearm.teacher.several import assign_teachers, prepare_teachers
from lynearm.teacher.worker import TeacherWorker
from lynearm.wire.codec import decode_block
from lynearm.wire.errors import ConfigError, StreamNotFoundError
from lynearm.wire.specs import StreamSpec

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    # Ray leaves its child processes to the interpreter's end.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

TESTS = Path(__file__).resolve().parents[1]

NODE = {"num_cpus": 1, "object_store_memory": 80 << 20, "memory": 8 << 30}

PROMPT_COUNT = 1000

STEPS = ("drain_a_node", "kill_the_service", "lose_a_node", "join_a_node")

OUTAGE_SECONDS = float(os.environ.get("LYNEARM_TEST_OUTAGE_SECONDS", "5"))
"""How long the service is away. At 60, leases and blocks wait as they would in production."""

_PREEMPTION = 2
"""A reason to drain a node, as Ray numbers them."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head and two more nodes, with room for one worker each."""
    import ray
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        # At nice 15, which is Ray's default, workers would starve on a busy machine.
        patch.setenv("RAY_worker_niceness", "0")
        # An earlier Ray of this process may have been of another mode, which it remembers.
        os.environ.pop("RAY_AUTH_MODE", None)
        patch.setenv("RAY_AUTH_MODE", "disabled")
        ray._raylet.Config.initialize("")
        # Workers on the nodes import the faulty one of these tests.
        patch.setenv("PYTHONPATH", str(TESTS), prepend=os.pathsep)
        head = {**NODE, "include_dashboard": False}
        made = patiently(lambda: Cluster(initialize_head=True, head_node_args=head))
        try:
            for _ in range(2):
                patiently(lambda: made.add_node(**NODE))
            module: Any = ray
            module.init(address=made.address, log_to_driver=False, logging_level="warning")
            yield made
        finally:
            ray.shutdown()
            made.shutdown()


def node_of(cluster: Any, worker: WorkerStatus) -> Any:
    """The simulated node whose raylet started a worker's process."""
    status = Path(f"/proc/{worker.process_id}/status").read_text()
    parent = int(status.partition("PPid:")[2].split()[0])
    raylets = {node.all_processes["raylet"][0].process.pid: node for node in cluster.list_all_nodes()}
    return raylets[parent]


def drain(node: Any, seconds: float) -> None:
    import ray

    client: Any = ray._raylet.GcsClient(address=ray.get_runtime_context().gcs_address)
    deadline = int((time.time() + seconds) * 1000)
    accepted, why = client.drain_node(node.node_id, _PREEMPTION, "the test takes it", deadline)
    assert accepted, why


class Trouble:
    """Disturbs a job step by step, each once the last one has shown its effect."""

    def __init__(self, cluster: Any, service: ServiceProcess) -> None:
        self.cluster = cluster
        self.service = service
        self.seen: list[TeachProgress] = []
        self.is_away = threading.Event()
        self.pids: set[int] = set()
        self.done: list[str] = []
        self.acked_blocks = 0
        self.worked_after_join: set[int] = set()
        self.outage: list[TeachProgress] = []
        """What was said while the service was away."""

    def __call__(self, progress: TeachProgress) -> None:
        self.seen.append(progress)
        if self.is_away.is_set():
            self.outage.append(progress)
        self.pids |= {worker.process_id for worker in progress.workers if worker.process_id}
        if len(self.done) == len(STEPS):
            self.worked_after_join |= {worker.process_id for worker in self.at_work(progress)}
        elif getattr(self, STEPS[len(self.done)])(progress):
            self.done.append(STEPS[len(self.done)])

    def at_work(self, progress: TeachProgress) -> list[WorkerStatus]:
        return [one for one in progress.workers if one.state == "generating" and one.done_prompts]

    def elsewhere(self, workers: list[WorkerStatus]) -> list[WorkerStatus]:
        """Those that are not on the head."""
        return [one for one in workers if node_of(self.cluster, one) is not self.cluster.head_node]

    def drain_a_node(self, progress: TeachProgress) -> bool:
        workers = self.at_work(progress)
        if len(workers) < 3:
            return False
        drain(node_of(self.cluster, self.elsewhere(workers)[0]), 120)
        return True

    def kill_the_service(self, progress: TeachProgress) -> bool:
        if len(progress.workers) > 2 or len(self.at_work(progress)) < 2:
            return False
        self.acked_blocks = progress.acked_blocks
        self.service.kill()
        self.is_away.set()
        threading.Timer(OUTAGE_SECONDS, self.bring_service_back).start()
        return True

    def bring_service_back(self) -> None:
        self.is_away.clear()
        self.service.start()

    def lose_a_node(self, progress: TeachProgress) -> bool:
        # Blocks come through again.
        if len(self.at_work(progress)) < 2 or progress.acked_blocks < self.acked_blocks + 10:
            return False
        node = node_of(self.cluster, self.elsewhere(self.at_work(progress))[0])
        self.cluster.remove_node(node, allow_graceful=False)
        return True

    def join_a_node(self, progress: TeachProgress) -> bool:
        if len(progress.workers) > 1:
            return False
        patiently(lambda: self.cluster.add_node(**NODE))
        return True


class FussyWorker(TeacherWorker):
    """Real, but does not load one model, and begins with another only once all others are loaded."""

    def load(self) -> StreamSpec:
        model = Path(self._config.model)
        if self._config.model_name == "broken":
            raise ConfigError("cannot load teacher 'broken': of course not")
        spec = super().load()
        (model / "loaded").touch()
        deadline = time.monotonic() + 120
        while not all((model.parent / name / "loaded").exists() for name in ("maths", "code")):
            if time.monotonic() > deadline:
                raise ConfigError("the other teacher is not there: they work one after another")
            time.sleep(0.05)
        return spec


def count_samples(target: str, stream: str = "lessons") -> Counter[tuple[str, int]]:
    with TraceClient(target) as client, client.subscribe(stream, follow=False) as blocks:
        dictionaries = client.dictionaries(stream)
        decoded = (decode_block(block.block, dictionaries=dictionaries) for block in blocks)
        return Counter((trace.prompt_id, trace.sample_index) for traces in decoded for trace in traces)


def test_no_prompt_is_lost_or_doubled_whatever_dies(
    cluster: Any, service: ServiceProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    model = build_tiny_llama(tmp_path / "tiny")
    monkeypatch.setattr(ray_actor, "TeacherWorker", FaultyWorker)
    ids = [f"p{number}" for number in range(PROMPT_COUNT)]
    ids.append(f"{POISON}-1")
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"id": one, "prompt": f"Tell me of {one}."}) + "\n" for one in ids))
    trouble = Trouble(cluster, service)
    config = teach_config(
        model,
        service=service.target,
        prompts=path,
        ray_address=cluster.address,
        completions=1,
        max_tokens=24,
        max_batch=8,
        block_bytes=8000,
        kv_cache_mib=64,
    )
    report = run_teach(config, trouble)

    assert tuple(trouble.done) == STEPS
    assert len(trouble.worked_after_join) >= 2, "the node that joined got no worker"
    expected = Counter((one, 0) for one in ids if not one.startswith(POISON))
    assert count_samples(service.target) == expected
    assert (report.prompts, report.completed, report.sealed) == (PROMPT_COUNT + 1, PROMPT_COUNT, True)
    (failed,) = report.failed
    assert failed.prompt_id == f"{POISON}-1"
    assert failed.reason.startswith(
        "ended the engine again when it was alone in it: the teacher's process died"
    )
    assert report.workers == 3
    # The poison ended an engine among others, and a process alone. Leaving a node is no restart.
    assert report.restarts == 2
    # While the service was away, engines went on with what they had leased, and it was said why they waited.
    away = trouble.outage
    assert away[-1].generated_tokens > away[0].generated_tokens
    reasons = {one.waiting_reason for progress in away for one in progress.workers}
    assert any("no trace service answers" in reason for reason in reasons), (
        reasons,
        {progress.message for progress in away},
    )
    meanwhile = away[-1].generated_tokens - away[0].generated_tokens
    again = report.generated_tokens - report.completion_tokens
    print(f"away {OUTAGE_SECONDS:g} s: {meanwhile} tokens meanwhile, {again} of all generated again")
    states = {worker.state for progress in trouble.seen for worker in progress.workers}
    assert {"loading", "generating", "draining", "retrying", "replacing"} <= states
    messages = {progress.message for progress in trouble.seen}
    assert any("RuntimeError: CUDA error: device-side assert triggered" in one for one in messages)

    deadline = time.monotonic() + 60
    while any(map(is_running, trouble.pids)) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not [process_id for process_id in trouble.pids if is_running(process_id)]
    table: Any = ray.util.placement_group_table()
    assert {place["state"] for place in table.values()} == {"REMOVED"}


def test_teachers_of_a_job_work_side_by_side_and_one_that_fails_ends_alone(
    cluster: Any, service: ServiceProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_actor, "TeacherWorker", FussyWorker)
    names = ("maths", "code", "broken")
    prompts = tmp_path / "prompts.jsonl"
    rows = [
        {"id": f"{name}-{n}", "prompt": f"{n}?", "tags": {"to": name}} for n in range(80) for name in names
    ]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = "".join(f"[[teacher]]\nname = '{name}'\nwhen = {{ to = '{name}' }}\n" for name in names)
    models = {name: build_tiny_llama(tmp_path / name, seed=seed) for seed, name in enumerate(names)}
    configs = assign_teachers(
        parse_job_file(job, name="job.toml").table,
        [
            teach_config(
                models[name],
                model_name=name,
                service=service.target,
                prompts=prompts,
                stream="apart" if name == "broken" else "lessons",
                ray_address=cluster.address,
                completions=1,
                max_tokens=60,
                max_batch=4,
                block_bytes=4000,
                kv_cache_mib=64,
            )
            for name in names
        ],
    )
    seen: list[TeachProgress] = []
    with pytest.raises(TeachersFailedError, match="teacher broken: cannot load teacher 'broken'") as caught:
        run_several(prepare_teachers(configs), seen.append)

    at_work = [{one.name for one in moment.teachers if one.tokens_per_second} for moment in seen]
    assert {"maths", "code"} in at_work, "they worked one after another"
    assert any("broken: failed: cannot load" in moment.message for moment in seen)
    reports = caught.value.reports
    assert [(name, one.completed, one.sealed) for name, one in reports.items()] == [
        ("maths", 80, True),
        ("code", 80, True),
    ]
    expected = {(f"{name}-{n}", 0): 1 for name in ("maths", "code") for n in range(80)}
    assert count_samples(service.target) == Counter(expected)
    with TraceClient(service.target) as client, pytest.raises(StreamNotFoundError):
        client.get_stream("apart")
