"""What stock mlx_lm computes from a package: whole sequences, cached steps, and a greedy continuation."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from lynearm.export.parity import DECODE_STEPS, FloatArray, HeldOutSequence, PackageLogits


def load_package(package: Path) -> tuple[Any, Any]:
    """Model and tokenizer, by stock mlx_lm; Any, since mlx and mlx_lm ship no types.

    On a CPU the model computes in float32 with the weights as they are stored: MLX's float16 products take
    fifty times as long there (4-bit, [44, 576] by [576, 1536]: 2.1 s against 0.04 s). The rounding of
    activations on a Mac is therefore not seen.
    """
    import mlx.core as mx
    import mlx_lm

    untyped = cast(Any, mlx_lm)
    model, tokenizer = untyped.load(str(package))[:2]
    if mx.default_device() == mx.Device(mx.cpu):
        model.set_dtype(mx.float32)
    return model, tokenizer


def run_mlx(package: Path, sequences: Sequence[HeldOutSequence]) -> PackageLogits:
    """Logits of a package, row for row those of `TorchReference.run`.

    Args:
        package: Directory that `mlx_lm.load` reads.
        sequences: At least one.
    """
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache

    model, _ = load_package(package)

    def rows(token_ids: Sequence[int], cache: Any = None) -> FloatArray:
        logits = model(mx.array([list(token_ids)]), cache=cache)[0].astype(mx.float32)
        return cast(FloatArray, np.array(logits))

    first, *others = sequences
    cache = make_prompt_cache(model)
    whole = rows(first.token_ids[:-1], cache)
    # The pass over the whole sequence is also the prefill of both continuations: its end is cut off again.
    trim_prompt_cache(cache, len(first.token_ids) - 1 - first.completion_start)
    greedy_cache = copy.deepcopy(cache)
    passes = [whole, *(rows(one.token_ids[:-1]) for one in others)]
    full = tuple(found[one.completion_start - 1 :] for found, one in zip(passes, sequences, strict=True))
    decode = [full[0][:1]]
    steps = min(DECODE_STEPS, len(full[0]))
    for position in range(first.completion_start, first.completion_start + steps - 1):
        decode.append(rows(first.token_ids[position : position + 1], cache))
    greedy = [int(decode[0][-1].argmax())]
    while len(greedy) < DECODE_STEPS:
        greedy.append(int(rows(greedy[-1:], greedy_cache)[-1].argmax()))
    return PackageLogits(full, np.concatenate(decode), tuple(greedy))
