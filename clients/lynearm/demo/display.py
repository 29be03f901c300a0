"""What a person sees while the demo runs: one line for each stage, alive at the same time."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from lynearm.demo.report_data import StageTiming

_PLAIN_INTERVAL_SECONDS = 15.0
"""Between two lines of one stage where there is no terminal to redraw."""


class StageDisplay:
    """Progress of stages that overlap. Threads may share it; use it as a context manager.

    On a terminal each stage is a live bar; elsewhere (CI, a pipe) a line from time to time.

    Args:
        console: Where to print.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live = console.is_terminal
        self._lock = threading.Lock()
        self._tasks: dict[str, TaskID] = {}
        self._began = time.monotonic()
        self._starts: dict[str, float] = {}
        self._printed: dict[str, float] = {}
        self.timings: list[StageTiming] = []
        """Of the finished stages, in the order in which they finished."""
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description:<8}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("{task.fields[text]}"),
            console=console,
            disable=not self._live,
        )

    def __enter__(self) -> Self:
        """Start drawing."""
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last picture standing."""
        self._progress.stop()

    def update(self, stage: str, text: str, fraction: float | None = None) -> None:
        """Show where a stage is; the first call starts it.

        Args:
            stage: Name of the stage.
            text: What it does, with rates.
            fraction: Done part, 0 to 1; None where that cannot be known.
        """
        with self._lock:
            task = self._task(stage)
            self._progress.update(
                task, text=text, total=None if fraction is None else 1.0, completed=fraction
            )
            now = time.monotonic()
            if not self._live and now - self._printed.get(stage, -1e9) >= _PLAIN_INTERVAL_SECONDS:
                self._printed[stage] = now
                self._print(stage, text)

    def finish(self, stage: str, text: str) -> None:
        """Show that a stage is done."""
        with self._lock:
            task = self._task(stage)
            timing = StageTiming(stage, self._starts[stage], time.monotonic() - self._began)
            self.timings.append(timing)
            self._progress.update(task, text=text, total=1.0, completed=1.0)
            if not self._live:
                self._print(stage, f"done in {timing.end_seconds - timing.start_seconds:.1f} s: {text}")

    def _task(self, stage: str) -> TaskID:
        if stage not in self._tasks:
            self._starts[stage] = time.monotonic() - self._began
            self._tasks[stage] = self._progress.add_task(stage, total=None, text="")
        return self._tasks[stage]

    def _print(self, stage: str, text: str) -> None:
        self.console.print(f"{stage}: {text}", highlight=False, markup=False, soft_wrap=True)
