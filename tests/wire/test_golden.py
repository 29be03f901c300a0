"""What was stored once is read for ever: blocks of every version, and what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from lynearm.wire.blocks import FORMAT_VERSION, verify_block
from lynearm.wire.codec import decode_block
from lynearm.wire.dictionaries import DictionaryReader
from lynearm.wire.specs import CODEC_MODES
from lynearm.wire.traces import SamplingParams, TokenSpan, TopK, Trace

GOLDEN = Path(__file__).parent / "golden"
BLOCKS = sorted(path.stem for path in GOLDEN.glob("*.block"))


@pytest.mark.parametrize("name", BLOCKS)
def test_golden_blocks_are_read_for_ever(name: str) -> None:
    data = (GOLDEN / f"{name}.block").read_bytes()
    header = verify_block(data)
    assert name.startswith(f"version{header.format_version}-")
    expected = json.loads((GOLDEN / f"{name.removesuffix('-dictionary')}.json").read_text())
    traces = decode_block(data, dictionaries=DictionaryReader(lambda _: dictionary_of(name)))
    assert len(traces) == len(expected) == header.trace_count
    for trace, described in zip(traces, expected, strict=True):
        # Logarithms differ between machines in the last bit.
        assert_says(trace, described, exactly=header.codec_mode == "exact")


def dictionary_of(name: str) -> bytes:
    return (GOLDEN / f"{name}.dictionary").read_bytes()


def assert_says(trace: Trace, described: dict[str, Any], *, exactly: bool) -> None:
    assert trace.prompt_id == described["prompt_id"]
    assert trace.prompt_token_ids.tolist() == described["prompt_token_ids"]
    assert trace.finish_reason == described["finish_reason"]
    assert trace.sample_index == described["sample_index"]
    assert trace.spans == tuple(TokenSpan(*span) for span in described["spans"])
    # JSON knows no tuples.
    sampling = {
        key: tuple(one) if isinstance(one, list) else one for key, one in described["sampling"].items()
    }
    assert trace.sampling == SamplingParams(**sampling)
    assert trace.stop_string == described.get("stop_string", "")
    assert list(trace.tags.items()) == list(described["tags"].items())
    assert trace.completion_text == described["completion_text"]
    assert trace.completion_token_ids.tolist() == described["completion_token_ids"]
    assert_floats(trace.sampled_logprobs, described["sampled_logprobs"], exactly=exactly)
    assert_rows(trace.top_k, described["top_k"], exactly=exactly)
    assert (trace.prompt_top_k is None) == ("prompt_top_k" not in described)
    if trace.prompt_top_k is not None and trace.prompt_logprobs is not None:
        assert_floats(trace.prompt_logprobs, described["prompt_logprobs"], exactly=exactly)
        assert_rows(trace.prompt_top_k, described["prompt_top_k"], exactly=exactly)


def assert_rows(top_k: TopK, described: dict[str, Any], *, exactly: bool) -> None:
    # Nothing orders entries of equal logprob; in the file their ids do.
    order = np.lexsort((top_k.token_ids, -top_k.logprobs))
    assert np.take_along_axis(top_k.token_ids, order, 1).tolist() == described["token_ids"]
    assert_floats(np.take_along_axis(top_k.logprobs, order, 1), described["logprobs"], exactly=exactly)
    assert_floats(top_k.tail_mass, described["tail_mass"], exactly=exactly)
    # Nor are draws from a tail in any order.
    drawn = None if top_k.tail_draws is None else np.sort(top_k.tail_draws, axis=1).tolist()
    assert drawn == described.get("tail_draws")


def assert_floats(actual: npt.NDArray[np.float32], described: list[Any], *, exactly: bool) -> None:
    expected = np.array(described, np.float64).astype(np.float32).reshape(actual.shape)
    if exactly:
        assert actual.tobytes() == expected.tobytes()
    else:
        np.testing.assert_allclose(actual, expected, rtol=3e-7)


def test_there_are_golden_blocks_of_every_version_and_mode() -> None:
    headers = [verify_block((GOLDEN / f"{name}.block").read_bytes()) for name in BLOCKS]
    found = {(header.format_version, header.codec_mode, bool(header.dictionary_digest)) for header in headers}
    assert {version for version, _, _ in found} == set(range(1, FORMAT_VERSION + 1))
    assert {(mode, used) for version, mode, used in found if version == FORMAT_VERSION} == {
        (mode, used) for mode in CODEC_MODES for used in (False, True)
    }
    assert {mode for version, mode, _ in found if version == 1} == {"exact", "standard"}
