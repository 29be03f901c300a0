"""The loop of a rollout process: newer weights, a wave of rollouts, and on.

    trainer ── weights, progress ──► student's engine ── waves ──► pipeline ── traces ──► stream ──► trainer

Invariants: a wave is drawn by one version of the weights. The engine waits when enough rollouts are under
way, or when new ones would be too old before their turn comes. What a process that was killed had written is
scored and published first, unless it has become too old; what it had published is not published again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from lynearm.client import Publisher, TeacherClient, TraceClient
from lynearm.rollouts.config import RolloutConfig
from lynearm.rollouts.demand import Demand
from lynearm.rollouts.engine import StudentEngine
from lynearm.rollouts.messages import Loaded, Message, Status, Stop, Taken, Weights
from lynearm.rollouts.pipeline import FinishedWave, PendingWave, Pipeline
from lynearm.rollouts.spool import Spool, SpoolPosition
from lynearm.rollouts.waves import Wave
from lynearm.rollouts.writing import RolloutWriter
from lynearm.wire.codec import decode_block

logger = logging.getLogger(__name__)

PRODUCER_ID = "student"

_STATUS_SECONDS = 0.5
_WAIT_SECONDS = 0.2
_EMPTY_SECONDS = 1.0
"""Until a stream without prompts is looked at again."""
_FAREWELL_SECONDS = 20.0
"""For what is being scored when the process is stopped: it is paid for."""


class RolloutWorker:
    """One rollout process, without its pipes.

    Args:
        config: What to do.
        send: Tells the trainer something; called from several threads.
        make_engine: Makes the engine with the first weights; tests share one.
    """

    def __init__(
        self,
        config: RolloutConfig,
        send: Callable[[Message], None],
        make_engine: Callable[[RolloutConfig, Path], StudentEngine] = StudentEngine,
    ) -> None:
        self._config = config
        self._send = send
        self._make_engine = make_engine
        self._changed = threading.Condition()
        # What follows is guarded by _changed.
        self._demand = Demand(
            config.max_staleness,
            config.per_step,
            config.ahead,
            config.wave,
            first_step=config.step,
            step=config.step,
        )
        self._weights: Weights | None = None
        self._stopped = False
        self._status = Status()
        # The rest belongs to the thread that runs.
        self._loaded_step = -1
        self._busy_seconds = 0.0
        self._said = 0.0

    def receive(self, message: Message) -> None:
        """Take what the trainer says; from any thread."""
        with self._changed:
            if isinstance(message, Weights):
                self._weights = message
            elif isinstance(message, Taken):
                demand = self._demand
                demand.step, demand.taken, demand.stale = message.step, message.traces, message.stale
            elif isinstance(message, Stop):
                self._stopped = True
            self._changed.notify_all()

    def run(self) -> None:
        """Work until it is told to stop.

        Raises:
            LynearmError: what makes it impossible to go on.
        """
        weights = self._first_weights()
        if weights is None:
            return
        config = self._config
        engine = self._make_engine(config, Path(weights.directory))
        self._note_loaded(weights.step, engine)
        spool = Spool(config.directory / "spool")
        with ExitStack() as stack:
            stack.callback(engine.close)
            client = stack.enter_context(
                TraceClient(config.service, timeout_seconds=config.service_timeout_seconds)
            )
            teacher = stack.enter_context(
                TeacherClient(config.teacher, timeout_seconds=config.service_timeout_seconds)
            )
            info = client.get_stream(config.stream)
            publisher = client.publisher(config.stream, PRODUCER_ID)
            stack.callback(_leave, publisher)
            pipeline = Pipeline(
                config,
                info.spec,
                teacher=teacher,
                publisher=publisher,
                spool=spool,
                session=f"rollouts-{info.created_unix_nano}",
                on_finished=self._note_finished,
            )
            stack.callback(pipeline.close, _FAREWELL_SECONDS)
            writer = RolloutWriter(config, engine, client, info)
            self._go_on(spool, pipeline, writer)
            self._loop(spool, pipeline, writer)

    def _first_weights(self) -> Weights | None:
        with self._changed:
            self._changed.wait_for(lambda: self._weights is not None or self._stopped)
            return None if self._stopped else self._weights

    def _go_on(self, spool: Spool, pipeline: Pipeline, writer: RolloutWriter) -> None:
        """Finish what a process before this one left."""
        unfinished = list(spool.unfinished())
        found = writer.look_into_stream(from_offset=min((one.offset for one in unfinished), default=None))
        with self._changed:
            self._demand.waiting += found.waiting
        position = spool.position()
        for one in unfinished:
            rest = tuple(trace for trace in one.wave.rollouts if trace.sample_index not in found.numbers)
            blocks = tuple(block for block in one.blocks if not _numbers(block) <= found.numbers)
            is_too_old = not one.blocks and self._demand.is_too_old(one.wave.step)
            if not rest or is_too_old or (one.blocks and not blocks):
                spool.forget(one.name)
                continue
            logger.info("rollouts %d to %d were left unfinished", rest[0].sample_index, rest[-1].sample_index)
            self._count_under_way(len(rest))
            self._pass_on(PendingWave(one.name, Wave(rest), blocks), pipeline)
        last = max((one.wave.rollouts[-1].sample_index for one in unfinished), default=-1)
        number = max(position.number, found.next_number, last + 1)
        writer.begin(SpoolPosition(number, position.prompt))

    def _loop(self, spool: Spool, pipeline: Pipeline, writer: RolloutWriter) -> None:
        while not self._is_stopped():
            pipeline.check()
            self._refresh(writer.engine)
            count = self._wait_for_demand(pipeline)
            if not count:
                continue
            started = time.monotonic()
            wave = writer.write(count, self._loaded_step, partial(self._says_stop, "writing", pipeline))
            self._busy_seconds += time.monotonic() - started
            if wave is None:
                if not self._is_stopped():
                    self._wait("prompts that can be answered", pipeline, _EMPTY_SECONDS)
                continue
            self._note_written(wave)
            name = spool.keep_rollouts(wave, offset=writer.least_offset, vocab_size=writer.engine.vocab_size)
            spool.move_to(writer.position)
            self._pass_on(PendingWave(name, wave), pipeline)

    def _pass_on(self, pending: PendingWave, pipeline: Pipeline) -> None:
        """Hand a wave over to be scored; waits while another one waits."""
        started = time.monotonic()
        pipeline.put(pending, partial(self._says_stop, "waiting for the teacher's scores", pipeline))
        with self._changed:
            waited_seconds = self._status.waiting_teacher_seconds + time.monotonic() - started
            self._status = replace(self._status, waiting_teacher_seconds=waited_seconds)

    def _refresh(self, engine: StudentEngine) -> None:
        with self._changed:
            weights = self._weights
        if weights is not None and weights.step != self._loaded_step:
            engine.refresh(Path(weights.directory))
            self._note_loaded(weights.step, engine)

    def _wait_for_demand(self, pipeline: Pipeline) -> int:
        """Rollouts to write; 0 after a while, or when there is something else to do."""
        with self._changed:
            count = self._demand.wanted(self._loaded_step)
        if not count:
            old = self._demand.is_too_old(self._loaded_step)
            reason = "newer weights" if old else "the trainer to use what there is"
            self._wait(reason, pipeline, _WAIT_SECONDS)
        return count

    def _wait(self, reason: str, pipeline: Pipeline, seconds: float) -> None:
        self._tell(f"waiting for {reason}", pipeline)
        started = time.monotonic()
        with self._changed:
            self._changed.wait(seconds)
            waited_seconds = self._status.waiting_trainer_seconds + time.monotonic() - started
            self._status = replace(self._status, waiting_trainer_seconds=waited_seconds)

    def _is_stopped(self) -> bool:
        return self._stopped

    def _says_stop(self, activity: str, pipeline: Pipeline) -> bool:
        """Whether to stop, asked in the midst of something, of which the trainer hears."""
        self._tell(activity, pipeline)
        return self._stopped

    def _count_under_way(self, count: int) -> None:
        with self._changed:
            self._demand.under_way += count

    def _note_loaded(self, step: int, engine: StudentEngine) -> None:
        self._loaded_step = step
        self._send(Loaded(step, engine.error))

    def _note_written(self, wave: Wave) -> None:
        self._count_under_way(len(wave.rollouts))
        with self._changed:
            tokens = self._status.tokens + wave.tokens
            rate = tokens / self._busy_seconds if self._busy_seconds else 0.0
            self._status = replace(self._status, tokens=tokens, tokens_per_second=rate)

    def _note_finished(self, finished: FinishedWave) -> None:
        with self._changed:
            self._demand.under_way -= finished.published + finished.refused
            self._demand.waiting += finished.published
            before = self._status
            self._status = replace(
                before,
                rollouts=before.rollouts + finished.published,
                scored_tokens=before.scored_tokens + finished.scored_tokens,
                divergence=before.divergence if finished.divergence is None else finished.divergence,
            )
            self._changed.notify_all()

    def _tell(self, activity: str, pipeline: Pipeline) -> None:
        """Say how it goes, now and then."""
        now = time.monotonic()
        if now - self._said < _STATUS_SECONDS:
            return
        self._said = now
        if pipeline.waiting_reason:
            activity = f"waiting for {pipeline.waiting_reason}"
        with self._changed:
            self._status = status = replace(self._status, activity=activity)
        self._send(status)


def _numbers(block: bytes) -> frozenset[int]:
    return frozenset(trace.sample_index for trace in decode_block(block))


def _leave(publisher: Publisher) -> None:
    # What was scored is in the stream, or in the spool: nothing is waited for here.
    publisher.__exit__(InterruptedError, InterruptedError(), None)
