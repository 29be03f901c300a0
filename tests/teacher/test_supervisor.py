"""What the supervisor does about nodes that come and go, and workers that die.

Stand-ins: nodes, processes and the queue are plain objects, so that a test decides who dies when.
`test_fleet` has real ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from models.teaching import teach_config

from lynearm.client.job_calls import JobInfo
from lynearm.client.leases import Lease
from lynearm.teacher.placement import NodeView, WorkerShare
from lynearm.teacher.quarantine import Suspect, SuspectGroup
from lynearm.teacher.ray_actor import WorkerLostError, WorkerOutOfReachError
from lynearm.teacher.recovery import MAX_VERDICTS
from lynearm.teacher.supervisor import MAX_BARREN_DEATHS, Supervisor
from lynearm.teacher.worker_progress import LeasedWork, WorkerProgress
from lynearm.wire.errors import ConfigError, StreamExistsError, TeacherError
from lynearm.wire.work import LeasedPrompt, LeaseKey

GIB = float(1 << 30)


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


class FakePlace:
    def __init__(self, cluster: FakeCluster, share: WorkerShare) -> None:
        self.cluster = cluster
        self.fits = share.memory_bytes <= 8 * GIB
        self.released = False
        self.placed = ""

    def node_id(self) -> str:
        if not self.placed and self.fits:
            self.placed = self.cluster.find_room()
        return self.placed

    def strategy(self) -> Any:
        return None

    def release(self) -> None:
        self.released = True


class FakeActor:
    """A process: the test says what its current call came to."""

    def __init__(self, place: FakePlace, producer_id: str, holder: str) -> None:
        self.place = place
        self.producer_id = producer_id
        self.holder = holder
        self.calls: list[str] = []
        self.work: Sequence[LeasedWork] = ()
        self.outcome: Any = None
        self.is_finished = False
        self.finds_nothing = False
        self.killed = False
        self.reported: WorkerProgress | None = None

    def call(self, method: str, *arguments: Any) -> Any:
        self.calls.append(method)
        if method in ("drain", "stop"):
            return None
        self.is_finished = method in ("load", "connect", "disconnect")
        self.outcome = {"load": "the spec", "disconnect": WorkerProgress()}.get(method)
        if method == "run" and self.finds_nothing:
            self.finish("dry")
        if method == "attempt":
            (self.work,) = arguments
        return method

    def finish(self, outcome: Any = None) -> None:
        self.is_finished, self.outcome = True, outcome

    def die(self, why: str = "killed") -> None:
        self.finish(WorkerLostError(why))

    def finished(self, reference: Any, timeout_seconds: float = 0.0) -> bool:
        return self.is_finished

    def result(self, reference: Any) -> Any:
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    def progress(self) -> WorkerProgress | None:
        return self.reported

    def kill(self) -> None:
        self.killed = True


class FakeCluster:
    """Nodes with room for one worker each."""

    def __init__(self, count: int) -> None:
        self.names = [f"node-{number}" for number in range(count)]
        self.draining: set[str] = set()
        self.places: list[FakePlace] = []
        self.actors: list[FakeActor] = []

    def busy(self) -> set[str]:
        return {place.placed for place in self.places if not place.released}

    def find_room(self) -> str:
        free = [name for name in self.names if name not in self.busy() | self.draining]
        return free[0] if free else ""

    def nodes(self) -> Sequence[NodeView]:
        total = {"CPU": 1.0, "memory": 8 * GIB}
        busy = self.busy()
        return [
            NodeView(name, name, total, {} if name in busy else total, is_draining=name in self.draining)
            for name in self.names
        ]

    def reserve(self, share: WorkerShare) -> FakePlace:
        self.places.append(FakePlace(self, share))
        return self.places[-1]

    def start(self, share: WorkerShare, place: Any, *, producer_id: str, holder: str) -> FakeActor:
        self.actors.append(FakeActor(place, producer_id, holder))
        return self.actors[-1]

    @property
    def alive(self) -> list[FakeActor]:
        return [actor for actor in self.actors if not actor.killed]

    def lose(self, name: str) -> None:
        self.names.remove(name)
        for actor in self.alive:
            if actor.place.placed == name:
                actor.die("its node has died")


class FakeQueue:
    name = "job"
    unit_count = 1000

    def __init__(self, held: Sequence[str] = ()) -> None:
        prompts = tuple(LeasedPrompt(number, name, b"", (0,)) for number, name in enumerate(held))
        self.leases = [Lease(LeaseKey(1, 1), prompts)] if prompts else []
        self.kept: list[str] = []
        self.given_back: list[str] = []
        self.answered: list[str] = []
        self.failed: dict[str, str] = {}
        self.state: Any = "open"

    def info(self) -> JobInfo:
        return JobInfo("lessons", "job", 1, 1000, 1000, self.state, 0, 0, 0)

    def prepare(self, spec: Any) -> JobInfo:
        return self.info()

    def give_back(self, holder: str) -> None:
        self.given_back.append(holder)

    def keep(self, holder: str) -> list[Lease]:
        self.kept.append(holder)
        leases, self.leases = self.leases, []
        return leases

    def finish(self, group: SuspectGroup) -> None:
        self.answered += [suspect.prompt.prompt_id for suspect in group.suspects]

    def fail(self, suspect: Suspect, reason: str) -> JobInfo:
        self.failed[suspect.prompt.prompt_id] = reason
        return self.info()


class Scene:
    """A supervisor with its cluster, queue and clock."""

    def __init__(self, nodes: int = 1, held: Sequence[str] = (), **settings: Any) -> None:
        settings = {"completions": 1, "max_batch": 8, "ray_address": "auto"} | settings
        self.clock = Clock()
        self.cluster = FakeCluster(nodes)
        self.queue = FakeQueue(held)
        config = teach_config(Path("nowhere"), **settings)
        self.supervisor = Supervisor(config, self.cluster, self.queue, clock=self.clock)

    def play(self, seconds: float = 20.0) -> None:
        """Let time pass, and errands end."""
        for _ in range(int(seconds * 2)):
            self.clock.seconds += 0.5
            self.supervisor.tick()
            self.supervisor._errands.wait()

    def states(self) -> list[str]:
        return [slot.state for slot in self.supervisor.slots]

    def attempted(self) -> list[list[str]]:
        """What the live workers try with nothing else in their engines."""
        return [
            [prompt.prompt_id for one in actor.work for prompt in one.prompts]
            for actor in self.cluster.alive
            if actor.calls[-1] == "attempt"
        ]


def test_there_are_as_many_workers_as_the_cluster_has_room_for() -> None:
    scene = Scene(nodes=3)
    scene.play()
    assert scene.states() == ["generating"] * 3
    assert [actor.producer_id for actor in scene.cluster.actors] == ["teacher-0", "teacher-1", "teacher-2"]
    assert all(actor.calls == ["load", "connect", "run"] for actor in scene.cluster.actors)


def test_no_more_workers_than_there_are_batches_of_work() -> None:
    scene = Scene(nodes=3)
    scene.queue.unit_count = 9
    scene.play()
    assert scene.states() == ["generating"] * 2


def test_workers_that_are_asked_for_wait_for_room_and_say_for_what() -> None:
    scene = Scene(nodes=1, workers=2)
    scene.play()
    assert scene.states() == ["generating", "waiting"]
    waiting = scene.supervisor.slots[1].status(8)
    assert waiting.waiting_reason == "waiting for 1 CPUs and 3.0 GiB on one node, which others use now"
    scene.cluster.names.append("node-9")
    scene.play()
    assert scene.states() == ["generating", "generating"]


def test_a_node_that_joins_gets_a_worker() -> None:
    scene = Scene(nodes=1)
    scene.play()
    scene.cluster.names.append("node-9")
    scene.play()
    assert {actor.place.placed for actor in scene.cluster.alive} == {"node-0", "node-9"}


def test_a_node_without_enough_memory_is_named_as_what_is_missing() -> None:
    scene = Scene(nodes=2, kv_cache_mib=16 << 10)
    scene.play()
    (waiting,) = scene.supervisor.slots
    assert waiting.reason == (
        "waiting for a node with 1 CPUs and 18.0 GiB: the 2 nodes have at most 1 CPUs and 8.0 GiB"
    )


def test_a_model_that_this_machine_cannot_hold_is_refused_before_anything_starts() -> None:
    scene = Scene(ray_address="local", kv_cache_mib=16 << 10)
    with pytest.raises(ConfigError, match=r"a worker takes 1 CPUs and 18\.0 GiB, which this machine"):
        scene.play()
    assert scene.cluster.places == []


def test_a_draining_node_is_left_once_what_was_begun_is_finished() -> None:
    scene = Scene(nodes=2)
    scene.play()
    leaving = scene.cluster.actors[0]
    scene.cluster.draining.add("node-0")
    scene.play(2)
    assert leaving.calls[-1] == "drain"
    assert scene.states() == ["draining", "generating"]
    leaving.finish("drained")
    scene.play()
    assert leaving.calls[-1] == "disconnect"
    assert leaving.killed
    assert leaving.place.released
    assert scene.states() == ["generating"]
    assert scene.supervisor.restarts == 0


def test_what_went_with_its_node_is_given_back_and_makes_nobody_suspect() -> None:
    scene = Scene(nodes=2, held=["a", "b"])
    scene.play()
    scene.cluster.lose("node-0")
    scene.play()
    assert scene.queue.given_back == ["teacher-0.1"]
    assert scene.queue.kept == []
    assert scene.states() == ["generating"]
    assert scene.attempted() == []


def test_a_successor_of_one_that_is_gone_has_leases_of_its_own() -> None:
    scene = Scene(nodes=2)
    scene.play()
    scene.cluster.lose("node-0")
    scene.play()
    scene.cluster.names.append("node-9")
    scene.play()
    again = scene.cluster.alive[-1]
    assert (again.producer_id, again.holder) == ("teacher-0", "teacher-0.2")
    assert scene.supervisor.slots[0].status(8).restarts == 0


def test_a_worker_that_was_given_up_is_forgotten_with_its_node() -> None:
    scene = Scene(nodes=1)
    scene.play()
    scene.cluster.names.append("node-9")
    while len(scene.cluster.actors) == 1:
        scene.play(0.5)
    scene.cluster.actors[1].finish(ConfigError("no such model on this node"))
    scene.play()
    scene.cluster.names.remove("node-9")
    scene.play()
    assert scene.states() == ["generating"]
    assert scene.cluster.places[1].released


def test_a_node_that_ray_calls_dead_late_makes_nobody_suspect() -> None:
    scene = Scene(nodes=2, held=["a", "b"])
    scene.play()
    scene.cluster.actors[0].finish(WorkerOutOfReachError("the teacher's process cannot be reached"))
    scene.play(20)
    assert scene.states() == ["replacing", "generating"]
    scene.cluster.names.remove("node-0")
    scene.play()
    assert (scene.queue.given_back, scene.queue.kept) == (["teacher-0.1"], [])
    assert scene.supervisor.restarts == 0


def test_suspects_are_tried_in_groups_and_cleared() -> None:
    scene = Scene(held=["a", "b", "c"], max_batch=16)
    scene.play()
    scene.cluster.actors[0].die()
    scene.play()
    assert scene.queue.kept == ["teacher-0.1"]
    assert scene.cluster.actors[1].holder == "teacher-0.2"
    assert scene.attempted() == [["a", "b"]]
    scene.cluster.actors[1].finish()
    scene.play(1)
    assert scene.attempted() == [["c"]]
    scene.cluster.actors[1].finish()
    scene.play(1)
    assert scene.states() == ["generating"]
    assert scene.queue.answered == ["a", "b", "c"]
    assert scene.queue.failed == {}


def test_a_prompt_that_ends_the_engine_alone_is_given_up_and_the_job_goes_on() -> None:
    scene = Scene(held=["a", "b"], max_batch=16)
    scene.play()
    for attempted in ([["a", "b"]], [["a"]]):
        scene.cluster.alive[0].die()
        scene.play()
        assert scene.attempted() == attempted
    scene.cluster.alive[0].finish()
    scene.play(1)
    assert scene.attempted() == [["b"]]
    scene.cluster.alive[0].die("segmentation fault")
    scene.play()
    assert scene.queue.failed == {"b": "ended the engine again when it was alone in it: segmentation fault"}
    assert scene.queue.answered == ["a"]
    assert scene.states() == ["generating"]


def test_a_job_in_which_every_prompt_ends_the_engine_ends_too() -> None:
    scene = Scene(held=[f"p{number}" for number in range(50)])
    scene.play()
    scene.cluster.alive[0].die()

    def die_for_ever() -> None:
        while True:
            scene.play(10)
            scene.cluster.alive[0].die("out of memory")

    with pytest.raises(TeacherError, match="8 prompts in a row ended the engine"):
        die_for_ever()
    assert len(scene.queue.failed) == MAX_VERDICTS - 1


def test_a_group_whose_node_is_lost_is_tried_again_elsewhere() -> None:
    scene = Scene(held=["a"], nodes=2, workers=1)
    scene.play()
    scene.cluster.actors[0].die()
    scene.play()
    assert scene.attempted() == [["a"]]
    scene.cluster.lose("node-0")
    scene.play()
    assert scene.attempted() == [["a"]]
    assert scene.queue.failed == {}


def test_a_worker_that_makes_no_token_is_replaced() -> None:
    scene = Scene()
    scene.play()
    stuck = scene.cluster.actors[0]
    stuck.reported = WorkerProgress(generated_tokens=7, running=3)
    scene.play(890)
    assert not stuck.killed
    scene.play(30)
    assert stuck.killed
    assert scene.states() == ["generating"]


def test_a_worker_that_waits_for_the_service_is_not_stuck() -> None:
    scene = Scene()
    scene.play()
    scene.cluster.actors[0].reported = WorkerProgress(running=3, waiting_reason="the service is away")
    scene.play(1000)
    assert not scene.cluster.actors[0].killed


def test_a_job_whose_workers_keep_dying_ends_with_the_reason() -> None:
    scene = Scene()

    def die_for_ever() -> None:
        while True:
            scene.play(10)
            scene.cluster.alive[0].die("out of memory")

    with pytest.raises(TeacherError, match="out of memory; teacher-0 died 3 times in a row"):
        die_for_ever()
    assert len(scene.cluster.actors) == MAX_BARREN_DEATHS


def test_a_worker_that_keeps_dying_beside_others_is_given_up_alone() -> None:
    scene = Scene(nodes=2)
    scene.play()
    for _ in range(MAX_BARREN_DEATHS):
        victim = next(actor for actor in scene.cluster.alive if actor.producer_id == "teacher-1")
        victim.die("out of memory")
        scene.play()
    assert scene.states() == ["generating", "given up"]
    assert "died 3 times in a row" in scene.supervisor.slots[1].status(8).waiting_reason


def test_finished_prompts_forgive_deaths() -> None:
    scene = Scene()
    for number in range(3 * MAX_BARREN_DEATHS):
        scene.play()
        scene.cluster.alive[0].reported = WorkerProgress(generated_prompts=1 + number)
        scene.play(1)
        scene.cluster.alive[0].die()
    scene.play()
    assert scene.states() == ["generating"]
    assert scene.supervisor.restarts == 3 * MAX_BARREN_DEATHS


def test_an_error_of_the_first_worker_is_the_jobs_and_of_a_later_one_its_own() -> None:
    scene = Scene(nodes=1)
    scene.play(0.5)
    scene.cluster.actors[0].finish(StreamExistsError("it has another spec"))
    with pytest.raises(StreamExistsError):
        scene.play()
    scene = Scene(nodes=1)
    scene.play()
    scene.cluster.names.append("node-9")
    while len(scene.cluster.actors) == 1:
        scene.play(0.5)
    scene.cluster.actors[1].finish(ConfigError("no such model on this node"))
    scene.play()
    assert scene.states() == ["generating", "given up"]
    assert len(scene.cluster.actors) == 2, "no other is tried on that node"


def test_the_job_ends_when_a_worker_finds_it_done() -> None:
    scene = Scene(nodes=2)
    scene.play()
    first, second = scene.cluster.actors
    first.finish("dry")
    scene.play(1)
    assert scene.states() == ["idle", "generating"]
    second.finish("done")
    scene.play(3)
    first.finish("dry")
    scene.play(3)
    assert scene.supervisor.has_ended
    assert all(actor.killed and actor.calls[-1] == "disconnect" for actor in (first, second))
    assert all(place.released for place in scene.cluster.places)


def test_an_idle_worker_asks_again_and_takes_suspects_at_once() -> None:
    scene = Scene(nodes=2, held=["a"], workers=2)
    scene.play()
    idle, dying = scene.cluster.actors
    idle.finds_nothing = True
    idle.finish("dry")
    scene.play(1)
    assert idle.calls.count("run") == 1
    scene.play(3)
    assert idle.calls.count("run") == 2
    dying.die()
    scene.play(8)
    assert idle.calls[-1] == "attempt"


def test_a_stop_lets_workers_publish_and_waits_no_longer_than_it_must() -> None:
    scene = Scene(nodes=2)
    scene.play()
    polite, stubborn = scene.cluster.actors
    scene.supervisor.stop()
    assert polite.calls[-1] == stubborn.calls[-1] == "stop"
    polite.finish("stopped")
    scene.play(20)
    assert polite.killed
    assert not stubborn.killed
    scene.play(20)
    assert stubborn.killed
    assert scene.supervisor.has_ended


def test_closing_kills_everything_and_releases_every_place() -> None:
    scene = Scene(nodes=3)
    scene.play(2)
    scene.supervisor.close()
    assert scene.cluster.alive == []
    assert all(place.released for place in scene.cluster.places)
