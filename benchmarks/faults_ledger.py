"""What the processes of `faults.py` write down, and what must follow from it.

A ledger is a file of lines that one process at a time appends to with one write each. SIGKILL takes nothing
of what was written; at most the last line is torn, and then it was never there. Every block says who made
it: its maker (a producer in one of its lives), its number there from 1 on, and the prompts whose traces it
stands for. Its other bytes follow from that, so that the oracle knows each block without having seen it.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import xxhash

from lynearm.wire.blocks import BlockHeader, checksum, join_block, split_block
from lynearm.wire.specs import CodecSpec, StreamSpec, TeacherSpec, TokenizerSpec

_LARGEST_BYTES = 24_000


@dataclass(frozen=True, slots=True)
class Identity:
    """Which block it is."""

    maker: str
    number: int
    prompts: tuple[int, ...] = ()

    def block(self) -> bytes:
        """The block: mostly small, some larger than a page of the disk."""
        label = json.dumps([self.maker, self.number, self.prompts]).encode()
        rng = random.Random(label)
        filler = rng.randbytes(int(_LARGEST_BYTES ** rng.uniform(0.3, 1)))
        payload = len(label).to_bytes(4) + label + filler
        header = BlockHeader(2, "exact", 1, 1, 1, len(payload), checksum(payload))
        return join_block(header, payload)

    @classmethod
    def of(cls, block: bytes | memoryview) -> Identity:
        """Which block these bytes are."""
        _, payload = split_block(block)
        size = int.from_bytes(payload[:4])
        maker, number, prompts = json.loads(bytes(payload[4 : 4 + size]))
        return cls(maker, number, tuple(prompts))


def stream_spec(name: str) -> StreamSpec:
    return StreamSpec(
        name=name,
        teacher=TeacherSpec("teacher", "sha256:00", "test", "float32", 128, 512),
        tokenizer=TokenizerSpec("tok", bytes(32), b"", 128, (2,)),
        codec=CodecSpec("exact", 4),
        license="Apache-2.0",
        labels={},
    )


class Ledger:
    """Appends lines of JSON to a file, after dropping a torn last one."""

    def __init__(self, path: Path) -> None:
        text = path.read_bytes() if path.exists() else b""
        whole = text.rfind(b"\n") + 1
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        os.truncate(self._file, whole)

    def write(self, *values: object) -> None:
        line = json.dumps(values).encode() + b"\n"
        if os.write(self._file, line) != len(line):
            raise OSError(f"the ledger took less than {len(line)} bytes")


def read_ledger(path: Path) -> list[list[object]]:
    if not path.exists():
        return []
    text = path.read_bytes()
    return [json.loads(line) for line in text[: text.rfind(b"\n") + 1].splitlines()]


@dataclass(slots=True)
class Reading:
    """The blocks that a reader got, in that order."""

    offsets: list[int] = field(default_factory=list[int])
    identities: list[Identity] = field(default_factory=list[Identity])
    digests: list[str] = field(default_factory=list[str])

    def add(self, offset: int, identity: Identity, digest: str) -> None:
        self.offsets.append(offset)
        self.identities.append(identity)
        self.digests.append(digest)


def read_reading(path: Path) -> Reading:
    """What the subscriber's ledger says."""
    reading = Reading()
    for offset, maker, number, prompts, digest in read_ledger(path):
        reading.add(offset, Identity(maker, number, tuple(prompts)), digest)  # type: ignore[arg-type]
    return reading


def digest_of(block: bytes | memoryview) -> str:
    return xxhash.xxh3_128_hexdigest(block)


@dataclass(slots=True)
class Verdict:
    """What the oracle found; all but `acked` and `read` must be 0."""

    acked: int = 0
    read: int = 0
    lost: int = 0
    duplicated: int = 0
    reordered: int = 0
    damaged: int = 0

    def add(self, other: Verdict) -> None:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def is_clean(self) -> bool:
        return not (self.lost or self.duplicated or self.reordered or self.damaged)


def judge(reading: Reading, acked: dict[str, int], finished: set[int]) -> Verdict:
    """Compare what was read with what was promised.

    Args:
        reading: All that a subscriber got, from offset 0 on.
        acked: Blocks 1 to n of each maker were acknowledged.
        finished: The prompts that the service says are finished.
    """
    verdict = Verdict(acked=sum(acked.values()), read=len(reading.offsets))
    verdict.reordered += sum(offset != place for place, offset in enumerate(reading.offsets))
    numbers: dict[str, list[int]] = {maker: [] for maker in acked}
    for identity, digest in zip(reading.identities, reading.digests, strict=True):
        numbers.setdefault(identity.maker, []).append(identity.number)
        verdict.damaged += digest != digest_of(identity.block())
    for maker, found in numbers.items():
        # Nothing acknowledged may be missing, nor anything that precedes a block which is there.
        due = max(acked.get(maker, 0), max(found, default=0))
        verdict.lost += due - len(set(found))
        verdict.duplicated += len(found) - len(set(found))
        verdict.reordered += sum(later < earlier for earlier, later in pairwise(found))
    _judge_prompts(reading, finished, verdict)
    return verdict


def _judge_prompts(reading: Reading, finished: set[int], verdict: Verdict) -> None:
    """Each prompt's traces once: from 0 on without holes, since the worker takes them in that order."""
    counts = Counter(prompt for identity in reading.identities for prompt in identity.prompts)
    verdict.duplicated += sum(count - 1 for count in counts.values())
    verdict.lost += len(finished - set(counts)) + len(set(counts) - finished)
    verdict.lost += max(counts, default=-1) + 1 - len(counts)
