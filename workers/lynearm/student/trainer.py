"""The training loop: follows streams while they are written, measures, saves, and stops where it can go on.

Invariants: every trace that the split rule gives to training is trained on once a pass, in the order that
`mixed_source` keeps; the cursors in a checkpoint are exactly after what its weights have seen. No teacher is
waited for while the stream that has the turn holds traces. A service that goes away is waited for; nothing is
lost by it.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from lynearm.client import TraceClient, stop_on_interrupt
from lynearm.student.alignment import check_rows
from lynearm.student.batches import Batch, Batcher, SplitRule
from lynearm.student.beginning import Beginning, begin
from lynearm.student.config import TrainConfig
from lynearm.student.failed_batch import failed_batch_path, write_failed_batch
from lynearm.student.held_out import choose_held_out, split_held_out
from lynearm.student.inputs import Inputs, find_stream
from lynearm.student.measuring import Measurer
from lynearm.student.mixed_source import MixedSource, Selection, TraceSource
from lynearm.student.mixing import StreamPlan, parse_streams
from lynearm.student.on_policy import OnPolicy
from lynearm.student.on_policy_plan import add_rollouts, mean_staleness, open_rollout_stream
from lynearm.student.out_of_memory import explain_out_of_memory
from lynearm.student.progress import (
    EvaluationRecord,
    OnProgress,
    StepRecord,
    StopReason,
    TrainReport,
    ignore_progress,
)
from lynearm.student.ranks import Ranks, join_ranks
from lynearm.student.recording import Recorder, has_stalled
from lynearm.student.reporting import Reporter
from lynearm.student.run_directory import best_checkpoint
from lynearm.student.saving import Saver, resume_command
from lynearm.wire.errors import InvalidInputError, LynearmError, MisalignmentError, StorageError

logger = logging.getLogger(__name__)

_STOP_REASONS: tuple[StopReason | None, ...] = (
    None,
    "max_seconds",
    "max_steps",
    "no_improvement",
    "interrupted",
)
"""By what ranks agree on: of several reasons, the later one counts."""


def run_train(
    config: TrainConfig,
    on_progress: OnProgress = ignore_progress,
    *,
    stop: threading.Event | None = None,
    plans: Sequence[StreamPlan] = (),
) -> TrainReport:
    """Train a student on streams until they, or a bound in the configuration, end.

    Ctrl-C ends it after the step that runs, with a checkpoint to resume from; a second one ends it at once.

    Args:
        config: What to do.
        on_progress: Called at every change of stage and after every step, on this thread.
        stop: Set it, from any thread, for what Ctrl-C does.
        plans: How streams take part, for programs that filter what they take from them; what
            `config.streams` says, if not given.

    Raises:
        StreamNotFoundError: if there is no such stream.
        ServiceUnavailableError: if no service answers, or it stayed away for `patience_seconds`.
        MisalignmentError: if student and streams are not aligned.
        CheckpointError: if the student or checkpoint cannot be loaded, or a checkpoint not be saved.
        DistillationForbiddenError: if a stream's terms forbid to learn from it, unless `allow_terms`.
        PromptFileError: if the questions cannot be read.
        MissingDependencyError: if a tracker's package is not installed.
        ConfigError: as for `beginning.begin`.
        TrainingError: if memory runs out; the weights are saved unless they were being changed.
        InvalidInputError: if the gradient stops being finite; the weights before it are saved.
    """
    client = TraceClient(
        config.service,
        timeout_seconds=config.service_timeout_seconds,
        patience_seconds=config.patience_seconds,
    )
    with client, stop_on_interrupt(stop) as event, _keep_threads(), join_ranks(config.device) as ranks:
        reporter = Reporter(on_progress if ranks.writes else ignore_progress)
        plans = tuple(plans) or parse_streams(config.streams)
        deadline = time.monotonic() + config.wait_seconds
        streams = [find_stream(client, plan.name, deadline, stop=event, reporter=reporter) for plan in plans]
        if config.on_policy:
            streams.append(open_rollout_stream(client, config, streams))
            plans = add_rollouts(plans, config)
        reporter.stage("loading", str(config.out if config.resume else config.student))
        if config.threads:
            torch.set_num_threads(config.threads)
        with explain_out_of_memory(config, "loading"):
            beginning = begin(config, streams, ranks)
        inputs = Inputs(client, plans, tuple(stream.spec for stream in streams))
        return _Run(config, inputs, beginning, ranks=ranks, stop=event, reporter=reporter).go()


class _Run:
    """One run in one process."""

    def __init__(
        self,
        config: TrainConfig,
        inputs: Inputs,
        beginning: Beginning,
        *,
        ranks: Ranks,
        stop: threading.Event,
        reporter: Reporter,
    ) -> None:
        self._config = config
        self._inputs = inputs
        self._ranks = ranks
        self._student = beginning.student
        self._objectives = beginning.objectives
        self._optimization = beginning.optimization
        self._state = beginning.state
        self._held_out = split_held_out(beginning.held_out, beginning.state.held_out_traces)
        self._on_policy: OnPolicy | None = None
        if config.on_policy and ranks.writes:
            self._on_policy = OnPolicy(config, inputs.plans)
            self._inputs = replace(inputs, plans=self._on_policy.watch(inputs.plans))
            reporter.watch_rollouts(self._on_policy.read_status)
        self._stop = stop
        self._reporter = reporter
        self._selection = Selection(
            SplitRule(config.held_out_fraction, config.seed), config.max_sequence_tokens
        )
        self._unchecked = set(range(len(inputs.specs))) if config.check_alignment else set[int]()
        self._saver = Saver(config, inputs.specs, beginning, ranks=ranks, reporter=reporter)
        self._skipped_traces = 0
        objectives = {
            spec.name: objective for spec, objective in zip(inputs.specs, self._objectives, strict=True)
        }
        self._measurer = Measurer(config, self._student, objectives, ranks=ranks, reporter=reporter)
        self._recorder = Recorder(config, self._state) if ranks.writes else None

    def go(self) -> TrainReport:
        """Train, measure, save; see `run_train`."""
        try:
            return self._go()
        finally:
            if self._on_policy is not None:
                self._on_policy.close()
            if self._recorder is not None:
                self._recorder.close()

    def _go(self) -> TrainReport:
        try:
            reason = self._train()
        except LynearmError as error:
            if isinstance(error, MisalignmentError) and not self._state.step:
                raise  # nothing was learnt: the command is to be given again, with another stream or student
            # The other ranks may be anywhere: nothing here waits for them, unless they hold parts of it.
            if not self._optimization.is_whole:
                self._saver.finish()
                logger.warning(
                    "the run was not saved since step %s: the step that failed had begun to change weights",
                    self._saver.saved_step or 0,
                )
            elif self._student.shards is None or self._ranks.meet():
                self._save(last=True, alone=True)
                logger.warning("the run was saved; go on with: %s", resume_command(self._config))
            else:
                logger.warning(
                    "the run was not saved since step %s: the other ranks, which hold parts of the student, "
                    "did not end with this one",
                    self._saver.saved_step or 0,
                )
            raise
        if reason != "interrupted":
            self._measure()
        checkpoint = self._save(last=True)
        self._reporter.stage("done")
        return self._report(reason or "stream_end", checkpoint)

    def _train(self) -> StopReason | None:
        """Train on the rest of the streams; why the run stops before their end, or None."""
        sources = self._inputs.sources(
            prefetch_blocks=self._config.prefetch_blocks,
            skip_damaged=self._config.on_corrupt == "skip",
            should_stop=lambda: self._why_stop() is not None,
            reporter=self._reporter,
        )
        source = MixedSource(
            self._inputs.plans,
            self._state.streams,
            sources,
            selection=self._selection,
            epochs=self._config.epochs,
            reporter=self._reporter,
        )
        if reason := self._agree(self._why_stop()):
            return reason
        with source:
            if not self._state.held_out_traces and not self._choose_held_out(sources):
                return self._agree(self._why_stop())
            batches = self._batches(source)
            # A batch that some rank cannot take, since it was interrupted, is left for the next run by all.
            while self._ranks.all_hold((batch := next(batches, None)) is not None) and batch is not None:
                self._use_threads(live=source.is_live)
                self._step(batch, source)
                if reason := self._agree(self._why_stop()):
                    return reason
            if reason := self._agree(None if source.exhausted else self._why_stop()):
                return reason
            self._state = replace(self._state, streams=source.states)
            return None

    def _choose_held_out(self, sources: Sequence[TraceSource]) -> bool:
        """Settle the held-out set and measure on it; False if the run should stop first."""
        held_out = choose_held_out(
            self._inputs.plans,
            sources,
            config=self._config,
            selection=self._selection,
            reporter=self._reporter,
        )
        if not self._ranks.all_hold(self._why_stop() is None):
            return False
        self._held_out = held_out
        self._state = replace(self._state, held_out_traces=tuple(map(len, held_out)))
        self._measure()
        return True

    def _batches(self, source: MixedSource) -> Iterator[Batch]:
        batcher = Batcher(
            batch_sequences=self._config.batch_sequences,
            batch_tokens=self._config.batch_tokens,
            max_sequence_tokens=self._config.max_sequence_tokens,
        )
        while (drawn := source.take(self._state.step)) is not None:
            if batch := batcher.add(drawn):
                yield batch
        self._skipped_traces = source.skipped_traces
        if source.exhausted and (batch := batcher.rest()):
            yield batch

    def _step(self, batch: Batch, source: MixedSource) -> None:
        started = time.monotonic()
        step = self._state.step + 1
        self._check_same_batch(batch)
        self._check_rows(batch)
        try:
            with explain_out_of_memory(self._config, "training"):
                result = self._optimization.step(batch, step)
        except InvalidInputError as error:
            raise self._list_traces(batch, error) from error
        record = StepRecord(
            step=step,
            epoch=self._state.epoch,
            loss=result.loss,
            kl=result.kl,
            cross_entropy=result.cross_entropy,
            tokens=self._state.tokens + result.tokens,
            learning_rate=result.learning_rate,
            gradient_norm=result.gradient_norm,
            hidden=result.hidden,
            stream_tokens=self._stream_tokens(batch),
            staleness=self._staleness(batch),
            seconds=time.monotonic() - started,
            waiting_seconds=self._reporter.take_waiting_seconds(),
        )
        self._record(record)
        self._state = replace(self._state, step=step, streams=batch.after, curve=(*self._state.curve, record))
        self._reporter.stepped(record, tokens=result.tokens, lag_blocks=source.lag_blocks)
        self._measure_and_save_if_due(step)

    def _measure_and_save_if_due(self, step: int) -> None:
        evaluation, saving = self._config.eval_every_steps, self._config.checkpoint_every_steps
        is_measured = bool(evaluation) and step % evaluation == 0
        is_saved = bool(saving) and step % saving == 0
        # The best checkpoint is one of those that were measured.
        if is_measured or (is_saved and evaluation):
            self._measure()
        # A run that waits for a lower KL keeps the weights of the lowest: it goes on to worse ones by design.
        if is_saved or (is_measured and self._config.early_stop_patience and self._has_improved()):
            self._save()

    def _has_improved(self) -> bool:
        divergences = [record.kl for record in self._state.evaluations]
        return len(divergences) > 1 and divergences[-1] < min(divergences[:-1])

    def _list_traces(self, batch: Batch, error: InvalidInputError) -> InvalidInputError:
        """The error of a step that came to no finite gradient, with where its traces are listed."""
        step = self._state.step + 1
        path = failed_batch_path(self._config.out, step)
        if self._ranks.writes:
            names = [self._inputs.plans[stream].name for stream in batch.streams]
            traces = list(zip(names, batch.traces, strict=True))
            write_failed_batch(path, traces, step=step, reason=error.message)
        return InvalidInputError(f"{error.message}; its traces are listed in {path}", error.remedy)

    def _check_same_batch(self, batch: Batch) -> None:
        """Where a rank may pass over blocks, make sure that all of them did so alike."""
        if self._config.on_corrupt == "skip":
            places = [(after.cursor.offset, after.cursor.trace_index, after.tokens) for after in batch.after]
            if not self._ranks.all_have(*itertools.chain.from_iterable(places)):
                raise StorageError(
                    "a block was damaged for some ranks and not for others, so that their batches differ",
                    "look at the disk of the trace service, and resume",
                )

    def _check_rows(self, batch: Batch) -> None:
        """Look at the first traces of each stream whether their rows stand where they should."""
        for stream in sorted(self._unchecked.intersection(batch.streams)):
            traces = [trace for trace, its in zip(batch.traces, batch.streams, strict=True) if its == stream]
            allow_misaligned = self._config.allow_misaligned
            check_rows(self._student, traces, self._objectives[stream], allow_misaligned=allow_misaligned)
            self._unchecked.remove(stream)

    def _staleness(self, batch: Batch) -> float | None:
        """Steps by which a batch's rollouts are behind, on average; None without any."""
        if not self._config.on_policy:
            return None
        last = len(self._inputs.plans) - 1
        pairs = zip(batch.traces, batch.streams, strict=True)
        return mean_staleness([trace for trace, stream in pairs if stream == last], self._state.step)

    def _stream_tokens(self, batch: Batch) -> dict[str, int]:
        """Completion tokens of a batch by stream; none where there is one stream."""
        if len(self._inputs.plans) == 1:
            return {}
        pairs = zip(batch.after, self._state.streams, strict=True)
        return {after.name: after.tokens - before.tokens for after, before in pairs}

    def _measure(self) -> None:
        """Measure on the held-out traces, unless that was done at this very step."""
        state, evaluations = self._state, self._state.evaluations
        if not any(self._held_out) or (evaluations and evaluations[-1].step == state.step):
            return
        with explain_out_of_memory(self._config, "measuring"):
            record = self._measurer.measure(self._held_out, step=state.step, tokens=state.tokens)
        self._record(record)
        self._state = replace(state, evaluations=(*evaluations, record))
        self._reporter.evaluated(record)

    def _record(self, record: StepRecord | EvaluationRecord) -> None:
        if self._recorder is not None:
            self._recorder.add(record)

    def _save(self, *, last: bool = False, alone: bool = False) -> Path:
        """Save, as `Saver.save` says."""
        with explain_out_of_memory(self._config, "saving"):
            directory = self._saver.save(self._student, self._state, self._held_out, last=last, alone=alone)
        # A resumed run was loaded from a checkpoint that will be removed; the newest one stays.
        self._student = replace(self._student, directory=directory)
        return directory

    def _agree(self, reason: StopReason | None) -> StopReason | None:
        """Why all ranks should stop: any rank's reason is every rank's."""
        agreed = self._ranks.most(_STOP_REASONS.index(reason))
        return _STOP_REASONS[agreed]

    def _why_stop(self) -> StopReason | None:
        if self._stop.is_set():
            return "interrupted"
        if self._config.max_steps and self._state.step >= self._config.max_steps:
            return "max_steps"
        if has_stalled(self._state.evaluations, self._config.early_stop_patience):
            return "no_improvement"
        if self._seconds_left() <= 0:
            return "max_seconds"
        # What is asked after each step, and again and again while the run waits, tends the rollouts too.
        if self._on_policy is not None:
            self._on_policy.tend(self._student, self._state)
        return None

    def _seconds_left(self) -> float:
        return self._config.max_seconds - self._reporter.seconds if self._config.max_seconds else math.inf

    def _use_threads(self, *, live: bool) -> None:
        threads = self._config.threads if live else self._config.replay_threads or self._config.threads
        if threads and threads != torch.get_num_threads():
            torch.set_num_threads(threads)

    def _report(self, reason: StopReason, checkpoint: Path) -> TrainReport:
        state = self._state
        return TrainReport(
            checkpoint=checkpoint,
            stop_reason=reason,
            steps=state.step,
            epochs=state.epoch,
            traces=state.traces,
            tokens=state.tokens,
            seconds=self._reporter.seconds,
            waiting_seconds=self._reporter.waiting_seconds,
            skipped_traces=self._skipped_traces,
            curve=state.curve,
            evaluations=state.evaluations,
            how_to_go_on="" if reason == "stream_end" else resume_command(self._config),
            damaged_blocks=sum(len(stream.damaged) for stream in state.streams),
            best_checkpoint=best_checkpoint(self._config.out),
        )


@contextmanager
def _keep_threads() -> Generator[None]:
    """Puts back torch's number of threads, which is the process's, not the run's."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
