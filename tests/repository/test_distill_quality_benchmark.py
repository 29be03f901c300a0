"""The benchmark of quality: its figures, that it goes on where it stopped, and what its ceiling is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from models.tiny_llama import build_tiny_llama

from lynearm.student.batches import Batch
from lynearm.student.config import TrainConfig
from lynearm.student.model import load_causal_lm, load_student
from lynearm.student.objective import Objective, parse_terms
from lynearm.student.optimization import Optimization
from lynearm.wire.traces import TopK, Trace

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
METHODS = (
    "standard_k64",
    "standard_adaptive",
    "compact_adaptive",
    "sampled",
    "hard_labels",
    "k64_default_loss",
    "k64_tail_draw",
    "k64_4_tail_draws",
    "adaptive_tail_draw",
    "k64_tail_token",
)


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llama(tmp_path_factory.mktemp("teacher") / "tiny")


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import distill_quality_runs

    return distill_quality_runs


@pytest.fixture
def made_traces(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import distill_quality_traces

    return distill_quality_traces


def run_quick(teacher_dir: Path, out: Path) -> subprocess.CompletedProcess[str]:
    arguments = ["--quick", "--teacher", str(teacher_dir), "--layers", "1", "--out", str(out)]
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / "distill_quality.py"), *arguments, "--data", str(out / "none")],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )


def make_trace(vocab_size: int, positions: int = 6, prompt: int = 4) -> Trace:
    rng = np.random.default_rng(0)
    return Trace(
        prompt_id="p",
        prompt_token_ids=rng.integers(0, vocab_size, prompt).astype(np.int32),
        completion_token_ids=rng.integers(0, vocab_size, positions).astype(np.int32),
        sampled_logprobs=np.zeros(positions, np.float32),
        top_k=TopK(
            np.tile(np.arange(3, dtype=np.int32), (positions, 1)),
            np.full((positions, 3), -2.0, np.float32),
            np.full(positions, 0.5, np.float32),
        ),
        finish_reason="stop",
    )


@pytest.mark.slow
def test_quality_benchmark_ends_with_its_figures_and_goes_on_where_it_stopped(
    teacher_dir: Path, tmp_path: Path
) -> None:
    first = run_quick(teacher_dir, tmp_path)
    figures = json.loads(first.stdout.splitlines()[-1])
    compared = {f"{name}_vs_dense{part}" for name in METHODS for part in ("", "_spread")}
    absolute = {f"{name}_{unit}" for name in ("dense", *METHODS) for unit in ("kl", "bits")}
    assert set(figures) == compared | absolute | {"initial_kl", "seeds"}
    assert all(figures[f"{name}_vs_dense"] > 0.5 for name in METHODS)
    assert figures["hard_labels_bits"] < figures["sampled_bits"] < figures["standard_k64_bits"]
    # A run that was killed in the middle: the last two students are missing.
    results = tmp_path / "results.jsonl"
    lines = results.read_text().splitlines(keepends=True)
    assert len(lines) == 2 * (1 + len(METHODS))
    results.write_text("".join(lines[:-2]))
    second = run_quick(teacher_dir, tmp_path)
    assert json.loads(second.stdout.splitlines()[-1]) == figures
    assert second.stderr.count("after 2 steps") == 2


def test_rows_of_a_whole_vocabulary_give_the_gradient_of_the_whole_kl(
    teacher_dir: Path, runs: ModuleType, tmp_path: Path
) -> None:
    teacher = load_causal_lm(teacher_dir).eval()
    student_dir = build_tiny_llama(tmp_path / "student", seed=1)
    trace = make_trace(teacher.config.vocab_size)
    dense = runs.with_full_rows(teacher, trace)
    student = load_student(student_dir, device="cpu")
    config = TrainConfig(loss=("forward-kl",), grad_clip=0.0)
    optimization = Optimization(student, config, objectives=(Objective(parse_terms(config.loss)),))
    result = optimization.step(Batch((dense,)), 1)

    plain = load_causal_lm(student_dir)
    token_ids = np.concatenate([trace.prompt_token_ids, trace.completion_token_ids[:-1]]).astype(np.int64)
    logits_TV = plain(input_ids=torch.from_numpy(token_ids)[None]).logits[0, -6:]
    with torch.no_grad():
        teacher_TV = torch.log_softmax(
            teacher(input_ids=torch.from_numpy(token_ids)[None]).logits[0, -6:], -1
        )
    loss = torch.nn.functional.kl_div(
        torch.log_softmax(logits_TV, -1), teacher_TV, log_target=True, reduction="batchmean"
    )
    loss.backward()
    norm = torch.nn.utils.get_total_norm(
        [parameter.grad for parameter in plain.parameters() if parameter.grad is not None]
    )
    assert result.kl == pytest.approx(loss.item(), rel=1e-4)
    assert result.gradient_norm == pytest.approx(norm.item(), rel=1e-3)


def test_a_teacher_is_at_no_distance_from_itself_and_parts_add_up(
    teacher_dir: Path, runs: ModuleType, tmp_path: Path
) -> None:
    teacher = load_causal_lm(teacher_dir).eval()
    held_out = runs.HeldOut(teacher, [make_trace(teacher.config.vocab_size)])
    same = held_out.measure(teacher)
    assert abs(same.kl) < 1e-6
    assert same.agreement == 1.0
    other = held_out.measure(load_causal_lm(build_tiny_llama(tmp_path / "other", seed=1)))
    assert 0 < other.kl_of_top < other.kl
    assert other.agreement < 1.0


def test_draws_are_of_the_tail_and_as_likely_as_there(teacher_dir: Path, made_traces: ModuleType) -> None:
    teacher = load_causal_lm(teacher_dir).eval()
    vocab_size, draws = int(teacher.config.vocab_size), 4000
    trace = make_trace(vocab_size)
    drawn = made_traces.with_tail_draws(teacher, trace, draws, torch.Generator().manual_seed(0)).top_k
    whole_TV = made_traces.full_logprobs(teacher, trace).exp().numpy()
    for row, kept, ids in zip(whole_TV, drawn.token_ids, drawn.tail_draws, strict=True):
        assert not np.isin(ids, kept).any()
        row[kept] = 0.0
        share_V, found_V = row / row.sum(), np.bincount(ids, minlength=vocab_size) / draws
        assert np.abs(found_V - share_V).max() < 5 * np.sqrt(share_V.max() / draws)
