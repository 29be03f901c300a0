"""The table and the last line of `benchmarks/distill_quality.py`."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from distill_quality import Bench
    from distill_quality_runs import Method, Quality

DENSE = "dense"
GOAL = 1.02
"""Of `standard_k64_vs_dense`, at most."""


@dataclass(frozen=True, slots=True)
class Result:
    """One student."""

    seed: int
    method: str
    quality: dict[int, Quality]
    """By steps."""

    @property
    def final(self) -> Quality:
        return self.quality[max(self.quality)]


@dataclass(frozen=True, slots=True)
class Row:
    """What is reported of a method."""

    method: Method
    bits: float
    kept: float
    kl: float
    kl_among_others: float
    agreement: float
    vs_dense: float
    """Ratio of held-out KL, mean over seeds; NaN while dense is not there."""
    spread: float | None
    """Its standard deviation over seeds; None of less than two."""
    vs_dense_halfway: float
    """The same after half of the steps."""


def summarise(bench: Bench, results: Sequence[Result]) -> list[Row]:
    """A row for each method that has results."""
    by_key = {(result.seed, result.method): result for result in results}
    rows: list[Row] = []
    for method in bench.methods:
        own = [result for result in results if result.method == method.name]
        if not own:
            continue
        coded = bench.streams.get(method.name)
        rows.append(
            Row(
                method,
                coded.bits_per_token if coded else bench.dense_bits(),
                coded.mean_kept if coded else bench.dense_bits() / 16,
                mean(result.final.kl for result in own),
                mean(result.final.kl - result.final.kl_of_top for result in own),
                mean(result.final.agreement for result in own),
                *_compare(own, by_key),
            )
        )
    return rows


def _compare(
    own: Sequence[Result], by_key: dict[tuple[int, str], Result]
) -> tuple[float, float | None, float]:
    """Ratios to dense, seed by seed: mean, standard deviation, and mean halfway."""
    pairs = [(result, by_key[result.seed, DENSE]) for result in own if (result.seed, DENSE) in by_key]
    if not pairs:
        return math.nan, None, math.nan
    ratios = [result.final.kl / dense.final.kl for result, dense in pairs]
    halves = [
        result.quality[min(result.quality)].kl / dense.quality[min(dense.quality)].kl
        for result, dense in pairs
    ]
    return mean(ratios), stdev(ratios) if len(ratios) > 1 else None, mean(halves)


def report(bench: Bench, results: Sequence[Result]) -> None:
    """The table, and the figures as JSON."""
    settings = bench.settings
    rows = summarise(bench, results)
    seeds = len({result.seed for result in results})
    table = Table(
        title=f"{seeds} seed{'s' * (seeds > 1)} of {settings.steps} steps of {settings.sequences} traces; "
        f"{bench.held_out.positions:,} held-out positions"
    )
    table.add_column("method")
    for title in ("bits/token", "entries", "KL", "over dense", "halfway", "KL among others", "agreement"):
        table.add_column(title, justify="right")
    for row in rows:
        spread = f" ± {row.spread:.3f}" if row.spread is not None else ""
        table.add_row(
            row.method.title,
            f"{row.bits:,.0f}",
            f"{row.kept:,.1f}",
            f"{row.kl:.4f}",
            f"{row.vs_dense:.3f}{spread}",
            f"{row.vs_dense_halfway:.3f}",
            f"{row.kl_among_others:.4f}",
            f"{row.agreement:.1%}",
        )
    initial = bench.measure_initial()
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    console.print(f"before training: KL {initial.kl:.4f}, agreement {initial.agreement:.1%}")
    figures = make_figures(rows) | {"initial_kl": initial.kl, "seeds": float(seeds)}
    if "standard_k64_vs_dense" in figures:
        console.print(f"standard_k64_vs_dense {figures['standard_k64_vs_dense']:.3f}, goal <= {GOAL}")
    # Not through the console, which would break the line.
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


def make_figures(rows: Sequence[Row]) -> dict[str, float]:
    """Figures as the module says."""
    figures: dict[str, float] = {}
    for row in rows:
        name = row.method.name
        if name != DENSE and not math.isnan(row.vs_dense):
            figures[f"{name}_vs_dense"] = row.vs_dense
            if row.spread is not None:
                figures[f"{name}_vs_dense_spread"] = row.spread
        figures |= {f"{name}_kl": row.kl, f"{name}_bits": row.bits}
    return figures
