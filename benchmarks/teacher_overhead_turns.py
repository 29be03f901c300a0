"""How the overhead benchmark compares: ways to answer the same prompts take turns."""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from lynearm.teacher import Prompt

PLAIN = "plain"
"""Generation without logprobs, which everything else is compared with."""

Way: TypeAlias = Callable[[Sequence[Prompt]], int]
"""Answers prompts; returns the tokens generated."""

Clock: TypeAlias = Literal["cpu", "wall"]
"""What overhead is counted in: CPU-seconds, or, where a GPU computes, seconds."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One comparison."""

    batch: int
    """Sequences at once."""
    top_k: int
    """Entries kept of each distribution."""
    rounds: int = 1


@dataclass(frozen=True, slots=True)
class Turn:
    """What one way took in one round."""

    tokens: int
    cpu_seconds: float
    """Of all processes without which the way does not work, the trace service and clients excepted."""
    wall_seconds: float
    beside_seconds: float
    """CPU-seconds of those: the trace service, or the client of a server."""
    size_bytes: int
    """Of what travelled."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """A way beside plain generation."""

    cell: Cell
    way: str
    plain: tuple[Turn, ...]
    turns: tuple[Turn, ...]
    clock: Clock

    @property
    def overhead(self) -> float:
        """Seconds per token more than plain generation takes, as a fraction of those.

        The median over the rounds, in each of which the two followed each other.
        """
        return statistics.median(
            self._seconds(turn) / self._seconds(plain) - 1
            for plain, turn in zip(self.plain, self.turns, strict=True)
        )

    @property
    def plain_seconds_per_token(self) -> float:
        """The least of all rounds: other work on the machine only ever adds."""
        return min(self._seconds(turn) for turn in self.plain)

    @property
    def beside_seconds_per_token(self) -> float:
        """CPU-seconds of the process beside it; the least of all rounds."""
        return min(turn.beside_seconds / turn.tokens for turn in self.turns)

    @property
    def bytes_per_token(self) -> float:
        """Of what travelled."""
        return sum(turn.size_bytes for turn in self.turns) / sum(turn.tokens for turn in self.turns)

    def _seconds(self, turn: Turn) -> float:
        """Per token."""
        return (turn.cpu_seconds if self.clock == "cpu" else turn.wall_seconds) / turn.tokens


@dataclass(frozen=True, slots=True)
class Meters:
    """What a turn is measured by; each says how much it has been so far."""

    cpu_seconds: Callable[[], float] = time.process_time
    beside_seconds: Callable[[], float] = lambda: 0.0
    size_bytes: Callable[[], int] = lambda: 0

    def measure(self, way: Way, prompts: Sequence[Prompt]) -> Turn:
        """Run a way once."""
        gc.collect()
        size, beside = self.size_bytes(), self.beside_seconds()
        wall, cpu = time.perf_counter(), self.cpu_seconds()
        tokens = way(prompts)
        cpu, wall = self.cpu_seconds() - cpu, time.perf_counter() - wall
        return Turn(tokens, cpu, wall, self.beside_seconds() - beside, self.size_bytes() - size)


def take_turns(
    ways: Mapping[str, Way], cell: Cell, prompts: Sequence[Prompt], meters: Meters, clock: Clock
) -> list[Comparison]:
    """Measure each way beside the one that is named `PLAIN`, after turns that warm up.

    In every round all ways answer the same prompts, one after the other, in an order that is turned round
    each time.

    Raises:
        ValueError: if two ways did not generate the same number of tokens.
    """
    ways[PLAIN](prompts[: cell.batch])  # From here on every turn finds its prompts in the prefix cache.
    for way in ways.values():
        way(prompts[: min(4, cell.batch)])
    turns: dict[str, list[Turn]] = {name: [] for name in ways}
    for number in range(cell.rounds):
        for name in list(ways) if number % 2 == 0 else reversed(ways):
            turns[name].append(meters.measure(ways[name], prompts[: cell.batch]))
    generated = {name: {turn.tokens for turn in of_way} for name, of_way in turns.items()}
    if len(set.union(*generated.values())) > 1:
        raise ValueError(f"the ways generated different numbers of tokens: {generated}")
    plain = tuple(turns.pop(PLAIN))
    made = [Comparison(cell, name, plain, tuple(of_way), clock) for name, of_way in turns.items()]
    for comparison in made:
        print(f"{cell}: {comparison.way} {100 * comparison.overhead:+.1f} %", file=sys.stderr, flush=True)
    return made
