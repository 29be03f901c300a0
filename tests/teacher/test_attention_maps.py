"""Attention maps of a tiny real model: against what attention is, and as files."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import numpy as np
import pytest
from models.tiny_llama import build_tiny_llama

from lynearm.teacher.attention_maps import AttentionMaps, compute_attention, write_attention
from lynearm.wire.errors import ConfigError, InvalidInputError, StorageError

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

PROMPT = "What is three plus four? </script><b>"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llama(tmp_path_factory.mktemp("attention") / "tiny")


@pytest.fixture(scope="module")
def maps(model: Path) -> AttentionMaps:
    return compute_attention(str(model), PROMPT)


def test_every_token_looks_at_those_up_to_itself(maps: AttentionMaps) -> None:
    layers, heads, size, _ = maps.weights.shape
    assert (layers, heads, size) == (2, 2, len(maps.tokens))
    assert np.allclose(maps.weights.sum(axis=3), 1, atol=1e-5)
    assert (np.triu(maps.weights, 1) == 0).all()
    assert maps.weights.std() > 0.01
    assert PROMPT in "".join(maps.tokens)
    assert "<|im_start|>" in maps.tokens


def test_without_the_chat_template_the_prompt_is_all(model: Path) -> None:
    plain = compute_attention(str(model), "three plus four", chat=False)
    assert "".join(plain.tokens) == "three plus four"


def test_a_page_holds_all_weights_and_nothing_that_ends_its_script(
    maps: AttentionMaps, tmp_path: Path
) -> None:
    write_attention(maps, tmp_path / "maps.html")
    page = (tmp_path / "maps.html").read_text(encoding="utf-8")
    found = re.search(r"const data = (\{.*\});\n", page)
    assert found is not None
    data = json.loads(found.group(1))
    assert data["tokens"] == list(maps.tokens)
    levels = np.frombuffer(base64.b64decode(data["weights"]), np.uint8).reshape(maps.weights.shape)
    assert np.abs(levels / 255 - maps.weights).max() <= 0.5 / 255 + 1e-6
    assert page.count("</script>") == 1
    assert "http" not in page.replace("http-equiv", "")


def test_arrays_come_back_as_they_are(maps: AttentionMaps, tmp_path: Path) -> None:
    write_attention(maps, tmp_path / "maps.npz")
    with np.load(tmp_path / "maps.npz") as found:
        np.testing.assert_array_equal(found["weights"], maps.weights)
        assert found["tokens"].tolist() == list(maps.tokens)


def test_what_cannot_be_looked_at_is_refused(model: Path, maps: AttentionMaps, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="expected 1 to 4: give a shorter one"):
        compute_attention(str(model), PROMPT, max_tokens=4)
    with pytest.raises(InvalidInputError, match="the prompt has 0 tokens"):
        compute_attention(str(model), "", chat=False)
    with pytest.raises(ConfigError, match="cannot load model"):
        compute_attention(str(tmp_path), PROMPT)
    with pytest.raises(InvalidInputError, match=r"expected \.html or \.npz"):
        write_attention(maps, tmp_path / "maps.png")
    with pytest.raises(StorageError, match="cannot write"):
        write_attention(maps, tmp_path / "missing" / "maps.html")
