"""The codec where numba finds no directory for its cache."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import lynearm.wire

SCRIPT = """
import numpy as np
from lynearm.wire.codec import decode_block, encode_block
from lynearm.wire.traces import TopK, Trace

half, quarter = np.log(np.array([0.5, 0.25], np.float32))
row = TopK(np.array([[5, 7]], np.int32), np.array([[half, quarter]]), np.full(1, 0.25, np.float32))
ids, logprobs = np.array([5], np.int32), row.logprobs[0, :1]
trace = Trace("p", ids, ids, logprobs, row, "stop")
(decoded,) = decode_block(encode_block([trace], codec="exact", vocab_size=300))
assert (decoded.top_k.logprobs == row.logprobs).all()
"""


def test_without_a_place_for_the_cache_every_process_compiles_for_itself(tmp_path: Path) -> None:
    package = tmp_path / "lynearm" / "wire"
    shutil.copytree(Path(lynearm.wire.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(Path(lynearm.wire.__file__).parents[1] / "v1", tmp_path / "lynearm" / "v1")
    # A file in the place of each directory: root may write into directories that are read-only.
    (package / "__pycache__").touch()
    home = tmp_path / "home"
    home.touch()
    environment = {
        **os.environ,
        "PYTHONPATH": str(tmp_path),
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    environment.pop("NUMBA_CACHE_DIR", None)
    subprocess.run([sys.executable, "-c", SCRIPT], check=True, env=environment, timeout=300)
