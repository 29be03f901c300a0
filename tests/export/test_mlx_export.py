"""MLX packages, loaded by stock mlx_lm and compared with torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lynearm.export import mlx_export, mlx_run
from lynearm.export.checkpoint import read_checkpoint
from lynearm.export.config import MlxExportConfig
from lynearm.export.held_out import find_checkpoint, read_held_out
from lynearm.export.mlx_export import export_mlx
from lynearm.export.progress import ExportProgress
from lynearm.export.speech import generate_texts_mlx
from lynearm.wire.errors import CheckpointError, ConfigError, InvalidInputError, ParityError

FILES = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "lynearm_export.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.mark.parametrize(("bits", "limit"), [(16, 1e-3), (8, 1e-2), (4, 2.0)])
def test_a_package_computes_what_the_checkpoint_computes(
    tiny_checkpoint: Path, tmp_path: Path, bits: int, limit: float
) -> None:
    result = export_mlx(tiny_checkpoint, tmp_path / "out", MlxExportConfig(bits=bits))
    assert result.parity is not None
    assert result.fidelity is not None
    assert result.parity.kl_mean < limit
    assert result.fidelity.kl_mean < 1e-3
    assert result.parity.decode_positions == 8
    assert {path.name for path in result.path.iterdir()} >= FILES
    assert result.size_bytes == sum(path.stat().st_size for path in result.path.iterdir())


def test_an_untied_head_is_stored_and_used(untied_checkpoint: Path, tmp_path: Path) -> None:
    result = export_mlx(untied_checkpoint, tmp_path / "out", MlxExportConfig(bits=16))
    assert result.parity is not None
    assert result.parity.kl_mean < 1e-3
    assert "lm_head.weight" in load_file(result.path / "model.safetensors")


def test_a_tied_head_is_not_stored(tiny_checkpoint: Path, tmp_path: Path) -> None:
    result = export_mlx(tiny_checkpoint, tmp_path / "out", MlxExportConfig(bits=8))
    assert not any("lm_head" in name for name in load_file(result.path / "model.safetensors"))


def test_the_config_says_everything_twice(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = export_mlx(tiny_checkpoint, tmp_path / "out", MlxExportConfig(bits=4, group_size=64)).path
    config = json.loads((out / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 500.0
    assert config["dtype"] == config["torch_dtype"] == "float16"
    assert config["quantization"] == config["quantization_config"]
    assert config["quantization"] == {"group_size": 64, "bits": 4, "mode": "affine"}
    tokenizer = json.loads((out / "tokenizer_config.json").read_text())
    assert tokenizer["chat_template"] == (out / "chat_template.jinja").read_text()
    assert tokenizer["tokenizer_class"] not in ("TokenizersBackend", None)


def test_a_lost_rotary_base_is_noticed(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What a plain copy of transformers' config.json would be: mlx_lm then falls back to 10000.
    def write_nested_only(directory: Path, *args: Any) -> None:
        shutil.copyfile(tiny_checkpoint / "config.json", directory / "config.json")

    monkeypatch.setattr(mlx_export, "write_config", write_nested_only)
    with pytest.raises(ParityError, match="differs from its own weights"):
        export_mlx(tiny_checkpoint, tmp_path / "out", MlxExportConfig(bits=16))
    assert not (tmp_path / "out").exists()


def test_a_damaged_weight_is_noticed(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = mlx_export.write_tensors

    def write_damaged(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
        name = "model.layers.1.mlp.down_proj.weight"
        written(directory, {**tensors, name: tensors[name].roll(1, 0)})

    monkeypatch.setattr(mlx_export, "write_tensors", write_damaged)
    with pytest.raises(ParityError):
        export_mlx(tiny_checkpoint, tmp_path / "out", MlxExportConfig(bits=8))


def test_a_cache_that_forgets_is_noticed(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = mlx_run.run_mlx

    def without_cache(package: Path, sequences: Any) -> Any:
        from dataclasses import replace

        found = honest(package, sequences)
        return replace(found, decode=found.decode[::-1].copy())

    monkeypatch.setattr(mlx_run, "run_mlx", without_cache)
    with pytest.raises(ParityError):
        export_mlx(tiny_checkpoint, tmp_path / "out", MlxExportConfig(bits=16))


def test_a_package_speaks(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = export_mlx(tiny_checkpoint, tmp_path / "out", MlxExportConfig(bits=4)).path
    question = "What is three plus four?"
    answers = generate_texts_mlx(out, [question, "Who?", question], max_tokens=8)
    assert len(answers) == 3
    assert answers[0] == answers[2], "a conversation heard the one before it"


def test_progress_ends_at_one(tiny_checkpoint: Path, tmp_path: Path) -> None:
    events: list[ExportProgress] = []
    export_mlx(tiny_checkpoint, tmp_path / "out", MlxExportConfig(bits=16), events.append)
    fractions = [event.fraction for event in events]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0


def test_an_earlier_export_is_replaced_and_nothing_else(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = MlxExportConfig(bits=16, check_parity=False)
    export_mlx(tiny_checkpoint, tmp_path / "out", config)
    export_mlx(tiny_checkpoint, tmp_path / "out", config)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(InvalidInputError, match="not written by lynearm"):
        export_mlx(tiny_checkpoint, tmp_path / "mine", config)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_a_training_run_stands_for_its_newest_checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "run" / "step-00000007")
    (tmp_path / "run" / "LATEST").write_text("step-00000007\n")
    assert find_checkpoint(tmp_path / "run").name == "step-00000007"
    (tmp_path / "run" / "LATEST").write_text("../elsewhere")
    with pytest.raises(CheckpointError, match="not there"):
        find_checkpoint(tmp_path / "run")


def test_held_out_traces_are_read_with_their_prompts(tiny_checkpoint: Path) -> None:
    sequences = read_held_out(tiny_checkpoint)
    assert len(sequences) == 8
    assert all(one.completion_start == 6 for one in sequences)


def test_a_damaged_held_out_file_is_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "held_out.block").write_bytes((tiny_checkpoint / "held_out.block").read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=r"held_out\.block"):
        read_held_out(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "mamba"}, "model_type is 'mamba'"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"num_hidden_layers": 9}, "lacks the tensor"),
        ({"intermediate_size": 100}, "implies"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 500.0}}, "RoPE scaling 'yarn'"),
        ({"rope_theta": 7.0}, "rope_theta 7.0"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
    ],
)
def test_a_checkpoint_that_cannot_be_exported_says_why(
    changed_checkpoint: Callable[[dict[str, object]], Path], values: dict[str, object], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(changed_checkpoint(values))


def test_a_directory_without_a_model_lists_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a directory"):
        read_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"lacks config\.json, model\.safetensors"):
        read_checkpoint(tmp_path)


def test_a_group_size_that_does_not_fit_is_refused(
    changed_checkpoint: Callable[[dict[str, object]], Path], tmp_path: Path
) -> None:
    from models.tiny_llama import build_tiny_llama

    narrow = build_tiny_llama(tmp_path / "narrow", hidden_size=64)
    with pytest.raises(InvalidInputError, match="not a multiple of the group size 128"):
        export_mlx(narrow, tmp_path / "out", MlxExportConfig(bits=4, group_size=128))


@pytest.mark.parametrize("values", [{"bits": 3}, {"group_size": 48}, {"dtype": "int8"}, {"parity_tokens": 1}])
def test_choices_that_no_exporter_knows_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        MlxExportConfig(**values)
