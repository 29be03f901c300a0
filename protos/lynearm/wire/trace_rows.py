"""Traces as rows, one trace after the other, checked before anything is encoded.

Shape legend: N = positions of a block, K = entries of the widest row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from lynearm.wire.blocks import MAX_BLOCK_ENTRIES, MAX_TRACES
from lynearm.wire.dictionaries import Dictionary, TokenOrder
from lynearm.wire.errors import CodecError
from lynearm.wire.grids import Grid
from lynearm.wire.positions import ROUNDING, Positions, first_previous_tokens
from lynearm.wire.row_naming import NamedRows, name_rows
from lynearm.wire.specs import (
    CODEC_MODES,
    MAX_TAIL_DRAWS,
    MAX_TOP_K,
    MAX_VOCAB_SIZE,
    CodecMode,
    CodecSpec,
)
from lynearm.wire.tail_draws import find_kept_draw
from lynearm.wire.traces import Float32Array, Int32Array, TopK, Trace

_Number = TypeVar("_Number", np.int32, np.float32)


def check_arguments(
    traces: Sequence[Trace], spec: CodecSpec, vocab_size: int, dictionary: Dictionary | None
) -> None:
    """Refuse what no block may hold, or no dictionary may be learnt from.

    Raises:
        CodecError: naming the value and its bound.
    """
    if spec.mode not in CODEC_MODES:
        raise CodecError(f"codec mode {spec.mode!r} is none of {CODEC_MODES}")
    if not 0 < vocab_size <= MAX_VOCAB_SIZE:
        raise CodecError(f"vocab_size {vocab_size} is outside 1..{MAX_VOCAB_SIZE}")
    if dictionary is not None and dictionary.vocab_size != vocab_size:
        raise CodecError(
            f"a dictionary over {dictionary.vocab_size} tokens for traces over {vocab_size}",
            "train a dictionary on traces of this teacher",
        )
    if spec.mode == "sampled" and spec.draws <= 0:
        raise CodecError("mode 'sampled' needs the number of draws", "give a CodecSpec with draws")
    if not 0 < len(traces) <= MAX_TRACES:
        raise CodecError(f"{len(traces)} traces in a block, expected 1 to {MAX_TRACES}")
    rows = sum(row_count(trace) for trace in traces)
    width = max(width_of(trace) for trace in traces)
    if width > MAX_TOP_K:
        raise CodecError(f"K is {width}, at most {MAX_TOP_K} can be kept")
    if rows * max(width, 1) > MAX_BLOCK_ENTRIES:
        raise too_large(f"{rows} positions of {width} entries", MAX_BLOCK_ENTRIES)
    draws = max(trace.top_k.tail_draw_count for trace in traces)
    if rows * draws > MAX_BLOCK_ENTRIES:
        raise too_large(f"{rows} positions of {draws} draws", MAX_BLOCK_ENTRIES)
    prompt_tokens = sum(trace.prompt_token_ids.size for trace in traces)
    if prompt_tokens > MAX_BLOCK_ENTRIES:
        raise too_large(f"{prompt_tokens} prompt tokens", MAX_BLOCK_ENTRIES)


def check_tail_draws(traces: Sequence[Trace], codec: CodecSpec | CodecMode) -> None:
    """Refuse traces of one block that have not the same number of tail draws, or not the stream's.

    Those without rows may have none, or any number.

    Raises:
        CodecError: naming prompt and number.
    """
    most = max(trace.top_k.tail_draw_count for trace in traces)
    if most and (codec.mode if isinstance(codec, CodecSpec) else codec) == "sampled":
        raise CodecError("mode 'sampled' has no tails to draw from", "capture in another codec mode")
    if most > MAX_TAIL_DRAWS:
        raise CodecError(f"{most} tail draws a position, at most {MAX_TAIL_DRAWS} can be kept")
    counts = [trace.top_k.tail_draw_count for trace in traces if row_count(trace)] or [0]
    count = codec.tail_draws if isinstance(codec, CodecSpec) else counts[0]
    for trace in traces:
        found = trace.top_k.tail_draw_count
        if found != count and row_count(trace):
            raise CodecError(
                f"trace of prompt {trace.prompt_id!r} has {found} tail draws a position, expected {count}",
                "capture as many as the stream's codec says, or publish to another stream",
            )


def check_rows(traces: Sequence[Trace], rows: Positions, vocab_size: int) -> None:
    """Refuse what shapes and dtypes do not show: ids, order, and values that are no probabilities."""
    kept_NK = kept_mask(rows)
    kept_ids = rows.token_ids if kept_NK.all() else np.where(kept_NK, rows.token_ids, 0)
    ids = {
        "prompt token ids": np.concatenate([trace.prompt_token_ids for trace in traces]),
        "sampled token ids": rows.sampled_ids,
        "kept token ids": kept_ids,
    }
    logprobs = {"sampled logprobs": rows.sampled_logprobs, "kept logprobs": rows.logprobs[:, :1]}
    checks = {
        f"{name} outside 0..{vocab_size - 1}": array.size == 0
        or (array.min() >= 0 and array.max() < vocab_size)
        for name, array in ids.items()
    }
    checks |= {
        f"{name} above 0": array.size == 0 or float(array.max()) <= ROUNDING
        for name, array in logprobs.items()
    }
    # Compared, not subtracted: −inf − −inf is NaN. NaN itself compares as false.
    checks["rows that are not sorted by logprob, descending"] = bool(
        (rows.logprobs[:, 1:] <= rows.logprobs[:, :-1]).all()
    )
    tail = rows.tail_mass
    checks["tail masses outside 0..1"] = tail.size == 0 or (
        float(tail.min()) >= -ROUNDING and float(tail.max()) <= 1 + ROUNDING
    )
    draws = rows.tail_draws
    if draws is not None and draws.size:
        drawn_N1 = draws[:, :1] >= 0
        checks[f"tail draws outside 0..{vocab_size - 1}, or −1 for some of a row"] = bool(
            (((draws >= 0) == drawn_N1) & (draws >= -1) & (draws < vocab_size)).all()
        )
        checks["tail draws of tokens that the position keeps"] = (
            find_kept_draw(draws, rows.token_ids, rows.kept) < 0
        )
    problems = [problem for problem, holds in checks.items() if not holds]
    if problems and len(traces) == 1:
        raise CodecError(f"trace of prompt {traces[0].prompt_id!r} has {problems[0]}")
    if problems:
        # Once more, one by one, to name the prompt.
        for trace in traces:
            check_rows([trace], gather_positions([trace]), vocab_size)


def kept_mask(rows: Positions) -> npt.NDArray[np.bool_]:
    """Which entries are not padding, shape [N, K]."""
    ranks_K: npt.NDArray[np.uint32] = np.arange(rows.token_ids.shape[1], dtype=np.uint32)
    mask_NK: npt.NDArray[np.bool_] = np.less.outer(ranks_K, rows.kept).T
    return mask_NK


def token_before(trace: Trace) -> int:
    """Token before a trace's first row: its prompt's first one where the prompt has rows, else its last."""
    prompt = trace.prompt_token_ids
    if prompt.size == 0:
        return -1
    return int(prompt[0] if trace.prompt_top_k is not None and trace.prompt_top_k.positions else prompt[-1])


def row_count(trace: Trace) -> int:
    """Rows of a trace: those of its prompt, where it has any, and those of its completion."""
    prompt_rows = 0 if trace.prompt_top_k is None else trace.prompt_top_k.positions
    return prompt_rows + trace.completion_token_ids.size


def width_of(trace: Trace) -> int:
    """The K of a trace's rows."""
    return trace.top_k.k if trace.prompt_top_k is None else max(trace.top_k.k, trace.prompt_top_k.k)


def name_trace_rows(
    traces: Sequence[Trace],
    spec: CodecSpec,
    order: TokenOrder,
    dictionary: Dictionary | None,
    grid: Grid | None = None,
) -> NamedRows:
    """Levels, token codes and symbols of the rows of some traces.

    Args:
        traces: After adaptive k.
        spec: How logprobs become levels.
        order: The vocabulary's order.
        dictionary: Whose grid and tail rule to prefer.
        grid: To be used whatever it adds; None chooses one.

    Raises:
        CodecError: if a row holds what is no id, logprob or mass, is not sorted, or names a token twice; the
            message names the prompt.
    """
    vocab_size = order.token_of_rank.size
    positions = gather_positions(traces)
    check_rows(traces, positions, vocab_size)
    lengths = [row_count(trace) for trace in traces]
    try:
        return name_rows(
            positions,
            [width_of(trace) for trace in traces],
            lengths,
            first_previous_tokens(lengths, [token_before(trace) for trace in traces]),
            mode=spec.mode,
            draws=spec.draws,
            order=order,
            dictionary=dictionary,
            grid=grid,
        )
    except CodecError as error:
        raise CodecError(f"block from prompt {traces[0].prompt_id!r} on: {error.message}") from error


def gather_positions(traces: Sequence[Trace]) -> Positions:
    """Rows of all traces, padded to the largest K."""
    parts: list[tuple[TopK, Int32Array, Float32Array]] = []
    for trace in traces:
        if trace.prompt_top_k is not None and trace.prompt_logprobs is not None:
            parts.append((trace.prompt_top_k, trace.prompt_token_ids[1:], trace.prompt_logprobs))
        parts.append((trace.top_k, trace.completion_token_ids, trace.sampled_logprobs))
    width = max(top_k.k for top_k, _, _ in parts)
    token_ids_NK = _stack([top_k.token_ids for top_k, _, _ in parts], width, np.int32(0))
    logprobs_NK = _stack([top_k.logprobs for top_k, _, _ in parts], width, np.float32(-np.inf))
    return Positions(
        kept=(logprobs_NK > -np.inf).sum(axis=1).astype(np.uint32),
        token_ids=token_ids_NK,
        logprobs=logprobs_NK,
        tail_mass=np.concatenate([top_k.tail_mass for top_k, _, _ in parts]),
        sampled_ids=np.concatenate([ids for _, ids, _ in parts]),
        sampled_logprobs=np.concatenate([logprobs for _, _, logprobs in parts]),
        tail_draws=_gather_draws([top_k for top_k, _, _ in parts]),
    )


def _gather_draws(parts: Sequence[TopK]) -> Int32Array | None:
    """Draws from all rows' tails; what parts without rows have does not count beside others."""
    some = [top_k for top_k in parts if top_k.positions] or parts[:1]
    drawn = [top_k.tail_draws for top_k in some if top_k.tail_draws is not None]
    return np.concatenate(drawn) if drawn else None


def _stack(parts: Sequence[npt.NDArray[_Number]], width: int, padding: _Number) -> npt.NDArray[_Number]:
    """Rows of all parts, padded to one width."""
    if all(part.shape[1] == width for part in parts):
        return np.concatenate(parts)
    rows_NK = np.full((sum(map(len, parts)), width), padding, padding.dtype)
    start = 0
    for part in parts:
        rows_NK[start : start + len(part), : part.shape[1]] = part
        start += len(part)
    return rows_NK


def too_large(what: str, limit: int) -> CodecError:
    """Says that traces exceed a block."""
    return CodecError(f"{what}: a block's limit is {limit}", "put fewer traces into one block")
