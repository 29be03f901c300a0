"""A run's measurements: on the held-out traces of each stream under its own teacher, and by questions."""

from __future__ import annotations

from collections.abc import Sequence

from lynearm.student.calibration import PredictionSums
from lynearm.student.config import TrainConfig
from lynearm.student.evaluation import HeldOutSums, evaluate
from lynearm.student.exact_match import ExactMatch, load_questions
from lynearm.student.harness import Harness
from lynearm.student.model import StudentModel
from lynearm.student.objective import Objective
from lynearm.student.progress import EvaluationRecord, StreamEvaluation
from lynearm.student.ranks import Ranks
from lynearm.student.reporting import Reporter
from lynearm.wire.traces import Trace


class Measurer:
    """Measures a student as its run goes on; every method is called by all ranks.

    Args:
        config: Of the run.
        student: Measured as it is at each call; in training mode afterwards.
        objectives: By the name of their stream, in the order of the streams.
        ranks: Who shares the work.
        reporter: Hears of it.

    Raises:
        PromptFileError: if the questions cannot be read.
        MissingDependencyError: if tasks of lm-eval are asked for and it is not installed.
        ConfigError: if it has no such task.
    """

    def __init__(
        self,
        config: TrainConfig,
        student: StudentModel,
        objectives: dict[str, Objective],
        *,
        ranks: Ranks,
        reporter: Reporter,
    ) -> None:
        self._config = config
        self._student = student
        self._objectives = objectives
        self._ranks = ranks
        self._reporter = reporter
        self._harness = Harness(config, student) if config.lm_eval else None
        self._questions = load_questions(config.questions) if config.questions else ()
        self._exact_match = (
            ExactMatch(student, max_new_tokens=config.question_tokens) if self._questions else None
        )

    def measure(self, held_out: Sequence[Sequence[Trace]], *, step: int, tokens: int) -> EvaluationRecord:
        """A measurement on held-out traces, of which there is at least one.

        Args:
            held_out: Of each stream, in their order.
            step: Steps that are done.
            tokens: Completion tokens trained on.
        """
        self._reporter.stage("evaluating", f"{sum(map(len, held_out))} held-out traces")
        parts = {
            name: self._sums(traces, objective)
            for (name, objective), traces in zip(self._objectives.items(), held_out, strict=True)
            if traces
        }
        together = _evaluation(sum(parts.values(), HeldOutSums()))
        several = len(self._objectives) > 1
        return EvaluationRecord(
            step,
            tokens,
            together.kl,
            together.cross_entropy,
            together.positions,
            together.agreement,
            together.calibration_error,
            self._ask(),
            {name: _evaluation(part) for name, part in parts.items()} if several else {},
            self._run_tasks(),
        )

    def _sums(self, traces: Sequence[Trace], objective: Objective) -> HeldOutSums:
        mine = self._ranks.share(traces, [len(trace.completion_token_ids) for trace in traces])
        sums = evaluate(
            self._student,
            mine,
            micro_batch_tokens=self._config.micro_batch_tokens,
            max_sequence_tokens=self._config.max_sequence_tokens,
            objective=objective,
        )
        kl, cross_entropy, positions, *counts = self._ranks.sum(
            sums.kl, sums.cross_entropy, sums.positions, *sums.predictions.values()
        )
        return HeldOutSums(kl, cross_entropy, int(positions), PredictionSums.from_values(counts))

    def _ask(self) -> float | None:
        """Part of the questions that the student answers exactly; None without questions."""
        if self._exact_match is None:
            return None
        self._reporter.stage("evaluating", f"{len(self._questions)} questions")
        mine = self._ranks.share(self._questions, [1] * len(self._questions))
        (correct,) = self._ranks.sum(self._exact_match.count_correct(self._student, mine))
        return correct / len(self._questions)

    def _run_tasks(self) -> dict[str, float]:
        """Figures of lm-eval's tasks; none without any."""
        if self._harness is None:
            return {}
        self._reporter.stage("evaluating", ", ".join(self._config.lm_eval))
        return self._ranks.from_first(self._harness.measure(self._student) if self._ranks.writes else {})


def _evaluation(sums: HeldOutSums) -> StreamEvaluation:
    return StreamEvaluation(
        sums.kl / sums.positions,
        sums.cross_entropy / sums.positions,
        sums.positions,
        sums.predictions.agreement,
        sums.predictions.calibration_error,
    )
