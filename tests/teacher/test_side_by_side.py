"""Several jobs on one cluster: who begins when, who gets more room, and what one's end means to others.

Stand-ins: jobs and nodes are plain objects, so that a test decides who ends when. `test_fleet` has real ones.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from models.teaching import teach_config

from lynearm.teacher import side_by_side
from lynearm.teacher.placement import NodeView, worker_share
from lynearm.teacher.progress import TeachProgress, WorkerStatus
from lynearm.teacher.shared_progress import SharedProgress, merge_progress
from lynearm.teacher.side_by_side import SideBySide
from lynearm.wire.errors import LynearmError, TeacherError

GIB = float(1 << 30)


class Cluster:
    """Nodes of one CPU."""

    def __init__(self, count: int, memory_gib: float = 8.0) -> None:
        self.free = [1.0] * count
        self.memory_gib = memory_gib

    def nodes(self, _: Any = None) -> Sequence[NodeView]:
        total = {"CPU": 1.0, "memory": self.memory_gib * GIB}
        return [
            NodeView(f"node-{number}", f"node-{number}", total, {**total, "CPU": cpus})
            for number, cpus in enumerate(self.free)
        ]


class Job:
    """A job whose workers a test counts; it takes the first free node for each."""

    def __init__(self, cluster: Cluster, log: list[str], name: str, **settings: Any) -> None:
        self.config = teach_config(Path("nowhere"), ray_address="auto", **settings)
        self.cluster = cluster
        self.log = log
        self.name = name
        self.interrupted = False
        self.supervisor: Any = None
        self.on_tick: Callable[[], None] = lambda: None
        self.has_ended = False
        self.allow: Callable[[int], int] = lambda count: count

    def begin(self, ray: Any, allow: Callable[[int], int]) -> None:
        self.log.append(f"{self.name} begins")
        self.allow = allow
        self.supervisor = SimpleNamespace(slots=[], sees_room=False, is_settled=True, has_connected=False)

    def tick(self) -> None:
        self.supervisor.sees_room = any(self.cluster.free)
        for _ in range(self.allow(sum(map(bool, self.cluster.free)))):
            node = self.cluster.free.index(1.0)
            self.cluster.free[node] = 0.0
            self.supervisor.slots.append(node)
        self.on_tick()

    def stop(self) -> None:
        self.interrupted = True

    def close(self) -> None:
        for node in self.supervisor.slots:
            self.cluster.free[node] = 1.0
        self.supervisor.slots = []


class Scene:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, nodes: int, *names: str, **settings: Any) -> None:
        monkeypatch.setattr(side_by_side, "POLL_SECONDS", 0.0)
        monkeypatch.setattr(side_by_side, "_ADMISSION_SECONDS", -1.0)
        self.cluster = Cluster(nodes)
        monkeypatch.setattr(side_by_side, "live_nodes", self.cluster.nodes)
        self.log: list[str] = []
        self.errors: dict[str, LynearmError | None] = {}
        self.jobs: dict[str, Any] = {name: Job(self.cluster, self.log, name, **settings) for name in names}
        self.most_workers: dict[str, int] = dict.fromkeys(names, 0)
        self.ticks = dict.fromkeys(names, 0)
        for job in self.jobs.values():
            job.on_tick = lambda job=job: self.note(job)

    def note(self, job: Job) -> None:
        if not any(line.endswith("ends") for line in self.log):
            self.most_workers[job.name] = max(self.most_workers[job.name], len(job.supervisor.slots))
        self.ticks[job.name] += 1
        job.has_ended = job.interrupted or self.ticks[job.name] >= 5

    def waits(self, name: str, why: str) -> None:
        if why and why not in self.log:
            self.log.append(f"{name}: {why}")

    def ends(self, name: str, error: LynearmError | None) -> None:
        self.log.append(f"{name} ends")
        self.errors[name] = error

    def run(self) -> None:
        SideBySide(None, self.jobs, self.waits, self.ends).run()


def test_jobs_run_side_by_side_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, 2, "maths", "code")
    scene.run()
    assert scene.log == ["maths begins", "code begins", "maths ends", "code ends"]
    assert scene.most_workers == {"maths": 1, "code": 1}
    assert scene.cluster.free == [1.0, 1.0]


def test_without_room_they_run_one_after_the_other_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, 1, "maths", "code")
    scene.run()
    share = worker_share(scene.jobs["code"].config, scene.cluster.nodes())
    waits = f"code: waiting for room for {share} beside maths"
    assert scene.log[:2] == ["maths begins", waits]
    assert scene.log[-3:] == ["maths ends", "code begins", "code ends"]


def test_memory_is_room_too(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, 2, "maths", "code", kv_cache_mib=7 << 10)
    scene.run()
    # 9 GiB fit on no node: each begins once nothing else runs, and its supervisor says what it waits for.
    assert scene.log.index("maths ends") < scene.log.index("code begins")


def test_memory_that_others_use_on_this_machine_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, 2, "maths", "code")
    for job in scene.jobs.values():
        job.config = replace(job.config, ray_address="local")
    need = worker_share(scene.jobs["code"].config, scene.cluster.nodes()).memory_bytes
    monkeypatch.setattr(side_by_side, "free_memory", lambda: int(1.5 * need))
    room = {"CPU": 2.0, "memory": 64 * GIB}
    monkeypatch.setattr(side_by_side, "live_nodes", lambda _: [NodeView("here", "here", room, room)])
    for job in scene.jobs.values():
        job.config = replace(job.config, threads=1)
    scene.run()
    assert scene.log.index("maths ends") < scene.log.index("code begins")


def test_room_that_is_left_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, 7, "maths", "code", "art")
    scene.run()
    assert sorted(scene.most_workers.values()) == [2, 2, 3]


def test_a_job_that_fails_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, 2, "maths", "code")

    def fail() -> None:
        raise TeacherError("its model does not load")

    scene.jobs["maths"].on_tick = fail
    scene.run()
    assert isinstance(scene.errors["maths"], TeacherError)
    assert scene.errors["code"] is None
    assert scene.ticks["code"] == 5
    assert scene.cluster.free == [1.0, 1.0]


def test_ctrl_c_ends_those_that_run_and_begins_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, 2, "maths", "code", "art")
    before = scene.jobs["code"].on_tick

    def interrupt() -> None:
        before()
        if scene.ticks["code"] == 2:
            signal.raise_signal(signal.SIGINT)

    scene.jobs["code"].on_tick = interrupt
    scene.run()
    assert [job.interrupted for job in scene.jobs.values()] == [True, True, False]
    assert "art begins" not in scene.log
    assert scene.log[-2:] == ["maths ends", "code ends"]


def test_a_second_ctrl_c_ends_everything_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, 2, "maths", "code")
    scene.jobs["maths"].on_tick = lambda: signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        scene.run()
    assert scene.cluster.free == [1.0, 1.0]


def test_progress_of_several_is_that_of_one_job() -> None:
    seen: list[TeachProgress] = []
    shared = SharedProgress(["maths", "code"], seen.append)
    worker = WorkerStatus("teacher-maths-0", "generating")
    shared.of("maths")(
        TeachProgress("generating", prompts=10, done_prompts=4, tokens_per_second=5.0, workers=(worker,))
    )
    shared.note("code", "waiting for room")
    merged = seen[-1]
    assert (merged.stage, merged.prompts, merged.done_prompts) == ("generating", 10, 4)
    assert merged.message == "code: waiting for room"
    assert [(one.name, one.stage, one.workers) for one in merged.teachers] == [
        ("maths", "generating", 1),
        ("code", "waiting", 0),
    ]
    shared.note("code", "")
    shared.of("code")(TeachProgress("loading", "the model", prompts=3, eta_seconds=None))
    assert (seen[-1].prompts, seen[-1].message) == (13, "code: the model")
    assert seen[-1].eta_seconds is None, "of one that is still loading nothing can be said"


def test_one_teacher_says_what_it_would_say_alone() -> None:
    alone = TeachProgress("generating", prompts=3, eta_seconds=4.0)
    assert merge_progress({"maths": alone}, {}) is alone
