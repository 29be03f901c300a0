"""Runs that learn from several streams, against a real trace service."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models.service_process import ServiceProcess
from models.tiny_llama import build_tiny_llama
from student.run_material import short_run
from student.teaching_material import make_blocks, make_spec, offer, write_traces
from typer.testing import CliRunner

from lynearm.cli.main import app
from lynearm.client import TraceClient
from lynearm.report.training import load_training_report, render_training_report
from lynearm.student.checkpoint import load_checkpoint
from lynearm.student.config import TrainConfig
from lynearm.student.metrics import read_metrics
from lynearm.student.mixing import StreamPlan, WeightSchedule
from lynearm.student.model import StudentModel, load_student
from lynearm.student.progress import TrainProgress, TrainReport
from lynearm.student.trainer import run_train
from lynearm.wire.errors import CheckpointError, DistillationForbiddenError, MisalignmentError
from lynearm.wire.traces import Trace

numbers = itertools.count()


@pytest.fixture(scope="module")
def other_teacher(tmp_path_factory: pytest.TempPathFactory) -> StudentModel:
    """Another teacher with the same tokenizer."""
    return load_student(build_tiny_llama(tmp_path_factory.mktemp("other") / "other", seed=3), device="cpu")


@pytest.fixture(scope="module")
def other_traces(other_teacher: StudentModel) -> list[Trace]:
    return write_traces(other_teacher, 30, seed=9, held_out=4)


@pytest.fixture
def pair(
    service: ServiceProcess,
    teacher: StudentModel,
    other_teacher: StudentModel,
    traces: list[Trace],
    other_traces: list[Trace],
) -> tuple[str, str]:
    """Two sealed streams: 52 traces to train on and 8 held out, and 26 and 4."""
    number = next(numbers)
    names = f"maths-{number}", f"code-{number}"
    offer(service.target, teacher, traces, name=names[0])
    offer(service.target, other_teacher, other_traces, name=names[1], traces_per_block=5)
    return names


@pytest.fixture
def configure(service: ServiceProcess, student_dir: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    def make(*streams: str, out: str = "run", **overrides: object) -> TrainConfig:
        own: dict[str, object] = {"held_out_window": 60, "eval_every_steps": 10}
        return short_run(service, student_dir, streams, tmp_path / out, **(own | overrides))

    return make


def losses(report: TrainReport) -> list[float]:
    return [record.loss for record in report.curve]


def test_two_streams_are_learnt_from_by_their_weights(
    pair: tuple[str, str],
    configure: Callable[..., TrainConfig],
    traces: list[Trace],
    other_traces: list[Trace],
) -> None:
    maths, code = pair
    config = configure(f"{maths}:0.7", f"{code}:0.3")
    events: list[TrainProgress] = []
    report = run_train(config, events.append)

    # Every trace once, of both streams.
    assert (report.stop_reason, report.epochs, report.traces) == ("stream_end", 1, 52 + 26)
    wanted = [sum(len(one.completion_token_ids) for one in part) for part in (traces[8:], other_traces[4:])]
    assert report.tokens == sum(wanted)
    states = load_checkpoint(report.checkpoint).state.streams
    assert [(state.name, state.traces, state.tokens) for state in states] == [
        (maths, 52, wanted[0]),
        (code, 26, wanted[1]),
    ]
    # Shares keep to the weights until one stream has ended; then the other has everything.
    assert [sum(record.stream_tokens.values()) for record in report.curve[1:]] == [
        record.tokens - before.tokens for before, record in itertools.pairwise(report.curve)
    ]
    half = report.curve[:10]
    of_maths = sum(record.stream_tokens[maths] for record in half)
    assert of_maths / half[-1].tokens == pytest.approx(0.7, abs=0.06)
    assert report.curve[-1].stream_tokens[maths] == 0 or report.curve[-1].stream_tokens[code] == 0
    ended = [event.message for event in events if "has ended" in event.message]
    assert len(ended) == 1
    assert "from here on" in ended[0]

    # Held out by stream, under its own teacher, and together.
    first, last = report.evaluations[0], report.evaluations[-1]
    assert set(last.streams) == {maths, code}
    counts = [sum(len(one.completion_token_ids) for one in part) for part in (traces[:8], other_traces[:4])]
    assert [last.streams[name].positions for name in pair] == counts
    mean = sum(part.kl * part.positions for part in last.streams.values()) / last.positions
    assert last.kl == pytest.approx(mean)
    assert all(last.streams[name].kl < first.streams[name].kl for name in pair)
    assert read_metrics(config.out).evaluations == report.evaluations
    assert read_metrics(config.out).steps == report.curve

    manifest = json.loads((report.checkpoint / "lynearm.json").read_text())
    assert [
        (use["stream"], use["completion_tokens"], use["complete_passes"]) for use in manifest["streams"]
    ] == [
        (maths, wanted[0], 1),
        (code, wanted[1], 1),
    ]
    (run,) = manifest["runs"]
    assert run["streams"] == [maths, code]
    assert run["settings"]["streams"] == [f"{maths}:0.7", f"{code}:0.3"]
    assert set(run["held_out"]["last"]["streams"]) == {maths, code}


@pytest.mark.parametrize("stops", [(1, 9), (16,)])
def test_a_resumed_mixture_repeats_the_uninterrupted_one(
    pair: tuple[str, str], configure: Callable[..., TrainConfig], stops: tuple[int, ...]
) -> None:
    streams = (f"{pair[0]}:0.9..0.2@12", f"{pair[1]}:0.3")
    whole = run_train(configure(*streams, out="whole", epochs=2))
    for number, steps in enumerate(stops):
        run_train(configure(*streams, out="parts", epochs=2, max_steps=steps, resume=number > 0))
    resumed = run_train(configure(*streams, out="parts", epochs=2, resume=True))
    assert resumed.curve == whole.curve
    assert resumed.evaluations[-1] == whole.evaluations[-1]
    ours, theirs = (load_student(run.checkpoint, device="cpu") for run in (resumed, whole))
    for (name, mine), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(mine, other), name


def test_the_order_does_not_depend_on_which_stream_has_data(
    service: ServiceProcess,
    pair: tuple[str, str],
    other_teacher: StudentModel,
    other_traces: list[Trace],
    configure: Callable[..., TrainConfig],
) -> None:
    maths, _ = pair
    late = f"late-{next(numbers)}"
    blocks = make_blocks(other_teacher, other_traces, 5)
    waited: list[str] = []
    with TraceClient(service.target) as client:
        client.create_stream(make_spec(other_teacher, late))
        with client.publisher(late, "teacher") as publisher:
            for block in blocks[:2]:
                publisher.publish(block)
            publisher.flush()

            def publish_the_rest(event: TrainProgress) -> None:
                if event.stage == "waiting" and not waited:
                    waited.append(event.message)
                    for block in blocks[2:]:
                        publisher.publish(block)
                    publisher.flush()
                    client.seal_stream(late)

            config = configure(maths, late, held_out_traces=4)
            report = run_train(config, publish_the_rest)
    assert len(waited) == 1
    assert f"stream {late}: the teacher's next block" in waited[0]
    at_once = run_train(configure(*pair, out="at-once", held_out_traces=4))
    assert losses(report) == losses(at_once)


def test_a_stream_whose_weight_falls_to_nothing_is_left(
    pair: tuple[str, str], configure: Callable[..., TrainConfig]
) -> None:
    maths, code = pair
    report = run_train(configure(maths, f"{code}:1..0@4", held_out_traces=0))
    steps = [record.stream_tokens[code] for record in report.curve]
    assert any(steps[:4])
    assert not any(steps[4:])
    states = load_checkpoint(report.checkpoint).state.streams
    assert (states[0].traces, states[0].epoch, states[1].epoch) == (52, 1, 0)
    assert 0 < states[1].traces < 26


def test_small_streams_begin_again_without_waiting_for_large_ones(
    pair: tuple[str, str], configure: Callable[..., TrainConfig]
) -> None:
    maths, code = pair
    report = run_train(configure(f"{maths}:0.5", f"{code}:0.5", epochs=2, held_out_traces=0))
    assert report.traces == 2 * (52 + 26)
    # While the large stream is in its first pass, the small one has begun its second and kept its share.
    middle = next(number for number, one in enumerate(report.curve) if one.epoch == 1)
    of_code = sum(record.stream_tokens[code] for record in report.curve[: middle // 2])
    assert of_code / report.curve[middle // 2 - 1].tokens == pytest.approx(0.5, abs=0.1)


def test_other_streams_on_resuming_are_refused_and_other_weights_are_not(
    pair: tuple[str, str],
    service: ServiceProcess,
    other_teacher: StudentModel,
    other_traces: list[Trace],
    configure: Callable[..., TrainConfig],
) -> None:
    maths, code = pair
    run_train(configure(maths, code, max_steps=2))
    for streams in ((maths,), (code, maths)):
        with pytest.raises(CheckpointError, match=f"was trained on {maths}, {code}, not on"):
            run_train(configure(*streams, resume=True))
    report = run_train(configure(f"{maths}:3", code, max_steps=4, resume=True))
    assert report.steps == 4
    with TraceClient(service.target) as client:
        client.delete_stream(code)
    offer(service.target, other_teacher, other_traces, name=code)
    with pytest.raises(CheckpointError, match=f"stream '{code}' made at"):
        run_train(configure(maths, code, resume=True))


def offer_as(
    service: ServiceProcess, teacher: StudentModel, traces: list[Trace], **teacher_changes: object
) -> str:
    """A sealed stream whose teacher says something else of itself."""
    name = f"odd-{next(numbers)}"
    spec = make_spec(teacher, name)
    changed = replace(spec.teacher, **teacher_changes)  # type: ignore[arg-type]  # fields by name
    with TraceClient(service.target) as client:
        client.create_stream(replace(spec, teacher=changed))
        with client.publisher(name, "teacher") as publisher:
            for block in make_blocks(teacher, traces, 7):
                publisher.publish(block)
        client.seal_stream(name)
    return name


def test_a_mixture_is_run_from_the_command_line_and_drawn(
    service: ServiceProcess, pair: tuple[str, str], student_dir: Path, tmp_path: Path
) -> None:
    maths, code = pair
    out = tmp_path / "run"
    arguments = ["train", "--student", str(student_dir), "--service", service.target, "--out", str(out)]
    arguments += ["--stream", f"{maths}:0.7", "--stream", f"{code}:0.3", "--max-steps", "3"]
    trained = CliRunner().invoke(app, [*arguments, "--device", "cpu", "--threads", "1"])
    assert trained.exit_code == 0, trained.output
    assert "3 steps" in trained.output
    shown = CliRunner().invoke(app, ["student", "lineage", str(out)], env={"COLUMNS": "200"})
    assert maths in shown.output
    assert code in shown.output
    page = render_training_report(load_training_report(out))
    assert "Shares of the streams" in page
    assert page.count("<svg") == 10
    wrong = CliRunner().invoke(app, [*arguments, "--stream", f"{code}:-1"])
    assert wrong.exit_code == 2
    assert "the weight" in wrong.output


def test_each_stream_has_a_temperature_of_its_own(
    service: ServiceProcess,
    pair: tuple[str, str],
    other_teacher: StudentModel,
    other_traces: list[Trace],
    configure: Callable[..., TrainConfig],
) -> None:
    warm = offer_as(service, other_teacher, other_traces, logprobs_temperature=2.0)
    with pytest.raises(MisalignmentError, match=f"stream '{warm}' are at temperature 2"):
        run_train(configure(pair[0], warm))
    report = run_train(configure(pair[0], warm, out="mixed", retemper=True))
    alone = run_train(configure(pair[0], out="alone"))
    # Before any step, the cold stream measures as it does alone: only the other one is re-tempered.
    assert report.evaluations[0].streams[pair[0]].kl == pytest.approx(alone.evaluations[0].kl)
    cold = run_train(configure(pair[1], out="cold"))
    assert report.evaluations[0].streams[warm].kl != pytest.approx(cold.evaluations[0].kl, rel=1e-2)
    # Rows of both temperatures in every step's batch, each under its own.
    assert report.curve[-1].kl < report.curve[0].kl


def test_a_stream_that_does_not_fit_is_named(
    service: ServiceProcess,
    teacher: StudentModel,
    traces: list[Trace],
    pair: tuple[str, str],
    configure: Callable[..., TrainConfig],
) -> None:
    processed = offer_as(service, teacher, traces, logprobs_mode="processed")
    config = configure(pair[0], processed, max_steps=2)
    with pytest.raises(MisalignmentError, match=f"stream '{processed}' are not aligned"):
        run_train(config)
    report = run_train(replace(config, allow_misaligned=True))
    manifest = json.loads((report.checkpoint / "lynearm.json").read_text())
    (difference,) = manifest["runs"][0]["overrides"]["allow_misaligned"]
    assert difference.startswith(f"stream '{processed}': logprobs")

    forbidden = f"forbidden-{next(numbers)}"
    with TraceClient(service.target) as client:
        client.create_stream(replace(make_spec(teacher, forbidden), license="llama2"))
    with pytest.raises(DistillationForbiddenError, match=forbidden):
        run_train(configure(pair[0], forbidden, out="forbidden"))


def test_a_stop_while_one_stream_is_waited_for_can_be_resumed(
    service: ServiceProcess,
    pair: tuple[str, str],
    other_teacher: StudentModel,
    other_traces: list[Trace],
    configure: Callable[..., TrainConfig],
) -> None:
    slow = f"slow-{next(numbers)}"
    blocks = make_blocks(other_teacher, other_traces, 5)
    stop = threading.Event()

    def interrupt(event: TrainProgress) -> None:
        if event.stage == "waiting":
            stop.set()

    with TraceClient(service.target) as client:
        client.create_stream(make_spec(other_teacher, slow))
        with client.publisher(slow, "teacher") as publisher:
            for block in blocks[:3]:
                publisher.publish(block)
            publisher.flush()
            config = configure(pair[0], slow, held_out_traces=4)
            part = run_train(config, interrupt, stop=stop)
            assert part.stop_reason == "interrupted"
            for block in blocks[3:]:
                publisher.publish(block)
        client.seal_stream(slow)
    resumed = run_train(replace(config, resume=True))
    at_once = run_train(configure(*pair, out="at-once", held_out_traces=4))
    assert 0 < part.steps < resumed.steps
    assert losses(resumed) == losses(at_once)


def test_a_program_can_filter_a_stream_that_never_ends(
    service: ServiceProcess,
    pair: tuple[str, str],
    other_teacher: StudentModel,
    other_traces: list[Trace],
    configure: Callable[..., TrainConfig],
) -> None:
    # As rollouts come in: each labelled with the step of the student that wrote it, dropped when too old.
    rollouts = f"rollouts-{next(numbers)}"
    labelled = [
        replace(trace, tags={"split": "train", "student_step": str(number // 6)})
        for number, trace in enumerate(other_traces)
    ]
    asked: list[tuple[int, int]] = []

    def is_fresh(trace: Trace, step: int) -> bool:
        written = int(trace.tags["student_step"])
        asked.append((written, step))
        return step - written <= 3

    with TraceClient(service.target) as client:
        client.create_stream(make_spec(other_teacher, rollouts))
        with client.publisher(rollouts, "student") as publisher:
            for block in make_blocks(other_teacher, labelled, 5):
                publisher.publish(block)
    share = WeightSchedule(((0, 0.25),))
    plans = (
        StreamPlan(pair[0], WeightSchedule(((0, 0.75),))),
        StreamPlan(rollouts, share, accepts=is_fresh, measured=False, endless=True),
    )
    report = run_train(configure(pair[0], max_steps=7), plans=plans)
    assert list(report.evaluations[0].streams) == [pair[0]]
    used = load_checkpoint(report.checkpoint).state.streams[1]
    refused = [(written, step) for written, step in asked if step - written > 3]
    assert used.traces == len(asked) - len(refused) > 0
    assert refused
    assert [written for written, _ in asked] == sorted(written for written, _ in asked)
