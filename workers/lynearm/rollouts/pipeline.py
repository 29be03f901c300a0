"""Scores waves and publishes them, on a thread of its own, while the student writes the next one.

Invariants: waves are published in the order in which they were written, each block once, also by processes
that take each other's place. At most one wave waits to be scored; then the writing waits. The spool has a
wave until the stream has it. A teacher or a trace service that is away is waited for.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lynearm.client import Publisher, TeacherClient
from lynearm.rollouts.config import RolloutConfig
from lynearm.rollouts.scoring import into_blocks, score_request, score_settings, scored_rollout
from lynearm.rollouts.spool import Spool
from lynearm.rollouts.waves import Wave, sampled_divergence
from lynearm.wire.codec import encode_block
from lynearm.wire.errors import DeadlineError, LynearmError, MisalignmentError, ServiceUnavailableError
from lynearm.wire.labels import summarise_tags
from lynearm.wire.scoring import ScoredCompletion, TeacherInfo
from lynearm.wire.specs import StreamSpec, bound_position_bytes
from lynearm.wire.traces import Trace

logger = logging.getLogger(__name__)

BLOCK_BYTES = 256 << 10
_LOOK_SECONDS = 1.0
"""How often it is asked whether the teacher is away, while nothing comes from it."""
_POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class PendingWave:
    """A wave on its way into the stream."""

    name: str
    """In the spool."""
    wave: Wave
    blocks: tuple[bytes, ...] = ()
    """Scored and encoded before, by a process that was killed."""


@dataclass(frozen=True, slots=True)
class FinishedWave:
    """What became of a wave."""

    published: int
    """Rollouts in the stream."""
    refused: int
    """Rollouts that the teacher cannot score."""
    scored_tokens: int
    divergence: float | None


def check_teacher(info: TeacherInfo, spec: StreamSpec) -> None:
    """Refuse a teacher that is not the one whose opinions a stream holds.

    Raises:
        MisalignmentError: if it is another model, or numbers tokens otherwise.
    """
    ours, theirs = spec.teacher, info.spec
    if (ours.model, ours.revision, ours.vocab_size) != (theirs.model, theirs.revision, theirs.vocab_size):
        raise MisalignmentError(
            f"stream {spec.name!r} holds what teacher {ours.model!r} ({ours.revision}) says, and "
            f"{theirs.model!r} ({theirs.revision}) is served",
            "serve the teacher of before, or begin a run with a rollout stream of its own",
        )


class Pipeline:
    """The thread; `close` it.

    Args:
        config: Says what a row holds.
        spec: Of the stream.
        teacher: Scores.
        publisher: Publishes; the caller closes it.
        spool: Keeps what is on its way.
        session: See `scoring.score_settings`.
        on_finished: Told of each wave, on this thread.
    """

    def __init__(
        self,
        config: RolloutConfig,
        spec: StreamSpec,
        *,
        teacher: TeacherClient,
        publisher: Publisher,
        spool: Spool,
        session: str,
        on_finished: Callable[[FinishedWave], None],
    ) -> None:
        self._config = config
        self._spec = spec
        self._teacher = teacher
        self._publisher = publisher
        self._spool = spool
        self._settings = score_settings(config, session)
        self._on_finished = on_finished
        self._queue: queue.Queue[PendingWave | None] = queue.Queue(1)
        self._error: BaseException | None = None
        self._heard: float | None = None
        """When the teacher was heard last; None while nothing is asked of it."""
        self._scored_any = False
        self._has_met = False
        self._bytes_per_token = bound_position_bytes(spec.codec.mode, config.top_k, config.tail_draws)
        self.waiting_reason = ""
        """Why nothing goes on; empty while it does."""
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="score-rollouts", daemon=True)
        self._watcher = threading.Thread(target=self._watch, name="watch-teacher", daemon=True)
        self._thread.start()
        self._watcher.start()

    def put(self, pending: PendingWave, should_stop: Callable[[], bool]) -> bool:
        """Hand over a wave; waits while another one waits. False if it should stop before.

        Raises:
            LynearmError: what stopped the scoring or the publishing of an earlier one.
        """
        while not should_stop():
            self.check()
            try:
                self._queue.put(pending, timeout=_POLL_SECONDS)
            except queue.Full:
                continue
            return True
        return False

    def check(self) -> None:
        """Raise what stopped the pipeline, if anything did."""
        if self._error is not None:
            raise self._error

    def close(self, timeout_seconds: float) -> None:
        """End after what it was handed, or after this time: what is left then is in the spool."""
        self._closed.set()
        self._thread.join(timeout_seconds)

    def _run(self) -> None:
        try:
            if not self._meet_teacher():
                return
            while (pending := self._next()) is not None:
                # Another one may have been started at the address; and one that is away is waited for here.
                if not pending.blocks and not self._meet_teacher():
                    return
                self._on_finished(self._finish(pending))
        # Whatever it is, the thread that writes raises it.
        except BaseException as error:
            self._error = error

    def _meet_teacher(self) -> bool:
        """Wait for the teacher, and see that it is the stream's; False if the pipeline is closed before."""
        while not self._closed.is_set():
            try:
                info = self._teacher.describe()
            except (ServiceUnavailableError, DeadlineError) as error:
                self.waiting_reason = f"the teacher at {self._config.teacher}"
                logger.info("the teacher is away: %s", error.message)
                self._closed.wait(_LOOK_SECONDS)
                continue
            self.waiting_reason = ""
            check_teacher(info, self._spec)
            self._has_met = True
            return True
        return False

    def _next(self) -> PendingWave | None:
        while True:
            try:
                return self._queue.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                if self._closed.is_set():
                    return None

    def _finish(self, pending: PendingWave) -> FinishedWave:
        finished = FinishedWave(len(pending.wave.rollouts), 0, 0, None)
        blocks = pending.blocks
        if not blocks:
            scored = self._score(pending.wave)
            finished = self._account(pending.wave, scored)
            blocks = self._encode(list(scored.values()))
            self._spool.keep_scored(pending.name, blocks)
        for block in blocks:
            self._publisher.publish(block, tags=summarise_tags(one.tags for one in pending.wave.rollouts))
        self._publisher.flush()
        self._spool.forget(pending.name)
        return finished

    def _score(self, wave: Wave) -> dict[int, Trace]:
        """The rollouts that the teacher could score, by number, in their order."""
        rollouts = {trace.sample_index: trace for trace in wave.rollouts}
        requests = {score_request(trace, self._config.support): number for number, trace in rollouts.items()}
        names = {request.request_id: number for request, number in requests.items()}
        found: dict[int, Trace] = {}
        refusals: list[LynearmError] = []

        def note_refusal(name: str, error: LynearmError) -> None:
            logger.warning("rollout %s cannot be scored: %s", name, error)
            refusals.append(error)

        self._heard = time.monotonic()
        try:
            for scored in self._teacher.score(list(requests), self._settings, on_failure=note_refusal):
                self._heard = time.monotonic()
                found[names[scored.request_id]] = self._scored(rollouts[names[scored.request_id]], scored)
        finally:
            self._heard = None
        self._scored_any = self._scored_any or bool(found)
        if refusals and not self._scored_any:
            # What it says of all is about the settings, not about one rollout.
            raise refusals[0]
        return dict(sorted(found.items()))

    def _scored(self, rollout: Trace, scored: ScoredCompletion) -> Trace:
        return scored_rollout(rollout, scored, self._config.support)

    def _account(self, wave: Wave, scored: dict[int, Trace]) -> FinishedWave:
        kept = [trace for trace in wave.rollouts if trace.sample_index in scored]
        return FinishedWave(
            published=len(kept),
            refused=len(wave.rollouts) - len(kept),
            scored_tokens=sum(trace.completion_token_ids.size for trace in kept),
            # The student's logprobs are at temperature 1; those of another one are no estimate.
            divergence=sampled_divergence(kept, list(scored.values()))
            if self._config.score_temperature == 1.0
            else None,
        )

    def _encode(self, traces: Sequence[Trace]) -> tuple[bytes, ...]:
        return tuple(
            encode_block(run, codec=self._spec.codec, vocab_size=self._spec.teacher.vocab_size)
            for run in into_blocks(traces, self._bytes_per_token, BLOCK_BYTES)
        )

    def _watch(self) -> None:
        """Notice a teacher that is away: scoring itself waits for it without a word."""
        while self._thread.is_alive():
            time.sleep(_LOOK_SECONDS)
            heard = self._heard
            is_silent = heard is not None and time.monotonic() - heard > 2 * _LOOK_SECONDS
            away = self._is_teacher_away() if is_silent else ""
            if self._has_met:
                self.waiting_reason = away or self._publisher.waiting_reason

    def _is_teacher_away(self) -> str:
        try:
            self._teacher.describe(timeout_seconds=_LOOK_SECONDS * 2)
        except ServiceUnavailableError:
            return f"the teacher at {self._config.teacher}"
        except LynearmError as error:
            # A busy one answers late.
            logger.debug("the teacher: %s", error)
        return ""
