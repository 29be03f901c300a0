"""Kills servers, publishers, workers and subscribers, and counts what is lost, doubled or out of order.

    python benchmarks/faults.py --kills 1000 [--seed 0] [--sites 3]

Real processes, sockets and files: each site has a server, a publisher, a worker that finishes prompts as a
teacher does, and a subscriber. They are killed by SIGKILL at random instants, and the server also at named
points (`lynearm.traces.failpoints`): before and after an object is written, before and after a commit,
before an acknowledgement. With half of the server's deaths the power fails too: what it had not synced is
taken from its files (`power_failure.c`; needs a C compiler). Each process writes down what it was promised,
or what it read, in a file that no kill takes from it; an oracle compares. A site is judged and replaced
after some kills, several run at once.

The last line is JSON: the kills, the blocks acknowledged, and how many of them were lost, read twice or
read out of order. The exit status is 1 unless the last three are 0. The seed decides who is killed when, as
far as processes repeat themselves. Linux only.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from faults_ledger import Verdict
from faults_power import build_library
from faults_processes import FaultFound
from faults_site import Outcome, run_site

KILLS_PER_SITE = 50


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sites", type=int, default=3, help="how many run at once")
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="lynearm-faults-")).resolve()
    power_failures = _preload_power_failures(directory)
    _start_fork_server()
    started = time.monotonic()
    shares = list(_shares(options.kills, options.sites))
    with ThreadPoolExecutor(options.sites) as threads:
        outcomes = list(
            threads.map(
                lambda site: _run_one(
                    directory / str(site), shares[site], f"{options.seed}/{site}", power_failures
                ),
                range(len(shares)),
            )
        )
    clean = report([outcome for outcome in outcomes if outcome], time.monotonic() - started)
    clean = clean and None not in outcomes
    if clean:
        shutil.rmtree(directory)
    else:
        print(f"what was left is in {directory}", file=sys.stderr)
    return 0 if clean else 1


def report(outcomes: list[Outcome], seconds: float) -> bool:
    """Print what happened; whether nothing was lost, doubled or out of order."""
    kills, verdict = Counter[str](), Verdict()
    for outcome in outcomes:
        kills.update(outcome.kills)
        verdict.add(outcome.verdict)
    for how, count in sorted(kills.items()):
        print(f"{count:6} killed: {how}")
    print(f"{sum(outcome.power_failures for outcome in outcomes):6} of the server's with a power failure")
    print(f"{sum(outcome.refused for outcome in outcomes):6} refused: prompts that were finished already")
    print(f"{verdict.read:6} blocks read, {verdict.damaged} of them damaged")
    print(f"{len(outcomes)} sites, {seconds:.0f} s, {sum(kills.values()) / seconds:.1f} kills/s")
    figures = {
        "kills": sum(kills.values()),
        "acked": verdict.acked,
        "lost": verdict.lost,
        "duplicated": verdict.duplicated,
        "reordered": verdict.reordered,
    }
    print(json.dumps(figures))
    return verdict.is_clean


def _run_one(directory: Path, kills: int, seed: str, power_failures: bool) -> Outcome | None:
    directory.mkdir()
    try:
        outcome = run_site(directory, kills, seed, power_failures=power_failures)
    except FaultFound as fault:
        print(f"site {directory}: {fault}", file=sys.stderr)
        return None
    if outcome.verdict.is_clean:
        shutil.rmtree(directory)
    else:
        print(f"site {directory}: {outcome.verdict}", file=sys.stderr)
    return outcome


def _shares(kills: int, sites: int) -> Iterator[int]:
    count = max(min(sites, kills), -(-kills // KILLS_PER_SITE))
    for site in range(count):
        yield kills * (site + 1) // count - kills * site // count


def _preload_power_failures(directory: Path) -> bool:
    library = build_library(directory)
    if library is None:
        print("no power failures: there is no C compiler, or it cannot build them", file=sys.stderr)
        return False
    os.environ["LD_PRELOAD"] = str(library)
    return True


def _start_fork_server() -> None:
    # The preloading process finds modules by this variable only.
    here = str(Path(__file__).resolve().parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH", "")]))
    multiprocessing.set_forkserver_preload(["faults_roles"])


if __name__ == "__main__":
    sys.exit(main())
