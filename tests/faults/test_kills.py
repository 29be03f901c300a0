"""Whatever is killed whenever: what was acknowledged is read once and in order."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

sys.path.append(str(BENCHMARKS))
from faults_ledger import Identity, Reading, Verdict, digest_of, judge  # noqa: E402  # no package


def test_forty_kills_lose_double_and_reorder_nothing() -> None:
    command = [sys.executable, str(BENCHMARKS / "faults.py"), "--kills", "40", "--sites", "2"]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    figures = json.loads(result.stdout.splitlines()[-1])
    acked = figures.pop("acked")
    assert figures == {"kills": 40, "lost": 0, "duplicated": 0, "reordered": 0}
    assert acked > 100


def read(*identities: Identity, offsets: list[int] | None = None) -> Reading:
    places = offsets if offsets is not None else list(range(len(identities)))
    return Reading(places, list(identities), [digest_of(one.block()) for one in identities])


A1, A2, A3 = (Identity("a", number) for number in (1, 2, 3))
B1, B2 = Identity("b", 1, (0, 1)), Identity("b", 2, (2,))


def test_the_oracle_finds_nothing_wrong_with_what_is_right() -> None:
    verdict = judge(read(A1, B1, A2, B2), {"a": 1, "b": 2}, {0, 1, 2})
    assert verdict == Verdict(acked=3, read=4)


@pytest.mark.parametrize(
    ("reading", "verdict"),
    [
        (read(A1, B1, B2), Verdict(lost=1)),
        (read(A1, A3, B1, B2), Verdict(lost=1)),
        (read(A2, A1, B1, B2), Verdict(reordered=1)),
        (read(A1, A2, A2, B1, B2), Verdict(duplicated=1)),
        (read(A1, A2, B1, B2, offsets=[0, 1, 2, 4]), Verdict(reordered=1)),
        (read(A1, A2, B1, B2, Identity("c", 1, (2,))), Verdict(duplicated=1)),
        (read(A1, A2, B1), Verdict(lost=2)),
        (read(A1, A2, B1, B2, Identity("c", 1, (3,))), Verdict(lost=1)),
    ],
    ids=["lost", "gap", "swapped", "twice", "offset", "prompt twice", "acked and prompt", "unfinished"],
)
def test_the_oracle_finds(reading: Reading, verdict: Verdict) -> None:
    found = judge(reading, {"a": 2, "b": 2}, {0, 1, 2})
    found.acked = found.read = 0
    assert found == verdict


def test_the_oracle_finds_a_block_that_is_another() -> None:
    reading = read(A1)
    reading.digests[0] = digest_of(A2.block())
    assert judge(reading, {"a": 1}, set()).damaged == 1
