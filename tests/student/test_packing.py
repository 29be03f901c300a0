"""Packing: several traces in one row give what each gives alone, to the loss and to every weight."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from student.test_batches import names, read_batches, receive

from lynearm.student.batches import (
    Batch,
    Batcher,
    DrawnTrace,
    PieceSizes,
    collate,
    completion_positions,
)
from lynearm.student.config import TrainConfig
from lynearm.student.model import StudentModel, load_student, packs_without_leaks
from lynearm.student.optimization import Optimization
from lynearm.wire.errors import ConfigError
from lynearm.wire.traces import Trace

VOCAB_SIZE = 384


def gradients(
    student_dir: Path, traces: list[Trace], *, packing: str, tokens: int
) -> dict[str, torch.Tensor]:
    """What one step hands to the optimizer, in float64."""
    student = load_student(student_dir, device="cpu")
    student.model.double()
    config = TrainConfig(student_dir, packing=packing, micro_batch_tokens=tokens, grad_clip=0.0)
    optimization = Optimization(student, config)
    found: dict[str, torch.Tensor] = {}

    def keep(optimizer: Any, *_: Any) -> None:
        found.update(
            (name, parameter.grad.clone())
            for name, parameter in student.named_parameters()
            if parameter.grad is not None
        )

    optimization._optimizer.register_step_pre_hook(keep)
    optimization.step(Batch(tuple(traces)), 1)
    return found


@pytest.mark.parametrize("tokens", [16, 40, 4096])
def test_gradients_equal_those_of_traces_alone(student_dir: Path, traces: list[Trace], tokens: int) -> None:
    chosen = traces[10:22]
    wanted = gradients(student_dir, chosen, packing="off", tokens=1)  # every trace by itself
    packed = gradients(student_dir, chosen, packing="on", tokens=tokens)
    assert wanted.keys() == packed.keys()
    assert len(wanted) > 10
    for name, gradient in wanted.items():
        torch.testing.assert_close(packed[name], gradient, rtol=1e-6, atol=1e-10)


def test_a_trace_knows_nothing_of_its_neighbours(teacher: StudentModel, traces: list[Trace]) -> None:
    first, second = traces[10], traces[11]
    other = replace(
        first,
        prompt_token_ids=(first.prompt_token_ids + 7) % 300,
        completion_token_ids=(first.completion_token_ids + 11) % 300,
    )
    states: list[torch.Tensor] = []
    for neighbour in (first, other):
        (piece,) = collate([neighbour, second], PieceSizes(64, 64, packed=True), vocab_size=VOCAB_SIZE)
        mine = torch.isin(
            piece.targets.sampled_ids_N, torch.as_tensor(second.completion_token_ids.astype(np.int64))
        )
        assert piece.position_ids_BL is not None
        with torch.no_grad():
            hidden_NH = teacher.hidden_states(piece.input_ids_BL, piece.position_ids_BL)[0][piece.positions_N]
        rows = [row.tolist() == second.top_k.token_ids[0].tolist() for row in piece.targets.token_ids_NK]
        start = rows.index(True)
        assert bool(mine[start])
        states.append(hidden_NH[start : start + len(second.completion_token_ids)])
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


def test_rows_are_full_and_hold_every_trace_once(traces: list[Trace]) -> None:
    chosen = traces[8:60]
    lengths = [len(trace.prompt_token_ids) + len(trace.completion_token_ids) - 1 for trace in chosen]
    pieces = collate(chosen, PieceSizes(32, 64, packed=True), vocab_size=VOCAB_SIZE)
    assert all(piece.input_ids_BL.shape[0] == 1 and piece.input_ids_BL.shape[1] <= 32 for piece in pieces)
    # Nothing is padded, and there are few more rows than their tokens need.
    assert sum(piece.input_ids_BL.numel() for piece in pieces) == sum(lengths)
    assert len(pieces) <= -(-sum(lengths) // 32) * 11 / 9 + 1
    starts = sum(
        int((piece.position_ids_BL == 0).sum()) for piece in pieces if piece.position_ids_BL is not None
    )
    assert starts == len(chosen)
    sampled = sum(int(piece.targets.sampled_ids_N.sum()) for piece in pieces)
    assert sampled == sum(int(trace.completion_token_ids.sum()) for trace in chosen)


def test_a_trace_longer_than_a_row_has_one_of_its_own(traces: list[Trace]) -> None:
    pieces = collate(traces[8:12], PieceSizes(4, 64, packed=True), vocab_size=VOCAB_SIZE)
    assert len(pieces) == 4


def test_a_model_that_carries_a_state_along_the_row_is_not_packed(teacher_dir: Path, tmp_path: Path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=VOCAB_SIZE, hidden_size=16, state_size=4, num_hidden_layers=2)
    any_model: Any = MambaForCausalLM(config)
    teacher = load_student(teacher_dir, device="cpu")
    mamba = replace(teacher, model=any_model.eval(), directory=tmp_path / "mamba")
    assert packs_without_leaks(teacher)
    assert not packs_without_leaks(mamba)
    with pytest.raises(ConfigError, match="mamba mixes sequences"):
        Optimization(mamba, TrainConfig(packing="on"))


def test_batches_by_tokens_are_complete_at_their_weight(teacher: StudentModel, traces: list[Trace]) -> None:
    batcher = Batcher(batch_sequences=1, batch_tokens=30, max_sequence_tokens=12)
    batches = [batch for trace in traces if (batch := batcher.add(DrawnTrace(trace, 0))) is not None]
    assert len(batches) > 5
    for batch in batches:
        weights = [completion_positions(trace, 12) for trace in batch.traces]
        assert sum(weights) >= 30 > sum(weights[:-1])
    # By sequences as ever where no tokens are asked for.
    assert len(names(read_batches(receive(teacher, traces, 7)))[0]) == 4
