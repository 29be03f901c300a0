"""How far a student is from its teacher on prompts that it never trains on: KL, agreement, calibration."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lynearm.student.batches import PieceSizes, collate, idle_piece
from lynearm.student.calibration import PredictionSums, count_predictions
from lynearm.student.losses import Targets, measure_loss
from lynearm.student.model import StudentModel
from lynearm.student.objective import Objective
from lynearm.student.run_directory import EARLIER_CHECKPOINT
from lynearm.student.sharding import even_out
from lynearm.wire.blocks import MAX_PAYLOAD_BYTES
from lynearm.wire.codec import decode_block, encode_block
from lynearm.wire.errors import CheckpointError, LynearmError
from lynearm.wire.traces import Trace

HELD_OUT_FILE = "held_out.block"
HELD_OUT_PATTERN = "held_out*.block"
"""In a checkpoint: the held-out traces, float32 logprobs bit for bit."""


@dataclass(frozen=True, slots=True)
class HeldOutSums:
    """Sums over the completion positions of some held-out traces."""

    kl: float = 0.0
    """Forward KL to the teacher over top-k and tail, nats."""
    cross_entropy: float = 0.0
    """On the tokens that the teacher drew, nats."""
    positions: int = 0
    predictions: PredictionSums = PredictionSums()  # noqa: RUF009  # frozen
    """Agreement with the teacher, and calibration."""

    def __add__(self, other: HeldOutSums) -> HeldOutSums:
        """Both together."""
        return HeldOutSums(
            self.kl + other.kl,
            self.cross_entropy + other.cross_entropy,
            self.positions + other.positions,
            self.predictions + other.predictions,
        )


def evaluate(
    student: StudentModel,
    traces: Sequence[Trace],
    *,
    micro_batch_tokens: int,
    max_sequence_tokens: int,
    objective: Objective | None = None,
) -> HeldOutSums:
    """Measure a student on traces, without dropout and without changing it.

    Args:
        student: The student; it is in training mode afterwards.
        traces: All usable by `batches.is_usable`.
        micro_batch_tokens: As for `batches.PieceSizes`, like the next.
        max_sequence_tokens: Completions are cut there.
        objective: Says the temperature of the KL; 1 if not given.
    """
    kl, cross_entropy, positions = 0.0, 0.0, 0
    counted: list[PredictionSums] = []

    def count(logits_CV: Tensor, rows: Targets) -> None:
        counted.append(count_predictions(logits_CV, rows))

    student.train(False)
    sizes = PieceSizes(micro_batch_tokens, max_sequence_tokens)
    pieces = collate(traces, sizes, vocab_size=student.vocab_size)
    for piece in even_out(pieces, student, idle_piece):
        on_device = piece.to(student.device)
        with torch.no_grad():
            hidden_NH = student.hidden_states(on_device.input_ids_BL).flatten(0, 1)[on_device.positions_N]
        kl_N, cross_entropy_N = measure_loss(
            hidden_NH,
            student.head_weight,
            on_device.targets,
            bias_V=student.head_bias,
            objective=objective,
            look_at=count,
        )
        kl += float(kl_N.double().sum())
        cross_entropy += float(cross_entropy_N.double().sum())
        positions += len(kl_N)
    student.train(True)
    return HeldOutSums(kl, cross_entropy, positions, sum(counted, PredictionSums()))


def save_held_out(directory: Path, traces: Sequence[Trace], vocab_size: int) -> None:
    """Write traces as `held_out.block`, in exact mode; what exceeds a block as `held_out.1.block` and so on.

    Without draws from the tail: rows of one block have as many, and nothing here measures them.

    Args:
        directory: An existing one.
        traces: Of all streams.
        vocab_size: Of the student.

    Raises:
        CodecError: if a single trace does not fit into a block.
    """
    for number, part in enumerate(_block_sized([_without_draws(trace) for trace in traces])):
        # A teacher's head may be wider than the student's: entries of its padding are kept as they came.
        width = max(vocab_size, *(1 + _last_id(trace) for trace in part))
        (directory / _held_out_name(number)).write_bytes(encode_block(part, codec="exact", vocab_size=width))


def _last_id(trace: Trace) -> int:
    """The largest token id that a trace keeps."""
    rows = (trace.top_k, trace.prompt_top_k)
    return max(int(row.token_ids.max(initial=0)) for row in rows if row is not None)


def _without_draws(trace: Trace) -> Trace:
    prompt = trace.prompt_top_k
    return replace(
        trace,
        top_k=replace(trace.top_k, tail_draws=None),
        prompt_top_k=None if prompt is None else replace(prompt, tail_draws=None),
    )


def load_held_out(directory: Path) -> tuple[Trace, ...]:
    """The held-out traces of a checkpoint, in their order; none if it has none.

    Raises:
        CheckpointError: if a file is not a block.
    """
    traces: list[Trace] = []
    for number in itertools.count():
        path = directory / _held_out_name(number)
        if not path.is_file():
            return tuple(traces)
        try:
            traces += decode_block(path.read_bytes())
        except LynearmError as error:
            raise CheckpointError(f"{path}: {error.message}", EARLIER_CHECKPOINT) from error
    raise AssertionError("unreachable")


def write_parity_tokens(checkpoint_dir: Path, path: Path) -> int:
    """Write the held-out token ids as JSON, for exporters, which know nothing of traces.

    The file holds a list of {"token_ids": [...], "completion_start": n}: prompt and completion, and the
    index of the first completion token.

    Returns:
        The number of sequences.

    Raises:
        CheckpointError: if the checkpoint has no held-out traces, or they cannot be read.
    """
    sequences = [
        {
            "token_ids": [*trace.prompt_token_ids.tolist(), *trace.completion_token_ids.tolist()],
            "completion_start": len(trace.prompt_token_ids),
        }
        for trace in load_held_out(checkpoint_dir)
    ]
    if not sequences:
        raise CheckpointError(
            f"{checkpoint_dir} has no held-out traces", "train with held_out_traces above 0"
        )
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.write_text(json.dumps(sequences), encoding="utf-8")
    os.replace(unfinished, path)
    return len(sequences)


def _held_out_name(number: int) -> str:
    return f"held_out.{number}.block" if number else HELD_OUT_FILE


def _block_sized(traces: Sequence[Trace]) -> list[list[Trace]]:
    # Bounded as if nothing were compressed: 8 bytes an entry and some for the position itself.
    parts: list[list[Trace]] = []
    size_bytes = MAX_PAYLOAD_BYTES
    for trace in traces:
        more = (
            len(trace.prompt_token_ids) * 4
            + len(trace.completion_token_ids) * (trace.top_k.k * 8 + 64)
            + 1024
        )
        if size_bytes + more > MAX_PAYLOAD_BYTES:
            parts.append([])
            size_bytes = 0
        parts[-1].append(trace)
        size_bytes += more
    return parts
