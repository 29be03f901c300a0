"""docs later"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

from transport_roles import Load
from transport_rounds import Rows, Site

KIB = 1 << 10
MIB = 1 << 20
SMALL, LARGE = 256 * KIB, MIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--mebibytes", type=int, default=64, help="that each row moves in each round")
    options = parser.parse_args()
    loads = [Load(size, options.mebibytes * MIB // size) for size in (SMALL, LARGE)]
    rows = Rows()
    with tempfile.TemporaryDirectory(prefix="lynearm-transport-") as directory:
        with Site(Path(directory), loads, rows) as site:
            for _ in range(options.rounds):
                for load in loads:
                    site.run_round(load, with_tls=load.block_bytes == LARGE)
    for name, size in rows.names:
        print(f"{name:30}{size >> 10:6} KiB {rows.megabytes_per_second(name, size):8.0f} MB/s"
              f"{rows.cpu_seconds_per_gb(name, size):8.3f} CPU-s/GB"
              f"{rows.cpu_seconds_per_gb('TCP copy', size)/rows.cpu_seconds_per_gb(name, size):8.3f}")


if __name__ == "__main__":
    main()
