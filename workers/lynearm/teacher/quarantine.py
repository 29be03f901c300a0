"""Prompts that were in the hands of a worker that died, until it is known which of them did it.

Who dies with a worker is suspect, not guilty: machines fail too. Suspects are answered again in small
groups, with nothing else in the engine. A group that survives is cleared; of one that does not, each is
answered alone; and one that ends an engine alone is given up. So a worker that is killed costs its successor
some time with small batches, and a prompt that kills costs three engines, however many prompts it was among.

Pure: no I/O. A worker whose node was lost makes nobody suspect; its leases are given back instead.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lynearm.client.leases import Lease
from lynearm.wire.work import LeasedPrompt

GROUP_FRACTION = 8
"""A group is a batch divided by this: an eighth keeps an engine busy enough, and is soon split further."""


@dataclass(frozen=True, slots=True)
class Suspect:
    """A prompt that may have ended an engine."""

    lease: Lease
    """Held by the supervisor."""
    prompt: LeasedPrompt


@dataclass(frozen=True, slots=True)
class SuspectGroup:
    """Prompts that are answered together, with no others."""

    suspects: tuple[Suspect, ...]

    @property
    def is_alone(self) -> bool:
        """Whether it is one prompt: if the engine ends again, this prompt did it."""
        return len(self.suspects) == 1


class Quarantine:
    """The suspects of one job.

    Args:
        max_batch: Samples that an engine generates at once.
    """

    def __init__(self, max_batch: int) -> None:
        self._group_units = max(1, max_batch // GROUP_FRACTION)
        self._groups: deque[SuspectGroup] = deque()

    def __len__(self) -> int:
        return len(self._groups)

    def admit(self, leases: Iterable[Lease]) -> None:
        """Take the prompts of a dead worker's leases."""
        group: list[Suspect] = []
        units = 0
        for lease in leases:
            for prompt in lease.prompts:
                if group and units + len(prompt.sample_indices) > self._group_units:
                    self._groups.append(SuspectGroup(tuple(group)))
                    group, units = [], 0
                group.append(Suspect(lease, prompt))
                units += len(prompt.sample_indices)
        if group:
            self._groups.append(SuspectGroup(tuple(group)))

    def next(self) -> SuspectGroup | None:
        """A group to be answered now; None when there is none."""
        while self._groups:
            group = self._groups.popleft()
            left = tuple(suspect for suspect in group.suspects if not suspect.lease.is_lost)
            if left:
                return SuspectGroup(left)
        return None

    def put_back(self, group: SuspectGroup) -> None:
        """Its worker ended for another reason."""
        self._groups.appendleft(group)

    def split(self, group: SuspectGroup) -> None:
        """A group ended its engine: answer each of it alone."""
        self._groups.extendleft(SuspectGroup((suspect,)) for suspect in reversed(group.suspects))


def by_lease(suspects: Sequence[Suspect]) -> dict[Lease, list[LeasedPrompt]]:
    """The prompts of each lease."""
    found: dict[Lease, list[LeasedPrompt]] = {}
    for suspect in suspects:
        found.setdefault(suspect.lease, []).append(suspect.prompt)
    return found
