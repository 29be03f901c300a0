"""`lynearm train`: a student learns from a stream."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lynearm.cli.failures import EXIT_INTERRUPTED, Interrupted, reported, this_command
from lynearm.cli.options import (
    Assignments,
    ConfigFile,
    Debug,
    Progress,
    ProgressMode,
    Service,
    flags,
    weights,
)

if TYPE_CHECKING:
    from lynearm.cli.progress import Reporter, Status
    from lynearm.rollouts import RolloutStatus
    from lynearm.student.config import TrainConfig
    from lynearm.student.progress import StepRecord, TrainProgress, TrainReport

_SHOWN_WAITING = 0.005
"""Part of the time without traces that is worth a word: less would show as 0 %."""


@reported("the same command goes on with --resume if there is a checkpoint, and without it if there is none")
def train(
    context: typer.Context,
    student: Annotated[
        Path | None, typer.Option(help="Model to begin with, in the transformers layout with tokenizer.")
    ] = None,
    streams: Annotated[
        list[str] | None,
        typer.Option(
            "--stream",
            metavar="NAME[:WEIGHT]",
            help="Stream to learn from. May be repeated: maths:0.7 and code:0.3 share the tokens so; "
            "maths:0.7..0.2@2000 goes from 0.7 to 0.2 until step 2,000.",
            show_default="default",
        ),
    ] = None,
    wait_seconds: Annotated[
        float | None,
        typer.Option(help="How long to wait for streams that are not there yet.", show_default="0"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Directory that receives the checkpoints.", show_default="runs/student"),
    ] = None,
    resume: Annotated[
        bool | None, typer.Option("--resume", help="Go on from the latest checkpoint in --out.")
    ] = None,
    service: Service = None,
    loss: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[@MIX][:WEIGHT]",
            help="A term of the loss, for example forward-kl:0.9, reverse-kl, jsd@0.5, cross-entropy:0.1, "
            "hidden-cosine@4=9:0.5. May be repeated: they are summed. Without any, streams with draws from "
            "the tail add tail-cross-entropy.",
            show_default="forward-kl:1 and cross-entropy:0.1",
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(help="At which student and teacher are compared: the stream's.", show_default="1"),
    ] = None,
    retemper: Annotated[
        bool | None,
        typer.Option("--retemper", help="Estimate rows of another temperature than the stream's."),
    ] = None,
    span_weights: Annotated[
        list[str] | None,
        typer.Option(
            "--span-weight",
            metavar="KIND:WEIGHT",
            help="How much reasoning, answer, truncated_reasoning or other positions count. May be repeated.",
        ),
    ] = None,
    tag_weights: Annotated[
        list[str] | None,
        typer.Option(
            "--tag-weight",
            metavar="KEY=VALUE:WEIGHT",
            help="How much traces with this tag count. May be repeated.",
        ),
    ] = None,
    lora: Annotated[
        str | None,
        typer.Option(
            metavar="r=16,alpha=32,…",
            help="Train a low-rank adapter, and leave the student's own weights as they are; also targets=, "
            'dropout=. "default" takes r=16,alpha=32,targets=all-linear.',
        ),
    ] = None,
    freeze: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WHAT,…",
            help="Leave embeddings, head, norms, layers.0-9, or parameters like *.mlp.* as they are. "
            "May be repeated.",
        ),
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option("--gradient-checkpointing", help="Compute layers twice, in much less memory."),
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak rate.", show_default="5e-4")] = None,
    batch_sequences: Annotated[
        int | None, typer.Option(help="Traces for each step.", show_default="8")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over each stream.", show_default="1")] = None,
    max_steps: Annotated[
        int | None, typer.Option(help="Steps of the whole run; 0 for all of the streams.", show_default="0")
    ] = None,
    max_seconds: Annotated[
        float | None, typer.Option(help="Bound on the time of this run; 0 sets none.", show_default="0")
    ] = None,
    held_out_traces: Annotated[
        int | None, typer.Option(help="Traces of each stream kept back to measure on.", show_default="32")
    ] = None,
    eval_every_steps: Annotated[
        int | None, typer.Option(help="Steps between measurements.", show_default="50")
    ] = None,
    checkpoint_every_steps: Annotated[
        int | None, typer.Option(help="Steps between checkpoints.", show_default="200")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; 0 for torch's choice.")] = None,
    device: Annotated[str | None, typer.Option(help="A torch device.", show_default="auto")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the split and of dropout.", show_default="0")] = None,
    sharding: Annotated[
        str | None,
        typer.Option(
            metavar="none|full",
            help="full: ranks hold parts of the student, not each the whole (FSDP2).",
            show_default="none",
        ),
    ] = None,
    ray: Annotated[
        bool | None, typer.Option("--ray", help="Let Ray Train place the ranks and replace lost ones.")
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(help="With --ray: processes; 0 for one on each GPU.", show_default="0")
    ] = None,
    ray_address: Annotated[
        str | None, typer.Option(help='Which Ray; "local" starts one.', show_default="auto")
    ] = None,
    on_policy: Annotated[
        bool | None,
        typer.Option(
            "--on-policy", help="Also train on what the student writes and a served teacher scores."
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="With --on-policy: the teacher that scores (`lynearm teacher serve`).",
            show_default="127.0.0.1:7412",
        ),
    ] = None,
    on_policy_share: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE",
            help="With --on-policy: part of the tokens that the student wrote; 0..0.5@500 goes from none to "
            "half until step 500.",
            show_default="0.5",
        ),
    ] = None,
    max_staleness: Annotated[
        int | None,
        typer.Option(
            help="With --on-policy: steps that what it wrote may be behind the student.", show_default="16"
        ),
    ] = None,
    rollout_prompts: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="With --on-policy: what the student answers, as for `lynearm teach`; else the prompts of "
            "the first stream.",
        ),
    ] = None,
    rollout_loss: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[@MIX][:WEIGHT]",
            help="With --on-policy: a term of the loss on what the student wrote. May be repeated.",
            show_default="reverse-kl:1",
        ),
    ] = None,
    check_alignment: Annotated[
        bool | None,
        typer.Option(
            "--check-alignment/--no-check-alignment",
            help="Look at the first traces whether rows and tokens are shifted.",
            show_default="check",
        ),
    ] = None,
    allow_misaligned: Annotated[
        bool | None, typer.Option("--allow-misaligned", help="Train although the tokenizers differ.")
    ] = None,
    allow_terms: Annotated[
        bool | None,
        typer.Option("--allow-terms", help="Train although the stream's terms forbid it; it is recorded."),
    ] = None,
    lm_eval: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TASK[,TASK]", help="Tasks of lm-eval to run with each measurement. May be repeated."
        ),
    ] = None,
    lm_eval_path: Annotated[
        Path | None, typer.Option(help="Folder of further tasks for lm-eval.", show_default="none")
    ] = None,
    early_stop_patience: Annotated[
        int | None,
        typer.Option(
            help="Stop after so many measurements without a lower held-out KL; 0 never.", show_default="0"
        ),
    ] = None,
    trackers: Annotated[
        list[str] | None,
        typer.Option(
            "--tracker",
            metavar="NAME",
            help="Also send figures to tensorboard, wandb or trackio. Repeatable.",
        ),
    ] = None,
    config: ConfigFile = None,
    assignments: Assignments = None,
    progress: Progress = ProgressMode.auto,
    debug: Debug = False,
) -> None:
    """Train a student on a teacher's stream, or on several streams.

    A stream may still be growing. Ctrl-C ends after the running step with a checkpoint; --resume goes on
    from it.
    """
    from lynearm.cli.progress import Reporter
    from lynearm.cli.settings import load_settings
    from lynearm.student.config import TrainConfig
    from lynearm.student.launch import launched_rank

    given = {
        **flags(context),
        "streams": streams or None,
        "loss": loss or None,
        "rollout_loss": rollout_loss or None,
        "span_weights": weights(span_weights, "--span-weight"),
        "tag_weights": weights(tag_weights, "--tag-weight"),
        "trackers": trackers or None,
        "freeze": freeze or None,
        "lm_eval": [task for tasks in lm_eval or () for task in tasks.split(",")] or None,
    }
    settings = load_settings(TrainConfig, "train", file=config, flags=given, assignments=assignments or ())
    # Of several ranks, one speaks.
    speaks = launched_rank() == 0
    progress = progress if speaks else ProgressMode.none
    with Reporter("train", progress, partial(describe, max_steps=settings.max_steps)) as report:
        outcome = _run(settings, report)
        report.conclude(outcome)
    if report.for_people and speaks:
        typer.echo(_summary(outcome))
        if outcome.stop_reason == "no_improvement":
            patience = settings.early_stop_patience
            typer.echo(f"stopped early: no lower held-out KL in the last {patience} measurements", err=True)
    resume_command = this_command("--resume")
    if outcome.stop_reason == "interrupted":
        if not speaks:
            raise typer.Exit(EXIT_INTERRUPTED)
        raise Interrupted(f"go on with `{resume_command}`")
    if outcome.stop_reason == "max_seconds" and report.for_people and speaks:
        typer.echo(f"time is up; go on with `{resume_command}`", err=True)


def describe(event: TrainProgress, *, max_steps: int = 0) -> Status | None:
    """What a moment of a training run means to a person."""
    from lynearm.cli.progress import Status, count

    if event.stage == "done":
        return None
    record, held_out = event.record, event.held_out
    # The stages of a run alternate: one line that says "training" throughout is calmer than ten that follow.
    stage = "training" if record is not None else event.stage
    between = "waiting for data: " if event.stage == "waiting" else f"{event.stage} "
    facts = [f"{between}{event.message}".strip()] if event.stage not in (stage, "training") else []
    # A step has no message: what has one while training is told once, such as the end of a stream.
    news = bool(event.message) and event.stage == "training"
    if event.message and (record is None or news):
        facts = [event.message]
    # The most wanted first: a narrow terminal cuts the end off.
    if record is not None:
        facts += [f"step {record.step}", f"loss {record.loss:.3f}"]
    if held_out is not None:
        facts.append(f"held-out KL {held_out.kl:.3f} at {held_out.step}")
    if record is not None:
        facts += [f"{count(event.tokens_per_second)} tokens/s", f"{count(record.tokens)} tokens"]
        if event.waiting_share >= _SHOWN_WAITING:
            facts.append(f"{event.waiting_share:.0%} waiting for data")
        if event.lag_blocks:
            facts.append(f"{event.lag_blocks} blocks behind")
    if event.rollouts is not None:
        facts += _rollout_facts(event.rollouts, record)
    completed = record.step if record else 0
    return Status(stage, ", ".join(facts), completed, max_steps or None, news=news)


def _rollout_facts(rollouts: RolloutStatus, record: StepRecord | None) -> list[str]:
    """How the student's own writing goes."""
    from lynearm.cli.progress import count, duration

    facts = [f"rollouts: {rollouts.activity}"]
    if rollouts.tokens_per_second:
        facts.append(f"{count(rollouts.tokens_per_second)} tokens/s written")
    if record is not None and record.staleness is not None:
        facts.append(f"{record.staleness:.1f} steps old")
    if rollouts.divergence is not None:
        facts.append(f"reverse KL about {rollouts.divergence:.3f}")
    if rollouts.scored_tokens:
        facts.append(f"{count(rollouts.scored_tokens)} tokens scored")
    if rollouts.waiting_teacher_seconds >= 1:
        facts.append(f"{duration(rollouts.waiting_teacher_seconds)} for the teacher")
    if rollouts.stale_rollouts:
        facts.append(f"{rollouts.stale_rollouts} too old")
    if rollouts.restarts:
        facts.append(f"{rollouts.restarts} restarts")
    return facts


def _run(settings: TrainConfig, report: Reporter[TrainProgress]) -> TrainReport:
    from lynearm.cli.progress import Status
    from lynearm.client import TraceClient
    from lynearm.student.mixing import parse_streams
    from lynearm.student.terms import check_terms

    # A wrong name or address, and terms that forbid it, are said at once, not after the imports below.
    if not settings.wait_seconds:
        with TraceClient(settings.service, timeout_seconds=settings.service_timeout_seconds) as client:
            found = [client.get_stream(plan.name) for plan in parse_streams(settings.streams)]
        for info in found:
            check_terms(info.spec, allow_terms=settings.allow_terms, warn=False)
    # Importing torch and transformers takes seconds, in which nobody should look at nothing.
    report.announce(Status("starting", "loading torch"))
    if settings.ray:
        from lynearm.student.ray_launch import run_on_ray

        return run_on_ray(settings, report)
    from lynearm.student.trainer import run_train

    return run_train(settings, report)


def _summary(report: TrainReport) -> str:
    from lynearm.cli.progress import duration

    before, after = report.held_out_before, report.held_out_after
    measured = f"; held-out KL {before:.3f} → {after:.3f}" if before is not None and after is not None else ""
    skipped = f", {report.skipped_traces} traces skipped" if report.skipped_traces else ""
    if report.damaged_blocks:
        skipped += f", damaged blocks left out: {report.damaged_blocks}"
    best = f", best {report.best_checkpoint.name}" if report.best_checkpoint else ""
    return (
        f"{report.steps} steps, {report.traces} traces, {report.tokens:,} tokens{skipped} "
        f"in {duration(report.seconds)}{measured}; checkpoint {report.checkpoint}{best}"
    )
