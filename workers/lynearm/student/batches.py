"""Batches in the order in which traces are drawn, and the tensors of a batch.

Invariant: which traces make up which batch depends on the order of traces in the streams and on the
configuration alone: not on time, not on how traces were packed into blocks, not on where a run was
interrupted. Shape legend: B = sequences, L = padded length, N = completion positions, K = kept entries,
S = layers of the teacher, H = their width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lynearm.student.losses import Targets
from lynearm.student.mixing import StreamState
from lynearm.student.teacher_states import WantedStates
from lynearm.student.weighting import PositionWeighting
from lynearm.wire.errors import MisalignmentError
from lynearm.wire.splits import SplitRule as SplitRule
from lynearm.wire.traces import Trace

_LEAST_FILL = 0.75
"""A sequence shorter than this part of a piece's longest is better computed with others of its length."""

_WORTHWHILE_TOKENS = 256
"""Padded tokens from which on another piece costs less than padding."""


@dataclass(frozen=True, slots=True)
class DrawnTrace:
    """A trace to train on."""

    trace: Trace
    stream: int
    """Index of its stream."""
    after: tuple[StreamState, ...] = ()
    """Where each stream goes on after it."""


@dataclass(frozen=True, slots=True)
class Batch:
    """The traces of one optimizer step."""

    traces: tuple[Trace, ...]
    streams: tuple[int, ...] = ()
    """Index of each trace's stream; empty where there is one stream."""
    after: tuple[StreamState, ...] = ()
    """Where a run that has done this step goes on, in each stream."""

    @property
    def tokens(self) -> int:
        """Completion tokens, before any are cut."""
        return sum(len(trace.completion_token_ids) for trace in self.traces)


class Batcher:
    """Groups traces into batches, in their order.

    Args:
        batch_sequences: Traces of a batch; the last one of a run may hold fewer.
        batch_tokens: Completion tokens from which on a batch is complete, however many traces those are; 0
            goes by `batch_sequences`.
        max_sequence_tokens: Completions are cut there.
    """

    def __init__(self, *, batch_sequences: int, batch_tokens: int = 0, max_sequence_tokens: int) -> None:
        self._batch_sequences = batch_sequences
        self._batch_tokens = batch_tokens
        self._max_sequence_tokens = max_sequence_tokens
        self._drawn: list[DrawnTrace] = []
        self._tokens = 0

    def add(self, drawn: DrawnTrace) -> Batch | None:
        """Take the next trace; the batch that it completes, if it does."""
        self._drawn.append(drawn)
        self._tokens += completion_positions(drawn.trace, self._max_sequence_tokens)
        if self._batch_tokens:
            return self.rest() if self._tokens >= self._batch_tokens else None
        return self.rest() if len(self._drawn) == self._batch_sequences else None

    def rest(self) -> Batch | None:
        """The traces that did not fill a batch; None without any."""
        if not self._drawn:
            return None
        traces, streams = zip(*((one.trace, one.stream) for one in self._drawn), strict=True)
        batch = Batch(traces, streams, self._drawn[-1].after)
        self._drawn, self._tokens = [], 0
        return batch


def is_usable(trace: Trace, max_sequence_tokens: int) -> bool:
    """Whether there is a completion token to learn from, with a token before it, within the length."""
    prompt_tokens = len(trace.prompt_token_ids)
    return len(trace.completion_token_ids) > 0 and 0 < prompt_tokens < max_sequence_tokens


def completion_positions(trace: Trace, max_sequence_tokens: int) -> int:
    """Completion tokens of a usable trace that are trained on."""
    return _length(trace, max_sequence_tokens) - len(trace.prompt_token_ids) + 1


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Traces that are computed at once, as tensors."""

    input_ids_BL: Tensor
    """int64, padded with 0 at the end; the last completion token, which predicts nothing, is left out."""
    positions_N: Tensor
    """int64: where the rows of `targets` are in [B, L] laid flat."""
    targets: Targets
    position_ids_BL: Tensor | None = None
    """int64; begins again at 0 with each trace of a packed row. None where every row is one trace."""
    states_NSH: Tensor | None = None
    """float32: the teacher's hidden states at the rows of `targets`, where they were asked for."""

    def to(self, device: torch.device) -> MicroBatch:
        """The same on another device."""
        position_ids_BL = None if self.position_ids_BL is None else self.position_ids_BL.to(device)
        return MicroBatch(
            self.input_ids_BL.to(device),
            self.positions_N.to(device),
            self.targets.to(device),
            position_ids_BL,
            None if self.states_NSH is None else self.states_NSH.to(device),
        )


@dataclass(frozen=True, slots=True)
class PieceSizes:
    """How a batch is cut into what is computed at once. It changes memory and speed, not the result."""

    micro_batch_tokens: int
    """Bound on B × L of a piece, unless one trace alone exceeds it."""
    max_sequence_tokens: int
    """Completions are cut there."""
    packed: bool = False
    """Lay traces end to end in one row; False lays each in a row of its own, with others of its length."""


def collate(
    traces: Sequence[Trace],
    sizes: PieceSizes,
    *,
    vocab_size: int,
    weighting: PositionWeighting = PositionWeighting(),  # noqa: B008  # frozen
    states: WantedStates | None = None,
    temperature: float = 1.0,
) -> list[MicroBatch]:
    """The traces as tensors, in pieces.

    Args:
        traces: All usable by `is_usable`.
        sizes: Of the pieces.
        vocab_size: Of the student.
        weighting: How much each position counts.
        states: Hidden states of the teacher to take along.
        temperature: At which distributions are compared: completions drawn at it are `Targets.drawn_N`.

    Raises:
        MisalignmentError: if a token of a prompt or completion is not in the student's vocabulary, or a trace
            lacks hidden states. Kept entries may be beyond the vocabulary, in the padding of a teacher's
            wider head: the loss leaves them out.
    """
    longest_first = sorted(traces, key=lambda trace: _length(trace, sizes.max_sequence_tokens), reverse=True)
    pieces = _fill_rows(longest_first, sizes) if sizes.packed else _group_by_length(longest_first, sizes)
    return [_collate_piece(piece, sizes, vocab_size, weighting, states, temperature) for piece in pieces]


def idle_piece() -> MicroBatch:
    """A piece of one token and no completion positions: its gradients are zero."""
    targets = Targets(
        torch.zeros((0, 1), dtype=torch.int64),
        torch.zeros((0, 1)),
        torch.zeros(0),
        torch.zeros(0, dtype=torch.int64),
    )
    return MicroBatch(torch.zeros((1, 1), dtype=torch.int64), torch.zeros(0, dtype=torch.int64), targets)


def _fill_rows(longest_first: Sequence[Trace], sizes: PieceSizes) -> list[list[Trace]]:
    """Rows of at most `micro_batch_tokens`: each trace goes into the first row that has room for it.

    First fit decreasing: at most 11/9 of the fewest rows there could be, and a few more (Johnson, 1973).
    """
    rows: list[list[Trace]] = []
    room: list[int] = []
    for trace in longest_first:
        length = _length(trace, sizes.max_sequence_tokens)
        row = next((number for number, free in enumerate(room) if free >= length), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(sizes.micro_batch_tokens)
        rows[row].append(trace)
        room[row] -= length
    return rows


def _group_by_length(longest_first: Sequence[Trace], sizes: PieceSizes) -> list[list[Trace]]:
    micro_batch_tokens, max_sequence_tokens = sizes.micro_batch_tokens, sizes.max_sequence_tokens
    pieces: list[list[Trace]] = []
    for trace in longest_first:
        length = _length(trace, max_sequence_tokens)
        longest = _length(pieces[-1][0], max_sequence_tokens) if pieces else 0
        padded_tokens = longest * len(pieces[-1]) if pieces else 0
        much_padding = padded_tokens >= _WORTHWHILE_TOKENS and length < _LEAST_FILL * longest
        if pieces and padded_tokens + longest <= micro_batch_tokens and not much_padding:
            pieces[-1].append(trace)
        else:
            pieces.append([trace])
    return pieces


def _length(trace: Trace, max_sequence_tokens: int) -> int:
    return min(len(trace.prompt_token_ids) + len(trace.completion_token_ids), max_sequence_tokens) - 1


def _collate_piece(
    traces: Sequence[Trace],
    sizes: PieceSizes,
    vocab_size: int,
    weighting: PositionWeighting,
    states: WantedStates | None,
    temperature: float,
) -> MicroBatch:
    lengths = [_length(trace, sizes.max_sequence_tokens) for trace in traces]
    if sizes.packed:
        shape = (1, sum(lengths))
        starts = np.cumsum([0, *lengths[:-1]])
    else:
        shape = (len(traces), max(lengths))
        starts = np.arange(len(traces)) * max(lengths)
    input_ids = np.zeros(shape[0] * shape[1], np.int64)
    position_ids = np.zeros_like(input_ids)
    positions: list[np.ndarray] = []
    for start, trace, length in zip(starts.tolist(), traces, lengths, strict=True):
        token_ids = np.concatenate((trace.prompt_token_ids, trace.completion_token_ids))[: length + 1]
        input_ids[start : start + length] = token_ids[:-1]
        position_ids[start : start + length] = np.arange(length)
        positions.append(start + np.arange(len(trace.prompt_token_ids) - 1, length))
    counts = [len(rows) for rows in positions]
    targets = _targets(traces, counts, weighting, temperature)
    _check_ids(input_ids, targets.sampled_ids_N, vocab_size)
    return MicroBatch(
        torch.as_tensor(input_ids.reshape(shape)),
        torch.as_tensor(np.concatenate(positions)),
        targets,
        torch.as_tensor(position_ids.reshape(shape)) if sizes.packed else None,
        None if states is None else states.gather(traces, counts),
    )


def _targets(
    traces: Sequence[Trace], counts: Sequence[int], weighting: PositionWeighting, temperature: float
) -> Targets:
    k = max(trace.top_k.k for trace in traces)
    token_ids_NK = np.zeros((sum(counts), k), np.int64)
    logprobs_NK = np.full((sum(counts), k), -np.inf, np.float32)
    start = 0
    for trace, count in zip(traces, counts, strict=True):
        rows = slice(start, start + count)
        token_ids_NK[rows, : trace.top_k.k] = trace.top_k.token_ids[:count]
        logprobs_NK[rows, : trace.top_k.k] = trace.top_k.logprobs[:count]
        start += count
    pairs = list(zip(traces, counts, strict=True))
    tail_mass_N = np.concatenate([trace.top_k.tail_mass[:count] for trace, count in pairs])
    sampled_N = np.concatenate([trace.completion_token_ids[:count] for trace, count in pairs])
    weights_N = np.concatenate([weighting.weigh(trace)[:count] for trace, count in pairs])
    drawn = [trace.sampling.is_plain(temperature) for trace in traces]
    tail_ids_ND = _tail_ids(pairs)
    return Targets(
        torch.as_tensor(token_ids_NK),
        torch.as_tensor(logprobs_NK),
        torch.as_tensor(tail_mass_N),
        torch.as_tensor(sampled_N.astype(np.int64)),
        None if weighting.is_even else torch.as_tensor(weights_N),
        None if all(drawn) else torch.as_tensor(np.repeat(drawn, counts)),
        None if tail_ids_ND is None else torch.as_tensor(tail_ids_ND),
    )


def _tail_ids(pairs: Sequence[tuple[Trace, int]]) -> np.ndarray | None:
    """Tokens drawn from the tails, int64 [N, D], -1 where a trace has fewer or none; None if none has any."""
    most = max(trace.top_k.tail_draw_count for trace, _ in pairs)
    if not most:
        return None
    tail_ids_ND = np.full((sum(count for _, count in pairs), most), -1, np.int64)
    start = 0
    for trace, count in pairs:
        drawn = trace.top_k.tail_draws
        if drawn is not None:
            tail_ids_ND[start : start + count, : drawn.shape[1]] = drawn[:count]
        start += count
    return tail_ids_ND


def _check_ids(input_ids: np.ndarray, sampled_ids_N: Tensor, vocab_size: int) -> None:
    top = max(int(input_ids.max()), int(sampled_ids_N.max()))
    if top >= vocab_size or int(input_ids.min()) < 0:
        raise MisalignmentError(
            f"the stream has token id {top}, the student's vocabulary ends at {vocab_size - 1}",
            "start from a student with the teacher's vocabulary",
        )
