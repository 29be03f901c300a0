"""A student narrower than its teacher: exact slices, of the units that put out most."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models.tiny_llama import build_tiny_llama
from student.cutting_material import INPUT_IDS, logits, profile_of
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from lynearm.student.cutting.config import CutConfig
from lynearm.student.cutting.cut import Evidence, cut_student
from lynearm.student.cutting.measuring import measure_profile
from lynearm.student.cutting.sequences import CalibrationSequence
from lynearm.student.cutting.shape import DecoderShape, read_shape
from lynearm.student.cutting.slicing import KeptUnits, make_student
from lynearm.student.cutting.width import Width, choose_heads, choose_units, settle_width
from lynearm.student.model import load_causal_lm, load_student
from lynearm.wire.errors import CheckpointError, ConfigError

SHAPE = DecoderShape(layers=3, heads=12, kv_heads=4, head_dim=8, neurons=40, hidden_size=48)
SEQUENCES = [CalibrationSequence((7, 30, 31, 200, 5, 77), 2), CalibrationSequence((9, 50, 60, 70), 1)]


def widen(directory: Path, **overrides: Any) -> Path:
    """A Llama with four key-value heads of three query heads each, with the tiny one's tokenizer."""
    build_tiny_llama(directory)
    fields = {
        "hidden_size": 48,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 8,
        **overrides,
    }
    base = json.loads((directory / "config.json").read_text())
    keep = {name: base[name] for name in ("vocab_size", "tie_word_embeddings", "eos_token_id")}
    torch.manual_seed(5)
    model = LlamaForCausalLM(LlamaConfig(**{**keep, "initializer_range": 0.3, **fields}))
    with torch.no_grad():
        # Norms and biases begin as ones and zeros, which would hide a wrong slice.
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.rand_like(parameter) + (0.5 if "norm" in name else 0.0))
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def wide_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return widen(tmp_path_factory.mktemp("wide") / "teacher")


@pytest.fixture(scope="module")
def biased_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untied, and with a bias in every projection."""
    directory = tmp_path_factory.mktemp("biased") / "teacher"
    return widen(directory, attention_bias=True, mlp_bias=True, tie_word_embeddings=False)


def change(directory: Path, out: Path, edit: Callable[[Any], None]) -> Path:
    """A copy of a model with changed weights."""
    student = load_student(directory, device="cpu")
    with torch.no_grad():
        edit(student.model.model)
    student.model.save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (out / name).write_bytes((directory / name).read_bytes())
    return out


def test_keeping_all_units_is_the_teacher_bit_for_bit(wide_dir: Path, biased_dir: Path) -> None:
    for directory in (wide_dir, biased_dir):
        teacher = load_causal_lm(directory).eval()
        shape = read_shape(teacher.config)
        every = KeptUnits(
            tuple(range(3)), (tuple(range(shape.heads)),) * 3, (tuple(range(shape.neurons)),) * 3
        )
        width = Width(shape.kv_heads, shape.heads, shape.neurons, shape.hidden_size)
        student = make_student(teacher, every, width, shape=shape, directory=directory)
        with torch.no_grad():
            assert torch.equal(student(INPUT_IDS).logits, teacher(INPUT_IDS).logits)
        assert student.config.to_dict() == teacher.config.to_dict()


@pytest.mark.parametrize(
    "wanted", [{"kv_heads": 2}, {"heads": 8}, {"heads": 4}, {"kv_heads": 2, "heads": 4}, {"neurons": 13}]
)
@pytest.mark.parametrize("biased", [False, True])
def test_leaving_out_units_that_are_zero_changes_nothing(
    tmp_path: Path, wide_dir: Path, biased_dir: Path, wanted: dict[str, int], biased: bool
) -> None:
    directory = biased_dir if biased else wide_dir
    width = settle_width(CutConfig(**wanted), SHAPE)
    generator = torch.Generator().manual_seed(1)

    def silence(model: Any) -> None:
        for layer in model.layers:
            groups = torch.randperm(SHAPE.kv_heads, generator=generator)[: width.kv_heads]
            heads = [
                int(group) * SHAPE.group + int(head)
                for group in groups
                for head in torch.randperm(SHAPE.group, generator=generator)[: width.group]
            ]
            neurons = torch.randperm(SHAPE.neurons, generator=generator)[: width.neurons]
            loud = torch.zeros(SHAPE.heads)
            loud[heads] = 1
            layer.self_attn.o_proj.weight *= loud.repeat_interleave(SHAPE.head_dim)
            loud = torch.zeros(SHAPE.neurons)
            loud[neurons] = 1
            layer.mlp.up_proj.weight *= loud[:, None]
            if layer.mlp.up_proj.bias is not None:
                layer.mlp.up_proj.bias *= loud

    teacher = change(directory, tmp_path / "teacher", silence)
    report = cut_student(teacher, tmp_path / "student", CutConfig(**wanted))
    torch.testing.assert_close(logits(tmp_path / "student"), logits(teacher), rtol=1e-5, atol=1e-4)
    assert report.kl < 1e-6
    assert [row.head_share for row in report.rows] == pytest.approx([1.0] * 3)
    assert [row.neuron_share for row in report.rows] == pytest.approx([1.0] * 3)
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (width.heads, width.kv_heads)
    assert (config["head_dim"], config["intermediate_size"]) == (SHAPE.head_dim, width.neurons)
    assert config["tie_word_embeddings"] is not biased


@pytest.mark.parametrize("biased", [False, True])
def test_leaving_out_channels_that_are_zero_changes_nothing(
    tmp_path: Path, wide_dir: Path, biased_dir: Path, biased: bool
) -> None:
    generator = torch.Generator().manual_seed(2)
    silent = torch.randperm(48, generator=generator)[:12]

    def silence(model: Any) -> None:
        model.embed_tokens.weight[:, silent] = 0
        for layer in model.layers:
            for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
                projection.weight[silent] = 0
                if projection.bias is not None:
                    projection.bias[silent] = 0

    teacher = change(biased_dir if biased else wide_dir, tmp_path / "teacher", silence)
    report = cut_student(teacher, tmp_path / "student", CutConfig(hidden_size=36))
    torch.testing.assert_close(logits(tmp_path / "student"), logits(teacher), rtol=1e-3, atol=1e-3)
    assert report.kl < 1e-6
    mask = int(report_account(tmp_path)["channels"]["mask"], 16)
    assert [i for i in range(48) if not mask >> i & 1] == sorted(silent.tolist())


def report_account(directory: Path) -> dict[str, Any]:
    account: dict[str, Any] = json.loads((directory / "student" / "lynearm.json").read_text())["cut_from"]
    return account


def test_depth_and_width_are_cut_at_once_and_recorded(tmp_path: Path, wide_dir: Path) -> None:
    heads, neurons = np.arange(12.0), np.zeros(40)
    neurons[[3, 17, 39]] = 1.0
    profile = profile_of(wide_dir, influence=[0.9, 0.1, 0.5], heads=heads, neurons=neurons)
    wanted = CutConfig(layers=2, choose="influence", kv_heads=2, heads=4, neurons=3, hidden_size=40)
    report = cut_student(wide_dir, tmp_path / "student", wanted, evidence=Evidence(profile=profile))
    assert report.layers == (0, 2)
    assert [row.heads for row in report.rows] == [(7, 8, 10, 11), (), (7, 8, 10, 11)]
    assert report.rows[0].head_share == pytest.approx((7 + 8 + 10 + 11) / 66)
    assert report.rows[0].neuron_share == 1
    account = report_account(tmp_path)
    assert account["layers"] == [0, 2]
    assert account["heads"] == {"of": 12, "kept": [[7, 8, 10, 11]] * 2}
    assert account["neurons"] == {"of": 40, "kept": 3, "masks": [f"{1 << 3 | 1 << 17 | 1 << 39:010x}"] * 2}
    assert (account["channels"]["of"], account["channels"]["kept"]) == (48, 40)
    model = load_student(tmp_path / "student", device="cpu").model
    teacher = load_student(wide_dir, device="cpu").model
    assert model.model.layers[1].mlp.up_proj.weight.shape == (3, 40)
    assert model.model.layers[1].self_attn.k_proj.weight.shape == (16, 40)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    channels = [i for i in range(48) if int(account["channels"]["mask"], 16) >> i & 1]
    ours = model.model.layers[1].self_attn.q_proj.weight[8:16]
    theirs = teacher.model.layers[2].self_attn.q_proj.weight[8 * 8 : 9 * 8]
    assert torch.equal(ours, theirs[:, channels])
    assert report.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_stock_transformers_generates_with_a_narrow_student(tmp_path: Path, wide_dir: Path) -> None:
    cut_student(wide_dir, tmp_path / "student", CutConfig(kv_heads=2, heads=2, neurons=20))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32)
    written = model.generate(INPUT_IDS, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert written.shape == (1, 10)
    with torch.no_grad():
        expected = model(written, use_cache=False).logits[0, 5:-1].argmax(-1)
    assert written[0, 6:].tolist() == expected.tolist()


def test_measured_heads_add_up_to_what_attention_adds(wide_dir: Path) -> None:
    """A head's contribution is the norm of its own part of the output projection."""
    model = load_causal_lm(wide_dir).eval()
    profile = measure_profile(model, SEQUENCES, name="", revision="")
    seen: list[torch.Tensor] = []
    handle = model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(
        lambda _module, inputs: seen.append(inputs[0][0])
    )
    neurons: list[torch.Tensor] = []
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(
        lambda _module, inputs: neurons.append(inputs[0][0])
    )
    with torch.no_grad():
        for sequence in SEQUENCES:
            model(torch.tensor([sequence.token_ids]))
    handle.remove()
    counted = torch.cat([one[each.counted] for one, each in zip(seen, SEQUENCES, strict=True)])
    weight = model.model.layers[1].self_attn.o_proj.weight.detach()
    expected = [
        float((counted[:, head * 8 : head * 8 + 8] @ weight[:, head * 8 : head * 8 + 8].T).norm(dim=1).mean())
        for head in range(12)
    ]
    np.testing.assert_allclose(profile.layers[1].head_contributions, expected, rtol=1e-5)
    active = torch.cat([one[each.counted] for one, each in zip(neurons, SEQUENCES, strict=True)])
    np.testing.assert_allclose(
        profile.layers[1].neuron_activations, active.abs().mean(0).detach().numpy(), rtol=1e-5
    )


@pytest.mark.parametrize("seed", range(20))
def test_the_kept_heads_are_the_best_that_the_shape_allows(seed: int) -> None:
    generator = np.random.default_rng(seed)
    importance = generator.random(12)
    width = Width(int(generator.integers(1, 5)), 0, 1, 48)
    group = int(generator.integers(1, 4))
    width = dataclasses.replace(width, heads=width.kv_heads * group)
    kept = choose_heads(importance, width, SHAPE)
    groups = {head // 3 for head in kept}
    assert (len(kept), len(groups), sorted(kept)) == (width.heads, width.kv_heads, list(kept))
    best = sorted((sum(sorted(importance[g * 3 : g * 3 + 3])[-group:]) for g in range(4)), reverse=True)
    assert importance[list(kept)].sum() == pytest.approx(sum(best[: width.kv_heads]))


def test_the_kept_units_are_the_largest_and_the_first_of_equals() -> None:
    assert choose_units(np.array([0.1, 3.0, 2.0, 2.0, 2.0]), 3) == (1, 2, 3)


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"heads": 13}, "heads is 13, expected 1 to 12"),
        ({"kv_heads": 2, "heads": 7}, "heads is 7, expected 1 to 6"),
        ({"heads": 6}, "heads is 6, and 4 key-value heads cannot share them evenly"),
        ({"kv_heads": 3, "heads": 9}, "hidden size"),
        ({"kv_heads": 5}, "kv_heads is 5, expected 1 to 4"),
        ({"neurons": 41}, "neurons is 41, expected 1 to 40"),
        ({"hidden_size": 49}, "hidden_size is 49, expected 1 to 48"),
        ({"hidden_size": 47}, "hidden size"),
    ],
)
def test_widths_that_cannot_be_are_refused(wanted: dict[str, int], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        settle_width(CutConfig(**wanted), SHAPE)
    if wanted == {"kv_heads": 3, "heads": 9}:
        assert caught.value.remedy == "with 3 key-value heads, keep 3 or 6"


def test_a_model_whose_configuration_has_no_head_width_keeps_its_heads(tmp_path: Path) -> None:
    directory = build_tiny_llama(tmp_path / "teacher")
    config = Qwen2Config(
        vocab_size=384,
        hidden_size=48,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
    )
    Qwen2ForCausalLM(config).save_pretrained(directory)
    with pytest.raises(CheckpointError, match="qwen2 has no head_dim"):
        cut_student(directory, tmp_path / "student", CutConfig(kv_heads=2))
    report = cut_student(directory, tmp_path / "student", CutConfig(kv_heads=2, hidden_size=32, neurons=8))
    assert load_student(report.directory, device="cpu").model.config.num_key_value_heads == 2
    assert (logits(report.directory)).isfinite().all()
