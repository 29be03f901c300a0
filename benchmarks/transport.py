"""What a block costs on its way, against a plain copy, and what others pay to move teacher logprobs.

    python benchmarks/transport.py [--quick] [--without-ray]

Servers, publishers and readers are processes of their own on this machine. Everything is measured in one
run, in rounds that take turns; blocks are random bytes, which nothing on the way can compress. Wall times
are medians over the rounds. CPU-seconds are user and system time by each process's own clock; of those that
are compared with TCP the least of all rounds counts, since other work on the machine only ever adds to
them; every row moves as many bytes, since the least of shorter samples is more a matter of luck. Takes about
two minutes; --quick takes half a minute, and shows that it runs and no more. Linux only.

The last line is JSON; where a figure stands for both block sizes, 256 KiB and 1 MiB, it is the worse of two:

- `fetch_*_cpu_vs_tcp`: bytes per CPU-second of server and reader together, of `TraceClient.fetch` from the
  server's memory, in relation to those of both ends of a loopback TCP connection that carries blocks of the
  same size into one buffer.
- `tail_*_cpu_vs_tcp`: the same for a subscription that follows while blocks are published. Counted is the
  reader, and what the server uses beyond the same publishing without a subscriber. The difference of two
  figures, and so the least certain of all.
- `grpc_*_cpu_vs_tcp`, `grpc_tail_*_cpu_vs_tcp`: the same for blocks that grpc.aio sends and grpc's sync
  client receives with nothing of ours in between: as fast as they go, and as the live tail's came, a group at
  once and then a pause, at the rate that the tail had in the same round, beside the same publishing. What
  gRPC leaves of TCP's efficiency for a fetch and for a tail.
- `durable_publish_*_vs_group_commit`: wall throughput of acknowledged publishing against a bare loop on the
  same disk, which writes a file for each group of the server's `group_bytes`, syncs it and its name, and
  commits a row in SQLite, synced too. Both delete what they wrote after their time is taken. The loop only
  writes; publishing also moves the blocks from process to process and checks them, so that a busy CPU slows
  it alone, and a busy disk both.
- `replay_vs_tail`: wall throughput of a subscription from offset 0, to blocks that are in the server's files
  only, against that of the live tail.
- `four_subscribers_cpu_vs_one`: CPU-seconds of the server for each byte sent (medians), four subscriptions to
  one stream at the same time against one.
- `tls_1m_cpu_ratio`: CPU-seconds (medians) of a fetch over TLS against plain.
- `*_tokens_per_cpu_second`, `*_bytes_per_token`: of the ways in `transport_others.py`, both ends and whatever
  stands between them together. Only `lynearm` stores what it moves.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from transport_comparison import compare_ways
from transport_others import Material
from transport_roles import Load
from transport_rounds import Rows, Site

KIB = 1 << 10
MIB = 1 << 20
SMALL, LARGE = 256 * KIB, MIB
NAMES = {SMALL: "256k", LARGE: "1m"}

GOALS = {
    "fetch_256k_cpu_vs_tcp": ">= 0.17",
    "fetch_1m_cpu_vs_tcp": ">= 0.30",
    "tail_256k_cpu_vs_tcp": ">= 0.17",
    "tail_1m_cpu_vs_tcp": ">= 0.30",
    "durable_publish_vs_group_commit": ">= 0.8",
    "replay_vs_tail": ">= 1.0",
    "four_subscribers_cpu_vs_one": "<= 1.3",
    "tls_1m_cpu_ratio": "<= 2",
}

_CORPUS = Path(__file__).resolve().parents[2] / "shared" / "data" / "teacher_topk256.npz"


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is moved, and how often."""

    rounds: int
    read_mebibytes: int
    publish_mebibytes: int
    """More, since a publisher needs some groups to get going."""
    positions: int
    passes: int


WHOLE = Scale(rounds=15, read_mebibytes=192, publish_mebibytes=192, positions=12_000, passes=10)
QUICK = Scale(rounds=1, read_mebibytes=8, publish_mebibytes=16, positions=1000, passes=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="little of everything, once")
    parser.add_argument("--without-ray", action="store_true", help="leave out the Ray queue")
    options = parser.parse_args()
    scale = QUICK if options.quick else WHOLE
    print(f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}")
    rows = measure_blocks(scale)
    print_rows(rows)
    figures = block_figures(rows)
    material = Material(_CORPUS if _CORPUS.exists() else None, scale.positions, scale.passes)
    figures |= compare_ways(material, with_ray=not options.without_ray)
    print(f"load average {os.getloadavg()[0]:.1f}")
    for name, goal in GOALS.items():
        print(f"{name:34}{figures[name]:8.2f}   goal {goal}")
    print(json.dumps({name: round(figure, 3) for name, figure in figures.items()}))


def measure_blocks(scale: Scale) -> Rows:
    """The rows of all rounds."""
    rows = Rows()
    loads = [Load(size, scale.read_mebibytes * MIB // size) for size in NAMES]
    with (
        tempfile.TemporaryDirectory(prefix="lynearm-transport-") as directory,
        Site(Path(directory), loads, rows) as site,
    ):
        for _ in range(scale.rounds):
            for load in loads:
                publish_load = Load(load.block_bytes, scale.publish_mebibytes * MIB // load.block_bytes)
                site.run_round(load, publish_load=publish_load, with_tls=load.block_bytes == LARGE)
    return rows


def print_rows(rows: Rows) -> None:
    print(f"{'':34}{'blocks':>8}{'MB/s':>8}{'CPU-s/GB':>10}{'median':>8}")
    for name, size in rows.names:
        print(
            f"{name:34}{size // KIB:4} KiB{rows.megabytes_per_second(name, size):8.0f}"
            f"{rows.cpu_seconds_per_gb(name, size):10.2f}{rows.median_cpu_seconds_per_gb(name, size):8.2f}"
        )


def block_figures(rows: Rows) -> dict[str, float]:
    """The figures about blocks, as the module says."""
    cost, median = rows.cpu_seconds_per_gb, rows.median_cpu_seconds_per_gb
    rate = rows.megabytes_per_second
    figures: dict[str, float] = {}
    for size, name in NAMES.items():
        tail = (
            cost("reader, live tail", size)
            + cost("server, publish and live tail", size)
            - cost("server, publish", size)
        )
        figures[f"fetch_{name}_cpu_vs_tcp"] = cost("TCP copy", size) / cost("fetch", size)
        figures[f"tail_{name}_cpu_vs_tcp"] = cost("TCP copy", size) / tail
        figures[f"grpc_{name}_cpu_vs_tcp"] = cost("TCP copy", size) / cost("gRPC alone", size)
        figures[f"grpc_tail_{name}_cpu_vs_tcp"] = cost("TCP copy", size) / cost(
            "gRPC alone, as the live tail", size
        )
        figures[f"durable_publish_{name}_vs_group_commit"] = rate("durable publish", size) / rate(
            "bare group commit", size
        )
    return figures | {
        "durable_publish_vs_group_commit": min(
            figures[f"durable_publish_{name}_vs_group_commit"] for name in NAMES.values()
        ),
        "replay_vs_tail": min(
            rate("replay from files", size) / rate("reader, live tail", size) for size in NAMES
        ),
        "four_subscribers_cpu_vs_one": max(
            median("server, four subscribers", size) / median("server, one subscriber", size)
            for size in NAMES
        ),
        "tls_1m_cpu_ratio": median("fetch over TLS", LARGE) / median("fetch", LARGE),
    }


if __name__ == "__main__":
    main()
