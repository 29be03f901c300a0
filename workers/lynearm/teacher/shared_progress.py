"""What several jobs that run side by side say of themselves, as one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from lynearm.teacher.progress import Stage, TeacherStatus, TeachProgress

_BY_NEWS: tuple[Stage, ...] = ("generating", "loading", "starting", "waiting", "sealing", "done")
"""The stage of several jobs is the first of these that one of them is in."""


class SharedProgress:
    """Takes each teacher's progress, and gives out that of all.

    Args:
        names: Of the teachers, in their order.
        on_progress: Given the progress of all whenever one says something.
    """

    def __init__(self, names: Sequence[str], on_progress: Callable[[TeachProgress], None]) -> None:
        self._on_progress = on_progress
        self._latest = dict.fromkeys(names, TeachProgress("waiting"))
        self._notes: dict[str, str] = {}

    def of(self, name: str) -> Callable[[TeachProgress], None]:
        """What a teacher's job is given as `on_progress`."""

        def take(progress: TeachProgress) -> None:
            self._latest[name] = progress
            self._on_progress(merge_progress(self._latest, self._notes))

        return take

    def note(self, name: str, message: str) -> None:
        """Say something of a teacher from now on, beside what it says itself; an empty text ends it."""
        if self._notes.get(name, "") != message:
            self._notes[name] = message
            self._on_progress(merge_progress(self._latest, self._notes))


def merge_progress(each: Mapping[str, TeachProgress], notes: Mapping[str, str]) -> TeachProgress:
    """The progress of several teachers as that of one job.

    Args:
        each: By teacher, in their order.
        notes: What else there is to say of a teacher.
    """
    every = list(each.values())
    if len(every) == 1 and not any(notes.values()):
        return every[0]
    messages = {name: notes.get(name) or progress.message for name, progress in each.items()}
    verdicts: Counter[str] = Counter()
    for progress in every:
        verdicts.update(progress.verdicts)
    etas = [progress.eta_seconds for progress in every if progress.stage == "generating"]
    known = [eta for eta in etas if eta is not None]
    is_told = len(known) == sum(progress.stage not in ("sealing", "done") for progress in every)
    return TeachProgress(
        stage=next(stage for stage in _BY_NEWS if any(one.stage == stage for one in every)),
        message="; ".join(f"{name}: {text}" for name, text in messages.items() if text),
        prompts=sum(one.prompts for one in every),
        done_prompts=sum(one.done_prompts for one in every),
        skipped_prompts=max(one.skipped_prompts for one in every),
        failed_prompts=sum(one.failed_prompts for one in every),
        generated_tokens=sum(one.generated_tokens for one in every),
        tokens_per_second=sum(one.tokens_per_second for one in every),
        acked_blocks=sum(one.acked_blocks for one in every),
        waiting_seconds=sum(one.waiting_seconds for one in every),
        restarts=sum(one.restarts for one in every),
        verdicts=verdicts,
        eta_seconds=max(known) if known and is_told else None,
        workers=tuple(worker for one in every for worker in one.workers),
        teachers=tuple(
            TeacherStatus(
                name,
                progress.stage,
                messages[name],
                progress.prompts,
                progress.done_prompts,
                progress.tokens_per_second,
                len(progress.workers),
            )
            for name, progress in each.items()
        ),
    )
