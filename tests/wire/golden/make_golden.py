"""Writes the golden files: blocks of each format version, and what they must decode to.

    PYTHONPATH=tests .venv/bin/python tests/wire/golden/make_golden.py

To be run once for each new format version, after its blocks were given a name in `make_all`; what is there
already stays, since what was stored once is read for ever. `--again version3` writes the files of a version
anew, for as long as it has not been released.

The files of version 1 were made by lynearm at commit d34a911, whose contract came first on the path:

    PYTHONPATH=v1/protos:tests .venv/bin/python tests/wire/golden/make_golden.py
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lynearm.wire import codec
from lynearm.wire.blocks import FORMAT_VERSION
from lynearm.wire.traces import SamplingParams, TokenSpan, TopK, Trace

HERE = Path(__file__).parent
VOCAB_SIZE = 1000

_ROWS: list[list[tuple[int, float]]] = [
    [(5, -0.25), (7, -2.0), (999, -4.5), (6, -4.5)],
    [(7, -0.5), (9, -1.5)],
    [(5, -0.0625), (300, -6.0), (301, -7.25)],
    [(12, -1.5), (5, -1.5), (7, -1.5)],
    [(640, -0.001)],
]
"""Token id and logprob of the entries of each row."""


def rows(
    entries: Sequence[Sequence[tuple[int, float]]], sampled: Sequence[int], outside: Sequence[float]
) -> dict[str, Any]:
    """Rows; the sampled token of each by index of its entry, or one outside, token 700, for −1."""
    width = max((len(row) for row in entries), default=0)
    token_ids = np.zeros((len(entries), width), np.int32)
    logprobs = np.full((len(entries), width), -np.inf, np.float32)
    for t, row in enumerate(entries):
        token_ids[t, : len(row)] = [token for token, _ in row]
        logprobs[t, : len(row)] = [logprob for _, logprob in row]
    tails = np.maximum(1 - np.exp(logprobs.astype(np.float64)).sum(axis=1), 0).astype(np.float32)
    loose = iter(outside)
    drawn = [row[i] if i >= 0 else (700, next(loose)) for row, i in zip(entries, sampled, strict=True)]
    return {
        "completion_token_ids": np.array([token for token, _ in drawn], np.int32),
        "sampled_logprobs": np.array([logprob for _, logprob in drawn], np.float32),
        "top_k": TopK(token_ids, logprobs, tails),
    }


SAMPLING = SamplingParams(
    temperature=0.5,
    top_p=0.95,
    top_k=40,
    min_p=0.05,
    max_tokens=5,
    seed=7,
    presence_penalty=0.25,
    frequency_penalty=-0.5,
    repetition_penalty=1.125,
    min_tokens=2,
    stop=("###", "本"),
    stop_token_ids=(0, 300),
)


def said(**rows_of_trace: Any) -> Trace:
    """A trace that says something in every field."""
    fields: dict[str, Any] = {
        "prompt_id": "frage-1-ä",
        "prompt_token_ids": np.array([1, 300], np.int32),
        "finish_reason": "stop",
        "sample_index": 3,
        "spans": (TokenSpan("reasoning", 0, 2), TokenSpan("answer", 3, 5)),
        "sampling": SAMPLING,
        "tags": {"set": "a", "": "leer"},
        "completion_text": "hi 日本",
        "stop_string": "本",
    }
    return Trace(**{**fields, **rows_of_trace})


def silent(**rows_of_trace: Any) -> Trace:
    """A trace that says as little as it may."""
    return Trace(prompt_id="", prompt_token_ids=np.zeros(0, np.int32), finish_reason="stop", **rows_of_trace)


def any_rows() -> list[Trace]:
    """Rows of uneven width, ties, sampled tokens outside, and an empty completion."""
    return [said(**rows(_ROWS, [0, 1, -1, 2, 0], [-9.25])), silent(**rows([], [], []))]


def prompt_rows() -> list[Trace]:
    """A prompt with distributions, and rows without entries."""
    scored = rows(_ROWS[:2], [1, -1], [-8.5])
    trace = said(
        **rows([[]] * 5, [-1] * 5, [-1, -2, -3, -4, -5]),
        prompt_token_ids=np.concatenate([np.array([2], np.int32), scored["completion_token_ids"]]),
        prompt_top_k=scored["top_k"],
        prompt_logprobs=scored["sampled_logprobs"],
    )
    return [trace]


def logits(*gaps_in_64ths: float, coarse_rows: int = 2) -> list[Trace]:
    """Rows that are log-softmaxes of logits on a coarse grid, and then some that are not; three in all."""
    entries: list[list[tuple[int, float]]] = []
    for t in range(3):
        grain = 1 / 64 if t < coarse_rows else 1 / 63
        gaps = -np.array([0, *gaps_in_64ths[t:]], np.float32) * np.float32(grain)
        logprobs = gaps - np.log(np.exp(gaps).sum(dtype=np.float32))
        entries.append([(10 + 3 * i + t, float(x)) for i, x in enumerate(logprobs)])
    return [silent(**rows(entries, [0, 2, -1], [-10.0]))]


def many_rows() -> list[Trace]:
    """Rows enough for four lanes."""
    entries = [[(t * t % 90, -0.125 - t % 5 / 8), (95, -3.0)][: 1 + t % 2] for t in range(66)]
    return [silent(**rows(entries, [0] * 66, []))]


def draws() -> list[Trace]:
    """Counts of eight draws."""
    counts = [[(5, 4), (7, 3), (999, 1)], [(7, 8)], [(5, 2), (12, 2), (13, 2), (700, 1), (14, 1)]]
    entries = [[(token, float(np.log(count / 8))) for token, count in row] for row in counts]
    drawn = rows(entries, [1, 0, -1], [-2.0])
    top_k = TopK(drawn["top_k"].token_ids, drawn["top_k"].logprobs, np.zeros(3, np.float32))
    return [silent(**{**drawn, "top_k": top_k})]


def tail_draws() -> list[Trace]:
    """Three draws from each tail, two of one token; nothing from one of the prompt's rows."""
    (trace,) = prompt_rows()
    first = [(t * t * 37 % 90, -0.5) for t in range(40)]
    drawn = with_draws(silent(**rows([[entry] for entry in first], [0] * 40, [])), 3)
    return [with_draws(trace, 3), drawn]


def with_draws(trace: Trace, count: int) -> Trace:
    """The trace with tokens drawn from its tails, and none from a first row of a prompt."""

    def draw(top_k: TopK, *, all_rows: bool) -> TopK:
        draws_TD = np.full((top_k.positions, count), -1, np.int32)
        for t in range(0 if all_rows else 1, top_k.positions):
            draws_TD[t] = [100 + (7 * t * t + 60 * (d % 2)) % 190 for d in range(count)]
        return replace(top_k, tail_draws=draws_TD)

    prompt = trace.prompt_top_k
    return replace(
        trace,
        top_k=draw(trace.top_k, all_rows=True),
        prompt_top_k=None if prompt is None else draw(prompt, all_rows=False),
    )


def make_all(version: int) -> Iterator[tuple[str, str, list[Trace]]]:
    """Name, mode and traces of every golden block of a version."""
    yield "exact", "exact", any_rows()
    yield "standard", "standard", any_rows()
    if version == 1:
        return
    yield "fine", "fine", any_rows()
    yield "compact", "compact", any_rows()
    yield "sampled", "sampled", draws()
    yield "prompt-rows", "exact", prompt_rows()
    yield "bf16", "exact", logits(8, 8, 40, 120, 200, 344)
    yield "fp16", "exact", logits(7, 257, 769, 770, 771, 837)
    yield "float32", "exact", logits(7, 257, 769, 770, 771, 837, coarse_rows=0)
    yield "four-lanes", "standard", many_rows()
    yield "tail-draws", "exact", tail_draws()
    yield "tail-draw-few-rows", "fine", [with_draws(trace, 1) for trace in any_rows()]
    yield "tail-draw-four-lanes", "standard", [with_draws(trace, 1) for trace in many_rows()]


def encode(traces: list[Trace], mode: str) -> Iterator[tuple[str, bytes, bytes]]:
    """Suffix, block and dictionary."""
    any_mode: Any = mode
    if FORMAT_VERSION == 1:
        yield "", codec.encode_block(traces, mode=any_mode, vocab_size=VOCAB_SIZE), b""
        return
    from lynearm.wire.dictionary_training import train_dictionary
    from lynearm.wire.specs import CodecSpec

    drawn = traces[0].top_k.tail_draw_count
    spec = CodecSpec(any_mode, draws=8 if mode == "sampled" else 0, tail_draws=drawn)
    yield "", codec.encode_block(traces, codec=spec, vocab_size=VOCAB_SIZE), b""
    dictionary = train_dictionary([traces], codec=spec, vocab_size=VOCAB_SIZE)
    block = codec.encode_block(traces, codec=spec, vocab_size=VOCAB_SIZE, dictionary=dictionary)
    yield "-dictionary", block, dictionary.encoded


def describe(trace: Trace) -> dict[str, Any]:
    """A trace as JSON: shortest decimals that give each float32 back, "-inf" for padding."""
    described: dict[str, Any] = {
        "prompt_id": trace.prompt_id,
        "prompt_token_ids": trace.prompt_token_ids.tolist(),
        "finish_reason": trace.finish_reason,
        "sample_index": trace.sample_index,
        "spans": [[span.kind, span.start, span.end] for span in trace.spans],
        "sampling": {name: getattr(trace.sampling, name) for name in SamplingParams.__dataclass_fields__},
        "tags": dict(trace.tags),
        "completion_text": trace.completion_text,
        "stop_string": trace.stop_string,
        "completion_token_ids": trace.completion_token_ids.tolist(),
        "sampled_logprobs": floats(trace.sampled_logprobs),
        "top_k": describe_rows(trace.top_k),
    }
    prompt_top_k: TopK | None = getattr(trace, "prompt_top_k", None)
    if prompt_top_k is not None:
        described["prompt_top_k"] = describe_rows(prompt_top_k)
        described["prompt_logprobs"] = floats(trace.prompt_logprobs)
    return described


def describe_rows(top_k: TopK) -> dict[str, Any]:
    """Rows as JSON; nothing orders entries of equal logprob, so here the ids do."""
    order = np.lexsort((top_k.token_ids, -top_k.logprobs))
    draws_TD = getattr(top_k, "tail_draws", None)
    drawn = {} if draws_TD is None else {"tail_draws": np.sort(draws_TD, axis=1).tolist()}
    return {
        "token_ids": np.take_along_axis(top_k.token_ids, order, 1).tolist(),
        "logprobs": [floats(row) for row in np.take_along_axis(top_k.logprobs, order, 1)],
        "tail_mass": floats(top_k.tail_mass),
        **drawn,
    }


def floats(values: npt.NDArray[np.float32] | None) -> list[float | str]:
    """float32 numbers as JSON."""
    if values is None:
        return []
    return [float(str(value)) if np.isfinite(value) else str(value) for value in values]


def write_json(path: Path, traces: Sequence[dict[str, Any]]) -> None:
    """One line for each field of each trace."""
    lines = [
        ",\n".join(
            f"    {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in one.items()
        )
        for one in traces
    ]
    path.write_text("[\n" + ",\n".join(f"  {{\n{one}\n  }}" for one in lines) + "\n]\n")


def main() -> None:
    """Write what is not there."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--again", default="", help="write the files of this version anew: versionN")
    again = parser.parse_args().again
    version = f"version{FORMAT_VERSION}"
    for name, mode, traces in make_all(FORMAT_VERSION):
        described = None
        for suffix, block, dictionary in encode(traces, mode):
            path = HERE / f"{version}-{name}{suffix}.block"
            if path.exists() and again != version:
                continue
            path.write_bytes(block)
            if dictionary:
                path.with_suffix(".dictionary").write_bytes(dictionary)
            decoded = [describe(trace) for trace in read(block, dictionary)]
            if described is None:
                described = decoded
                write_json(path.with_suffix(".json"), decoded)
            if decoded != described:
                raise AssertionError(f"{path.name} decodes to something else than without its dictionary")
            print(path.name, len(block), len(dictionary))


def read(block: bytes, dictionary: bytes) -> Sequence[Trace]:
    """The block, decoded."""
    if not dictionary:
        return codec.decode_block(block)
    from lynearm.wire.dictionaries import DictionaryReader

    return codec.decode_block(block, dictionaries=DictionaryReader(lambda _: dictionary))


if __name__ == "__main__":
    main()
