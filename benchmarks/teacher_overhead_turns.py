"""What the overhead benchmark compares, and how: two ways that take turns at the same work."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from lynearm.teacher import Prompt

PLAIN = "plain"
"""Generation without logprobs, which everything is compared with."""

Way: TypeAlias = Callable[[Sequence[Prompt]], int]
"""Answers prompts; returns the tokens generated."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One comparison: how many sequences at once, and how many entries of each distribution."""

    batch: int
    top_k: int


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is generated."""

    tokens: int
    """Longest completion, tokens."""
    rounds: int


@dataclass(frozen=True, slots=True)
class Turn:
    """What one way took in one round."""

    tokens: int
    cpu_seconds: float
    wall_seconds: float
    beside_seconds: float = 0.0
    """CPU-seconds of another process that takes part: the trace service, or the client of a server."""
    size_bytes: int = 0
    """Of what travelled."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """A way beside plain generation, over rounds in which the two took turns."""

    cell: Cell
    way: str
    plain: tuple[Turn, ...]
    turns: tuple[Turn, ...]

    @property
    def overhead(self) -> float:
        """CPU-seconds per token more than plain generation, as a fraction of it: the median of the rounds."""
        pairs = zip(self.plain, self.turns, strict=True)
        return statistics.median(
            (turn.cpu_seconds / turn.tokens) / (plain.cpu_seconds / plain.tokens) - 1 for plain, turn in pairs
        )

    @property
    def tokens_per_cpu_second(self) -> float:
        """Of all rounds."""
        return self._tokens / sum(turn.cpu_seconds for turn in self.turns)

    @property
    def plain_tokens_per_cpu_second(self) -> float:
        """Of all rounds, without logprobs."""
        return sum(turn.tokens for turn in self.plain) / sum(turn.cpu_seconds for turn in self.plain)

    @property
    def beside_microseconds_per_token(self) -> float:
        """CPU time of the other process."""
        return 1e6 * sum(turn.beside_seconds for turn in self.turns) / self._tokens

    @property
    def bytes_per_token(self) -> float:
        """Of what travelled."""
        return sum(turn.size_bytes for turn in self.turns) / self._tokens

    @property
    def _tokens(self) -> int:
        return sum(turn.tokens for turn in self.turns)


class Clocks:
    """What a turn is measured by.

    Args:
        cpu_seconds: CPU time so far of all that the way itself needs.
        beside_seconds: CPU time so far of the other process.
        size_bytes: What has travelled so far.
    """

    def __init__(
        self,
        cpu_seconds: Callable[[], float] = time.process_time,
        beside_seconds: Callable[[], float] = lambda: 0.0,
        size_bytes: Callable[[], int] = lambda: 0,
    ) -> None:
        self._cpu_seconds = cpu_seconds
        self._beside_seconds = beside_seconds
        self._size_bytes = size_bytes

    def measure(self, way: Way, prompts: Sequence[Prompt]) -> Turn:
        """Run a way once."""
        gc.collect()
        size, beside = self._size_bytes(), self._beside_seconds()
        wall, cpu = time.perf_counter(), self._cpu_seconds()
        tokens = way(prompts)
        return Turn(
            tokens=tokens,
            cpu_seconds=self._cpu_seconds() - cpu,
            wall_seconds=time.perf_counter() - wall,
            beside_seconds=self._beside_seconds() - beside,
            size_bytes=self._size_bytes() - size,
        )


def take_turns(
    ways: Mapping[str, Way], cell: Cell, rounds: Sequence[Sequence[Prompt]], clocks: Clocks
) -> list[Comparison]:
    """Measure each way beside the one that is named `PLAIN`.

    All ways of a round answer the same prompts, one after the other, in an order that is turned round each
    time: what else the machine does meanwhile hits all alike.

    Raises:
        ValueError: if two ways did not generate the same number of tokens.
    """
    turns: dict[str, list[Turn]] = {name: [] for name in ways}
    for number, prompts in enumerate(rounds):
        for name in list(ways) if number % 2 == 0 else reversed(ways):
            turns[name].append(clocks.measure(ways[name], prompts))
        generated = {name: made[-1].tokens for name, made in turns.items()}
        if len(set(generated.values())) > 1:
            raise ValueError(f"the ways generated different numbers of tokens: {generated}")
    plain = tuple(turns[PLAIN])
    return [Comparison(cell, name, plain, tuple(made)) for name, made in turns.items() if name != PLAIN]


def split_rounds(prompts: Sequence[Prompt], batch: int, rounds: int) -> list[list[Prompt]]:
    """For each round the prompts that fill the batch once; the same ones again where there are too few."""
    needed = [prompts[number % len(prompts)] for number in range(batch * rounds)]
    return [needed[start : start + batch] for start in range(0, len(needed), batch)]
