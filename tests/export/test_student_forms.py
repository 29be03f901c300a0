"""Students that were cut narrower, or are adapters, become packages like any other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from lynearm.cli.main import app
from lynearm.export.config import CoreMlExportConfig, MlxExportConfig
from lynearm.export.coreml_export import export_coreml
from lynearm.export.mlx_export import export_mlx
from lynearm.student.checkpoint import copy_tokenizer
from lynearm.student.cutting.config import CutConfig
from lynearm.student.cutting.cut import cut_student
from lynearm.student.lora_settings import LoraSettings
from lynearm.student.model import load_student
from lynearm.wire.errors import CheckpointError


@pytest.fixture(scope="module")
def narrow_dir(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of its two key-value heads with one of two query heads: 32 wide, where the model is 128."""
    wanted = CutConfig(layers=2, choose="evenly", kv_heads=1, heads=1, neurons=96)
    return cut_student(tiny_checkpoint, tmp_path_factory.mktemp("narrow") / "student", wanted).directory


def test_a_narrow_student_becomes_an_mlx_package(narrow_dir: Path, tmp_path: Path) -> None:
    made = export_mlx(narrow_dir, tmp_path / "out", MlxExportConfig(bits=16))
    assert made.fidelity is not None
    config = json.loads((made.path / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (1, 1, 32)
    assert config["intermediate_size"] == 96


def test_a_narrow_student_becomes_a_core_ml_package(narrow_dir: Path, tmp_path: Path) -> None:
    made = export_coreml(narrow_dir, tmp_path / "out", CoreMlExportConfig(context_length=64))
    assert made.parity is not None
    assert made.parity.kl_mean < 1e-3


def test_an_adapter_is_merged_for_its_export(tiny_checkpoint: Path, tmp_path: Path) -> None:
    student = load_student(
        tiny_checkpoint, device="cpu", lora=LoraSettings(r=2, targets=("q_proj", "down_proj"))
    )
    assert student.adapter is not None
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0.0, 0.1)
    run = tmp_path / "run"
    directory = run / "step-00000003"
    directory.mkdir(parents=True)
    student.adapter.save(directory)
    copy_tokenizer(tiny_checkpoint, directory)
    (run / "LATEST").write_text("step-00000003\n")
    with pytest.raises(CheckpointError, match="is an adapter without its base"):
        export_mlx(run, tmp_path / "out")
    made = CliRunner().invoke(
        app, ["export", "mlx", str(run), "--out", str(tmp_path / "out"), "--bits", "16"]
    )
    assert made.exit_code == 0, made.output
    package = load_file(tmp_path / "out" / "model.safetensors")
    merged = student.adapter.merge().state_dict()
    for name in ("model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.weight"):
        assert torch.equal(package[name], merged[name].to(package[name].dtype))
    assert "step-00000003" in (tmp_path / "out" / "README.md").read_text()
