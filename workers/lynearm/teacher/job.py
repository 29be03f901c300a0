"""One teaching job: prompts in, a stream of traces out, whatever dies on the way.

Invariants: the service alone says which samples are done, and one is done in the transaction that commits
its trace. Workers come and go; what a dead one had not published is generated again, what it had is not. A
job that is stopped goes on when the same command runs again.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Collection, Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from lynearm.client import StreamInfo, TraceClient
from lynearm.client.job_calls import JobInfo
from lynearm.teacher.config import TeachConfig
from lynearm.teacher.crew import Allow
from lynearm.teacher.job_progress import JobProgress, OnProgress
from lynearm.teacher.model_source import pin_model
from lynearm.teacher.preflight import runs_here
from lynearm.teacher.progress import TeachProgress, TeachReport
from lynearm.teacher.prompt_job import MAX_REPORTED_FAILURES, JobPrompts, PromptJob
from lynearm.teacher.ray_actor import RayWorkers, teacher_session
from lynearm.teacher.ray_cluster import Untyped
from lynearm.teacher.slot import Totals
from lynearm.teacher.supervisor import Supervisor
from lynearm.wire.errors import (
    InternalError,
    JobCancelledError,
    MissingDependencyError,
    StreamNotFoundError,
    StreamSealedError,
)

__all__ = ["OnProgress", "TeachProgress", "TeachReport", "run_teach"]

POLL_SECONDS = 0.25
"""Between two looks at a job's workers."""


def run_teach(config: TeachConfig, on_progress: OnProgress = lambda progress: None) -> TeachReport:
    """Let the teacher answer every prompt that the stream does not have yet.

    Waits for a service that is not there. Ctrl-C stops cleanly: what is finished is published, and the report
    says `interrupted`; a second Ctrl-C stops at once.

    Args:
        config: What to do.
        on_progress: Called on this thread, about twice a second.

    Raises:
        MissingDependencyError: without Ray or vLLM. Nothing was started.
        ConfigError: if there is no such model, or it does not fit here. Nothing was started.
        PromptFileError: if the prompts cannot be read or, with `strict`, one is bad. Nothing was started.
        StreamExistsError: if the stream exists with another spec.
        StreamSealedError: if it is sealed, and prompts are not finished.
        JobCancelledError: if somebody ended the job.
        JobExistsError: if the job that the config names has other prompts.
        TeacherError: if workers keep dying.
        LynearmError: what else the engine or the service said.
    """
    with TraceClient(config.service) as client:
        job = TeachJob(settled(config), client, on_progress)
        if job.look():
            job.prepare_for_ray()
            try:
                with teacher_session(job.config.ray_address, local_cpus([job.config])) as ray:
                    _run_alone(job, ray)
            except KeyboardInterrupt:
                job.interrupted = True
        return job.conclude()


def settled(config: TeachConfig) -> TeachConfig:
    """A configuration in which nothing depends any more on when and where it is read.

    Raises:
        MissingDependencyError, ConfigError: as for `run_teach`.
    """
    check_installed()
    address = "local" if runs_here(config) else config.ray_address or "auto"
    return replace(pin_model(config), ray_address=address)


class TeachJob:
    """One job from its first look at the service to its report.

    In this order: `look`; where there is work, `begin` on a connected Ray, `tick` until `has_ended`, `close`;
    `conclude`. `tick` waits for nothing, so that one loop may run several jobs; the others may wait for the
    service.

    Args:
        config: From `settled`.
        client: Of its service.
        on_progress: Called on the thread that calls the job, about twice a second.
    """

    def __init__(self, config: TeachConfig, client: TraceClient, on_progress: OnProgress) -> None:
        self.config = config
        self._client = client
        self._progress = JobProgress(config, on_progress)
        self._prompts: JobPrompts | None = None
        self._work: PromptJob | None = None
        self._before: StreamInfo | None = None
        self._supervisor: Supervisor | None = None
        self.interrupted = False
        """Whether it was told to stop before its end."""

    @property
    def supervisor(self) -> Supervisor | None:
        """Of its workers; None before `begin`."""
        return self._supervisor

    @property
    def has_ended(self) -> bool:
        """Whether there is nothing left to look at."""
        return self._supervisor is None or self._supervisor.has_ended

    def look(self) -> bool:
        """Read the prompts, and see what the stream has of them; whether there is work.

        Raises:
            PromptFileError, StreamSealedError, JobCancelledError, LynearmError: as for `run_teach`.
        """
        self._prompts = prompts = JobPrompts(self.config)
        self._progress.prompts, self._progress.skipped_prompts = prompts.count, prompts.bad_line_count
        self._work = PromptJob(self._client, self.config, prompts)
        self._wait_for_service()
        self._before = self._stream()
        job = self._work.find()
        self._progress.finished_before = self._work.count_finished(self._before, job)
        is_done = job is not None and job.state == "done"
        remaining = 0 if is_done else prompts.count - self._progress.finished_before
        if remaining:
            self._refuse_in_vain(self._before, job, remaining)
        return remaining > 0

    def prepare_for_ray(self) -> None:
        """Close what must not be open while Ray starts; before `begin`, unless Ray is connected."""
        # Ray forks its servers from this process, and while a channel is open gRPC's fork handlers abort such
        # a child now and then, for which Ray then waits half a minute. The next call opens a channel again.
        self._client.close()
        self._progress.enter("starting")

    def begin(self, ray: Untyped, allow: Allow = lambda count: count) -> None:
        """Start to place workers.

        Args:
            ray: The connected module.
            allow: As `Supervisor` takes it.
        """
        self._progress.enter("loading")
        workers = RayWorkers(ray, self.config)
        self._supervisor = Supervisor(self.config, workers, self._looked_at_work, allow=allow)
        self._progress.supervisor = self._supervisor

    def tick(self) -> None:
        """Look at everything once; waits for nothing.

        Raises:
            LynearmError: what makes the job impossible; TeacherError if workers keep dying.
        """
        supervisor = self._supervisor
        if supervisor is None:
            return
        supervisor.tick()
        if self._progress.stage == "loading" and supervisor.has_connected:
            self._progress.enter("generating")
        self._progress.say_now_and_then(supervisor, is_stopping=self.interrupted)

    def stop(self) -> None:
        """End soon: what is finished is published, and the report says `interrupted`."""
        self.interrupted = True
        if self._supervisor is not None:
            self._supervisor.stop()

    def close(self) -> None:
        """End every worker at once. Idempotent."""
        if self._supervisor is not None:
            self._supervisor.close()
        if self._work is not None:
            self._work.close()

    def conclude(self, *, seal: bool = True) -> TeachReport:
        """What the job did; seals the stream where its config says so, unless it was interrupted.

        Args:
            seal: False leaves it to others.
        """
        sealed = self._seal() if seal else False
        self._wait_for_service()
        self._progress.enter("done")
        self._progress.say()
        return self._report(self._looked_at_work, sealed=sealed)

    @property
    def _looked_at_work(self) -> PromptJob:
        if self._work is None:
            raise InternalError("the job was used before it looked at its prompts")
        return self._work

    def _refuse_in_vain(self, stream: StreamInfo | None, job: JobInfo | None, remaining: int) -> None:
        """Start nothing that can publish nothing."""
        if stream is not None and stream.sealed:
            raise StreamSealedError(
                f"stream {self.config.stream!r} is sealed, and {remaining} prompts are not in it",
                "write them to a stream of another name",
            )
        if job is not None and job.state == "cancelled":
            raise JobCancelledError(
                f"job {job.name!r} of stream {self.config.stream!r} was cancelled",
                "to answer its prompts after all, name another job: what is done stays done",
            )

    def _wait_for_service(self) -> None:
        message = f"waiting for the trace service at {self.config.service}"
        self._client.wait_until_ready(on_wait=lambda: self._progress.say(message))

    def _stream(self) -> StreamInfo | None:
        try:
            return self._client.get_stream(self.config.stream)
        except StreamNotFoundError:
            return None

    def _seal(self) -> bool:
        if self.interrupted or not self.config.seal:
            return False
        self._progress.enter("sealing")
        self._wait_for_service()
        return self._client.seal_stream(self.config.stream).sealed

    def _report(self, work: PromptJob, *, sealed: bool) -> TeachReport:
        before, after, job = self._before, self._stream(), work.find()
        progress, supervisor = self._progress, self._supervisor
        totals = supervisor.totals() if supervisor else Totals()
        failed = work.failures(job)
        return TeachReport(
            stream=self.config.stream,
            job=_name(job),
            prompts=progress.prompts,
            finished_before=progress.finished_before,
            completed=work.count_finished(after, job) - progress.finished_before,
            completions=_growth(before, after, "trace_count"),
            empty_completions=totals.empty_completions,
            completion_tokens=_growth(before, after, "completion_token_count"),
            prompt_tokens=_growth(before, after, "prompt_token_count"),
            generated_tokens=totals.generated_tokens,
            skipped=self._prompts.bad_lines if self._prompts else (),
            failed=failed[:MAX_REPORTED_FAILURES],
            blocks=_growth(before, after, "next_offset"),
            size_bytes=_growth(before, after, "size_bytes"),
            restarts=supervisor.restarts if supervisor else 0,
            seconds=progress.seconds,
            workers=supervisor.most_workers if supervisor else 0,
            failed_prompts=len(failed),
            stage_seconds=progress.stage_seconds | {"encoding": totals.encode_seconds},
            verdicts=dict(totals.verdicts),
            left_out=totals.left_out,
            interrupted=self.interrupted,
            sealed=sealed,
        )


def _name(job: JobInfo | None) -> str:
    return "" if job is None else job.name


def _growth(before: StreamInfo | None, after: StreamInfo | None, name: str) -> int:
    return int(getattr(after, name, 0)) - int(getattr(before, name, 0))


def local_cpus(configs: Sequence[TeachConfig]) -> int:
    """CPUs of a Ray that is started for these jobs: for a worker of each, as far as the machine has them."""
    machine = len(os.sched_getaffinity(0))
    wanted = [config.threads * max(1, config.workers) or machine for config in configs]
    return max(*wanted, min(sum(wanted), machine))


def _run_alone(job: TeachJob, ray: Untyped) -> None:
    job.begin(ray)
    try:
        while not job.has_ended:
            with stopping_once([job]):
                job.tick()
                time.sleep(POLL_SECONDS)
    finally:
        job.close()


@contextmanager
def stopping_once(jobs: Collection[TeachJob]) -> Generator[None]:
    """Let the first Ctrl-C end the work of jobs, and the second one everything."""
    try:
        yield
    except KeyboardInterrupt:
        if not jobs or any(job.interrupted for job in jobs):
            raise
        for job in jobs:
            job.stop()


def check_installed() -> None:
    """Refuse to begin without Ray or vLLM.

    Raises:
        MissingDependencyError: naming what is missing.
    """
    # Found, not imported: that takes half a minute, and happens in the actors.
    missing = [name for name in ("ray", "vllm") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            f"{' and '.join(missing)} not installed, which the teacher needs",
            "pip install 'lynearm[teacher]' or, without a GPU, 'lynearm[teacher-cpu]'",
        )
