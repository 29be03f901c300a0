"""`SamplingParams` as a protobuf message, in blocks and in requests."""

from __future__ import annotations

import math

from lynearm.v1 import trace_pb2
from lynearm.wire.traces import MAX_STOP_BYTES, MAX_STOP_TOKENS, MAX_STOPS, SamplingParams


def sampling_to_proto(sampling: SamplingParams) -> trace_pb2.SamplingParams:
    """The message, in which what is as by default takes no bytes.

    Raises:
        ValueError: if a value has no place in it, or `sampling_problem` finds one.
    """
    problem = sampling_problem(sampling)
    if problem:
        raise ValueError(problem)
    return trace_pb2.SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        top_k=sampling.top_k,
        max_tokens=sampling.max_tokens,
        seed=sampling.seed,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=0.0 if sampling.repetition_penalty == 1 else sampling.repetition_penalty,
        min_tokens=sampling.min_tokens,
        stop=sampling.stop,
        stop_token_ids=sampling.stop_token_ids,
    )


def sampling_from_proto(message: trace_pb2.SamplingParams) -> SamplingParams:
    """What the message says, whether or not one can draw like that."""
    return SamplingParams(
        temperature=message.temperature,
        top_p=message.top_p,
        min_p=message.min_p,
        top_k=message.top_k,
        max_tokens=message.max_tokens,
        seed=message.seed if message.HasField("seed") else None,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        repetition_penalty=message.repetition_penalty or 1.0,
        min_tokens=message.min_tokens,
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
    )


def stop_token_problem(sampling: SamplingParams, vocab_size: int) -> str:
    """Which stop token the vocabulary does not have; empty when it has all of them."""
    outside = next((one for one in sampling.stop_token_ids if one >= vocab_size), None)
    return "" if outside is None else f"stop token {outside} is outside the vocabulary, 0 to {vocab_size - 1}"


def sampling_problem(sampling: SamplingParams) -> str:
    """What about penalties and stops is out of bounds, or ambiguous; empty when nothing is."""
    lengths = [len(text.encode(errors="replace")) for text in sampling.stop]
    ids = sampling.stop_token_ids
    checks = {
        f"presence_penalty {sampling.presence_penalty} is outside -2..2": (
            -2 <= sampling.presence_penalty <= 2
        ),
        f"frequency_penalty {sampling.frequency_penalty} is outside -2..2": (
            -2 <= sampling.frequency_penalty <= 2
        ),
        f"repetition_penalty {sampling.repetition_penalty} is not above 0; 1 changes nothing": (
            math.isfinite(sampling.repetition_penalty) and sampling.repetition_penalty > 0
        ),
        f"min_tokens {sampling.min_tokens} is negative": sampling.min_tokens >= 0,
        f"{len(lengths)} stop strings, at most {MAX_STOPS} may be": len(lengths) <= MAX_STOPS,
        f"a stop string has {max(lengths, default=1)} bytes, at most {MAX_STOP_BYTES} may be": (
            max(lengths, default=1) <= MAX_STOP_BYTES
        ),
        "a stop string is empty": min(lengths, default=1) > 0,
        "a stop string is there twice": len(set(sampling.stop)) == len(lengths),
        f"{len(ids)} stop tokens, at most {MAX_STOP_TOKENS} may be": len(ids) <= MAX_STOP_TOKENS,
        f"stop tokens {ids} are not all token ids": all(0 <= one < 1 << 31 for one in ids),
        "a stop token is there twice": len(set(ids)) == len(ids),
    }
    return next((problem for problem, holds in checks.items() if not holds), "")
