"""The parts of the on-policy benchmark; all of it takes minutes and SmolLM2's weights."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from models.tiny_llama import build_tiny_llama

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "on_policy.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("on_policy_benchmark", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_students_are_measured_on_their_own_text(benchmark: ModuleType, tmp_path: Path) -> None:
    teacher, student = (build_tiny_llama(tmp_path / f"model-{seed}", seed=seed) for seed in (0, 1))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": text}) for text in ("What is three?", "Why?")))
    judge = benchmark.Judge(teacher, prompts, argparse.Namespace(answer_tokens=6))
    same = judge.measure(teacher, 0)
    assert abs(same.reverse_kl) < 1e-4
    assert abs(same.forward_kl) < 1e-4
    other = judge.measure(student, 0)
    assert other.reverse_kl > 0.1
    assert other.forward_kl > 0.1


def test_a_divergence_is_over_the_whole_vocabulary(benchmark: ModuleType, tmp_path: Path) -> None:
    first, second = (benchmark.load(build_tiny_llama(tmp_path / f"m{seed}", seed=seed)) for seed in (3, 4))
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    found = benchmark.divergence(first, second, ids, 3)
    with torch.no_grad():
        p, q = (torch.distributions.Categorical(logits=one(ids).logits[0, 2:4]) for one in (first, second))
    torch.testing.assert_close(found, torch.distributions.kl_divergence(p, q), rtol=1e-4, atol=1e-5)


def test_both_ways_are_compared_by_seed(benchmark: ModuleType) -> None:
    def measured(value: float) -> object:
        return benchmark.Measured(value, 2 * value)

    figures = benchmark.summarise(
        argparse.Namespace(seeds=2, layers=20, tokens=100),
        measured(4.0),
        {"off_policy": [measured(2.0), measured(3.0)], "on_policy": [measured(1.0), measured(3.3)]},
        110,
        [100, 120],
    )
    assert figures["reverse_kl_on_vs_off"] == pytest.approx((0.5 + 1.1) / 2)
    assert figures["on_policy_wins"] == 1
    assert figures["teacher_tokens_on_policy"] == figures["teacher_tokens_off_policy"] == 110
    assert json.dumps(figures)


def test_prompts_are_held_out_or_in_one_half(benchmark: ModuleType, tmp_path: Path) -> None:
    from lynearm.demo.config import PROMPTS

    files = benchmark.split_prompts(argparse.Namespace(prompts=PROMPTS, held_out=8), tmp_path)
    parts = [set(path.read_text().splitlines()) for path in files]
    assert len(parts[0]) == 8
    assert min(len(part) for part in parts[1:]) > 50
    assert len(set.union(*parts)) == sum(len(part) for part in parts)
