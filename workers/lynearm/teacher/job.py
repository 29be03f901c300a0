"""One teaching job: prompts in, a stream of traces out, whatever dies on the way.

Invariants: the stream alone says which prompts are finished. A worker that dies is replaced, under the same
producer id, by one that asks the stream what is left; what the dead one had not published is generated again,
what it had is not. A job that is stopped goes on when the same command runs again.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from lynearm.client import StreamInfo, TraceClient
from lynearm.teacher.config import TeachConfig
from lynearm.teacher.prompt_sources import load_prompts
from lynearm.teacher.prompts import BadLine, Prompt
from lynearm.teacher.ray_actor import WorkerActor, WorkerLostError, ray_session
from lynearm.teacher.worker import WorkerProgress
from lynearm.wire.errors import MissingDependencyError, StreamNotFoundError, StreamSealedError, TeacherError

logger = logging.getLogger(__name__)

Stage: TypeAlias = Literal["waiting", "starting", "loading", "generating", "sealing", "done"]

MAX_BARREN_RESTARTS = 3
"""Workers that may die in a row without a prompt finished between them."""

_POLL_SECONDS = 0.5
_STOP_SECONDS = 30.0
"""How long a worker may take to publish what it has when it is asked to stop."""
_RATE_WINDOW_SECONDS = 15.0


@dataclass(frozen=True, slots=True)
class TeachProgress:
    """How far a job is; given to `on_progress` about twice a second."""

    stage: Stage
    message: str = ""
    """What a person should know now: what is waited for, what was restarted."""
    prompts: int = 0
    """Prompts of the file, bad lines not counted."""
    done_prompts: int = 0
    """Prompts whose completions are generated, those of earlier runs included."""
    skipped_prompts: int = 0
    """Bad lines, and prompts that the teacher cannot take."""
    generated_tokens: int = 0
    """Completion tokens generated in this run."""
    tokens_per_second: float = 0.0
    """Over the last 15 seconds."""
    acked_blocks: int = 0
    """Blocks that are durable."""
    waiting_seconds: float = 0.0
    """How long the teacher waited for the service to take blocks."""
    restarts: int = 0
    verdicts: Mapping[str, int] = field(default_factory=dict[str, int])
    """Completions of this run by verdict; empty without a verifier."""
    worker_process_id: int = 0
    """Process that holds the engine, on whatever node it runs; 0 while there is none."""


@dataclass(frozen=True, slots=True)
class TeachReport:
    """What a job did."""

    stream: str
    prompts: int
    """Prompts of the file, bad lines not counted."""
    finished_before: int
    """Prompts of the file that the stream had already."""
    completed: int
    """Prompts that this run finished; durable."""
    completions: int
    """Traces that this run added to the stream."""
    empty_completions: int
    completion_tokens: int
    """Tokens of those traces: what the stream holds more than before."""
    prompt_tokens: int
    generated_tokens: int
    """Completion tokens that the engine made, those included that a dead worker lost."""
    skipped: tuple[BadLine, ...]
    blocks: int
    """Blocks that this run added."""
    size_bytes: int
    """Bytes of those blocks."""
    restarts: int
    seconds: float
    stage_seconds: Mapping[str, float] = field(default_factory=dict[str, float])
    """Wall time of waiting, starting, loading, generating and sealing; encoding runs beside generating."""
    verdicts: Mapping[str, int] = field(default_factory=dict[str, int])
    """Completions by verdict, those included that a dead worker lost; empty without a verifier."""
    left_out: int = 0
    """Of those, completions that were not published."""
    interrupted: bool = False
    """Stopped before the end; the same command goes on from here."""
    sealed: bool = False


OnProgress: TypeAlias = Callable[[TeachProgress], None]


def run_teach(config: TeachConfig, on_progress: OnProgress = lambda progress: None) -> TeachReport:
    """Let the teacher answer every prompt of a file that the stream does not have yet.

    Waits for a service that is not there. Ctrl-C stops cleanly: what is finished is published, and the report
    says `interrupted`; a second Ctrl-C stops at once.

    Args:
        config: What to do.
        on_progress: Called on this thread, about twice a second.

    Raises:
        MissingDependencyError: without Ray or vLLM. Nothing was started.
        PromptFileError: if the file cannot be read or, with `strict`, has a bad line. Nothing was started.
        StreamExistsError: if the stream exists with another spec.
        StreamSealedError: if it is sealed, and prompts are not finished.
        TeacherError: if the worker keeps dying.
        LynearmError: what else the engine or the service said.
    """
    with TraceClient(config.service) as client:
        return _Job(config, client, on_progress).run()


class _Job:
    def __init__(self, config: TeachConfig, client: TraceClient, on_progress: OnProgress) -> None:
        self._config = config
        self._client = client
        self._on_progress = on_progress
        self._started = time.monotonic()
        self._stage: Stage = "waiting"
        self._stage_seconds: dict[str, float] = {}
        self._prompts: tuple[Prompt, ...] = ()
        self._bad_lines: tuple[BadLine, ...] = ()
        self._worker = WorkerProgress()
        self._earlier = WorkerProgress()
        self._finished_before_worker = 0
        self._restarts = 0
        self._interrupted = False
        self._rates: deque[tuple[float, int]] = deque([(self._started, 0)])

    def run(self) -> TeachReport:
        _check_installed()
        loaded = load_prompts(self._config.prompts, strict=self._config.strict)
        self._prompts, self._bad_lines = loaded.prompts, loaded.bad_lines
        if self._config.route is not None:
            self._prompts = tuple(self._config.route.apply(self._prompts))
        with self._in_stage("waiting"):
            self._wait_for_service()
        before = self._stream()
        finished_before = self._finished_prompts()
        remaining = len(self._prompts) - finished_before
        if remaining and before is not None and before.sealed:
            raise StreamSealedError(
                f"stream {self._config.stream!r} is sealed, and {remaining} prompts are not in it",
                "write them to a stream of another name",
            )
        if remaining:
            self._teach()
        sealed = self._seal()
        self._stage = "done"
        self._report_progress()
        return self._report(before, finished_before, sealed)

    def _teach(self) -> None:
        cpus = self._config.threads or len(os.sched_getaffinity(0))
        # Ray forks its servers from this process, and while a channel is open gRPC's fork handlers abort such
        # a child now and then, for which Ray then waits half a minute. The next call opens a channel again.
        self._client.close()
        try:
            with ExitStack() as stack:
                with self._in_stage("starting"):
                    ray = stack.enter_context(ray_session(self._config.ray_address, cpus))
                self._supervise(ray, cpus)
        except KeyboardInterrupt:
            self._interrupted = True

    def _supervise(self, ray: Any, cpus: int) -> None:  # Any: the module ray
        """Run workers until one comes to its end."""
        barren = 0
        while True:
            self._finished_before_worker = self._finished_prompts()
            try:
                self._one_worker(ray, cpus)
                return
            except WorkerLostError as error:
                self._restarts += 1
                self._retire_worker()
                self._wait_for_service()
                barren = 0 if self._finished_prompts() > self._finished_before_worker else barren + 1
                if barren >= MAX_BARREN_RESTARTS:
                    raise TeacherError(
                        f"{error.message}; that was worker {barren} in a row without a finished prompt",
                        "lower max_batch or max_model_len if memory is short, and see Ray's logs",
                    ) from error
                logger.warning("stream %s: %s; starting another", self._config.stream, error)
                self._report_progress(f"{error.message}; starting another")

    def _one_worker(self, ray: Any, cpus: int) -> None:
        actor = WorkerActor(ray, self._config, cpus)
        try:
            with self._in_stage("loading"):
                spec = self._result(actor, actor.load(), stoppable=False)
            with self._in_stage("generating"):
                self._worker = self._result(actor, actor.run(spec, self._prompts), stoppable=True)
        finally:
            actor.kill()
        self._interrupted = self._interrupted or self._worker.stopped

    def _result(self, actor: WorkerActor, reference: Any, *, stoppable: bool) -> Any:
        """What a call of the actor returns, with progress meanwhile; the first Ctrl-C stops the worker."""
        give_up_at = float("inf")
        while True:
            try:
                if actor.finished(reference, _POLL_SECONDS):
                    return actor.result(reference)
                self._worker = actor.progress(_POLL_SECONDS) or self._worker
                self._report_progress("stopping" if self._interrupted else self._worker.waiting_reason)
                if time.monotonic() > give_up_at:
                    raise KeyboardInterrupt
            except KeyboardInterrupt:
                if self._interrupted or not stoppable:
                    raise
                self._interrupted = True
                give_up_at = time.monotonic() + _STOP_SECONDS
                actor.stop()

    def _retire_worker(self) -> None:
        """Add what a dead worker did to what was done earlier."""
        dead, earlier = self._worker, self._earlier
        self._earlier = WorkerProgress(
            generated_tokens=earlier.generated_tokens + dead.generated_tokens,
            empty_completions=earlier.empty_completions + dead.empty_completions,
            acked_blocks=earlier.acked_blocks + dead.acked_blocks,
            waiting_seconds=earlier.waiting_seconds + dead.waiting_seconds,
            encode_seconds=earlier.encode_seconds + dead.encode_seconds,
            verdicts=_added(earlier.verdicts, dead.verdicts),
            left_out=earlier.left_out + dead.left_out,
        )
        self._worker = WorkerProgress()

    def _wait_for_service(self) -> None:
        message = f"waiting for the trace service at {self._config.service}"
        self._client.wait_until_ready(on_wait=lambda: self._report_progress(message))

    def _stream(self) -> StreamInfo | None:
        try:
            return self._client.get_stream(self._config.stream)
        except StreamNotFoundError:
            return None

    def _finished_prompts(self) -> int:
        """Prompts of this file that the stream has."""
        try:
            finished = self._client.finished_prompts(self._config.stream)
        except StreamNotFoundError:
            return 0
        return sum(prompt.prompt_id in finished for prompt in self._prompts)

    def _seal(self) -> bool:
        if self._interrupted or not self._config.seal:
            return False
        with self._in_stage("sealing"):
            self._wait_for_service()
            return self._client.seal_stream(self._config.stream).sealed

    @contextmanager
    def _in_stage(self, stage: Stage) -> Generator[None]:
        self._stage = stage
        self._report_progress()
        entered = time.monotonic()
        try:
            yield
        finally:
            spent = self._stage_seconds.get(stage, 0.0) + time.monotonic() - entered
            self._stage_seconds[stage] = spent

    def _report_progress(self, message: str = "") -> None:
        generated = self._earlier.generated_tokens + self._worker.generated_tokens
        self._on_progress(
            TeachProgress(
                stage=self._stage,
                message=message,
                prompts=len(self._prompts),
                done_prompts=self._finished_before_worker + self._worker.generated_prompts,
                skipped_prompts=len(self._bad_lines) + len(self._worker.skipped),
                generated_tokens=generated,
                tokens_per_second=self._tokens_per_second(generated),
                acked_blocks=self._earlier.acked_blocks + self._worker.acked_blocks,
                waiting_seconds=self._earlier.waiting_seconds + self._worker.waiting_seconds,
                restarts=self._restarts,
                verdicts=_added(self._earlier.verdicts, self._worker.verdicts),
                worker_process_id=self._worker.process_id,
            )
        )

    def _tokens_per_second(self, generated_tokens: int) -> float:
        now = time.monotonic()
        self._rates.append((now, generated_tokens))
        while len(self._rates) > 2 and now - self._rates[0][0] > _RATE_WINDOW_SECONDS:
            self._rates.popleft()
        since, tokens = self._rates[0]
        return (generated_tokens - tokens) / (now - since) if now > since else 0.0

    def _report(self, before: StreamInfo | None, finished_before: int, sealed: bool) -> TeachReport:
        self._wait_for_service()
        after = self._stream()
        earlier, worker = self._earlier, self._worker
        stages = self._stage_seconds | {"encoding": earlier.encode_seconds + worker.encode_seconds}
        return TeachReport(
            stream=self._config.stream,
            prompts=len(self._prompts),
            finished_before=finished_before,
            completed=self._finished_prompts() - finished_before,
            completions=_growth(before, after, "trace_count"),
            empty_completions=earlier.empty_completions + worker.empty_completions,
            completion_tokens=_growth(before, after, "completion_token_count"),
            prompt_tokens=_growth(before, after, "prompt_token_count"),
            generated_tokens=earlier.generated_tokens + worker.generated_tokens,
            skipped=(*self._bad_lines, *worker.skipped),
            blocks=_growth(before, after, "next_offset"),
            size_bytes=_growth(before, after, "size_bytes"),
            restarts=self._restarts,
            seconds=time.monotonic() - self._started,
            stage_seconds=stages,
            verdicts=_added(earlier.verdicts, worker.verdicts),
            left_out=earlier.left_out + worker.left_out,
            interrupted=self._interrupted,
            sealed=sealed,
        )


def _added(*counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sum((Counter(count) for count in counts), Counter[str]()))


def _growth(before: StreamInfo | None, after: StreamInfo | None, name: str) -> int:
    return int(getattr(after, name, 0)) - int(getattr(before, name, 0))


def _check_installed() -> None:
    # Found, not imported: that takes half a minute, and happens in the actor.
    missing = [name for name in ("ray", "vllm") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            f"{' and '.join(missing)} not installed, which the teacher needs",
            "pip install 'lynearm[teacher]' or, without a GPU, 'lynearm[teacher-cpu]'",
        )
