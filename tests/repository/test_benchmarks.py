"""The benchmarks run where there is nothing but the package, and say what their readers parse."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from models.tiny_llama import build_tiny_llama

ROOT = Path(__file__).resolve().parents[2]

FIGURES = {
    "standard_k64_bits",
    "standard_k64_kl",
    "standard_k64_kl_p999",
    "standard_adaptive_bits",
    "tail_draw_bits",
    "compact_adaptive_bits",
    "fine_k64_bits",
    "exact_bf16_k64_bits",
    "decode_k64_tokens_per_second",
    "decode_k16_tokens_per_second",
    "encode_k64_tokens_per_second",
    "block16_overhead",
    "no_dictionary_overhead",
}


TRANSPORT_FIGURES = {
    "fetch_256k_cpu_vs_tcp",
    "fetch_1m_cpu_vs_tcp",
    "tail_256k_cpu_vs_tcp",
    "tail_1m_cpu_vs_tcp",
    *(f"grpc_{kind}_cpu_vs_tcp" for kind in ("256k", "1m", "tail_256k", "tail_1m")),
    "durable_publish_vs_group_commit",
    "durable_publish_256k_vs_group_commit",
    "durable_publish_1m_vs_group_commit",
    "replay_vs_tail",
    "four_subscribers_cpu_vs_one",
    "tls_1m_cpu_ratio",
    *(f"{way}_tokens_per_cpu_second" for way in ("lynearm", "lynearm_exact", "json_http", "pickle_zeromq")),
    *(f"{way}_bytes_per_token" for way in ("lynearm", "lynearm_exact", "json_http", "pickle_zeromq")),
}

TEACHER_FIGURES = {
    "tiny_b8_k16_overhead",
    "tiny_b8_k16_flat_lists_overhead",
    "tiny_b8_k16_dictionaries_overhead",
    "tiny_b8_k16_service_us",
    "tiny_b8_k16_bytes_per_token",
    "tiny_b8_plain_us",
    "max_abs_logprob_error",
}


def run_benchmark(name: str, *arguments: str) -> str:
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / name), *arguments],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    ).stdout


def test_codec_benchmark_ends_with_its_figures_as_json() -> None:
    output = run_benchmark("codec.py", "--synthetic", "--quick")
    figures = json.loads(output.splitlines()[-1])
    assert set(figures) == FIGURES
    # A dictionary of a made-up teacher, learnt from little, may save nothing.
    assert figures.pop("no_dictionary_overhead") > -0.05
    assert all(value > 0 for value in figures.values())
    assert "SYNTHETIC" in output


def test_transport_benchmark_ends_with_its_figures_as_json() -> None:
    output = run_benchmark("transport.py", "--quick", "--without-ray")
    figures = json.loads(output.splitlines()[-1])
    assert set(figures) == TRANSPORT_FIGURES
    # What a live tail adds is a difference, which in a single round may be anything.
    certain = {name: value for name, value in figures.items() if not name.startswith("tail_")}
    assert all(value > 0 for value in certain.values())
    assert figures["lynearm_bytes_per_token"] < figures["pickle_zeromq_bytes_per_token"]


def test_prompt_queue_benchmark_ends_with_its_figures_as_json() -> None:
    figures = json.loads(run_benchmark("prompt_queue.py", "--quick").splitlines()[-1])
    for step in ("read", "create", "lease", "finish", "fail", "list_failed"):
        assert figures[f"{step}_prompts_per_second"] > 0
    assert figures["lease_last_tenth_vs_first"] > 0
    assert figures["create_client_mib"] < 100


@pytest.mark.slow
def test_scoring_benchmark_ends_with_its_figures_as_json(tmp_path: Path) -> None:
    model = build_tiny_llama(tmp_path / "tiny")
    output = run_benchmark("scoring.py", "--quick", "--model", str(model))
    figures = json.loads(output.splitlines()[-1])
    assert {"gather_overhead", "service_chosen_bytes_per_token", "reuse_cpu_ratio"} <= set(figures)
    assert figures["service_bytes_per_token"] < figures["service_chosen_bytes_per_token"]
    assert figures["dictionaries_overhead"] > figures["gather_overhead"]


@pytest.mark.slow
def test_teacher_overhead_benchmark_ends_with_its_figures_as_json() -> None:
    output = run_benchmark("teacher_overhead.py", "--quick", "--device", "cpu")
    figures = json.loads(output.splitlines()[-1])
    assert set(figures) == TEACHER_FIGURES
    assert figures["max_abs_logprob_error"] < 1e-3
    assert figures["tiny_b8_plain_us"] > 0
    assert figures["tiny_b8_k16_bytes_per_token"] > 10


@pytest.mark.slow
def test_student_forms_benchmark_ends_with_its_figures_as_json(tmp_path: Path) -> None:
    model = build_tiny_llama(tmp_path / "tiny", num_layers=4)
    output = run_benchmark("student_forms.py", str(model), "--tokens", "64", "--rank", "2")
    figures = json.loads(output.splitlines()[-1])
    assert set(figures) == {"peak_mib", "cpu_seconds", "trained"}
    trained = figures["trained"]
    assert trained["lora"] < trained["frozen embeddings and lower half"] < trained["frozen embeddings"]
    assert trained["everything"] == trained["gradient checkpointing"]


@pytest.mark.slow
def test_loss_benchmark_ends_with_its_figures_as_json() -> None:
    figures = json.loads(run_benchmark("loss.py", "--quick").splitlines()[-1])
    assert set(figures) == {
        f"{cost}_vs_ce_{shape}{micro_batch}"
        for cost in ("memory", "time")
        for shape in ("49k", "152k")
        for micro_batch in ("", "_accumulating")
    }
    assert all(value > 0 for value in figures.values())
