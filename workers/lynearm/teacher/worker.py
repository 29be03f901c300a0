"""The teacher's worker: a loaded engine that turns leased prompts into published traces.

It runs inside a Ray actor, but knows nothing of Ray: `load`, `connect`, `attempt` and `run` block, one after
the other, while `progress`, `drain` and `stop` may be called from other threads. A worker holds no state that
matters: a sample is done exactly if the stream has its trace, and what a dead worker held goes to others.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from lynearm.client.leases import Lease
from lynearm.teacher.config import TeachConfig
from lynearm.teacher.connection import WorkerConnection
from lynearm.teacher.engine import Completion, TeacherEngine
from lynearm.teacher.leasing import Assignment, LeaseAhead
from lynearm.teacher.orphans import end_with_parent
from lynearm.teacher.prompt_content import decode_prompt
from lynearm.teacher.prompts import Prompt
from lynearm.teacher.publishing import FinishedPrompt
from lynearm.teacher.selection import TraceSelection, verifier_of
from lynearm.teacher.worker_progress import LeasedWork, WorkerProgress
from lynearm.wire.errors import (
    InternalError,
    InvalidInputError,
    LeaseSupersededError,
    LynearmError,
    PromptFinishedError,
    TeacherError,
)
from lynearm.wire.specs import CodecSpec, StreamSpec
from lynearm.wire.traces import Int32Array, Trace
from lynearm.wire.work import MAX_REASON_BYTES, FailedSamples

logger = logging.getLogger(__name__)

RunEnd: TypeAlias = Literal["done", "dry", "drained", "stopped"]
"""Why `run` returned. done: the whole job is; dry: others hold what is left of it."""

_WAIT_SECONDS = 0.1
_LAST_WORDS_SECONDS = 10.0
"""How long a worker whose engine is dead may take to save what it had finished."""

_MAX_REOPENINGS = 5
"""Refusals in a row, without a finished prompt between them."""


class EngineFailedError(TeacherError):
    """The engine raised an error that is not about one request: nothing more can be expected of it."""


@dataclass(slots=True)
class _Pending:
    """A prompt on its way through the engine."""

    lease: Lease
    prompt: Prompt
    sample_indices: tuple[int, ...]
    token_ids: Int32Array
    traces: dict[int, Trace]


class TeacherWorker:
    """Owns an engine; leases, generates, encodes and publishes.

    Args:
        config: What to load, and how to sample.
        producer_id: Names its blocks; that of the config when empty.
        holder: Names its leases; the producer id when empty.
    """

    def __init__(self, config: TeachConfig, producer_id: str = "", holder: str = "") -> None:
        self._config = config
        self._producer_id = producer_id or config.producer_id
        self._holder = holder or self._producer_id
        self._engine: TeacherEngine | None = None
        self._connection: WorkerConnection | None = None
        self._selection: TraceSelection | None = None
        self._stop = threading.Event()
        self._drain = threading.Event()
        self._progress = WorkerProgress(process_id=os.getpid())
        self._pending: dict[str, _Pending] = {}

    def load(self) -> StreamSpec:
        """Load the model, and say what the stream is to be.

        Raises:
            ConfigError, MissingDependencyError: as for `TeacherEngine`.
        """
        verifier_of(self._config)  # what is wrong with it comes out before the model is loaded
        self._engine = TeacherEngine(self._config)
        teacher, tokenizer = self._engine.describe()
        return StreamSpec(
            name=self._config.stream,
            teacher=teacher,
            tokenizer=tokenizer,
            codec=CodecSpec(
                self._config.codec,
                self._engine.top_k,
                min_probability=self._config.min_probability,
                draws=self._config.draws,
                hidden=self._engine.hidden,
                tail_draws=self._config.tail_draws,
            ),
            license=self._config.license,
            labels=dict(self._config.labels),
        )

    def connect(self, spec: StreamSpec, job: str) -> None:
        """Get ready to work on a job of the stream.

        Raises:
            StreamExistsError: if the stream exists with another spec.
        """
        self._selection = self._selection or self._make_selection()
        self._connection = WorkerConnection(
            self._config,
            spec,
            job,
            producer_id=self._producer_id,
            holder=self._holder,
            selection=self._selection,
        )

    def run(self) -> RunEnd:
        """Answer prompts until there is nothing to lease, or until told to end; what it made is durable then.

        Raises:
            EngineFailedError: if the engine died; the leases of what was in it are still held.
            LynearmError: what ended the publishing, for example that another producer took over.
        """
        refusals, done_before = 0, -1
        while True:
            try:
                return self._run_once()
            except (LeaseSupersededError, PromptFinishedError) as error:
                # It was silent for too long, and others went on with its work.
                refusals = 1 if self._progress.generated_prompts > done_before else refusals + 1
                if refusals > _MAX_REOPENINGS:
                    raise
                done_before = self._progress.generated_prompts
                logger.warning("stream %s: %s; beginning anew", self._config.stream, error)
                self._abort_all()
                self._connected.reopen()

    def attempt(self, work: Sequence[LeasedWork]) -> None:
        """Answer some prompts with nothing else in the engine; durable on return.

        Args:
            work: At most one for each lease.

        Raises:
            EngineFailedError: if the engine died of them.
            LynearmError: what ended the publishing.
        """
        for one in work:
            lease = Lease(one.key, one.prompts)
            for prompt in one.prompts:
                self._start(Assignment(lease, prompt))
        try:
            while self._loaded.unfinished and not self._stop.is_set():
                self._step()
            self._abort_all()
            self._connected.writer.flush()
        except (LeaseSupersededError, PromptFinishedError) as error:
            logger.warning("stream %s: %s; others answered it", self._config.stream, error)
            self._abort_all()
            self._connected.reopen()

    def disconnect(self) -> WorkerProgress:
        """Give back what it leased and did not finish; how far it came. Idempotent.

        Raises:
            LynearmError: what ended the publishing.
        """
        connection = self._connection
        if connection is not None:
            try:
                connection.close()
            finally:
                self._progress = self.progress()
                self._connection = None
        return self.progress()

    def progress(self) -> WorkerProgress:
        """How far it is; from any thread, at any time."""
        engine, connection = self._engine, self._connection
        selection = self._selection
        progress = replace(
            self._progress,
            generated_tokens=engine.generated_tokens if engine else 0,
            verdicts=Counter(selection.verdicts if selection else {}),
            left_out=selection.left_out if selection else 0,
        )
        if connection is None:
            return progress
        job = connection.prompt_worker.job
        return replace(
            progress,
            acked_blocks=connection.acked_blocks,
            waiting_seconds=connection.waiting_seconds,
            waiting_reason=connection.waiting_reason,
            encode_seconds=connection.encode_seconds,
            job_done_units=job.done_units if job else 0,
        )

    def end_with_parent(self) -> None:
        """End the process when the one that started it has ended: in an actor, the raylet of its node."""
        end_with_parent()

    def drain(self) -> None:
        """Make `run` return once what it began is finished."""
        self._drain.set()

    def stop(self) -> None:
        """Make `run` return soon: unfinished completions are dropped, finished prompts published."""
        self._stop.set()

    @property
    def _loaded(self) -> TeacherEngine:
        if self._engine is None:
            raise InternalError("the worker was asked to run before it loaded its engine")
        return self._engine

    @property
    def _connected(self) -> WorkerConnection:
        if self._connection is None:
            raise InternalError("the worker was asked to run before it knew its job")
        return self._connection

    def _make_selection(self) -> TraceSelection:
        spans = self._loaded.tokenizer.spans
        return TraceSelection(
            verifier_of(self._config),
            self._config.keep,
            lambda trace: spans.answer_text(
                trace.completion_token_ids.tolist(), trace.spans, trace.finish_reason, trace.stop_string
            ),
        )

    def _run_once(self) -> RunEnd:
        source = self._connected.lease_ahead()
        try:
            end = self._generate(source)
            self._connected.writer.flush()
            if self._connected.profile is not None:
                self._connected.profile.store(self._loaded.take_statistics())
        finally:
            # After a failure of the engine, what was in it stays leased until it is known what did it.
            source.keep_begun()
        return "done" if end == "dry" and self._connected.is_job_done() else end

    def _generate(self, source: LeaseAhead) -> RunEnd:
        while not self._stop.is_set():
            if self._drain.is_set():
                source.keep_begun()
            self._feed(source)
            if self._loaded.unfinished:
                self._step()
            elif source.is_dry:
                return "drained" if self._drain.is_set() else "dry"
            else:
                source.wait(_WAIT_SECONDS)
        self._abort_all()
        return "stopped"

    def _feed(self, source: LeaseAhead) -> None:
        """Keep the engine full, and little more: what waits in it is lost at a stop."""
        while self._loaded.unfinished < self._config.max_batch + self._config.completions - 1:
            assignment = source.next()
            if assignment is None:
                break
            self._start(assignment)
        self._update(running=self._loaded.unfinished)

    def _step(self) -> None:
        for completion in self._of_engine(self._loaded.step):
            self._collect(completion)
        self._drop_lost()
        profile = self._connected.profile
        if profile is not None and profile.is_due:
            profile.store(self._loaded.take_statistics())
        self._connected.writer.check()
        self._update(running=self._loaded.unfinished)

    def _of_engine(self, work: Callable[[], list[Completion]]) -> list[Completion]:
        try:
            return work()
        # Whatever it raises, in whatever process of its own: what is in it cannot be trusted any more.
        except Exception as error:
            with contextlib.suppress(LynearmError):
                self._connected.writer.flush(_LAST_WORDS_SECONDS)
            text = str(error).strip().split("\n", 1)[0][:300]
            raise EngineFailedError(f"the engine failed: {type(error).__name__}: {text}") from error

    def _drop_lost(self) -> None:
        lost = [prompt_id for prompt_id, pending in self._pending.items() if pending.lease.is_lost]
        self._abort(lost)

    def _start(self, assignment: Assignment) -> None:
        """Put a prompt into the engine; what the engine cannot take is given up."""
        leased, engine = assignment.prompt, self._loaded
        if leased.prompt_id in self._pending:
            # Its lease was lost and comes back before that was noticed: what it has so far is of no use.
            self._abort([leased.prompt_id])
        pending: _Pending | None = None
        try:
            prompt = decode_prompt(leased.prompt_id, leased.content)
            token_ids = engine.tokenizer.encode(prompt)
            pending = _Pending(assignment.lease, prompt, leased.sample_indices, token_ids, {})
            self._pending[leased.prompt_id] = pending
            for sample_index in leased.sample_indices:
                sampling = engine.sampling(leased.prompt_id, sample_index, token_ids.size)
                engine.add(f"{sample_index}:{leased.prompt_id}", token_ids.tolist(), sampling)
        except (InvalidInputError, TeacherError) as error:
            if pending is not None:
                self._abort([leased.prompt_id])
            self._refuse(assignment, error)
            return
        self._update(prompt_tokens=self._progress.prompt_tokens + token_ids.size)

    def _refuse(self, assignment: Assignment, error: LynearmError) -> None:
        leased = assignment.prompt
        reason = error.message.encode()[:MAX_REASON_BYTES].decode(errors="ignore").replace("\0", " ")
        failed = FailedSamples(leased.prompt_id, leased.sample_indices, reason)
        self._connected.writer.put(FinishedPrompt(assignment.lease, (), (failed,)))
        self._update(failed_prompts=self._progress.failed_prompts + 1)

    def _collect(self, completion: Completion) -> None:
        sample, _, prompt_id = completion.request_id.partition(":")
        pending = self._pending[prompt_id]
        trace = self._trace(pending, int(sample), completion)
        pending.traces[trace.sample_index] = trace
        if not trace.completion_text.strip():
            self._update(empty_completions=self._progress.empty_completions + 1)
        if len(pending.traces) == len(pending.sample_indices):
            del self._pending[prompt_id]
            in_order = tuple(trace for _, trace in sorted(pending.traces.items()))
            self._connected.writer.put(FinishedPrompt(pending.lease, in_order))
            self._update(generated_prompts=self._progress.generated_prompts + 1)

    def _trace(self, pending: _Pending, sample_index: int, completion: Completion) -> Trace:
        engine = self._loaded
        token_ids = completion.token_ids.tolist()
        prompt = pending.prompt
        return Trace(
            prompt_id=prompt.prompt_id,
            prompt_token_ids=pending.token_ids,
            completion_token_ids=completion.token_ids,
            sampled_logprobs=completion.sampled_logprobs,
            top_k=completion.top_k,
            finish_reason=completion.finish_reason,
            sample_index=sample_index,
            spans=engine.tokenizer.spans.find(
                pending.token_ids.tolist(), token_ids, completion.finish_reason, completion.stop_string
            ),
            sampling=engine.sampling(prompt.prompt_id, sample_index, pending.token_ids.size),
            tags=prompt.tags,
            completion_text=engine.tokenizer.decode(token_ids, engine.eos_token_ids),
            stop_string=completion.stop_string,
            hidden=completion.hidden,
        )

    def _abort_all(self) -> None:
        self._abort(list(self._pending))

    def _abort(self, prompt_ids: Sequence[str]) -> None:
        request_ids = [
            f"{sample_index}:{prompt_id}"
            for prompt_id in prompt_ids
            for sample_index in self._pending.pop(prompt_id).sample_indices
        ]
        if request_ids:
            self._loaded.abort(request_ids)
        self._update(running=self._loaded.unfinished)

    def _update(self, **changes: object) -> None:
        # Replaced whole, so that other threads always see one consistent state.
        self._progress = replace(self._progress, **changes)  # type: ignore[arg-type]  # fields by name
