"""The demo's report: it says what it was given, runs nothing, and draws its charts where they should lie."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lynearm.demo.report import (
    DemoReport,
    ExportRow,
    HeldOutPoint,
    StageTiming,
    TextSample,
    TrainPoint,
    format_bytes,
    format_seconds,
    format_small,
    render_report,
    write_report,
)
from lynearm.report.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    WIDTH,
    Chart,
    Series,
    draw_chart,
    linear_ticks,
    log_ticks,
    smooth,
    thin_out,
)
from lynearm.wire.errors import StorageError


class Page(HTMLParser):
    """The elements, attributes and visible text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in {"meta", "line", "polyline"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


def build_report(**overrides: object) -> DemoReport:
    report = DemoReport(
        title="A teacher taught a student",
        teacher="the teacher",
        student="the student",
        teacher_tokens=16_873,
        bits_per_token=912.4,
        top_k=64,
        curve=tuple(TrainPoint(step, 100 * step, 2.0 / step) for step in range(1, 41)),
        held_out=(HeldOutPoint(0, 0, 1.5), HeldOutPoint(20, 2000, 0.8), HeldOutPoint(40, 4000, 0.414)),
        exports=(
            ExportRow("MLX, 16-bit", "runs/demo/mlx-16", 213_400_000, 2.5e-5, 0.043, 8, 8, "mlx-lm"),
            ExportRow("MLX, 4-bit", "runs/demo/mlx-4", 60_100_000, 0.41, 6.2, 5, 8, "mlx-lm"),
        ),
        stages=(StageTiming("Teach", 10.0, 110.0), StageTiming("Train", 60.0, 210.0)),
        samples=(TextSample("Say hello.", "Hello from the student.", "Hello from the teacher."),),
        facts={"Prompts": "302"},
        versions={"Python": "3.11"},
        machine="2 cores",
    )
    return replace(report, **overrides)  # type: ignore[arg-type]  # fields by name


def test_the_page_tells_what_the_run_came_to() -> None:
    text = Page(render_report(build_report())).text
    for told in (
        "A teacher taught a student",
        "1.500 → 0.414",
        "16,873",
        "912",
        "213 MB",
        "2.5 × 10⁻⁵",
        "60.1 MB",
        "5 of 8",
        "3 min 20 s",
        "1 min 40 s",
        "Say hello.",
        "Hello from the student.",
        "Hello from the teacher.",
        "302",
        "3.11",
        "2 cores",
    ):
        assert told in text, told


def test_elements_are_closed_in_order() -> None:
    assert Page(render_report(build_report())).open == []


def test_nothing_is_fetched_and_nothing_runs() -> None:
    source = render_report(build_report())
    page = Page(source)
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name in {"src", "href"} or name.startswith("on")]
    assert not re.search(r"https?:|//|@import|url\(", source.replace("</", "<"))
    assert any(value.startswith("default-src 'none'") for name, value in page.attributes if name == "content")


def test_hostile_text_stays_text_wherever_it_enters() -> None:
    hostile = "\"'><script>alert(1)</script><img src=x onerror=alert(2)>&amp;"
    page = Page(
        render_report(
            build_report(
                title=hostile,
                teacher=hostile,
                student=hostile,
                exports=(ExportRow(hostile, hostile, 1, 0.0, 0.0, 1, 1, hostile),),
                stages=(StageTiming(hostile, 0.0, 1.0),),
                samples=(TextSample(hostile, hostile, hostile),),
                sampled_from=hostile,
                facts={hostile: hostile},
                versions={hostile + "2": hostile},
                machine=hostile,
            )
        )
    )
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.text.count(hostile) >= 12


def test_a_long_run_stays_below_100_kb() -> None:
    report = build_report(
        curve=tuple(TrainPoint(step, 512 * step, 1.0 + math.sin(step)) for step in range(1, 50_001)),
        held_out=tuple(HeldOutPoint(step, 512 * step, 1.0 + 1.0 / (step + 1)) for step in range(5_000)),
        samples=tuple(TextSample("p" * 9_000, "s" * 9_000, "t" * 9_000) for _ in range(50)),
    )
    assert len(render_report(report).encode()) < 100_000


def test_an_empty_run_says_that_nothing_was_measured() -> None:
    page = Page(render_report(DemoReport("Title", "a", "b", 0, 0.0, 64)))
    assert page.text.count("not measured") == 3
    assert "nothing was measured" in page.text
    assert page.open == []


def test_figures_that_are_not_finite_are_said_and_not_drawn() -> None:
    report = build_report(
        curve=(TrainPoint(1, 100, math.nan), TrainPoint(2, 200, math.inf)),
        exports=(ExportRow("broken", "", 1, math.inf, math.nan, 0, 8),),
    )
    source = render_report(report)
    assert Page(source).text.count("not finite") == 2
    assert not re.search(r'(points|x|y|cx|cy)="[^"]*(nan|inf)', source)


def test_one_measurement_alone_is_drawn() -> None:
    source = render_report(build_report(held_out=(HeldOutPoint(0, 0, 1.5),), curve=(TrainPoint(1, 5, 0.0),)))
    assert source.count("<circle") == 1


def test_a_report_replaces_the_old_one_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "run" / "report.html"
    write_report(path, build_report(title="first"))
    write_report(path, build_report(title="second"))
    assert "<title>second</title>" in path.read_text(encoding="utf-8")
    assert list(path.parent.iterdir()) == [path]


def test_half_a_surrogate_pair_does_not_stop_the_report(tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", build_report(samples=(TextSample("p", "broken \ud83d"),)))
    assert "broken ?" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError, match="cannot be written"):
        write_report(tmp_path / "file" / "report.html", build_report())


def polyline(svg: str) -> list[tuple[float, float]]:
    found = re.search(r'<polyline [^>]*points="([^"]*)"', svg)
    assert found is not None
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in found[1].split())]


def grid_height(svg: str, tick: str) -> float:
    found = re.search(
        rf'<line class="grid" [^>]*y1="([\d.]+)"[^>]*/><text [^>]*>{re.escape(tick)}</text>', svg
    )
    assert found is not None
    return float(found[1])


def test_points_lie_between_the_axes_in_proportion() -> None:
    svg = draw_chart(Chart("t", "x", "y", (Series("s", ((0.0, 2.0), (50.0, 1.0), (100.0, 0.5))),)))
    at = polyline(svg)
    assert [x for x, _ in at] == pytest.approx([LEFT, (LEFT + WIDTH - RIGHT) / 2, WIDTH - RIGHT], abs=0.1)
    heights = [HEIGHT - BOTTOM - y for _, y in at]
    assert heights == pytest.approx([heights[0], heights[0] / 2, heights[0] / 4], abs=0.2)
    assert grid_height(svg, "2.0") == pytest.approx(at[0][1], abs=0.1)
    assert grid_height(svg, "0.5") == pytest.approx(at[2][1], abs=0.1)


def test_an_axis_over_a_decade_is_logarithmic_and_says_so() -> None:
    svg = draw_chart(Chart("t", "x", "nats", (Series("s", ((0.0, 10.0), (1.0, 1.0), (2.0, 0.1))),)))
    (_, top), (_, middle), (_, bottom) = polyline(svg)
    assert middle - top == pytest.approx(bottom - middle, abs=0.2)
    assert "nats, log scale" in svg
    assert grid_height(svg, "1") == pytest.approx(middle, abs=0.1)


def test_two_series_get_a_legend_and_a_lone_one_does_not() -> None:
    one, two = Series("alone", ((0.0, 1.0), (1.0, 2.0))), Series("other", ((0.0, 1.0), (1.0, 2.0)))
    assert ">alone</text>" not in draw_chart(Chart("t", "x", "y", (one,)))
    both = draw_chart(Chart("t", "x", "y", (one, two)))
    assert ">alone</text>" in both
    assert ">other</text>" in both


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.6, [0.0, 0.5, 1.0, 1.5]),
        (0.0, 40_000.0, [0.0, 10_000.0, 20_000.0, 30_000.0, 40_000.0]),
        (0.0, 0.03, [0.0, 0.01, 0.02, 0.03]),
        (-1.0, 1.0, [-1.0, -0.5, 0.0, 0.5, 1.0]),
        (3.0, 3.0, [3.0]),
    ],
)
def test_linear_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert linear_ticks(low, high) == pytest.approx(expected)


def test_log_ticks_are_one_two_five() -> None:
    assert log_ticks(0.2, 7.0) == pytest.approx([0.2, 0.5, 1.0, 2.0, 5.0])
    assert log_ticks(1e-6, 1.0) == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0])


def test_thinning_keeps_the_ends_and_the_mean() -> None:
    points = [(float(x), float(x % 2)) for x in range(1000)]
    thinned = thin_out(points, limit=101)
    assert len(thinned) == 101
    assert (thinned[0], thinned[-1]) == (points[0], points[-1])
    assert all(y == pytest.approx(0.5, abs=0.06) for _, y in thinned[1:-1])
    assert thin_out(points[:50], limit=101) == tuple(points[:50])


def test_smoothing_is_a_centred_mean() -> None:
    points = [(0.0, 0.0), (1.0, 3.0), (2.0, 6.0), (3.0, 0.0)]
    assert smooth(points, 3) == ((0.0, 1.5), (1.0, 3.0), (2.0, 3.0), (3.0, 3.0))


def test_numbers_read_well() -> None:
    assert [format_seconds(value) for value in (0.84, 9.96, 59.7, 372.0)] == [
        "0.8 s",
        "10 s",
        "1 min 00 s",
        "6 min 12 s",
    ]
    assert [format_bytes(value) for value in (12, 76_300_000, 999_900_000, 538_090_408, 2_000_000_000)] == [
        "12 B",
        "76.3 MB",
        "1000 MB",
        "538 MB",
        "2 GB",
    ]
    assert [format_small(value) for value in (0.0, 0.512, 6.2, 1e-3)] == ["0", "0.512", "6.2", "0.001"]
    assert format_small(3.14e-5) == "3.1 × 10⁻⁵"
