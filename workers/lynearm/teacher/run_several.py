"""Runs a job of several teachers: each answers its part of the prompts, side by side where there is room.

Invariant: a stream is sealed after the last of its teachers, and only if all of them came to their end.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

from lynearm.client import TraceClient
from lynearm.teacher.config import TeachConfig
from lynearm.teacher.job import TeachJob, local_cpus, settled
from lynearm.teacher.job_progress import OnProgress
from lynearm.teacher.progress import TeachReport
from lynearm.teacher.ray_actor import teacher_session
from lynearm.teacher.several import teacher_name
from lynearm.teacher.shared_progress import SharedProgress
from lynearm.teacher.side_by_side import SideBySide
from lynearm.wire.errors import ConfigError, LynearmError, TeacherError

logger = logging.getLogger(__name__)


class TeachersFailedError(TeacherError):
    """Some of several teachers came to no good end.

    Args:
        message: Who, and why.
        remedy: What to do.
        reports: What the others did, by teacher.
        errors: What went wrong, by teacher.
    """

    def __init__(
        self,
        message: str,
        remedy: str = "",
        *,
        reports: Mapping[str, TeachReport] | None = None,
        errors: Mapping[str, LynearmError] | None = None,
    ) -> None:
        super().__init__(message, remedy)
        self.reports = dict(reports or {})
        self.errors = dict(errors or {})


def run_several(
    configs: Sequence[TeachConfig],
    on_progress: OnProgress = lambda progress: None,
    *,
    only: str = "",
) -> dict[str, TeachReport]:
    """Let each teacher answer its part of the prompts, side by side as far as there is room.

    Args:
        configs: What `prepare_teachers` returned.
        on_progress: Called on this thread with the progress of all; as for `run_teach`.
        only: One teacher to run, as where each has a machine of its own. Nothing is sealed then.

    Returns:
        By teacher, in their order: what it did. Without those that had not begun when all were interrupted.

    Raises:
        ConfigError: if there is no teacher named `only`.
        LynearmError: as for `run_teach`, before anything is started; what earlier runs did stays.
        TeachersFailedError: if some failed later; the others came to their ends. The same call goes on.
    """
    by_name = {teacher_name(config): config for config in configs}
    if only and only not in by_name:
        raise ConfigError(f"the job has no teacher {only!r}", f"name one of {', '.join(by_name)}")
    addresses = {config.ray_address for config in configs}
    if len(addresses) > 1:
        raise ConfigError(
            f"the teachers name {len(addresses)} Rays, {' and '.join(map(repr, sorted(addresses)))}",
            "write ray_address under [teach]: all of them share one",
        )
    wanted = {name: settled(config) for name, config in by_name.items() if only in ("", name)}
    with ExitStack() as clients:
        return _Several(wanted, on_progress, clients, may_seal=not only).run()


class _Several:
    """Jobs of teachers from the first look at the service to their reports."""

    def __init__(
        self,
        configs: Mapping[str, TeachConfig],
        on_progress: OnProgress,
        clients: ExitStack,
        *,
        may_seal: bool,
    ) -> None:
        self._configs = configs
        self._progress = SharedProgress(list(configs), on_progress)
        self._clients = {
            name: clients.enter_context(TraceClient(config.service)) for name, config in configs.items()
        }
        self._jobs = {
            name: TeachJob(config, self._clients[name], self._progress.of(name))
            for name, config in configs.items()
        }
        self._may_seal = may_seal
        self._reports: dict[str, TeachReport] = {}
        self._errors: dict[str, LynearmError] = {}

    def run(self) -> dict[str, TeachReport]:
        has_work = {name: job.look() for name, job in self._jobs.items()}
        for name, job in self._jobs.items():
            if not has_work[name]:
                self._conclude(name, job)
        if any(has_work.values()):
            self._teach({name: job for name, job in self._jobs.items() if has_work[name]})
        if self._errors:
            raise self._failure()
        return self._in_order()

    def _teach(self, jobs: Mapping[str, TeachJob]) -> None:
        for job in jobs.values():
            job.prepare_for_ray()
        configs = [job.config for job in jobs.values()]
        try:
            with teacher_session(configs[0].ray_address, local_cpus(configs)) as ray:
                SideBySide(ray, jobs, self._progress.note, self._take_end).run()
        except KeyboardInterrupt:
            for name, job in jobs.items():
                job.interrupted = True
                if name not in self._reports and job.supervisor is not None:
                    self._conclude(name, job)

    def _take_end(self, name: str, error: LynearmError | None) -> None:
        self._progress.note(name, f"failed: {error.message}" if error else "")
        if error is None:
            self._conclude(name, self._jobs[name])
        else:
            self._errors[name] = error

    def _conclude(self, name: str, job: TeachJob) -> None:
        # Of a stream with several teachers, the last one seals.
        sharing = [other for other, config in self._configs.items() if config.stream == job.config.stream]
        others_are_done = all(
            other in self._reports and not self._reports[other].interrupted
            for other in sharing
            if other != name
        )
        self._reports[name] = job.conclude(seal=self._may_seal and others_are_done)

    def _in_order(self) -> dict[str, TeachReport]:
        """The reports as they are after the last teacher, who seals."""
        streams = Counter(config.stream for config in self._configs.values())
        sealed = {report.stream for report in self._reports.values() if report.sealed}
        return {
            name: replace(
                self._reports[name],
                sealed=self._reports[name].stream in sealed,
                shares_stream=streams[self._reports[name].stream] > 1,
            )
            for name in self._jobs
            if name in self._reports
        }

    def _failure(self) -> TeachersFailedError:
        told = "; ".join(f"teacher {name}: {error.message}" for name, error in self._errors.items())
        remedies = [error.remedy for error in self._errors.values() if error.remedy]
        return TeachersFailedError(
            told,
            "; ".join([*dict.fromkeys(remedies), "the same command goes on"]),
            reports=self._in_order(),
            errors=self._errors,
        )
