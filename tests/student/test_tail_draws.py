"""Streams with draws from the tail: a real run on one, and what packing leaves of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from models.service_process import ServiceProcess
from student.run_material import short_run
from student.teaching_material import make_spec, write_traces

from lynearm.client import TraceClient
from lynearm.student.alignment import check_rows
from lynearm.student.batches import PieceSizes, collate
from lynearm.student.losses import distillation_loss
from lynearm.student.model import StudentModel
from lynearm.student.objective import Objective, make_objective
from lynearm.student.trainer import run_train
from lynearm.wire.codec import encode_block
from lynearm.wire.specs import StreamSpec
from lynearm.wire.traces import Trace


def draw_tails(teacher: StudentModel, traces: Sequence[Trace], draws: int) -> list[Trace]:
    """The traces with tokens that the teacher draws from what their rows leave out."""
    generator = torch.Generator().manual_seed(0)
    drawn: list[Trace] = []
    for trace in traces:
        token_ids = np.concatenate((trace.prompt_token_ids, trace.completion_token_ids)).astype(np.int64)
        with torch.no_grad():
            logits_LV = teacher.model(input_ids=torch.from_numpy(token_ids)[None]).logits[0]
        tail_TV = torch.softmax(logits_LV[len(trace.prompt_token_ids) - 1 : -1], -1)
        tail_TV.scatter_(1, torch.from_numpy(trace.top_k.token_ids.astype(np.int64)), 0.0)
        ids_TD = torch.multinomial(tail_TV, draws, replacement=True, generator=generator)
        drawn.append(replace(trace, top_k=replace(trace.top_k, tail_draws=ids_TD.numpy().astype(np.int32))))
    return drawn


def spec_with_draws(teacher: StudentModel, draws: int) -> StreamSpec:
    spec = make_spec(teacher, "drawn")
    return replace(spec, codec=replace(spec.codec, tail_draws=draws))


def test_a_run_learns_from_draws_that_came_over_the_wire(
    service: ServiceProcess, teacher: StudentModel, student_dir: Path, tmp_path: Path
) -> None:
    spec = spec_with_draws(teacher, 2)
    with TraceClient(service.target) as client:
        client.create_stream(spec)
        with client.publisher("drawn", "teacher") as publisher:
            for start in range(0, 40, 8):
                block = draw_tails(teacher, write_traces(teacher, 8, seed=start), 2)
                publisher.publish(encode_block(block, codec=spec.codec, vocab_size=teacher.vocab_size))
        client.seal_stream("drawn")
    losses: dict[str, list[float]] = {}
    for name, terms in (("default", ()), ("without", ("forward-kl", "cross-entropy:0.1"))):
        config = short_run(
            service, student_dir, ("drawn",), tmp_path / name, loss=terms, epochs=3, packing="on"
        )
        report = run_train(config)
        losses[name] = [record.loss for record in report.curve]
    # What the draws add is the cross-entropy of a tail of 376 tokens, which has half of the mass here.
    assert losses["default"][0] > losses["without"][0] + 2
    assert losses["default"][-1] < losses["default"][0]


def test_a_student_that_equals_its_teacher_has_no_kl_and_is_found_aligned(teacher: StudentModel) -> None:
    traces = draw_tails(teacher, write_traces(teacher, 6), 1)
    objective = make_objective(spec_with_draws(teacher, 1), ())
    check_rows(teacher, traces, objective)
    (piece,) = collate(traces, PieceSizes(4096, 512), vocab_size=teacher.vocab_size)
    assert piece.targets.tail_ids_ND is not None
    with torch.no_grad():
        hidden_NH = teacher.hidden_states(piece.input_ids_BL).flatten(0, 1)[piece.positions_N]
    result = distillation_loss(hidden_NH, teacher.head_weight.detach(), piece.targets, objective=objective)
    assert float(result.kl_N.abs().max()) < 1e-5
    assert float(result.loss) > 0


@pytest.mark.parametrize("tokens", [16, 4096])
def test_packed_rows_keep_their_draws(teacher: StudentModel, traces: list[Trace], tokens: int) -> None:
    # Traces of three streams in a batch: two draws a position, one, and none.
    chosen = [
        *draw_tails(teacher, traces[10:14], 2),
        *draw_tails(teacher, traces[14:18], 1),
        *traces[18:20],
    ]
    objective = Objective(make_objective(spec_with_draws(teacher, 1), ()).terms)

    def total(packed: bool, most: int) -> float:
        pieces = collate(chosen, PieceSizes(most, 512, packed=packed), vocab_size=teacher.vocab_size)
        loss = 0.0
        for piece in pieces:
            with torch.no_grad():
                states_BLH = teacher.hidden_states(piece.input_ids_BL, piece.position_ids_BL)
            hidden_NH = states_BLH.flatten(0, 1)[piece.positions_N]
            head_VH = teacher.head_weight.detach()
            loss += float(
                distillation_loss(hidden_NH, head_VH, piece.targets, objective=objective, divisor=1.0).loss
            )
        return loss

    assert total(True, tokens) == pytest.approx(total(False, 1), rel=1e-5)
