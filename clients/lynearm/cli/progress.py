"""Shows where a long step is: live bars on a terminal, lines elsewhere, JSON for programs.

Roles report by calling a function with frozen dataclasses of their own. A `Reporter` is that function: it
asks the command's `describe` what an event means to a person, and draws it. Progress goes to standard
error, so that standard output stays free for results; with `json`, each event goes there instead, as
{"role": "teach", "event": "teach_progress", …its fields}.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, cast

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from lynearm.cli.options import ProgressMode

LINE_INTERVAL_SECONDS = 5.0
"""Between two lines of one stage where there is no terminal to redraw."""

_NARROW_COLUMNS = 90
"""Below this width the bar gives its place to the text."""

_Event = TypeVar("_Event")


_SURROUNDING_LINES = 4
"""Of a terminal, which rows leave to the bar above them and the prompt below."""

_ROW_BAR_COLUMNS = 10


@dataclass(frozen=True, slots=True)
class Row:
    """One of several that work at the same time."""

    name: str
    share: float
    """How busy it is, 0 to 1."""
    cells: tuple[str, ...]
    """Counts and rates, as many in every row: they stand in columns."""
    note: str = ""
    """What else there is to say; cut off where the terminal ends."""


@dataclass(frozen=True, slots=True)
class Status:
    """What an event means to a person."""

    stage: str
    """One or two words, for example "training"."""
    text: str = ""
    """Counts and rates."""
    completed: float = 0.0
    total: float | None = None
    """None where the end cannot be known."""
    left_seconds: float | None = None
    """Until the end, where somebody knows better than the bar's own estimate."""
    rows: tuple[Row, ...] = ()
    """Below the bar, on a terminal."""
    news: bool = False
    """Whether it is said once, and is not to be passed over between two lines."""


class Reporter(Generic[_Event]):
    """Takes a role's events and shows them. Threads may share it; use it as a context manager.

    Args:
        role: The command's verb.
        mode: How to show.
        describe: What an event means; None shows nothing for it to people.
    """

    def __init__(self, role: str, mode: ProgressMode, describe: Callable[[_Event], Status | None]) -> None:
        self._role = role
        self._describe = describe
        self._console = Console(stderr=True)
        self._results = sys.stdout
        if mode is ProgressMode.auto:
            mode = ProgressMode.rich if self._console.is_terminal else ProgressMode.plain
        self.mode = mode
        self._lock = threading.Lock()
        self._bars = _bars(self._console) if mode is ProgressMode.rich else None
        self._shown: Status | None = None
        self._printed_at = -math.inf

    def __enter__(self) -> Self:
        """Start drawing."""
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Clear the picture."""
        if self._bars is not None:
            self._bars.stop()

    @property
    def for_people(self) -> bool:
        """Whether a person reads the results; with JSON, a program reads the events."""
        return self.mode is not ProgressMode.json

    def __call__(self, event: _Event) -> None:
        """Show an event of the role."""
        if self.mode is ProgressMode.json:
            self.conclude(event)
        elif (status := self._describe(event)) is not None:
            self.announce(status)

    def announce(self, status: Status) -> None:
        """Show to people what no event of the role says, such as a slow import."""
        if self.mode in (ProgressMode.json, ProgressMode.none):
            return
        with self._lock:
            if self._bars is not None:
                self._draw(self._bars, status)
            else:
                self._print(status)
            self._shown = status

    def conclude(self, report: object) -> None:
        """Hand a dataclass to programs; people get to read its contents elsewhere."""
        if self.mode is ProgressMode.json:
            with self._lock:
                print(event_line(self._role, report), file=self._results, flush=True)

    def _draw(self, bars: _Bars, status: Status) -> None:
        new_stage = self._shown is None or self._shown.stage != status.stage
        bars.rows = status.rows
        if not bars.tasks or new_stage:
            for task in bars.tasks:
                bars.remove_task(task.id)
            bars.add_task(status.stage, total=status.total, text="", left=None)
        bars.update(
            bars.tasks[0].id,
            total=status.total,
            completed=status.completed,
            text=status.text,
            left=status.left_seconds,
        )

    def _print(self, status: Status) -> None:
        new_stage = self._shown is None or self._shown.stage != status.stage
        now = time.monotonic()
        if not (new_stage or status.news) and (
            status == self._shown or now - self._printed_at < LINE_INTERVAL_SECONDS
        ):
            return
        self._printed_at = now
        done = f" {status.completed / status.total:.0%}" if status.total else ""
        print(
            f"{self._role}: {status.stage}{done}" + (f": {status.text}" if status.text else ""),
            file=sys.stderr,
        )


def event_line(role: str, event: object) -> str:
    """An event as one line of JSON: role, the class's name in snake case, and its fields."""
    if not dataclasses.is_dataclass(event) or isinstance(event, type):
        raise TypeError(f"{event!r} is no dataclass instance")
    name = re.sub(r"(?<!^)(?=[A-Z])", "_", type(event).__name__).lower()
    fields = cast("dict[str, object]", plain_value(dataclasses.asdict(event)))
    return json.dumps({"role": role, "event": name, **fields}, ensure_ascii=False, allow_nan=False)


def count(number: float) -> str:
    """A count in at most five characters: 912, 3.4k, 12M."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        # Slightly below each limit the smaller unit would round to 1000.
        if number >= 0.9995 * limit:
            shown = number / limit
            return f"{shown:.1f}{unit}" if shown < 9.95 else f"{shown:.0f}{unit}"
    return f"{number:.0f}"


def size(size_bytes: float) -> str:
    """A size with a unit: 912 B, 3.4 MB."""
    shown = count(size_bytes)
    return f"{shown} B" if shown[-1].isdigit() else f"{shown[:-1]} {shown[-1]}B"


def duration(seconds: float) -> str:
    """A duration: 4.2 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


class _Bars(Progress):
    """The bar of a stage, and rows below it."""

    rows: tuple[Row, ...] = ()

    def get_renderables(self) -> Iterable[RenderableType]:
        """What is drawn, some times a second."""
        yield self.make_tasks_table(self.tasks)
        if self.rows:
            room = max(1, self.console.height - _SURROUNDING_LINES)
            yield _table(self.rows[:room], more=len(self.rows) - room)


def _table(rows: Sequence[Row], more: int) -> Table:
    table = Table.grid(padding=(0, 1), expand=True)
    for _ in ("indent", "name", "bar"):
        table.add_column(no_wrap=True)
    for index in range(len(rows[0].cells)):
        table.add_column(no_wrap=True, justify="right" if index else "left", overflow="ellipsis")
    table.add_column(no_wrap=True, ratio=1, overflow="ellipsis", style="dim")
    for row in rows:
        bar = ProgressBar(total=1, completed=row.share, width=_ROW_BAR_COLUMNS)
        table.add_row(" ", Text(row.name), bar, *map(Text, row.cells), Text(row.note))
    if more > 0:
        table.add_row(" ", Text(f"and {more} more", style="dim"))
    return table


class _Bar(BarColumn):
    """A bar where the end is known; nothing elsewhere, since the spinner moves already."""

    def render(self, task: Task) -> ProgressBar:
        bar = super().render(task)
        if task.total is None:
            bar.width = 0
        return bar


class _Elapsed(ProgressColumn):
    """Time since the stage began, and the time that is left where that can be told."""

    def render(self, task: Task) -> Text:
        elapsed = duration(task.elapsed or 0.0)
        left: float | None = task.fields.get("left")
        left = task.time_remaining if left is None else left
        return Text(f"{elapsed}, {duration(left)} left" if left else elapsed, style="dim")


def _bars(console: Console) -> _Bars:
    columns: list[ProgressColumn] = [SpinnerColumn(), TextColumn("{task.description}")]
    if console.width >= _NARROW_COLUMNS:
        columns.append(_Bar(bar_width=24))
    text_column = Column(ratio=1, no_wrap=True, overflow="ellipsis")
    columns += [
        TextColumn("{task.fields[text]}", markup=False, table_column=text_column),
        _Elapsed(table_column=Column(no_wrap=True)),
    ]
    # What a step came to is printed after it, so that its bar need not stay.
    return _Bars(*columns, console=console, expand=True, transient=True)


def plain_value(value: Any) -> object:  # Any: fields of other roles' dataclasses
    """The value in the types of JSON, which has neither NaN nor bytes."""
    if isinstance(value, Mapping):
        return {str(key): plain_value(one) for key, one in cast("Mapping[object, Any]", value).items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain_value(one) for one in cast("list[Any]", value)]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Path):
        return str(value)
    return value
