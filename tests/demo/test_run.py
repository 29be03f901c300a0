"""The demo's own path, with a tiny teacher: real Ray, vLLM, gRPC, torch, MLX and coremltools."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from models.tiny_llama import build_tiny_llama
from rich.console import Console

from lynearm.demo.config import DemoConfig
from lynearm.demo.run import run_demo
from lynearm.wire.errors import ConfigError, LynearmError


@pytest.fixture(scope="module")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llama(
        tmp_path_factory.mktemp("demo") / "teacher", hidden_size=128, num_layers=4, initializer_range=0.08
    )


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    lines = [
        {
            "id": f"p-{number}",
            "prompt": f"What is {number} plus four?",
            "tags": {"split": "held_out" if number < 4 else "train"},
        }
        for number in range(24)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.slow
def test_the_whole_path_ends_in_packages_and_a_report(
    tiny_teacher: Path, prompts: Path, tmp_path: Path
) -> None:
    config = DemoConfig(
        out=tmp_path / "demo",
        teacher=tiny_teacher,
        prompts=prompts,
        dropped_layers=(1,),
        top_k=16,
        max_tokens=24,
        max_batch=8,
        held_out_traces=4,
        batch_sequences=4,
        eval_every_steps=3,
        learning_rate=3e-3,
    )
    printed = io.StringIO()
    report = run_demo(config, Console(file=printed, width=120))

    assert report.teacher_tokens > 0
    assert report.bits_per_token > 0
    assert report.held_out_before is not None
    assert report.held_out_after is not None
    # Two passes over 20 traces do not make a good student; they must make a better one.
    assert report.held_out_after < report.held_out_before
    assert [row.name for row in report.exports] == ["MLX, 16-bit", "MLX, 4-bit", "Core ML, 8-bit"]
    assert all(row.size_bytes > 0 and row.kl_mean < 4 for row in report.exports)
    assert report.exports[0].kl_mean < 1e-3
    assert {stage.name for stage in report.stages} >= {"serve", "teach", "cut", "train", "mlx-4", "coreml"}

    checkpoint = next((config.out / "student").glob("step-*"))
    assert (checkpoint / "model.safetensors").is_file()
    lineage = json.loads((checkpoint / "lynearm.json").read_text())
    assert "Apache-2.0" in json.dumps(lineage)
    html = (config.out / "report.html").read_text()
    assert "Core ML" in html
    text = printed.getvalue()
    assert "held-out KL before" in text
    assert "MLX, 4-bit" in text


def test_a_directory_that_no_demo_made_is_left_alone(prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="no demo made it"):
        run_demo(DemoConfig(out=tmp_path, prompts=prompts), Console(file=io.StringIO()))
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.slow
def test_a_role_that_fails_ends_the_demo_with_its_last_words(prompts: Path, tmp_path: Path) -> None:
    broken = build_tiny_llama(tmp_path / "broken", hidden_size=128, num_layers=2)
    (broken / "chat_template.jinja").write_text("{{ raise_exception('nobody may ask') }}")
    config = DemoConfig(out=tmp_path / "demo", teacher=broken, prompts=prompts, dropped_layers=())
    with pytest.raises(LynearmError, match="`lynearm teach` ended with code 1"):
        run_demo(config, Console(file=io.StringIO()))


def test_a_missing_prompt_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.jsonl"):
        DemoConfig(prompts=tmp_path / "nowhere.jsonl")
