"""From logits to what is kept of their distributions, where the logits are: on the engine's own device.

Torch's log-softmax writes a copy of the whole vocabulary to keep a few entries of it, and adds its normaliser
up in float32 lane by lane, so that kept mass and tail are off 1 by 1e-5 and more. Here the sum is corrected,
and the top k are sought among the best blocks of the vocabulary alone. Where a CPU has few threads, compiled
code does both, in one visit to each row.

Shape legend: N = rows, V = vocabulary, K = kept entries, B = entries of a block, D = draws of the tail.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lynearm.teacher.draws import draw_in_blocks
from lynearm.teacher.row_kernels import take_rows

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 64
"""Entries of the vocabulary that are first looked at as one."""

_FEW_THREADS = 4
"""CPU threads up to which one of them is sooner done with compiled code than all of them with torch's."""

_FEW_ENTRIES = 256
"""Kept entries up to which the same holds."""

_CHUNK_BYTES = 4 << 20
"""Of probabilities at a time on a CPU: what stays in its caches."""
_GPU_CHUNK_BYTES = 256 << 20


def temper(logits_NV: Tensor, temperature: float, out: Tensor | None = None) -> Tensor:
    """Logits divided by a temperature, in float32: those of the distribution at that temperature.

    Args:
        logits_NV: Any float type; left as they are.
        temperature: Above 0.
        out: Where to, float32, shape [N, V]; None returns the logits themselves where they are right already.
    """
    import torch

    if out is None:
        logits_NV = logits_NV.to(torch.float32)
        return logits_NV if temperature == 1 else logits_NV / temperature
    out.copy_(logits_NV)
    return out if temperature == 1 else out.div_(temperature)


class TopLogprobs(NamedTuple):
    """What is kept of some distributions."""

    logprobs_NK: Tensor
    """Float32, descending."""
    token_ids_NK: Tensor
    """Int32. Which of equal entries are taken, and in what order, is not said."""
    normalisers_N1: Tensor
    """Log of each row's sum of exponentials: any other logprob is a logit less this."""
    tail_ids_ND: Tensor
    """Int32: draws from what is not kept, -1 in rows that keep all there is. D is 0 where none are wanted."""


def top_logprobs(
    logits_NV: Tensor, k: int, copy_NV: Tensor | None = None, chances_ND: Tensor | None = None
) -> TopLogprobs:
    """The k largest logprobs of each row, what makes logprobs of logits, and draws from the rest.

    Tokens that are less than e^-87 times as likely as the likeliest one may be taken for impossible.

    Args:
        logits_NV: Float32. With draws they may be written to, and are as before afterwards.
        k: 0 for normalisers and draws alone.
        copy_NV: Gets a copy of the logits; None: nothing does.
        chances_ND: Float64, in [0, 1), on the logits' device: where in the tail's cumulated mass a draw is.
            None: nothing is drawn.
    """
    import torch

    if chances_ND is None:
        chances_ND = torch.empty((logits_NV.shape[0], 0), dtype=torch.float64, device=logits_NV.device)
    if _has_few_threads(logits_NV) and k <= _FEW_ENTRIES:
        copy = None if copy_NV is None else copy_NV.numpy()
        # Logits that are a part of wider rows, as of a padded vocabulary, are copied first.
        logits = np.ascontiguousarray(logits_NV.numpy())
        logprobs, token_ids, normalisers, drawn = take_rows(logits, k, copy, chances_ND.numpy())
        return TopLogprobs(
            torch.as_tensor(logprobs),
            torch.as_tensor(token_ids),
            torch.as_tensor(normalisers[:, None]),
            torch.as_tensor(drawn),
        )
    if copy_NV is not None:
        copy_NV.copy_(logits_NV)
    values_NK, ids_NK = _top_entries(logits_NV, k)
    normalisers_N1, drawn_ND = _sum_rows(logits_NV, values_NK, ids_NK, chances_ND)
    return TopLogprobs(values_NK - normalisers_N1, ids_NK.to(torch.int32), normalisers_N1, drawn_ND)


def logprobs_at(logits_NV: Tensor, token_ids_NK: Tensor, normalisers_N1: Tensor) -> Tensor:
    """Logprobs of chosen tokens, shape [N, K]."""
    return logits_NV.gather(1, token_ids_NK) - normalisers_N1


def _sum_rows(
    logits_NV: Tensor, values_NK: Tensor, ids_NK: Tensor, chances_ND: Tensor
) -> tuple[Tensor, Tensor]:
    """Normalisers, to about 1e-6, and draws: the exponentials are float32, their sum is taken pairwise.

    Args:
        logits_NV: Float32.
        values_NK: The k largest of each row, descending.
        ids_NK: Where they are, int64.
        chances_ND: As for `top_logprobs`.

    Returns:
        Shapes [N, 1] and [N, D].
    """
    import torch

    rows, vocab_size = logits_NV.shape
    normalisers_N1 = logits_NV.new_empty((rows, 1))
    drawn_ND = torch.empty(chances_ND.shape, dtype=torch.int32, device=logits_NV.device)
    chunk = min(rows, max(1, _chunk_bytes(logits_NV) // (4 * vocab_size), 2 * torch.get_num_threads()))
    scratch = logits_NV.new_empty((chunk, vocab_size))
    for start in range(0, rows, chunk):
        part = slice(start, min(start + chunk, rows))
        logits = logits_NV[part]
        # softmax = exp(logit - largest) / sum, of which the sum alone is inexact: by what the softmax adds up
        # to. Its largest entry is 1 / sum.
        probabilities = torch.softmax(logits, dim=-1, out=scratch[: logits.shape[0]])
        if ids_NK.shape[1]:
            largest, of_largest = values_NK[part, :1], probabilities.gather(1, ids_NK[part, :1])
        else:
            largest, of_largest = logits.amax(-1, keepdim=True), probabilities.amax(-1, keepdim=True)
        total = probabilities.sum(-1, keepdim=True)
        normalisers_N1[part] = largest + (total / of_largest).log()
        if chances_ND.shape[1]:
            drawn_ND[part] = draw_in_blocks(probabilities.scatter_(1, ids_NK[part], 0.0), chances_ND[part])
    return normalisers_N1, drawn_ND


def _top_entries(logits_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, descending, and where they are, shape [N, K] each; sooner than torch.topk.

    The k largest lie within the k blocks of the vocabulary whose largest entries are largest.
    """
    import torch

    rows, vocab_size = logits_NV.shape
    blocks = vocab_size // _BLOCK
    if k == 0:
        return logits_NV[:, :0], torch.empty((rows, 0), dtype=torch.int64, device=logits_NV.device)
    if blocks <= 2 * k:
        return _largest(logits_NV, k)
    in_blocks = blocks * _BLOCK
    blocks_NJB = logits_NV[:, :in_blocks].view(rows, blocks, _BLOCK)
    best_NK = blocks_NJB.amax(-1).topk(k, dim=1, sorted=False).indices
    each_N1 = torch.arange(rows, device=logits_NV.device).unsqueeze(1)
    candidates = blocks_NJB[each_N1, best_NK].flatten(1)
    if in_blocks < vocab_size:
        # What fills no block comes behind all of them, as in the vocabulary.
        candidates = torch.cat((candidates, logits_NV[:, in_blocks:]), dim=1)
        best_NK = torch.nn.functional.pad(best_NK, (0, 1), value=blocks)
    values_NK, places_NK = _largest(candidates, k)
    return values_NK, best_NK.gather(1, places_NK // _BLOCK) * _BLOCK + places_NK % _BLOCK


def _largest(values_NM: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, descending, and where they are."""
    import torch

    if not _has_few_threads(values_NM):
        return values_NM.topk(k, dim=1)
    # numpy's partition is vectorised, and four times as fast on a core as torch's, which uses all of them.
    width = values_NM.shape[1]
    places_NK = torch.as_tensor(np.argpartition(values_NM.numpy(), width - k, axis=1)[:, width - k :])
    values_NK, order_NK = values_NM.gather(1, places_NK).sort(dim=1, descending=True)
    return values_NK, places_NK.gather(1, order_NK)


def _has_few_threads(tensor: Tensor) -> bool:
    import torch

    return tensor.device.type == "cpu" and torch.get_num_threads() <= _FEW_THREADS


def _chunk_bytes(tensor: Tensor) -> int:
    return _CHUNK_BYTES if tensor.device.type == "cpu" else _GPU_CHUNK_BYTES
