"""The cache of compiled code: where there is no place for it, and what it may not outlive."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import lynearm.wire
from lynearm.wire.jit import digest_of_sources

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


def test_compiled_code_does_not_outlive_what_it_has_of_other_modules(tmp_path: Path) -> None:
    constants, loops = tmp_path / "constants.py", tmp_path / "loops.py"
    loops.write_text(
        "from constants import STEP\n"
        "from lynearm.wire.jit import compiled\n\n"
        "@compiled\ndef next_number(number: int) -> int:\n    return number + STEP\n"
    )

    def next_of_forty(sources: str) -> int:
        script = (
            "from lynearm.wire import jit\n"
            f"jit.digest_of_sources = lambda: {sources!r}\n"
            "from loops import next_number\n"
            "print(next_number(40))\n"
        )
        environment = {
            **os.environ,
            "PYTHONDONTWRITEBYTECODE": "1",
            "NUMBA_CACHE_DIR": str(tmp_path / "cache"),
        }
        command = [sys.executable, "-c", script]
        ended = subprocess.run(
            command, check=True, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
        return int(ended.stdout)

    constants.write_text("STEP = 1\n")
    assert next_of_forty("as they were") == 41
    constants.write_text("STEP = 2\n")
    # The cache is used, which is why its stamp has to tell of every module.
    assert next_of_forty("as they were") == 41
    assert next_of_forty("changed") == 42


def test_the_sources_are_all_modules_of_the_package() -> None:
    package = Path(lynearm.wire.__file__).parent
    assert digest_of_sources() == digest_of_sources()
    whole = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(package.glob("*.py"))))
    assert digest_of_sources() == whole.hexdigest()
