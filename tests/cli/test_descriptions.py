"""What a person reads about the moments of each role."""

from __future__ import annotations

from dataclasses import replace

from lynearm.cli.export import describe as describe_export
from lynearm.cli.teach_progress import describe as describe_teach
from lynearm.cli.train import describe as describe_train
from lynearm.export.progress import ExportProgress
from lynearm.rollouts import RolloutStatus
from lynearm.student.progress import EvaluationRecord, StepRecord, TrainProgress
from lynearm.teacher.progress import TeachProgress, WorkerStatus

STEP = StepRecord(
    step=12,
    epoch=0,
    loss=1.5,
    kl=1.25,
    cross_entropy=2.5,
    tokens=3449,
    learning_rate=1e-3,
    gradient_norm=1.0,
)


def test_a_teacher_shows_prompts_and_rate() -> None:
    status = describe_teach(
        TeachProgress(
            "generating", prompts=40, done_prompts=10, generated_tokens=2400, tokens_per_second=98.4
        )
    )
    assert status is not None
    assert (status.completed, status.total) == (10, 40)
    assert "10/40 prompts, 98 tokens/s, 2.4k tokens" in status.text


def test_a_teacher_says_what_it_waits_for() -> None:
    status = describe_teach(TeachProgress("waiting", "waiting for the trace service at a:1"))
    assert status is not None
    assert status.text == "waiting for the trace service at a:1"
    loading = describe_teach(TeachProgress("loading"))
    assert loading is not None
    assert loading.text == "the model into vLLM"


def test_a_teacher_shows_each_worker_and_how_full_the_batches_are() -> None:
    workers = (
        WorkerStatus("teacher-0", "generating", "10.0.0.4", "", 3210.0, 64, 64, 312),
        WorkerStatus("teacher-1", "generating", "10.0.0.5", "", 2890.0, 16, 64, 290, restarts=2),
        WorkerStatus("teacher-2", "replacing", "", "its process died", 0.0, 0, 64, 120),
        WorkerStatus("teacher-3", "loading", "10.0.0.6"),
    )
    event = TeachProgress("generating", prompts=9, failed_prompts=1, eta_seconds=90.0, workers=workers)
    status = describe_teach(event)
    assert status is not None
    assert status.left_seconds == 90
    assert "batch 62% full" in status.text, "of those that generate: 80 of 128"
    assert status.text.endswith("1 failed")
    first, second, third, fourth = status.rows
    assert (first.name, first.share) == ("teacher-0", 1.0)
    assert first.cells == ("generating", "64/64", "3.2k tokens/s", "312 prompts")
    assert second.note == "restarted 2×, at 10.0.0.5"
    assert (third.share, third.note) == (0.0, "its process died")
    assert fourth.cells == ("loading", "", "", "")
    sealing = describe_teach(TeachProgress("sealing", workers=workers))
    assert sealing is not None
    assert sealing.rows == ()


def test_a_trainer_shows_step_loss_held_out_kl_and_rate() -> None:
    event = TrainProgress(
        "training",
        record=STEP,
        tokens_per_second=87.0,
        lag_blocks=3,
        held_out=EvaluationRecord(step=10, tokens=3000, kl=0.75, cross_entropy=2.0, positions=500),
    )
    status = describe_train(event, max_steps=24)
    assert status is not None
    assert (status.completed, status.total) == (12, 24)
    assert (
        status.text
        == "step 12, loss 1.500, held-out KL 0.750 at 10, 87 tokens/s, 3.4k tokens, 3 blocks behind"
    )


def test_a_trainer_keeps_one_line_through_its_stages() -> None:
    waiting = describe_train(TrainProgress("waiting", "the teacher's next block", record=STEP))
    assert waiting is not None
    assert (waiting.stage, waiting.total) == ("training", None)
    assert waiting.text.startswith("waiting for data: the teacher's next block, step 12")
    assert not waiting.news
    ended = describe_train(TrainProgress("training", "stream a has ended; from here on b 100%", record=STEP))
    assert ended is not None
    assert ended.text.startswith("stream a has ended; from here on b 100%, step 12")
    assert ended.news, "it is said once"
    loading = describe_train(TrainProgress("loading", "models/student"))
    assert loading is not None
    assert (loading.stage, loading.text) == ("loading", "models/student")


def test_an_export_shows_its_stage_and_share() -> None:
    status = describe_export(ExportProgress("quantising", 0.2))
    assert (status.text, status.completed, status.total) == ("quantising", 0.2, 1.0)


def test_the_end_is_left_to_the_summary() -> None:
    assert describe_teach(TeachProgress("done")) is None
    assert describe_train(TrainProgress("done", record=STEP)) is None


def test_a_trainer_shows_how_its_student_writes() -> None:
    rollouts = RolloutStatus(
        activity="waiting for the teacher at a:1",
        loaded_step=8,
        rollouts=40,
        tokens=2400,
        tokens_per_second=63.4,
        scored_tokens=2300,
        divergence=0.402,
        waiting_teacher_seconds=75.0,
        waiting_trainer_seconds=3.0,
        restarts=1,
        stale_rollouts=2,
    )
    status = describe_train(
        TrainProgress("training", record=replace(STEP, staleness=3.25), rollouts=rollouts)
    )
    assert status is not None
    for fact in (
        "rollouts: waiting for the teacher at a:1",
        "63 tokens/s written",
        "3.2 steps old",
        "reverse KL about 0.402",
        "2.3k tokens scored",
        "1 min 15 s for the teacher",
        "2 too old",
        "1 restarts",
    ):
        assert fact in status.text
    assert "rollouts" not in (describe_train(TrainProgress("training", record=STEP)) or status).text
