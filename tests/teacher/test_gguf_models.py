"""The conversion of GGUF files, against gguf's and transformers' own readers of the same file."""

from __future__ import annotations

import json
import sys
import threading
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from lynearm.teacher import gguf_models
from lynearm.teacher.gguf_file import read_gguf
from lynearm.teacher.gguf_models import convert_gguf, default_cache_dir
from lynearm.wire.errors import CheckpointError, MissingDependencyError, StorageError, StorageFullError

gguf = pytest.importorskip("gguf", reason="the tests write their GGUF files with the gguf package")

HIDDEN, HEADS, KV_HEADS, FEED_FORWARD = 64, 4, 2, 96
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abc123", "Ġ", "ab"]


def rotary_to_gguf(weights: np.ndarray, heads: int) -> np.ndarray:
    """Row order of llama.cpp: the two halves of each head interleaved."""
    rows = [
        head * (len(weights) // heads) + half * (len(weights) // heads // 2) + pair
        for head in range(heads)
        for pair in range(len(weights) // heads // 2)
        for half in range(2)
    ]
    return weights[rows]


def tiny_weights(seed: int = 0) -> dict[str, np.ndarray]:
    """A one-layer llama's weights, under their Hugging Face names."""
    rng = np.random.default_rng(seed)
    kv = HIDDEN // HEADS * KV_HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens": (len(TOKENS), HIDDEN),
        "model.norm": (HIDDEN,),
        "model.layers.0.input_layernorm": (HIDDEN,),
        "model.layers.0.post_attention_layernorm": (HIDDEN,),
        "model.layers.0.self_attn.q_proj": (HIDDEN, HIDDEN),
        "model.layers.0.self_attn.k_proj": (kv, HIDDEN),
        "model.layers.0.self_attn.v_proj": (kv, HIDDEN),
        "model.layers.0.self_attn.o_proj": (HIDDEN, HIDDEN),
        "model.layers.0.mlp.gate_proj": (FEED_FORWARD, HIDDEN),
        "model.layers.0.mlp.up_proj": (FEED_FORWARD, HIDDEN),
        "model.layers.0.mlp.down_proj": (HIDDEN, FEED_FORWARD),
    }
    return {f"{name}.weight": rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


GGUF_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "model.layers.0.input_layernorm.weight": "blk.0.attn_norm.weight",
    "model.layers.0.post_attention_layernorm.weight": "blk.0.ffn_norm.weight",
    "model.layers.0.self_attn.q_proj.weight": "blk.0.attn_q.weight",
    "model.layers.0.self_attn.k_proj.weight": "blk.0.attn_k.weight",
    "model.layers.0.self_attn.v_proj.weight": "blk.0.attn_v.weight",
    "model.layers.0.self_attn.o_proj.weight": "blk.0.attn_output.weight",
    "model.layers.0.mlp.gate_proj.weight": "blk.0.ffn_gate.weight",
    "model.layers.0.mlp.up_proj.weight": "blk.0.ffn_up.weight",
    "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
}


def write_tiny_gguf(
    path: Path, *, kind: str = "F32", architecture: str = "llama", pre: str = "smollm", extra: str = ""
) -> Path:
    """A GGUF file of `tiny_weights`, its matrices quantised to `kind`, written by the gguf package."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("Tiny")
    writer.add_license("apache-2.0")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    quant = gguf.GGMLQuantizationType[kind]
    for name, weights in tiny_weights().items():
        if "q_proj" in name or "k_proj" in name:
            weights = rotary_to_gguf(weights, HEADS if "q_proj" in name else KV_HEADS)
        if weights.ndim == 1:
            writer.add_tensor(GGUF_NAMES[name], weights)
        else:
            writer.add_tensor(GGUF_NAMES[name], gguf.quants.quantize(weights, quant), raw_dtype=quant)
    if architecture == "qwen2":
        for name, size in (("q", HIDDEN), ("k", HIDDEN // 2), ("v", HIDDEN // 2)):
            writer.add_tensor(f"blk.0.attn_{name}.bias", np.arange(size, dtype=np.float32))
    if extra:
        writer.add_tensor(extra, np.zeros(32, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny_gguf(tmp_path / "tiny.gguf")


@pytest.mark.parametrize("kind", ["F32", "F16", "Q4_1", "Q8_0"])
def test_tensors_are_dequantised_bit_for_bit_as_gguf_does(tmp_path: Path, kind: str) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", kind=kind)
    ours = read_gguf(path)
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert {tensor.name for tensor in ours.tensors} == set(theirs)
    for tensor in ours.tensors:
        expected = gguf.quants.dequantize(theirs[tensor.name].data, theirs[tensor.name].tensor_type)
        np.testing.assert_array_equal(ours.load(tensor), expected.reshape(tensor.shape), strict=True)


def test_weights_come_out_under_their_names_in_their_rotary_order(tiny: Path, tmp_path: Path) -> None:
    written = load_file(convert_gguf(tiny, tmp_path / "cache") / "model.safetensors")
    expected = tiny_weights()
    assert set(written) == set(expected)
    for name, weights in expected.items():
        np.testing.assert_array_equal(written[name], weights, strict=True)


def test_config_has_both_forms_of_the_rotary_base(tiny: Path, tmp_path: Path) -> None:
    config = json.loads((convert_gguf(tiny, tmp_path / "cache") / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5000.0
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert config["tie_word_embeddings"] is True
    assert (config["head_dim"], config["num_key_value_heads"], config["vocab_size"]) == (16, 2, len(TOKENS))


def test_progress_ends_at_all_of_it(tiny: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, float]] = []
    convert_gguf(tiny, tmp_path / "cache", lambda message, fraction: seen.append((message, fraction)))
    fractions = [fraction for _, fraction in seen]
    assert fractions == sorted(fractions)
    assert len(fractions) == len(tiny_weights())
    assert fractions[-1] == 1.0


def test_a_second_call_converts_nothing(tiny: Path, tmp_path: Path) -> None:
    first = convert_gguf(tiny, tmp_path / "cache")
    before = (first / "model.safetensors").stat()
    assert convert_gguf(tiny, tmp_path / "cache", pytest.fail) == first
    assert (first / "model.safetensors").stat().st_ino == before.st_ino


def test_two_at_once_convert_once(tiny: Path, tmp_path: Path) -> None:
    calls: list[float] = []
    results: list[Path] = []

    def convert() -> None:
        results.append(
            convert_gguf(tiny, tmp_path / "cache", lambda message, fraction: calls.append(fraction))
        )

    threads = [threading.Thread(target=convert) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(results)) == 1
    assert len(calls) == len(tiny_weights())


def test_a_damaged_copy_and_the_remains_of_a_killed_run_are_replaced(tiny: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    target = convert_gguf(tiny, cache)
    good = (target / "model.safetensors").read_bytes()
    (target / "model.safetensors").write_bytes(good[:-1])
    remains = cache / f".{target.name}.partial-killed"
    remains.mkdir()
    (remains / "model.safetensors").write_bytes(b"half")
    assert convert_gguf(tiny, cache) == target
    assert (target / "model.safetensors").read_bytes() == good
    assert not remains.exists()


def test_another_file_gets_another_directory(tiny: Path, tmp_path: Path) -> None:
    other = write_tiny_gguf(tmp_path / "other.gguf", kind="F16")
    assert convert_gguf(tiny, tmp_path / "cache") != convert_gguf(other, tmp_path / "cache")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: b"", "cannot be read"),
        (lambda data: b"GGML" + data[4:], "does not begin with GGUF"),
        (lambda data: data[:4] + (9).to_bytes(4, "little") + data[8:], "version 9"),
        (lambda data: data[:200], "inside its header"),
        (lambda data: data[:-40], "inside the tensor"),
        (lambda data: data[:16] + (2**62).to_bytes(8, "little") + data[24:], "is not a GGUF file"),
    ],
    ids=["empty", "magic", "version", "header cut", "weights cut", "absurd count"],
)
def test_a_damaged_gguf_file_is_refused_and_leaves_nothing(
    tiny: Path, tmp_path: Path, damage: Any, said: str
) -> None:
    tiny.write_bytes(damage(tiny.read_bytes()))
    with pytest.raises(CheckpointError, match=said):
        convert_gguf(tiny, tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_an_unknown_tensor_type_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tensor type 30; F32, F16, Q4_1, Q8_0 are understood"):
        read_gguf(write_tiny_gguf(tmp_path / "tiny.gguf", kind="BF16"))


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ({"architecture": "rwkv9"}, "'rwkv9', expected a llama, and transformers does not read it either"),
        ({"architecture": "gpt2"}, r"lacks transformer\.[a-z0-9_.]+ of a gpt2"),
    ],
    ids=["unknown", "not all of it"],
)
def test_a_model_that_nobody_reads_is_refused(tmp_path: Path, written: dict[str, str], said: str) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", **written)
    with pytest.raises(CheckpointError, match=said):
        convert_gguf(path, tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_without_transformers_gguf_reader_its_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    path = write_tiny_gguf(tmp_path / "tiny.gguf", architecture="qwen2")
    with pytest.raises(MissingDependencyError, match=r"'qwen2'.*pip install 'lynearm\[gguf\]'"):
        convert_gguf(path, tmp_path / "cache")


@pytest.mark.parametrize(
    "written",
    [{"architecture": "qwen2", "pre": "qwen2", "kind": "Q4_0"}, {"kind": "BF16"}, {"kind": "Q5_1"}],
    ids=["architecture", "BF16", "Q5_1"],
)
def test_what_our_reader_does_not_know_transformers_converts(tmp_path: Path, written: dict[str, str]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = write_tiny_gguf(tmp_path / "tiny.gguf", **written)
    directory = convert_gguf(source, tmp_path / "cache")
    ours = AutoModelForCausalLM.from_pretrained(directory)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=source.name, dtype=torch.float32)
    for name, weights in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], weights), name
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab"
    config = json.loads((directory / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5000.0
    assert "quantization_config" not in config
    assert 'license: "apache-2.0"' in (directory / "README.md").read_text()
    steps = json.loads((directory / "tokenizer.json").read_text())["pre_tokenizer"].get("pretokenizers", [])
    # transformers' reader would leave the digits of SmolLM2's numbers together.
    assert (steps[0]["type"] == "Digits") == (written.get("pre") is None)


def test_a_tensor_that_no_llama_has_is_refused(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", extra="blk.0.attn_q.bias")
    with pytest.raises(CheckpointError, match=r"blk\.0\.attn_q\.bias"):
        convert_gguf(path, tmp_path / "cache")


def test_a_full_disk_is_said_before_anything_is_written(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")(10 << 20, 0, 10 << 20)
    monkeypatch.setattr(gguf_models.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(StorageFullError, match="10 MiB free, the model as float32 needs 64 MiB"):
        convert_gguf(tiny, tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_a_cache_that_cannot_be_written_is_said(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be written"):
        convert_gguf(tiny, tiny / "cache")


def test_the_cache_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    assert default_cache_dir() == tmp_path / "elsewhere" / "lynearm"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    assert default_cache_dir() == tmp_path / ".cache" / "lynearm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == tmp_path / ".cache" / "lynearm"


@pytest.mark.parametrize("kind", ["F16", "Q4_1"])
def test_transformers_reads_the_same_model_from_the_gguf_file(tmp_path: Path, kind: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    source = write_tiny_gguf(tmp_path / "tiny.gguf", kind=kind)
    ours = AutoModelForCausalLM.from_pretrained(convert_gguf(source, tmp_path / "cache"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=source.name, dtype=torch.float32)
    assert set(ours.state_dict()) == set(theirs.state_dict())
    for name, weights in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], weights), name
    for field in ("rope_parameters", "rms_norm_eps", "num_key_value_heads", "eos_token_id", "vocab_size"):
        assert getattr(ours.config, field) == getattr(theirs.config, field)
