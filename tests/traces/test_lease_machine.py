"""Any interleaving of workers, crashes, takeovers and publishes, against a model in memory."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import ClassVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from traces.harness import LoopThread, make_spec

from lynearm.traces.catalog import BlockFacts, CommittedBlock, NewBlock, Producer, WrittenGroup
from lynearm.traces.job_records import GivenUp, NewJob, NewPrompts, WorkRequest
from lynearm.traces.sql_catalog import SqlCatalog
from lynearm.traces.sqlite import SqliteDatabase
from lynearm.traces.store import Span, StoredObject
from lynearm.wire.errors import LeaseSupersededError, PromptFinishedError
from lynearm.wire.work import (
    DIGEST_OF_NOTHING,
    FailedSamples,
    FinishedSamples,
    FinishedWork,
    JobPrompt,
    LeaseKey,
    extend_digest,
)

Unit = tuple[str, int]

WORKERS = ("a", "b")


class LeaseMachine(RuleBasedStateMachine):
    """The model knows who was given which units, under which generation, and what is in the stream."""

    loop: ClassVar[LoopThread]

    def __init__(self) -> None:
        super().__init__()
        self._directory = tempfile.TemporaryDirectory()
        self.catalog = self.loop.run(
            SqlCatalog.open(SqliteDatabase(Path(self._directory.name) / "catalog.sqlite3"))
        )
        self.given: list[tuple[LeaseKey, str, frozenset[Unit]]] = []
        self.valid: dict[LeaseKey, str] = {}
        """Holder of each lease that nobody has superseded."""
        self.done: set[Unit] = set()
        """In the stream."""
        self.given_up: set[Unit] = set()
        self.blocks = 0

    @initialize(prompts=st.lists(st.sampled_from("pqrst"), min_size=1, max_size=6), samples=st.integers(1, 4))
    def create(self, prompts: list[str], samples: int) -> None:
        """A job, in which prompts may come twice."""
        self.units = {(prompt_id, index) for prompt_id in prompts for index in range(samples)}
        content = [JobPrompt(prompt_id, b"") for prompt_id in prompts]
        digest = DIGEST_OF_NOTHING
        for prompt in content:
            digest = extend_digest(digest, prompt.prompt_id, b"")
        self.loop.run(self.catalog.create_stream(make_spec(), allow_existing=False))
        self.loop.run(self.catalog.create_job(NewJob("s", "j", samples, len(content), digest)))
        self.loop.run(self.catalog.add_prompts(NewPrompts("s", "j", digest, 0, content)))
        self.producer: Producer = self.loop.run(self.catalog.open_producer("s", "p", 0))

    @rule(
        worker=st.sampled_from(WORKERS),
        max_units=st.integers(1, 9),
        restarted=st.booleans(),
        silent=st.sets(st.sampled_from(WORKERS)),
    )
    def lease(self, worker: str, max_units: int, restarted: bool, silent: set[str]) -> None:
        """A worker asks, while the service takes some of the holders for silent."""
        lost = silent | ({worker} if restarted else set())
        quiet = {key.lease_id for key, holder in self.valid.items() if holder in silent}
        grant = self.loop.run(
            self.catalog.lease_prompts(
                WorkRequest("s", "j", worker, max_units, restarted), lambda _job, held: quiet & held.keys()
            )
        )
        if restarted:
            self.valid = {key: holder for key, holder in self.valid.items() if holder != worker}
        if grant.key is None:
            held_by_others = {
                unit
                for key, holder, units in self.given
                if self.valid.get(key) == holder and holder not in lost
                for unit in units
            }
            assert self.units - self.done - self.given_up <= held_by_others
            return
        key = grant.key
        units = [(one.prompt_id, index) for one in grant.prompts for index in one.sample_indices]
        assert 0 < len(units) == len(set(units)) <= max_units
        assert not self.done & set(units)
        self.valid = {held: holder for held, holder in self.valid.items() if held.lease_id != key.lease_id}
        self.valid[key] = worker
        self.given.append((key, worker, frozenset(units)))

    @rule(data=st.data())
    @precondition(lambda self: self.given)
    def publish(self, data: st.DataObject) -> None:
        """Somebody publishes what it was given, be it long ago."""
        key, _, units = data.draw(st.sampled_from(self.given))
        part = data.draw(st.sets(st.sampled_from(sorted(units)), min_size=1))
        prompts = tuple(
            FinishedSamples(prompt_id, tuple(sorted(index for found, index in part if found == prompt_id)))
            for prompt_id in sorted({prompt_id for prompt_id, _ in part})
        )
        outcome = self._commit(FinishedWork(key, prompts))
        if isinstance(outcome, CommittedBlock):
            assert key in self.valid
            assert not part & self.done
            self.done |= part
        elif isinstance(outcome, PromptFinishedError):
            assert part & (self.done | self.given_up)
        else:
            assert isinstance(outcome, LeaseSupersededError)
            assert key not in self.valid or units <= self.done | self.given_up

    @rule(data=st.data())
    @precondition(lambda self: self.given)
    def give_up(self, data: st.DataObject) -> None:
        """Somebody gives up what it was given, be it long ago."""
        key, _, units = data.draw(st.sampled_from(self.given))
        part = data.draw(st.sets(st.sampled_from(sorted(units)), min_size=1))
        failed = [
            GivenUp(key, FailedSamples(prompt_id, (index,), "why")) for prompt_id, index in sorted(part)
        ]
        try:
            self.loop.run(self.catalog.fail_prompts("s", failed))
        except LeaseSupersededError:
            assert key not in self.valid
        else:
            assert key in self.valid or units <= self.done | self.given_up
            if key in self.valid:
                self.given_up |= part

    @rule(worker=st.sampled_from(WORKERS), predecessor=st.sampled_from(WORKERS), max_units=st.integers(1, 9))
    def take_over(self, worker: str, predecessor: str, max_units: int) -> None:
        """A worker takes over what another held."""
        request = WorkRequest("s", "j", worker, max_units, restarted=False, predecessor=predecessor)
        grant = self.loop.run(self.catalog.lease_prompts(request, lambda _job, _held: set()))
        held = {key.lease_id for key, holder in self.valid.items() if holder == predecessor}
        if grant.key is None:
            left = {
                unit for key, _, units in self.given if self.valid.get(key) == predecessor for unit in units
            }
            assert left <= self.done | self.given_up
            return
        assert grant.key.lease_id in held
        units = frozenset((one.prompt_id, index) for one in grant.prompts for index in one.sample_indices)
        self.valid = {key: who for key, who in self.valid.items() if key.lease_id != grant.key.lease_id}
        self.valid[grant.key] = worker
        self.given.append((grant.key, worker, units))

    @rule(data=st.data())
    @precondition(lambda self: self.given)
    def release(self, data: st.DataObject) -> None:
        """Somebody gives a lease back, be it long ago."""
        key, _, _ = data.draw(st.sampled_from(self.given))
        self.loop.run(self.catalog.release_leases("s", [key]))
        self.valid.pop(key, None)

    @rule()
    def restart(self) -> None:
        """The service is stopped and started."""
        self.loop.run(self.catalog.close())
        self.catalog = self.loop.run(
            SqlCatalog.open(SqliteDatabase(Path(self._directory.name) / "catalog.sqlite3"))
        )

    @invariant()
    def status_is_right(self) -> None:
        """The stream has what the model has; the job's figures count it."""
        locations = self.loop.run(self.catalog.locate_prompts("s", sorted({unit[0] for unit in self.units})))
        samples = {index for _, index in self.units}
        found = [
            (location.prompt_id, index)
            for location in locations
            for index in (location.sample_indices or sorted(samples))
        ]
        assert sorted(found) == sorted(self.done)
        job = self.loop.run(self.catalog.get_job("s", "j"))
        assert job.done_count + job.leased_count <= job.prompt_count * job.samples_per_prompt
        if job.is_done:
            assert self.done | self.given_up == self.units

    def teardown(self) -> None:
        """One worker alone can always finish the job."""
        while True:
            request = WorkRequest("s", "j", "last", 5, True)
            grant = self.loop.run(self.catalog.lease_prompts(request, lambda _job, held: set(held)))
            if grant.key is None:
                break
            prompts = tuple(FinishedSamples(one.prompt_id, one.sample_indices) for one in grant.prompts)
            assert isinstance(self._commit(FinishedWork(grant.key, prompts)), CommittedBlock)
        assert grant.job.is_done
        self.loop.run(self.catalog.close())
        self._directory.cleanup()

    def _commit(self, work: FinishedWork) -> object:
        self.blocks += 1
        # The number of a refused block is free again.
        facts = BlockFacts(8, self.blocks, 1, 1, 1)
        block = NewBlock(self.producer, self.next_sequence, facts, (), (work,))
        group = WrittenGroup(StoredObject(f"o{self.blocks}", (Span(0, 8),)), [block])
        (outcome,) = self.loop.run(self.catalog.commit([group]))
        self.next_sequence += isinstance(outcome, CommittedBlock)
        return outcome

    next_sequence = 1


def test_each_sample_is_published_once_however_workers_and_crashes_interleave(loop: LoopThread) -> None:
    LeaseMachine.loop = loop
    run = LeaseMachine.TestCase
    run.settings = settings(
        max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
    )
    run("runTest").runTest()
