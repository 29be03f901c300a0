"""Traces to Arrow columns, without padding.

Shape legend: T = completion positions, K = entries kept per position, D = draws from the tail of each.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lynearm.interchange.arrow import Untyped
from lynearm.wire.traces import SamplingParams, Trace


def traces_to_batch(pa: Untyped, schema: Untyped, traces: Sequence[Trace]) -> Untyped:
    """A record batch with one row for each trace.

    Args:
        pa: The module pyarrow.
        schema: As `lynearm.interchange.arrow.trace_schema` makes it.
        traces: Any number.
    """
    columns: dict[str, Untyped] = {
        "prompt_id": [trace.prompt_id for trace in traces],
        "sample_index": [trace.sample_index for trace in traces],
        "prompt_token_ids": _lists(pa, [trace.prompt_token_ids for trace in traces], np.int32),
        "completion_token_ids": _lists(pa, [trace.completion_token_ids for trace in traces], np.int32),
        "completion_text": [trace.completion_text for trace in traces],
        "finish_reason": [trace.finish_reason for trace in traces],
        "stop_string": [trace.stop_string for trace in traces],
        "sampled_logprobs": _lists(pa, [trace.sampled_logprobs for trace in traces], np.float32),
        "top_k": [trace.top_k.k for trace in traces],
        **_entries(pa, traces),
        "tail_mass": _lists(pa, [trace.top_k.tail_mass for trace in traces], np.float32),
        "spans": [
            [{"kind": span.kind, "start": span.start, "end": span.end} for span in trace.spans]
            for trace in traces
        ],
        "sampling": [_sampling(trace.sampling) for trace in traces],
        "tags": [[{"key": key, "value": value} for key, value in trace.tags.items()] for trace in traces],
    }
    if "tail_draws" in schema.names:
        columns["tail_draws"] = _tail_draws(pa, traces)
    arrays = [
        columns[field.name]
        if isinstance(columns[field.name], pa.Array)
        else pa.array(columns[field.name], field.type)
        for field in schema
    ]
    return pa.record_batch(arrays, schema=schema)


def _entries(pa: Untyped, traces: Sequence[Trace]) -> dict[str, Untyped]:
    """Kept token ids and logprobs: for each trace a list for each position."""
    kept_TK = [trace.top_k.logprobs > -np.inf for trace in traces]
    row_ends = np.cumsum(_concatenated([kept.sum(axis=1) for kept in kept_TK], np.int64))
    position_offsets = _offsets([trace.top_k.positions for trace in traces])
    entry_offsets = np.concatenate(([0], row_ends)).astype(np.int32)
    ids = _concatenated(
        [trace.top_k.token_ids[kept] for trace, kept in zip(traces, kept_TK, strict=True)], np.int32
    )
    logprobs = _concatenated(
        [trace.top_k.logprobs[kept] for trace, kept in zip(traces, kept_TK, strict=True)], np.float32
    )
    return {
        name: pa.ListArray.from_arrays(
            position_offsets, pa.ListArray.from_arrays(entry_offsets, pa.array(values))
        )
        for name, values in (("top_k_token_ids", ids), ("top_k_logprobs", logprobs))
    }


def _tail_draws(pa: Untyped, traces: Sequence[Trace]) -> Untyped:
    """Tokens drawn from the tails: for each trace a list of D for each position, empty without draws."""
    draws_TD = [
        np.empty((trace.top_k.positions, 0), np.int32)
        if trace.top_k.tail_draws is None
        else trace.top_k.tail_draws
        for trace in traces
    ]
    counts = [count for draws in draws_TD for count in [draws.shape[1]] * len(draws)]
    drawn = pa.array(_concatenated([draws.ravel() for draws in draws_TD], np.int32))
    positions = pa.ListArray.from_arrays(_offsets(counts), drawn)
    return pa.ListArray.from_arrays(_offsets([len(draws) for draws in draws_TD]), positions)


def _lists(pa: Untyped, arrays: Sequence[npt.NDArray[np.generic]], dtype: npt.DTypeLike) -> Untyped:
    offsets = _offsets([array.size for array in arrays])
    return pa.ListArray.from_arrays(offsets, pa.array(_concatenated(arrays, dtype)))


def _concatenated(arrays: Sequence[npt.NDArray[np.generic]], dtype: npt.DTypeLike) -> npt.NDArray[np.generic]:
    # np.concatenate takes no empty sequence, and would not know the type.
    joined: npt.NDArray[np.generic] = np.concatenate([np.zeros(0, dtype), *arrays])
    return joined.astype(dtype, copy=False)


def _offsets(lengths: Sequence[int]) -> npt.NDArray[np.int32]:
    return np.concatenate(([0], np.cumsum(np.asarray(lengths, np.int64)))).astype(np.int32)


def _sampling(params: SamplingParams) -> dict[str, object]:
    return {name: getattr(params, name) for name in SamplingParams.__dataclass_fields__}
