"""Which part of a global batch is whose."""

from __future__ import annotations

from dataclasses import dataclass

from lynearm.wire.errors import InvalidInputError


@dataclass(frozen=True, slots=True)
class Shard:
    """One of the processes that train on a stream together.

    Raises:
        InvalidInputError: if there is no such rank.
    """

    rank: int = 0
    """0 to `world_size` - 1."""
    world_size: int = 1

    def __post_init__(self) -> None:
        """Check that the rank is one."""
        if not 0 <= self.rank < self.world_size:
            raise InvalidInputError(
                f"rank {self.rank} of {self.world_size} ranks", "ranks count from 0 to world_size - 1"
            )

    def slice_of(self, batch_traces: int) -> slice:
        """The traces of a global batch that are this rank's.

        The slices of all ranks, in their order, are the batch. A whole batch is cut evenly; the last of a
        stream, which may hold fewer, as evenly as can be, so that some ranks may get one less, or none.
        """
        return slice(
            self.rank * batch_traces // self.world_size, (self.rank + 1) * batch_traces // self.world_size
        )

    def check_batch_size(self, batch_size: int) -> None:
        """Refuse a global batch that ranks cannot share evenly.

        Raises:
            InvalidInputError: naming sizes that they can.
        """
        if batch_size < 1 or batch_size % self.world_size:
            whole = max(1, -(-batch_size // self.world_size))
            raise InvalidInputError(
                f"a global batch of {batch_size} traces, expected a multiple of {self.world_size} ranks",
                f"make it {whole * self.world_size}",
            )
