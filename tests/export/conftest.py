"""Tiny checkpoints, built once for a session."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from models.tiny_llama import build_tiny_llama
from safetensors.torch import load_file, save_file

from lynearm.wire.codec import encode_block
from lynearm.wire.traces import TopK, Trace

VOCAB_SIZE = 384


def make_trace(number: int, vocab_size: int = VOCAB_SIZE) -> Trace:
    random = np.random.default_rng(number)
    length = 12 + number
    return Trace(
        prompt_id=f"p{number}",
        prompt_token_ids=random.integers(5, vocab_size, 6).astype(np.int32),
        completion_token_ids=random.integers(5, vocab_size, length).astype(np.int32),
        sampled_logprobs=np.full(length, -1.0, np.float32),
        top_k=TopK(
            np.zeros((length, 0), np.int32), np.zeros((length, 0), np.float32), np.ones(length, np.float32)
        ),
        finish_reason="stop",
    )


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied, with grouped queries, a rotary base that is not the default, and held-out traces."""
    directory = build_tiny_llama(
        tmp_path_factory.mktemp("tiny") / "student", hidden_size=128, num_layers=3, initializer_range=0.08
    )
    config = json.loads((directory / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 500.0}
    config.pop("rope_theta", None)
    (directory / "config.json").write_text(json.dumps(config))
    block = encode_block([make_trace(number) for number in range(8)], codec="exact", vocab_size=VOCAB_SIZE)
    (directory / "held_out.block").write_bytes(block)
    return directory


@pytest.fixture(scope="session")
def untied_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a head of its own."""
    directory = tmp_path_factory.mktemp("untied") / "student"
    shutil.copytree(tiny_checkpoint, directory)
    config = json.loads((directory / "config.json").read_text()) | {"tie_word_embeddings": False}
    (directory / "config.json").write_text(json.dumps(config))
    weights = load_file(directory / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(weights, directory / "model.safetensors")
    return directory


@pytest.fixture
def changed_checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Callable[[dict[str, object]], Path]:
    """Makes a copy whose config.json has other values."""

    def change(values: dict[str, object]) -> Path:
        directory = tmp_path / "changed"
        shutil.copytree(tiny_checkpoint, directory)
        config = json.loads((directory / "config.json").read_text()) | values
        (directory / "config.json").write_text(json.dumps(config))
        return directory

    return change
