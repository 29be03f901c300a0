"""The codec's benchmark runs where there is nothing but the package, and says what its readers parse."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

FIGURES = {
    "standard_k64_bits",
    "standard_k64_kl",
    "standard_k64_kl_p999",
    "standard_adaptive_bits",
    "compact_adaptive_bits",
    "fine_k64_bits",
    "exact_bf16_k64_bits",
    "decode_k64_tokens_per_second",
    "decode_k16_tokens_per_second",
    "encode_k64_tokens_per_second",
    "block16_overhead",
    "no_dictionary_overhead",
}


def run_benchmark(*arguments: str) -> str:
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "codec.py"), *arguments],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    ).stdout


def test_codec_benchmark_ends_with_its_figures_as_json() -> None:
    output = run_benchmark("--synthetic", "--quick")
    figures = json.loads(output.splitlines()[-1])
    assert set(figures) == FIGURES
    # A dictionary of a made-up teacher, learnt from little, may save nothing.
    assert figures.pop("no_dictionary_overhead") > -0.05
    assert all(value > 0 for value in figures.values())
    assert "SYNTHETIC" in output
