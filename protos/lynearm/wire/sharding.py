"""Which examples of a stream belong to which training step, and which of them to which rank. Pure.

The examples of a stream are its traces in the stream's order, numbered from 0. They are cut into windows of
whole batches, and each window is shuffled by itself; without a seed everything stays in order. Step s trains
on positions s * global_batch_size to (s + 1) * global_batch_size of the result, and rank r of w on its slice
of those.

Invariants:

- The sequence of examples depends on the stream, the seed, the batch size and the window, and on nothing
  else: not on the number of ranks, on when a block arrived, or on where a run was interrupted.
- The slices of the ranks, in the order of the ranks, are the batch; their sizes differ by at most one.
- A window is the most that a run holds in memory, and what it reads again when it resumes.

The shuffle is defined here to the bit, by SplitMix64, since numpy's generators may change their streams.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from lynearm.wire.errors import InvalidInputError

T = TypeVar("T")

_MAX_SEED = (1 << 64) - 1
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """How a stream becomes a sequence of global batches.

    Raises:
        InvalidInputError: naming the field that is out of range.
    """

    global_batch_size: int
    """Examples of one step, over all ranks."""
    seed: int | None = None
    """Of the shuffle; None: the stream's order."""
    window_batches: int = 1
    """Batches that are shuffled together. With 1, the shuffle only deals a batch out to ranks anew."""

    def __post_init__(self) -> None:
        """Check every field."""
        checks = {
            f"global_batch_size is {self.global_batch_size}, expected at least 1": self.global_batch_size
            >= 1,
            f"window_batches is {self.window_batches}, expected at least 1": self.window_batches >= 1,
            f"seed is {self.seed}, expected 0 to {_MAX_SEED}": 0 <= (self.seed or 0) <= _MAX_SEED,
        }
        for problem, holds in checks.items():
            if not holds:
                raise InvalidInputError(problem)

    @property
    def window_size(self) -> int:
        """Examples of a window; the last one of a stream may have fewer."""
        return self.global_batch_size * self.window_batches

    def window_of(self, step: int) -> int:
        """The window that holds the examples of a step."""
        return step // self.window_batches

    def first_example(self, step: int) -> int:
        """Number of the example at which reading must begin for a step: the first of its window."""
        return self.window_of(step) * self.window_size

    def order(self, window: int, size: int) -> list[int]:
        """The places in a window of the examples that come first, second, and so on.

        Args:
            window: Number of the window.
            size: Examples that it has: `window_size`, or fewer at the end of a stream.
        """
        if self.seed is None:
            return list(range(size))
        key = _mix(_mix(np.uint64(self.seed)) + np.uint64(window))
        with np.errstate(over="ignore"):
            places = np.arange(1, size + 1, dtype=np.uint64) * np.uint64(_GOLDEN_GAMMA)
        return [int(place) for place in np.argsort(_mix(key + places), kind="stable")]


@dataclass(frozen=True, slots=True)
class Shard:
    """Which part of each global batch is whose.

    Raises:
        InvalidInputError: there is no such rank.
    """

    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        """Check the rank."""
        if not 0 <= self.rank < self.world_size:
            raise InvalidInputError(f"rank {self.rank} of {self.world_size}, expected 0 to world_size - 1")

    def slice(self, size: int) -> slice:
        """The part of a batch of `size` examples that is this rank's."""
        return slice(self.rank * size // self.world_size, (self.rank + 1) * size // self.world_size)


@dataclass(frozen=True, slots=True)
class ShardedBatch(Generic[T]):
    """What one rank trains on in one step."""

    step: int
    examples: Sequence[T]
    """May be empty where the stream ends."""
    global_size: int
    """Examples of the step over all ranks: what a mean over the global batch divides by."""


def shard_examples(
    examples: Iterable[T], plan: ShardPlan, shard: Shard, *, first_step: int = 0, drop_last: bool = False
) -> Iterator[ShardedBatch[T]]:
    """What a rank trains on, step by step. Every rank gives the same examples, and gets the same steps.

    Args:
        examples: In the stream's order, from number `plan.first_example(first_step)` on. An iterator that
            waits for the stream makes this one wait until a window is full or the stream ends.
        plan: How the stream is cut into batches.
        shard: Which part is wanted.
        first_step: Where to begin: after as many steps as a checkpoint has done.
        drop_last: Leave out a last batch that is not full.
    """
    source = iter(examples)
    window = plan.window_of(first_step)
    while members := list(islice(source, plan.window_size)):
        ordered = [members[place] for place in plan.order(window, len(members))]
        steps = range(window * plan.window_batches, (window + 1) * plan.window_batches)
        for step, batch in zip(steps, _batches(ordered, plan.global_batch_size), strict=False):
            if step >= first_step and not (drop_last and len(batch) < plan.global_batch_size):
                yield ShardedBatch(step, batch[shard.slice(len(batch))], len(batch))
        window += 1


def _batches(ordered: list[T], size: int) -> Iterator[list[T]]:
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def _mix(value: npt.NDArray[np.uint64] | np.uint64) -> npt.NDArray[np.uint64]:
    """The output function of SplitMix64 (Steele, Lea, Flood 2014), on each element."""
    with np.errstate(over="ignore"):
        mixed = np.asarray(value, dtype=np.uint64) + np.uint64(_GOLDEN_GAMMA)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(mixed ^ (mixed >> np.uint64(31)), dtype=np.uint64)
