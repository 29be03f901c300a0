"""What people and programs see of a step that takes long."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from rich.console import Console

from lynearm.cli.options import ProgressMode
from lynearm.cli.progress import Reporter, Row, Status, count, duration, event_line, size
from lynearm.cli.text import printable
from lynearm.cli.traffic import Traffic, with_rates


@dataclass(frozen=True)
class LongStep:
    stage: str = "working"
    done: int = 0
    loss: float = float("nan")
    out: Path = Path("x")
    digest: bytes = b"\x01\xff"
    parts: tuple[str, ...] = field(default=("a", "b"))


def describe(event: LongStep) -> Status:
    return Status(event.stage, f"{event.done} things", event.done, 10)


def test_json_has_one_parsable_object_for_each_event(capsys: pytest.CaptureFixture[str]) -> None:
    with Reporter("teach", ProgressMode.json, describe) as report:
        report(LongStep(done=1))
        report.announce(Status("loading"))
        report.conclude(LongStep(done=2))
    captured = capsys.readouterr()
    first, second = (json.loads(line) for line in captured.out.splitlines())
    assert first == {
        "role": "teach",
        "event": "long_step",
        "stage": "working",
        "done": 1,
        "loss": None,
        "out": "x",
        "digest": "01ff",
        "parts": ["a", "b"],
    }
    assert second["done"] == 2
    assert captured.err == ""


def test_lines_come_at_each_stage_and_not_at_each_event(capsys: pytest.CaptureFixture[str]) -> None:
    with Reporter("train", ProgressMode.auto, describe) as report:
        for done in range(5):
            report(LongStep(done=done))
        report(LongStep("saving", 10))
    captured = capsys.readouterr()
    assert captured.err.splitlines() == ["train: working 0%: 0 things", "train: saving 100%: 10 things"]
    assert captured.out == ""


def test_news_is_not_passed_over_between_two_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with Reporter("train", ProgressMode.plain, describe) as report:
        report(LongStep(done=1))
        report.announce(Status("working", "a stream has ended", news=True))
        report(LongStep(done=2))
    assert capsys.readouterr().err.splitlines() == [
        "train: working 10%: 1 things",
        "train: working: a stream has ended",
    ]


def test_none_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Reporter("train", ProgressMode.none, describe) as report:
        report(LongStep())
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


@pytest.mark.parametrize("columns", [50, 120])
def test_live_display_keeps_to_one_line(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=columns, color_system=None)

    def console(**_: object) -> Console:
        return terminal

    monkeypatch.setattr("lynearm.cli.progress.Console", console)
    reporter: Reporter[LongStep] = Reporter(
        "train", ProgressMode.auto, lambda event: Status("training", "x" * 300, 3, 10)
    )
    with reporter as report:
        assert report.mode is ProgressMode.rich
        report(LongStep())
    frames = screen.getvalue().replace("\r", "\n").splitlines()
    drawn = [frame for frame in frames if "training" in frame]
    assert drawn
    assert all(len(frame.rsplit("\x1b[2K", 1)[-1]) <= columns for frame in drawn)


@pytest.mark.parametrize("columns", [50, 80, 140])
@pytest.mark.parametrize("lines", [3, 10, 40])
def test_rows_stand_in_columns_and_fit_the_terminal(
    columns: int, lines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=columns, height=lines, color_system=None)
    monkeypatch.setattr("lynearm.cli.progress.Console", lambda **_: terminal)
    rows = tuple(
        Row(f"teacher-{n}", n / 12, ("generating", f"{n}/12", f"{n * 100} tokens/s"), "at [red]10.0.0.1")
        for n in range(12)
    )
    status = Status("generating", "x" * 300, 3, 10, left_seconds=75, rows=rows)
    with Reporter[LongStep]("teach", ProgressMode.rich, lambda _: status) as report:
        report(LongStep())
        report(LongStep(done=1))
        assert report._bars is not None
        (table, *below) = report._bars.get_renderables()
        drawn = [
            "".join(segment.text for segment in line)
            for one in (table, *below)
            for line in terminal.render_lines(one)
        ]
    assert all(len(line) == columns for line in drawn)
    assert len(drawn) <= max(lines - 1, 3)
    assert "1 min 15 s left" in drawn[0] or columns < 80
    shown = [line for line in drawn if "teacher-" in line]
    if columns >= 80:
        assert [line.split()[0] for line in shown] == [f"teacher-{n}" for n in range(len(shown))]
    more = [line for line in drawn if " more" in line]
    assert bool(more) == (len(shown) < 12)
    if columns == 140:
        assert len({line.index("tokens/s") for line in shown}) == 1
        assert all("[red]" in line for line in shown), "texts are no markup"


def test_rows_are_for_a_terminal_only(capsys: pytest.CaptureFixture[str]) -> None:
    status = Status("generating", "all", rows=(Row("teacher-0", 0.5, ("generating",)),))
    with Reporter[LongStep]("teach", ProgressMode.plain, lambda _: status) as report:
        report(LongStep())
    assert capsys.readouterr().err == "teach: generating: all\n"


def test_events_must_be_dataclasses() -> None:
    with pytest.raises(TypeError, match="no dataclass"):
        event_line("teach", {"a": 1})


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (count(0), "0"),
        (count(912), "912"),
        (count(3449), "3.4k"),
        (count(12_400_000), "12M"),
        (count(999_999), "1.0M"),
        (size(912), "912 B"),
        (size(3_400_000), "3.4 MB"),
        (duration(4.21), "4.2 s"),
        (duration(185), "3 min 05 s"),
        (duration(7800), "2 h 10 min"),
    ],
)
def test_quantities_are_short(shown: str, expected: str) -> None:
    assert shown == expected


def test_traces_cannot_steer_the_terminal() -> None:
    assert "\x1b" not in printable("a\x1b[31mred")
    assert printable("two\nlines\tof ünïcode 🙂") == "two\nlines\tof ünïcode 🙂"


def test_rates_are_of_the_time_between_two_looks() -> None:
    before = Traffic("a:1", streams=1, traces=2, tokens=100, size_bytes=1000)
    after = Traffic("a:1", streams=1, traces=4, tokens=500, size_bytes=3000)
    now = with_rates(after, before, 2.0)
    assert (now.tokens_per_second, now.bytes_per_second) == (200.0, 1000.0)
    assert with_rates(before, after, 2.0).tokens_per_second == 0
    assert with_rates(after, None, 2.0) == after
