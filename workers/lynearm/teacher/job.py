"""One teaching job: prompts in, a stream of traces out, whatever dies on the way.

Invariants: the service alone says which samples are done, and one is done in the transaction that commits
its trace. Workers come and go; what a dead one had not published is generated again, what it had is not. A
job that is stopped goes on when the same command runs again.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TypeAlias

from lynearm.client import StreamInfo, TraceClient
from lynearm.client.job_calls import JobInfo
from lynearm.teacher.config import TeachConfig
from lynearm.teacher.progress import Stage, TeachProgress, TeachReport
from lynearm.teacher.prompt_job import MAX_REPORTED_FAILURES, JobPrompts, PromptJob
from lynearm.teacher.rates import RateMeter
from lynearm.teacher.ray_actor import RayWorkers, ray_session
from lynearm.teacher.ray_cluster import Untyped
from lynearm.teacher.slot import Totals
from lynearm.teacher.supervisor import Supervisor
from lynearm.wire.errors import MissingDependencyError, StreamNotFoundError, StreamSealedError

__all__ = ["OnProgress", "TeachProgress", "TeachReport", "run_teach"]

_POLL_SECONDS = 0.25
_REPORT_SECONDS = 0.5
_MESSAGE_SECONDS = 10.0
"""How long it is said what happened: those who print a line now and then shall not miss it."""

_ETA_WINDOW_SECONDS = 120.0

OnProgress: TypeAlias = Callable[[TeachProgress], None]


def run_teach(config: TeachConfig, on_progress: OnProgress = lambda progress: None) -> TeachReport:
    """Let the teacher answer every prompt that the stream does not have yet.

    Waits for a service that is not there. Ctrl-C stops cleanly: what is finished is published, and the report
    says `interrupted`; a second Ctrl-C stops at once.

    Args:
        config: What to do.
        on_progress: Called on this thread, about twice a second.

    Raises:
        MissingDependencyError: without Ray or vLLM. Nothing was started.
        PromptFileError: if the prompts cannot be read or, with `strict`, one is bad. Nothing was started.
        StreamExistsError: if the stream exists with another spec.
        StreamSealedError: if it is sealed, and prompts are not finished.
        JobExistsError: if the job that the config names has other prompts.
        TeacherError: if workers keep dying.
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
        self._entered = self._started
        self._stage_seconds: dict[str, float] = {}
        self._prompt_count = 0
        self._skipped_count = 0
        self._finished_before = 0
        self._supervisor: Supervisor | None = None
        self._interrupted = False
        self._tokens = RateMeter()
        self._units = RateMeter(_ETA_WINDOW_SECONDS)
        self._reported_at = float("-inf")
        self._message = ("", float("-inf"))

    def run(self) -> TeachReport:
        _check_installed()
        prompts = JobPrompts(self._config)
        self._prompt_count, self._skipped_count = prompts.count, len(prompts.bad_lines)
        work = PromptJob(self._client, self._config, prompts)
        self._wait_for_service()
        before = self._stream()
        job = work.find()
        self._finished_before = work.count_finished(before, job)
        is_done = job is not None and job.state == "done"
        remaining = 0 if is_done else prompts.count - self._finished_before
        if remaining and before is not None and before.sealed:
            raise StreamSealedError(
                f"stream {self._config.stream!r} is sealed, and {remaining} prompts are not in it",
                "write them to a stream of another name",
            )
        if remaining:
            self._teach(work)
        sealed = self._seal()
        self._wait_for_service()
        self._enter("done")
        self._report_progress()
        return self._report(work, prompts, before, sealed=sealed)

    def _teach(self, work: PromptJob) -> None:
        # Ray forks its servers from this process, and while a channel is open gRPC's fork handlers abort such
        # a child now and then, for which Ray then waits half a minute. The next call opens a channel again.
        self._client.close()
        self._enter("starting")
        try:
            with ray_session(self._config.ray_address, _local_cpus(self._config)) as ray:
                self._enter("loading")
                self._supervise(ray, work)
        except KeyboardInterrupt:
            self._interrupted = True

    def _supervise(self, ray: Untyped, work: PromptJob) -> None:
        supervisor = Supervisor(self._config, RayWorkers(ray, self._config), work)
        self._supervisor = supervisor
        try:
            while not supervisor.has_ended:
                with self._stopping_once(supervisor):
                    supervisor.tick()
                    if self._stage == "loading" and supervisor.has_connected:
                        self._enter("generating")
                    self._report_now_and_then(supervisor)
                    time.sleep(_POLL_SECONDS)
        finally:
            supervisor.close()
            work.close()

    @contextmanager
    def _stopping_once(self, supervisor: Supervisor) -> Generator[None]:
        """Let the first Ctrl-C end the work, and the second one everything."""
        try:
            yield
        except KeyboardInterrupt:
            if self._interrupted:
                raise
            self._interrupted = True
            supervisor.stop()

    def _wait_for_service(self) -> None:
        message = f"waiting for the trace service at {self._config.service}"
        self._client.wait_until_ready(on_wait=lambda: self._report_progress(message))

    def _stream(self) -> StreamInfo | None:
        try:
            return self._client.get_stream(self._config.stream)
        except StreamNotFoundError:
            return None

    def _seal(self) -> bool:
        if self._interrupted or not self._config.seal:
            return False
        self._enter("sealing")
        self._wait_for_service()
        return self._client.seal_stream(self._config.stream).sealed

    def _enter(self, stage: Stage) -> None:
        now = time.monotonic()
        spent = self._stage_seconds.get(self._stage, 0.0) + now - self._entered
        self._stage_seconds[self._stage] = spent
        self._stage, self._entered = stage, now
        self._report_progress()

    def _report_now_and_then(self, supervisor: Supervisor) -> None:
        now = time.monotonic()
        if supervisor.message:
            self._message, supervisor.message = (supervisor.message, now + _MESSAGE_SECONDS), ""
        if now - self._reported_at < _REPORT_SECONDS:
            return
        self._reported_at = now
        message, until = self._message
        if self._interrupted:
            message = "stopping"
        elif now > until:
            message = next((slot.progress.waiting_reason for slot in supervisor.slots), "")
            if self._stage == "loading" and supervisor.slots and not message:
                message = supervisor.slots[0].reason
        self._report_progress(message)

    def _report_progress(self, message: str = "") -> None:
        supervisor = self._supervisor
        totals = supervisor.totals() if supervisor else Totals()
        max_batch = self._config.max_batch
        done = self._done_prompts(totals)
        self._on_progress(
            TeachProgress(
                stage=self._stage,
                message=message,
                prompts=self._prompt_count,
                done_prompts=done,
                skipped_prompts=self._skipped_count,
                failed_prompts=totals.failed_prompts + (supervisor.given_up if supervisor else 0),
                generated_tokens=totals.generated_tokens,
                tokens_per_second=self._tokens.update(totals.generated_tokens),
                acked_blocks=totals.acked_blocks,
                waiting_seconds=totals.waiting_seconds,
                restarts=supervisor.restarts if supervisor else 0,
                eta_seconds=self._eta_seconds(done),
                workers=tuple(slot.status(max_batch) for slot in supervisor.slots) if supervisor else (),
            )
        )

    def _done_prompts(self, totals: Totals) -> int:
        """By what workers generated, or by what the service said, which counts those of other commands."""
        here = self._finished_before + totals.generated_prompts
        heard = self._supervisor.done_units() // self._config.completions if self._supervisor else 0
        return min(max(here, heard), self._prompt_count)

    def _eta_seconds(self, done_prompts: int) -> float | None:
        if self._stage != "generating":
            return None
        rate = self._units.update(done_prompts)
        return (self._prompt_count - done_prompts) / rate if rate > 0 else None

    def _report(
        self, work: PromptJob, prompts: JobPrompts, before: StreamInfo | None, *, sealed: bool
    ) -> TeachReport:
        after, job = self._stream(), work.find()
        supervisor = self._supervisor
        totals = supervisor.totals() if supervisor else Totals()
        failed = work.failures(job)
        return TeachReport(
            stream=self._config.stream,
            job=_name(job),
            prompts=prompts.count,
            finished_before=self._finished_before,
            completed=work.count_finished(after, job) - self._finished_before,
            completions=_growth(before, after, "trace_count"),
            empty_completions=totals.empty_completions,
            completion_tokens=_growth(before, after, "completion_token_count"),
            prompt_tokens=_growth(before, after, "prompt_token_count"),
            generated_tokens=totals.generated_tokens,
            skipped=prompts.bad_lines,
            failed=failed[:MAX_REPORTED_FAILURES],
            blocks=_growth(before, after, "next_offset"),
            size_bytes=_growth(before, after, "size_bytes"),
            restarts=supervisor.restarts if supervisor else 0,
            seconds=time.monotonic() - self._started,
            workers=supervisor.most_workers if supervisor else 0,
            failed_prompts=len(failed),
            stage_seconds=self._stage_seconds | {"encoding": totals.encode_seconds},
            interrupted=self._interrupted,
            sealed=sealed,
        )


def _name(job: JobInfo | None) -> str:
    return "" if job is None else job.name


def _growth(before: StreamInfo | None, after: StreamInfo | None, name: str) -> int:
    return int(getattr(after, name, 0)) - int(getattr(before, name, 0))


def _local_cpus(config: TeachConfig) -> int:
    """CPUs of a Ray that is started for this job."""
    return config.threads * max(1, config.workers) or len(os.sched_getaffinity(0))


def _check_installed() -> None:
    # Found, not imported: that takes half a minute, and happens in the actors.
    missing = [name for name in ("ray", "vllm") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            f"{' and '.join(missing)} not installed, which the teacher needs",
            "pip install 'lynearm[teacher]' or, without a GPU, 'lynearm[teacher-cpu]'",
        )
