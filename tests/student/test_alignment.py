"""Rows that stand a position off are found, whoever shifted them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from student.teaching_material import judge, make_spec

from lynearm.student.alignment import SHIFTS, check_alignment, check_rows, student_kl, token_agreement
from lynearm.student.model import StudentModel
from lynearm.student.objective import Objective
from lynearm.wire.errors import MisalignmentError
from lynearm.wire.traces import TopK, Trace


@pytest.fixture(scope="module")
def drawn_traces(teacher: StudentModel) -> list[Trace]:
    """Completions that the teacher draws itself, so that its own rows hold most of their tokens."""
    generator = torch.Generator().manual_seed(5)
    traces: list[Trace] = []
    for number in range(4):
        token_ids = torch.randint(5, 300, (4,), generator=generator).tolist()
        for _ in range(16):
            with torch.no_grad():
                logits_V = 30.0 * teacher.model(input_ids=torch.tensor([token_ids])).logits[0, -1]
            token_ids.append(int(torch.multinomial(torch.softmax(logits_V, -1), 1, generator=generator)))
        traces.append(judge(teacher, token_ids[:4], token_ids[4:], prompt_id=f"d{number}"))
    return traces


def shift_rows(trace: Trace, by: int) -> Trace:
    """Row t is what row t − by was."""
    rows = trace.top_k
    moved = TopK(*(np.roll(array, by, 0) for array in (rows.token_ids, rows.logprobs, rows.tail_mass)))
    return replace(trace, top_k=moved)


def shift_everything(trace: Trace, by: int) -> Trace:
    """Rows that belong to other tokens, which the recorded logprobs do not betray."""
    moved = shift_rows(trace, by)
    return replace(moved, sampled_logprobs=np.full_like(trace.sampled_logprobs, -30.0))


def test_rows_in_their_place_pass(
    teacher: StudentModel, drawn_traces: list[Trace], traces: list[Trace]
) -> None:
    assert token_agreement(drawn_traces, 0)[0] > 0.9
    assert student_kl(teacher, drawn_traces, Objective(), 0)[0] < 1e-5
    check_rows(teacher, drawn_traces, Objective())
    check_rows(teacher, traces, Objective())
    assert teacher.model.training


@pytest.mark.parametrize("by", [-1, 1])
@pytest.mark.parametrize("shift", [shift_rows, shift_everything])
def test_shifted_rows_are_refused(
    teacher: StudentModel, drawn_traces: list[Trace], by: int, shift: Callable[[Trace, int], Trace]
) -> None:
    shifted = [shift(trace, by) for trace in drawn_traces]
    sign = "tokens" if shift is shift_rows else "the student's KL"
    with pytest.raises(
        MisalignmentError, match=f"rows stand a position {'late' if by > 0 else 'early'}.*{sign}"
    ):
        check_rows(teacher, shifted, Objective())
    check_rows(teacher, shifted, Objective(), allow_misaligned=True)


def test_a_student_that_knows_nothing_does_not_accuse_its_teacher(
    teacher: StudentModel, drawn_traces: list[Trace]
) -> None:
    blank = replace(teacher, model=_blank(teacher))
    kls = [student_kl(blank, drawn_traces, Objective(), shift)[0] for shift in SHIFTS]
    assert min(kls) > 0.9 * max(kls)
    check_rows(blank, drawn_traces, Objective())


def _blank(teacher: StudentModel) -> object:
    import copy

    model = copy.deepcopy(teacher.model)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model


def test_short_traces_and_traces_without_rows_prove_nothing(
    teacher: StudentModel, drawn_traces: list[Trace]
) -> None:
    rows = drawn_traces[0].top_k
    bare = replace(
        drawn_traces[0],
        top_k=TopK(rows.token_ids[:, :0], rows.logprobs[:, :0], np.ones_like(rows.tail_mass)),
    )
    short = judge(teacher, [5, 6, 7], [8], prompt_id="short")
    check_rows(teacher, [], Objective())
    check_rows(teacher, [bare, short, judge(teacher, [5], [8, 9], prompt_id="two")], Objective())


def test_padded_logits_of_other_width_are_aligned(teacher: StudentModel) -> None:
    spec = make_spec(teacher)
    tokens = spec.tokenizer.vocab_size
    check_alignment(replace(spec, teacher=replace(spec.teacher, vocab_size=max(tokens, 1) + 999)), teacher)
    narrow = replace(spec, teacher=replace(spec.teacher, vocab_size=tokens - 1))
    with pytest.raises(MisalignmentError, match=f"width of the logits: teacher {tokens - 1}"):
        check_alignment(narrow, teacher)
