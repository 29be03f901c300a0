"""Whole runs against a real trace service."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from models.service_process import ServiceProcess
from models.tiny_llama import build_tiny_llama
from student.run_material import short_run
from student.teaching_material import make_blocks, make_spec, offer

from lynearm.client import TraceClient
from lynearm.student.checkpoint import latest_checkpoint, load_checkpoint
from lynearm.student.config import TrainConfig
from lynearm.student.lineage import read_lineage
from lynearm.student.model import StudentModel, load_causal_lm, load_student
from lynearm.student.optimization import Optimization
from lynearm.student.progress import TrainProgress, TrainReport, ignore_progress
from lynearm.student.trainer import run_train
from lynearm.wire.errors import (
    CheckpointError,
    ConfigError,
    CorruptBlockError,
    InvalidInputError,
    MisalignmentError,
    ServiceUnavailableError,
    StreamNotFoundError,
    TrainingError,
)
from lynearm.wire.traces import Cursor, TopK, Trace

numbers = itertools.count()


@pytest.fixture
def stream(service: ServiceProcess, teacher: StudentModel, traces: list[Trace]) -> str:
    """A sealed stream of all traces."""
    name = f"stream-{next(numbers)}"
    offer(service.target, teacher, traces, name=name)
    return name


@pytest.fixture
def configure(service: ServiceProcess, student_dir: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    def make(stream: str, out: str = "run", **overrides: object) -> TrainConfig:
        own: dict[str, object] = {"eval_every_steps": 5}
        return short_run(service, student_dir, (stream,), tmp_path / out, **(own | overrides))

    return make


def losses(report: TrainReport) -> list[float]:
    return [record.loss for record in report.curve]


def test_a_student_learns_from_a_stream(
    stream: str, configure: Callable[..., TrainConfig], traces: list[Trace]
) -> None:
    events: list[TrainProgress] = []
    report = run_train(configure(stream, epochs=3), events.append)
    assert report.stop_reason == "stream_end"
    assert (report.epochs, report.traces, report.steps) == (3, 3 * 52, 39)
    assert report.tokens == 3 * sum(len(trace.completion_token_ids) for trace in traces[8:])
    assert [one.step for one in report.evaluations] == [0, 5, 10, 15, 20, 25, 30, 35, 39]
    assert report.held_out_before is not None
    assert report.held_out_after is not None
    assert report.held_out_after < 0.9 * report.held_out_before
    assert report.curve[-1].kl < report.curve[0].kl
    assert report.how_to_go_on == ""
    stages = [event.stage for event in events]
    assert stages[:2] == ["loading", "collecting"]
    assert stages[-1] == "done"
    assert events[-1].held_out == report.evaluations[-1]
    assert max(event.tokens_per_second for event in events) > 0
    lineage = json.loads((report.checkpoint / "lynearm.json").read_text())
    (use,) = lineage["streams"]
    assert (use["stream"], use["complete_passes"], use["traces"]) == (stream, 3, 156)
    assert use["end"] == {"offset": 9, "trace_index": 0}


@pytest.mark.parametrize("stops", [(3,), (13,), (5, 14, 20)])
def test_a_resumed_run_repeats_the_uninterrupted_one(
    stream: str, configure: Callable[..., TrainConfig], stops: tuple[int, ...]
) -> None:
    whole = run_train(configure(stream, "whole", epochs=2))
    for number, steps in enumerate(stops):
        part = run_train(configure(stream, "parts", epochs=2, max_steps=steps, resume=number > 0))
        assert (part.stop_reason, part.steps) == ("max_steps", steps)
    resumed = run_train(configure(stream, "parts", epochs=2, resume=True))
    assert resumed.steps == whole.steps == 26
    assert losses(resumed) == losses(whole)
    assert resumed.traces == whole.traces
    ours, theirs = (load_student(run.checkpoint, device="cpu") for run in (resumed, whole))
    for (name, mine), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(mine, other), name


def test_a_resumed_run_keeps_its_tokenizer_when_old_checkpoints_go(
    stream: str, configure: Callable[..., TrainConfig]
) -> None:
    first = run_train(configure(stream, max_steps=2, keep_checkpoints=1))
    resumed = run_train(
        configure(stream, max_steps=8, keep_checkpoints=1, checkpoint_every_steps=1, resume=True)
    )
    assert not first.checkpoint.exists()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (resumed.checkpoint / name).is_file()


def test_a_stream_that_comes_later_is_waited_for(
    service: ServiceProcess, teacher: StudentModel, traces: list[Trace], configure: Callable[..., TrainConfig]
) -> None:
    create = threading.Timer(1.0, lambda: offer(service.target, teacher, traces, name="later"))
    create.start()
    stages: list[str] = []
    report = run_train(
        configure("later", wait_seconds=60.0, max_steps=2), lambda event: stages.append(event.stage)
    )
    create.join()
    assert report.steps == 2
    assert stages[0] == "waiting"


def test_training_begins_before_the_teacher_has_finished(
    service: ServiceProcess, teacher: StudentModel, traces: list[Trace], configure: Callable[..., TrainConfig]
) -> None:
    blocks = make_blocks(teacher, traces, 10)
    stages: list[str] = []
    with TraceClient(service.target) as client:
        client.create_stream(make_spec(teacher, "live"))
        with client.publisher("live", "teacher") as publisher:
            for block in blocks[:3]:
                publisher.publish(block)
            publisher.flush()

            def publish_the_rest(event: TrainProgress) -> None:
                stages.append(event.stage)
                # 22 traces are there to train on: after five batches the trainer waits for the teacher.
                if event.stage == "waiting" and stages.count("waiting") == 1:
                    assert event.record is not None
                    assert event.record.step == 5
                    for block in blocks[3:]:
                        publisher.publish(block)
                    publisher.flush()
                    client.seal_stream("live")

            report = run_train(configure("live", "live"), publish_the_rest)
    assert stages.count("waiting") == 1
    assert (report.stop_reason, report.traces) == ("stream_end", 52)
    assert report.waiting_seconds > 0.5
    # What was there when doesn't show in what was learnt.
    offer(service.target, teacher, traces, name="finished", traces_per_block=60)
    assert losses(run_train(configure("finished", "finished"))) == losses(report)


def test_a_service_that_goes_away_is_waited_for(
    tmp_path: Path, teacher: StudentModel, traces: list[Trace], configure: Callable[..., TrainConfig]
) -> None:
    stages: list[str] = []
    with ServiceProcess(tmp_path / "data") as own:
        with TraceClient(own.target) as client:
            client.create_stream(make_spec(teacher, "s"))
            with client.publisher("s", "teacher") as publisher:
                for block in make_blocks(teacher, traces[:30], 10):
                    publisher.publish(block)

        def on_progress(event: TrainProgress) -> None:
            stages.append(event.stage)
            if event.stage == "waiting" and stages.count("waiting") == 1:
                own.kill()
            elif event.stage == "waiting" and "no trace service" in event.message:
                own.start()
                with TraceClient(own.target) as client:
                    with client.publisher("s", "teacher") as publisher:
                        for block in make_blocks(teacher, traces[30:], 10):
                            publisher.publish(block)
                    client.seal_stream("s")

        report = run_train(configure("s", service=own.target), on_progress)
    assert (report.stop_reason, report.traces) == ("stream_end", 52)


def test_a_service_that_stays_away_ends_the_run_with_a_checkpoint(
    tmp_path: Path, teacher: StudentModel, traces: list[Trace], configure: Callable[..., TrainConfig]
) -> None:
    with ServiceProcess(tmp_path / "data") as own:
        with TraceClient(own.target) as client:
            client.create_stream(make_spec(teacher, "s"))
            with client.publisher("s", "teacher") as publisher:
                for block in make_blocks(teacher, traces[:30], 10):
                    publisher.publish(block)

        def on_progress(event: TrainProgress) -> None:
            if event.stage == "waiting":
                own.kill()

        with pytest.raises(ServiceUnavailableError):
            run_train(configure("s", service=own.target, patience_seconds=0.5), on_progress)
    directory = latest_checkpoint(tmp_path / "run")
    assert directory is not None
    state = load_checkpoint(directory).state
    assert (state.step, state.traces) == (5, 20)


@pytest.mark.parametrize("by_signal", [True, False])
def test_an_interrupted_run_saves_and_says_how_to_go_on(
    stream: str, configure: Callable[..., TrainConfig], by_signal: bool
) -> None:
    stop = threading.Event()

    def interrupt(event: TrainProgress) -> None:
        if event.record is not None and event.record.step == 4 and not stop.is_set():
            if by_signal:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.01)
            stop.set()

    handler = signal.getsignal(signal.SIGINT)
    report = run_train(configure(stream), interrupt, stop=stop)
    assert signal.getsignal(signal.SIGINT) is handler
    assert (report.stop_reason, report.steps) == ("interrupted", 4)
    assert "--resume" in report.how_to_go_on
    assert load_checkpoint(report.checkpoint).state.step == 4
    whole = run_train(configure(stream, "whole"))
    resumed = run_train(configure(stream, resume=True))
    assert losses(resumed) == losses(whole)


def test_an_interrupt_while_it_waits_ends_a_run_at_once(
    service: ServiceProcess, teacher: StudentModel, configure: Callable[..., TrainConfig]
) -> None:
    with TraceClient(service.target) as client:
        client.create_stream(make_spec(teacher, "empty"))
    stop = threading.Event()

    def interrupt(event: TrainProgress) -> None:
        if event.stage == "waiting":
            stop.set()

    report = run_train(configure("empty"), interrupt, stop=stop)
    assert (report.stop_reason, report.steps, report.evaluations) == ("interrupted", 0, ())
    state = load_checkpoint(report.checkpoint).state
    assert (state.streams[0].cursor, state.held_out_traces) == (Cursor(), ())


def test_a_long_wait_is_said_again(
    service: ServiceProcess,
    teacher: StudentModel,
    configure: Callable[..., TrainConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lynearm.student.source._ANNOUNCE_AGAIN_SECONDS", 0.3)
    with TraceClient(service.target) as client:
        client.create_stream(make_spec(teacher, "silent"))
    stop, told = threading.Event(), list[str]()

    def listen(event: TrainProgress) -> None:
        if event.stage == "waiting":
            told.append(event.message)
            if len(told) == 3:
                stop.set()

    run_train(configure("silent"), listen, stop=stop)
    assert told == ["the teacher's next block"] * 3


def test_the_held_out_set_ends_at_its_size_or_at_the_window(
    stream: str, configure: Callable[..., TrainConfig], traces: list[Trace]
) -> None:
    few = run_train(configure(stream, "few", held_out_traces=3, max_steps=1))
    positions = [len(trace.completion_token_ids) for trace in traces[:8]]
    assert few.evaluations[0].positions == sum(positions[:3])
    many = run_train(configure(stream, "many", held_out_traces=20, held_out_window=4, max_steps=1))
    assert many.evaluations[0].positions == sum(positions)
    none = run_train(configure(stream, "none", held_out_traces=0, max_steps=1))
    assert none.evaluations == ()
    assert losses(none) == losses(many) == losses(few)


def test_frozen_embeddings_stay_as_they_are(
    stream: str, configure: Callable[..., TrainConfig], student_dir: Path
) -> None:
    report = run_train(configure(stream, freeze_embeddings=True, max_steps=3))
    before, after = (load_student(path, device="cpu") for path in (student_dir, report.checkpoint))
    assert torch.equal(before.head_weight, after.head_weight)
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(before.model.state_dict()[name], after.model.state_dict()[name])


def test_a_student_with_another_tokenizer_is_refused_with_the_difference(
    stream: str, configure: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    other = build_tiny_llama(
        tmp_path / "other", seed=2, corpus=("Quite another text.",), chat_template="{{ x }}"
    )
    with pytest.raises(MisalignmentError) as caught:
        run_train(configure(stream, student=other))
    assert "vocabulary: teacher 'teacher'" in caught.value.message
    assert "chat template: teacher " in caught.value.message
    assert "allow_misaligned" in caught.value.remedy
    report = run_train(configure(stream, student=other, allow_misaligned=True, max_steps=1))
    assert report.steps == 1


def test_a_student_with_another_vocabulary_width_is_refused(
    stream: str, configure: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    narrower = build_tiny_llama(tmp_path / "narrower", seed=2, vocab_size=320)
    with pytest.raises(MisalignmentError, match="width of the logits: teacher 384, student 320"):
        run_train(configure(stream, student=narrower))


def test_a_student_with_padded_logits_learns_like_one_without(
    stream: str, configure: Callable[..., TrainConfig], student_dir: Path, tmp_path: Path
) -> None:
    wider = tmp_path / "wider"
    shutil.copytree(student_dir, wider)
    model = load_causal_lm(student_dir)
    model.resize_token_embeddings(512, mean_resizing=False)
    model.save_pretrained(wider)
    padded = run_train(configure(stream, out="padded", student=wider, max_steps=3))
    plain = run_train(configure(stream, out="plain", max_steps=3))
    assert losses(padded) == pytest.approx(losses(plain), rel=1e-4)


def test_a_run_of_other_losses_with_weights_brings_them_down(
    stream: str, configure: Callable[..., TrainConfig]
) -> None:
    report = run_train(
        configure(
            stream,
            epochs=3,
            loss=("jsd@0.5:0.8", "reverse-kl:0.2"),
            span_weights={"other": 0.5},
            tag_weights={"split=train": 2.0},
        )
    )
    # Bounded by log 2, a JSD falls slowly.
    assert losses(report)[-1] < 0.95 * losses(report)[0]
    assert report.held_out_before is not None
    assert report.held_out_after is not None
    assert report.held_out_after < report.held_out_before


def test_a_run_that_is_refused_before_its_first_step_leaves_nothing_in_the_way(
    service: ServiceProcess,
    teacher: StudentModel,
    teacher_dir: Path,
    traces: list[Trace],
    configure: Callable[..., TrainConfig],
) -> None:
    # A student that is its teacher finds each row a position late.
    late = [replace(trace, top_k=roll_rows(trace.top_k)) for trace in traces]
    offer(service.target, teacher, late, name="late")
    config = configure("late", student=teacher_dir, max_steps=1)
    with pytest.raises(MisalignmentError, match="a position late"):
        run_train(config)
    assert latest_checkpoint(config.out) is None
    offer(service.target, teacher, traces, name="in-time")
    assert run_train(replace(config, streams=("in-time",))).steps == 1


def roll_rows(rows: TopK) -> TopK:
    return TopK(*(np.roll(array, 1, 0) for array in (rows.token_ids, rows.logprobs, rows.tail_mass)))


def test_an_unknown_stream_is_named(configure: Callable[..., TrainConfig]) -> None:
    with pytest.raises(StreamNotFoundError, match="nowhere"):
        run_train(configure("nowhere"))


def test_a_run_is_not_overwritten_and_not_resumed_from_nothing(
    stream: str, configure: Callable[..., TrainConfig]
) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint to resume from"):
        run_train(configure(stream, resume=True))
    run_train(configure(stream, max_steps=1))
    with pytest.raises(ConfigError, match="already holds step-00000001"):
        run_train(configure(stream))
    with pytest.raises(ConfigError, match="batch_sequences was 4 and is 5"):
        run_train(configure(stream, resume=True, batch_sequences=5))
    with pytest.raises(ConfigError, match="freeze_embeddings was False and is True"):
        run_train(configure(stream, resume=True, freeze_embeddings=True))


def test_a_cursor_of_another_stream_is_refused(
    service: ServiceProcess,
    teacher: StudentModel,
    traces: list[Trace],
    stream: str,
    configure: Callable[..., TrainConfig],
) -> None:
    run_train(configure(stream, max_steps=1))
    with TraceClient(service.target) as client:
        client.delete_stream(stream)
    offer(service.target, teacher, traces, name=stream)
    with pytest.raises(CheckpointError, match="made at"):
        run_train(configure(stream, resume=True))


def test_a_checkpoint_left_by_a_crash_is_replaced(stream: str, configure: Callable[..., TrainConfig]) -> None:
    config = configure(stream, checkpoint_every_steps=2, max_steps=4)
    report = run_train(config)
    # As if the run had died after renaming step 4 into place and before saying so.
    (config.out / "LATEST").write_text("step-00000002\n")
    (report.checkpoint / "trainer.json").write_text("{}")
    again = run_train(replace(config, resume=True))
    assert losses(again) == losses(report)
    assert load_checkpoint(again.checkpoint).state.step == 4


def damage_block(data_dir: Path, block: bytes) -> None:
    """Flip a bit of a block that a service, which does not run now, has stored."""
    (path,) = [
        one for one in data_dir.joinpath("blocks").rglob("*") if one.is_file() and block in one.read_bytes()
    ]
    stored = bytearray(path.read_bytes())
    stored[stored.index(block) + len(block) // 2] ^= 1
    path.write_bytes(stored)


def test_a_damaged_block_ends_a_run_or_is_passed_over_and_recorded(
    tmp_path: Path, teacher: StudentModel, traces: list[Trace], configure: Callable[..., TrainConfig]
) -> None:
    with ServiceProcess(tmp_path / "data") as own:
        offer(own.target, teacher, traces, name="hurt", traces_per_block=4)
        own.stop()
        damage_block(tmp_path / "data", make_blocks(teacher, traces, 4)[7])
        own.start()
        config = configure("hurt", service=own.target)
        with pytest.raises(CorruptBlockError, match=r"block 7 .*damaged.*--set on_corrupt=skip"):
            run_train(config)
        stopped = latest_checkpoint(config.out)
        assert stopped is not None
        assert load_checkpoint(stopped).state.streams[0].damaged == ()
        resumed = run_train(replace(config, resume=True, on_corrupt="skip", epochs=2))
        whole = run_train(configure("hurt", "whole", service=own.target, on_corrupt="skip", epochs=2))
    assert whole.traces == 2 * (len(traces) - 8 - 4)
    assert losses(resumed) == losses(whole)
    for report in (resumed, whole):
        assert report.damaged_blocks == 1
        assert read_lineage(report.checkpoint)["streams"][0]["damaged_blocks"] == [7]
        assert "Damaged blocks left out of `hurt`: 1." in (report.checkpoint / "README.md").read_text()


def test_a_gradient_that_is_not_finite_ends_the_run_before_the_weights_are_lost(
    stream: str, configure: Callable[..., TrainConfig], student_dir: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(student_dir, broken)
    model = load_student(broken, device="cpu").model
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(3e38)
    model.save_pretrained(broken)
    config = configure(stream, student=broken, held_out_traces=0)
    with pytest.raises(InvalidInputError, match=r"step 1 is not finite .*failed-step-00000001\.json"):
        run_train(config)
    listed = json.loads((config.out / "failed-step-00000001.json").read_text())
    assert "not finite" in listed["reason"]
    # The fixture's first eight are held out.
    assert [trace["prompt_id"] for trace in listed["traces"]] == ["p8", "p9", "p10", "p11"]
    assert {trace["stream"] for trace in listed["traces"]} == {stream}


def ask_for_too_much(*_: object, **__: object) -> NoReturn:
    """The allocator's own refusal of a PiB."""
    torch.empty(1 << 50, dtype=torch.uint8)
    raise AssertionError("this machine has a PiB of memory")


def fail_at(count: int, real: Callable[..., Any]) -> Callable[..., Any]:
    """A function that finds no memory when it is called for the `count`th time."""
    calls = itertools.count(1)

    def call(*arguments: object, **named: object) -> object:
        return ask_for_too_much() if next(calls) == count else real(*arguments, **named)

    return call


def test_a_step_without_memory_saves_the_run_and_names_the_settings(
    stream: str, configure: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(stream)
    with monkeypatch.context() as patch:
        patch.setattr(Optimization, "_backward", fail_at(3, vars(Optimization)["_backward"]))
        with pytest.raises(TrainingError, match=r"out of memory while training .*micro_batch_tokens below"):
            run_train(config)
    saved = latest_checkpoint(config.out)
    assert saved is not None
    assert load_checkpoint(saved).state.step == 2
    resumed = run_train(replace(config, resume=True, micro_batch_tokens=64))
    assert losses(resumed) == pytest.approx(losses(run_train(configure(stream, "whole"))), rel=1e-4)


def test_weights_that_a_step_without_memory_had_begun_to_change_are_not_saved(
    stream: str,
    configure: Callable[..., TrainConfig],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = configure(stream, checkpoint_every_steps=2)
    monkeypatch.setattr(torch.optim.AdamW, "step", fail_at(4, torch.optim.AdamW.step))
    with pytest.raises(TrainingError, match="out of memory"):
        run_train(config)
    saved = latest_checkpoint(config.out)
    assert saved is not None
    assert load_checkpoint(saved).state.step == 2
    assert "not saved since step 2" in caplog.text


def test_a_student_or_a_measurement_without_memory_says_what_helps(
    stream: str, configure: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lynearm.student import beginning, measuring

    with monkeypatch.context() as patch:
        patch.setattr(beginning, "load_student", ask_for_too_much)
        with pytest.raises(TrainingError, match=r"while loading .*smaller student"):
            run_train(configure(stream, "loading"))
    monkeypatch.setattr(measuring, "evaluate", ask_for_too_much)
    with pytest.raises(TrainingError, match=r"while measuring .*micro_batch_tokens below"):
        run_train(configure(stream, "measuring"))


def test_a_finished_run_can_take_another_pass(stream: str, configure: Callable[..., TrainConfig]) -> None:
    first = run_train(configure(stream))
    again = run_train(configure(stream, resume=True))
    assert (again.steps, again.stop_reason) == (first.steps, "stream_end")
    longer = run_train(configure(stream, resume=True, epochs=2), ignore_progress)
    assert (longer.epochs, longer.steps) == (2, 2 * first.steps)
