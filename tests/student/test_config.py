"""What a trainer can be told, and what it refuses."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from student.teaching_material import make_spec

from lynearm.cli.settings import load_settings
from lynearm.student.alignment import find_differences
from lynearm.student.config import TrainConfig
from lynearm.student.model import StudentModel
from lynearm.student.optimization import learning_rate
from lynearm.student.saving import resume_command
from lynearm.wire.errors import ConfigError


@pytest.mark.parametrize(
    "wrong",
    [
        {"streams": ("No Such Name",)},
        {"streams": ()},
        {"streams": ("maths", "maths:2")},
        {"learning_rate": 0.0},
        {"batch_sequences": 0},
        {"held_out_fraction": 0.95},
        {"loss": ("forward-kl:0",)},
        {"temperature": 0.0},
        {"schedule": "cosine"},
        {"schedule": "wavy"},
        {"dtype": "float8"},
        {"patience_seconds": -1.0},
        {"max_sequence_tokens": 1},
        {"epochs": 0},
    ],
)
def test_a_value_out_of_range_is_named(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))}|No Such Name"):
        TrainConfig(**wrong)  # type: ignore[arg-type]  # wrong on purpose


def test_the_rate_rises_then_stays_or_falls() -> None:
    constant = TrainConfig(learning_rate=1.0, warmup_steps=4)
    rates = [learning_rate(constant, step) for step in range(1, 8)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0])
    cosine = replace(constant, schedule="cosine", max_steps=14)
    assert learning_rate(cosine, 9) == pytest.approx(0.55)
    assert learning_rate(cosine, 14) == learning_rate(cosine, 20) == pytest.approx(0.1)


def test_an_aligned_student_has_no_differences(teacher: StudentModel) -> None:
    assert find_differences(make_spec(teacher), teacher) == []


def test_other_logprobs_and_end_tokens_are_differences(teacher: StudentModel) -> None:
    spec = make_spec(teacher)
    other = replace(
        spec,
        teacher=replace(spec.teacher, logprobs_mode="processed", logprobs_temperature=0.7),
        tokenizer=replace(spec.tokenizer, eos_token_ids=(9,)),
    )
    end_tokens, logprobs = find_differences(other, teacher)
    assert "end tokens: teacher [9]" in end_tokens
    assert "processed at temperature 0.7" in logprobs


def test_the_command_to_go_on_names_what_has_to_be_the_same() -> None:
    config = TrainConfig(
        streams=("maths:0.7", "code:0.3"), out=Path("runs/a b"), lora="r=8", freeze=("norms", "*.mlp.*")
    )
    assert resume_command(config) == (
        "lynearm train --resume --out 'runs/a b' --stream maths:0.7 --stream code:0.3 "
        "--service 127.0.0.1:7411 --lora r=8 --freeze norms --freeze '*.mlp.*'"
    )


def test_the_command_to_go_on_repeats_every_setting() -> None:
    config = TrainConfig(
        student=Path("s"),
        streams=("maths:0.7", "code:0.3"),
        service="10.0.0.1:9",
        out=Path("runs/a b"),
        learning_rate=1e-4,
        loss=("jsd@0.5", "cross-entropy:0.1"),
        span_weights={"reasoning": 0.5},
        tag_weights={"domain=it's": 2.0},
        questions=Path("some questions.jsonl"),
        schedule="cosine",
        max_steps=40,
        epochs=3,
        gradient_checkpointing=True,
        async_checkpoints=False,
        lora="r=8",
        freeze=("norms", "*.mlp.*"),
    )
    words = shlex.split(resume_command(config))
    assignments = [words[at + 1] for at, word in enumerate(words) if word == "--set"]
    said = {
        "streams": ["maths:0.7", "code:0.3"],
        "service": "10.0.0.1:9",
        "out": "runs/a b",
        "lora": "r=8",
        "freeze": ["norms", "*.mlp.*"],
        "student": "s",
    }
    assert load_settings(TrainConfig, "train", flags=said, assignments=assignments) == config
