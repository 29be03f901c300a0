"""The training loop: follows a stream while it is written, measures, saves, and stops where it can go on.

Invariants: every trace that the split rule gives to training is trained on once a pass, in stream order;
the cursor in a checkpoint is exactly after what its weights have seen. The teacher is never waited for with
traces at hand. A service that goes away is waited for; nothing is lost by it.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from lynearm.client import TraceClient, stop_on_interrupt
from lynearm.student.alignment import check_rows, find_differences
from lynearm.student.batches import Batch, Batcher, SplitRule, is_usable
from lynearm.student.beginning import Beginning, begin
from lynearm.student.calibration import PredictionSums
from lynearm.student.checkpoint import Checkpoint, refresh_checkpoint, save_checkpoint, step_name
from lynearm.student.checkpoint_writer import CheckpointWriter, copy_tensors, copy_weights
from lynearm.student.config import TrainConfig
from lynearm.student.evaluation import evaluate
from lynearm.student.exact_match import ExactMatch, load_questions
from lynearm.student.lineage import StreamUse, extend_lineage
from lynearm.student.progress import (
    EvaluationRecord,
    OnProgress,
    StepRecord,
    StopReason,
    TrainReport,
    ignore_progress,
)
from lynearm.student.ranks import Ranks, join_ranks
from lynearm.student.reader import PositionedTrace, TraceReader
from lynearm.student.recording import Recorder, has_stalled
from lynearm.student.reporting import Reporter
from lynearm.student.run_account import describe_run
from lynearm.student.run_directory import best_checkpoint
from lynearm.student.source import WatchedSource
from lynearm.wire.errors import CheckpointError, LynearmError, ServiceUnavailableError, StreamNotFoundError
from lynearm.wire.protobuf import StreamInfo
from lynearm.wire.traces import Cursor, Trace

_Tensors: TypeAlias = dict[str, Tensor]

logger = logging.getLogger(__name__)

_LOOK_FOR_STREAM_SECONDS = 0.5

_STOP_REASONS: tuple[StopReason | None, ...] = (
    None,
    "max_seconds",
    "max_steps",
    "no_improvement",
    "interrupted",
)
"""By what ranks agree on: of several reasons, the later one counts."""


def run_train(
    config: TrainConfig, on_progress: OnProgress = ignore_progress, *, stop: threading.Event | None = None
) -> TrainReport:
    """Train a student on a stream until the stream, or a bound in the configuration, ends.

    Ctrl-C ends it after the step that runs, with a checkpoint to resume from; a second one ends it at once.

    Args:
        config: What to do.
        on_progress: Called at every change of stage and after every step, on this thread.
        stop: Set it, from any thread, for what Ctrl-C does.

    Raises:
        StreamNotFoundError: if there is no such stream.
        ServiceUnavailableError: if no service answers, or it stayed away for `patience_seconds`.
        MisalignmentError: if student and stream are not aligned.
        CheckpointError: if the student or checkpoint cannot be loaded, or a checkpoint not be saved.
        DistillationForbiddenError: if the stream's terms forbid to learn from it, unless `allow_terms`.
        PromptFileError: if the questions cannot be read.
        MissingDependencyError: if a tracker's package is not installed.
        ConfigError: as for `beginning.begin`.
        InvalidInputError: if the gradient stops being finite; the weights before it are saved.
    """
    client = TraceClient(
        config.service,
        timeout_seconds=config.service_timeout_seconds,
        patience_seconds=config.patience_seconds,
    )
    with client, stop_on_interrupt(stop) as event, _keep_threads(), join_ranks(config.device) as ranks:
        reporter = Reporter(on_progress if ranks.writes else ignore_progress)
        stream = _find_stream(client, config, event, reporter)
        reporter.stage("loading", str(config.out if config.resume else config.student))
        if config.threads:
            torch.set_num_threads(config.threads)
        beginning = begin(config, stream, ranks)
        return _Run(config, client, beginning, ranks=ranks, stream=stream, stop=event, reporter=reporter).go()


def _find_stream(
    client: TraceClient, config: TrainConfig, stop: threading.Event, reporter: Reporter
) -> StreamInfo:
    """The stream, waited for as long as the configuration says."""
    deadline = time.monotonic() + config.wait_seconds
    announced = False
    while True:
        try:
            return client.get_stream(config.stream)
        except (StreamNotFoundError, ServiceUnavailableError):
            if stop.is_set() or time.monotonic() >= deadline:
                raise
        if not announced:
            reporter.stage("waiting", f"stream {config.stream!r} to be created")
            announced = True
        stop.wait(_LOOK_FOR_STREAM_SECONDS)


class _Run:
    """One run in one process."""

    def __init__(
        self,
        config: TrainConfig,
        client: TraceClient,
        beginning: Beginning,
        *,
        ranks: Ranks,
        stream: StreamInfo,
        stop: threading.Event,
        reporter: Reporter,
    ) -> None:
        self._config = config
        self._client = client
        self._ranks = ranks
        self._writer = CheckpointWriter()
        self._student = beginning.student
        self._objective = beginning.objective
        self._rows_checked = not config.check_alignment
        self._optimization = beginning.optimization
        self._state = beginning.state
        self._held_out: tuple[Trace, ...] = beginning.held_out
        self._base_lineage = beginning.base_lineage
        self._spec = stream.spec
        self._stop = stop
        self._reporter = reporter
        self._rule = SplitRule(config.held_out_fraction, config.seed)
        self._saved_step: int | None = self._state.step if config.resume else None
        self._skipped_traces = 0
        # Not empty only where that was allowed: what the manifest says was overridden.
        self._differences = find_differences(self._spec, self._student)
        self._questions = load_questions(config.questions) if config.questions else ()
        self._exact_match = (
            ExactMatch(self._student, max_new_tokens=config.question_tokens) if self._questions else None
        )
        self._recorder = Recorder(config, self._state) if ranks.writes else None

    def go(self) -> TrainReport:
        """Train, measure, save; see `run_train`."""
        try:
            return self._go()
        finally:
            if self._recorder is not None:
                self._recorder.close()

    def _go(self) -> TrainReport:
        reason: StopReason | None = None
        try:
            while reason is None and self._state.epoch < self._config.epochs:
                reason = self._pass()
        except LynearmError:
            # The other ranks may be anywhere: nothing here waits for them, unless they hold parts of it.
            if self._student.shards is None or self._ranks.meet():
                self._save(last=True, alone=True)
                logger.warning("the run was saved; go on with: %s", self._how_to_go_on())
            else:
                logger.warning(
                    "the run was not saved since step %s: the other ranks, which hold parts of the student, "
                    "did not end with this one",
                    self._saved_step or 0,
                )
            raise
        if reason != "interrupted":
            self._measure()
        checkpoint = self._save(last=True)
        self._reporter.stage("done")
        return self._report(reason or "stream_end", checkpoint)

    def _pass(self) -> StopReason | None:
        """Train on the rest of one pass; why the run should stop, or None when the pass is complete."""
        start, client = self._state.cursor, self._client
        with (
            client.subscribe(self._config.stream, start=start.offset) as subscription,
            TraceReader(
                subscription,
                start=start,
                prefetch_blocks=self._config.prefetch_blocks,
                dictionaries=client.dictionaries(self._config.stream, wait=True),
                on_close=subscription.close,
            ) as reader,
        ):
            source = WatchedSource(
                reader,
                waiting_reason=lambda: subscription.waiting_reason,
                should_stop=lambda: self._why_stop() is not None,
                reporter=self._reporter,
            )
            if not self._state.held_out_chosen and not self._choose_held_out(source):
                return self._agree(self._why_stop())
            batches = self._batches(source)
            # A batch that some rank cannot take, since it was interrupted, is left for the next run by all.
            while self._ranks.all_hold((batch := next(batches, None)) is not None) and batch is not None:
                self._use_threads(live=self._state.epoch == 0 and not reader.received_all)
                self._step(batch, reader)
                if reason := self._agree(self._why_stop()):
                    return reason
            if reason := self._agree(None if source.exhausted else self._why_stop()):
                return reason
        self._state = replace(self._state, epoch=self._state.epoch + 1, cursor=Cursor())
        return None

    def _choose_held_out(self, source: WatchedSource) -> bool:
        """Settle the held-out set and measure on it; False if the run should stop first."""
        wanted, passed, held_out = self._config.held_out_traces, list[PositionedTrace](), list[Trace]()
        self._reporter.stage("collecting", f"{wanted} held-out traces")
        while len(held_out) < wanted and len(passed) < self._config.held_out_window:
            positioned = source.take()
            if positioned is None:
                break
            if not self._rule.holds_out(positioned.trace):
                passed.append(positioned)
            elif is_usable(positioned.trace, self._config.max_sequence_tokens):
                # Measured without hidden states, which would fill the checkpoint's blocks.
                held_out.append(replace(positioned.trace, hidden=None))
        if not self._ranks.all_hold(self._why_stop() is None):
            return False
        source.give_back(passed)
        self._held_out = tuple(held_out)
        self._state = replace(self._state, held_out_chosen=True)
        self._measure()
        return True

    def _batches(self, source: WatchedSource) -> Iterator[Batch]:
        batcher = Batcher(
            batch_sequences=self._config.batch_sequences,
            batch_tokens=self._config.batch_tokens,
            max_sequence_tokens=self._config.max_sequence_tokens,
            rule=self._rule,
        )
        while (positioned := source.take()) is not None:
            if batch := batcher.add(positioned):
                yield batch
        self._skipped_traces += batcher.skipped_traces
        if source.exhausted and (batch := batcher.rest()):
            yield batch

    def _step(self, batch: Batch, reader: TraceReader) -> None:
        started = time.monotonic()
        step = self._state.step + 1
        if not self._rows_checked:
            check_rows(
                self._student, batch.traces, self._objective, allow_misaligned=self._config.allow_misaligned
            )
            self._rows_checked = True
        result = self._optimization.step(batch, step)
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
            seconds=time.monotonic() - started,
            waiting_seconds=self._reporter.take_waiting_seconds(),
        )
        self._record(record)
        self._state = replace(
            self._state,
            step=step,
            cursor=batch.after,
            furthest=max(self._state.furthest, batch.after),
            traces=self._state.traces + len(batch.traces),
            tokens=record.tokens,
            curve=(*self._state.curve, record),
        )
        self._reporter.stepped(
            record,
            tokens=result.tokens,
            lag_blocks=max(0, reader.next_offset - batch.after.offset) if self._state.epoch == 0 else 0,
        )
        if self._config.eval_every_steps and step % self._config.eval_every_steps == 0:
            self._measure()
        if self._config.checkpoint_every_steps and step % self._config.checkpoint_every_steps == 0:
            if self._config.eval_every_steps:
                self._measure()  # the best checkpoint is one of those that were measured
            self._save()

    def _measure(self) -> None:
        """Measure on the held-out traces, unless that was done at this very step."""
        evaluations = self._state.evaluations
        if not self._held_out or (evaluations and evaluations[-1].step == self._state.step):
            return
        self._reporter.stage("evaluating", f"{len(self._held_out)} held-out traces")
        lengths = [len(trace.completion_token_ids) for trace in self._held_out]
        sums = evaluate(
            self._student,
            self._ranks.share(self._held_out, lengths),
            micro_batch_tokens=self._config.micro_batch_tokens,
            max_sequence_tokens=self._config.max_sequence_tokens,
            objective=self._objective,
        )
        kl, cross_entropy, positions, *counts = self._ranks.sum(
            sums.kl, sums.cross_entropy, sums.positions, *sums.predictions.values()
        )
        predictions = PredictionSums.from_values(counts)
        record = EvaluationRecord(
            self._state.step,
            self._state.tokens,
            kl / positions,
            cross_entropy / positions,
            int(positions),
            predictions.agreement,
            predictions.calibration_error,
            self._ask(),
        )
        self._record(record)
        self._state = replace(self._state, evaluations=(*evaluations, record))
        self._reporter.evaluated(record)

    def _ask(self) -> float | None:
        """Part of the questions that the student answers exactly; None without questions."""
        if self._exact_match is None:
            return None
        self._reporter.stage("evaluating", f"{len(self._questions)} questions")
        mine = self._ranks.share(self._questions, [1] * len(self._questions))
        (correct,) = self._ranks.sum(self._exact_match.count_correct(self._student, mine))
        return correct / len(self._questions)

    def _record(self, record: StepRecord | EvaluationRecord) -> None:
        if self._recorder is not None:
            self._recorder.add(record)

    def _save(self, *, last: bool = False, alone: bool = False) -> Path:
        """Save on rank 0; beside the training, unless it is the last.

        Args:
            last: Return when it is on the disk.
            alone: Do not ask the other ranks whether they hold the same weights.
        """
        state, directory = self._state, self._config.out / step_name(self._state.step)
        if not alone:
            self._ranks.check_equal(self._optimization.parameters())
        failure: CheckpointError | None = None
        if self._ranks.writes:
            self._reporter.stage("saving", f"step {state.step}")
            failure = self._finish_writing(last=last)
        if not alone:
            self._ranks.raise_together(failure)
        gathered = self._gather()
        if self._ranks.writes:
            self._write(directory, gathered, beside=self._config.async_checkpoints and not last)
        # A resumed run was loaded from a checkpoint that will be removed; the newest one stays.
        self._student = replace(self._student, directory=directory)
        self._saved_step = state.step
        if last and not alone:
            self._ranks.all_hold(True)
        elif self._student.shards is not None and alone:
            self._ranks.meet()  # a launcher ends the rank that writes when it finds that another has ended
        return directory

    def _gather(self) -> tuple[_Tensors, _Tensors] | None:
        """Weights and optimizer state of a sharded student, which all ranks gather; None if of no use."""
        if self._student.shards is None or not self._ranks.most(int(self._saved_step != self._state.step)):
            return None
        weights = self._student.shards.gather_weights(keep=self._ranks.writes)
        return weights, self._optimization.state()

    def _finish_writing(self, *, last: bool) -> CheckpointError | None:
        """Wait for the write before; what it failed with, unless this is the last."""
        try:
            self._writer.wait()
        except CheckpointError as error:
            if not last:
                return error
            # The last chance to save: it may be of the very step that failed.
            logger.warning("%s; trying once more", error)
            self._saved_step = None
        return None

    def _write(self, directory: Path, gathered: tuple[_Tensors, _Tensors] | None, *, beside: bool) -> None:
        student, state, config = self._student, self._state, self._config
        use = StreamUse(self._spec, state.furthest, state.epoch, state.traces, state.tokens)
        run = describe_run(
            config,
            self._spec,
            differences=self._differences,
            evaluations=state.evaluations,
            world_size=self._ranks.world_size,
        )
        lineage = extend_lineage(self._base_lineage, use, run=run)
        checkpoint = Checkpoint(directory, state, {}, self._held_out, self._base_lineage)
        if self._saved_step == state.step:
            refresh_checkpoint(checkpoint, config=config, lineage=lineage)
            return
        weights, optimizer = gathered or (None, self._optimization.state())
        if beside and gathered is None:
            weights, optimizer = copy_weights(student), copy_tensors(optimizer)
        checkpoint = replace(checkpoint, optimizer=optimizer)
        save = partial(save_checkpoint, student, checkpoint, config=config, lineage=lineage, weights=weights)
        if beside:
            self._writer.submit(save)
        else:
            save()

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
        return "max_seconds" if self._seconds_left() <= 0 else None

    def _seconds_left(self) -> float:
        return self._config.max_seconds - self._reporter.seconds if self._config.max_seconds else math.inf

    def _use_threads(self, *, live: bool) -> None:
        threads = self._config.threads if live else self._config.replay_threads or self._config.threads
        if threads and threads != torch.get_num_threads():
            torch.set_num_threads(threads)

    def _how_to_go_on(self) -> str:
        config = self._config
        return (
            f"lynearm train --resume --out {config.out} --stream {config.stream} --service {config.service}"
        )

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
            how_to_go_on="" if reason == "stream_end" else self._how_to_go_on(),
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
