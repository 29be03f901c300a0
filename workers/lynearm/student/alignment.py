"""The alignment contract, from the student's side: what it must share with a stream's teacher.

The loss compares probabilities token id by token id, and position by position. A student that numbers its
tokens otherwise, or rows that stand one position off, train without an error and teach nothing, so that
every difference is refused unless someone says to ignore it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch

from lynearm.student.batches import PieceSizes, collate
from lynearm.student.losses import measure_loss
from lynearm.student.model import StudentModel
from lynearm.student.objective import Objective
from lynearm.wire.errors import MisalignmentError
from lynearm.wire.specs import StreamSpec, alignment_differences
from lynearm.wire.traces import Trace

logger = logging.getLogger(__name__)

SHIFTS = (-1, 0, 1)
"""Positions by which rows are tried against tokens: what an off-by-one makes."""

_TRACES = 4
_LONGEST_TOKENS = 512
"""Bounds on what a look at the rows computes."""

_LEAST_POSITIONS = 16
"""Fewer positions prove nothing."""

_SAME_LOGPROB = 0.5
"""Nats by which two logprobs of one token may differ: above any codec's grid."""

_BETTER_AGREEMENT = 0.1
"""Part of the positions by which another shift has to agree better, to be believed."""

_BETTER_KL = 0.7
"""Part of the KL that another shift has to fall below; one among unrelated rows stays above 0.9."""


def check_alignment(spec: StreamSpec, student: StudentModel, *, allow_misaligned: bool = False) -> None:
    """Refuse a student that does not share the stream's conventions.

    Args:
        spec: Of the stream.
        student: The student to train.
        allow_misaligned: Log the differences instead.

    Raises:
        MisalignmentError: listing every difference.
    """
    differences = find_differences(spec, student)
    if not differences:
        return
    listed = "; ".join(differences)
    if not allow_misaligned:
        raise MisalignmentError(
            f"student and stream {spec.name!r} are not aligned: {listed}",
            "start from a student with the teacher's tokenizer, or train all the same with allow_misaligned",
        )
    logger.warning("stream %s: training a misaligned student: %s", spec.name, listed)


def find_differences(spec: StreamSpec, student: StudentModel) -> list[str]:
    """What the student does not share with the stream, one line each; empty when aligned.

    Logits of other widths are no difference while both hold every token: what is beyond is padding, which
    the loss leaves out. Neither is a temperature, which `objective.make_objective` looks at.
    """
    differences = alignment_differences(spec.tokenizer, student.tokenizer)
    widths = (spec.teacher.vocab_size, student.vocab_size)
    if widths[0] != widths[1] and min(widths) < spec.tokenizer.vocab_size:
        differences.append(
            f"width of the logits: teacher {widths[0]}, student {widths[1]}, for "
            f"{spec.tokenizer.vocab_size} tokens"
        )
    if spec.teacher.logprobs_mode != "raw":
        differences.append(
            f"logprobs: the teacher's are {spec.teacher.logprobs_mode} at temperature "
            f"{spec.teacher.logprobs_temperature:g}, the student's are raw"
        )
    return differences


def list_differences(specs: Sequence[StreamSpec], student: StudentModel) -> list[str]:
    """The differences to each of several streams; of more than one, each says to which."""
    several = len(specs) > 1
    return [
        f"stream {spec.name!r}: {difference}" if several else difference
        for spec in specs
        for difference in find_differences(spec, student)
    ]


def check_rows(
    student: StudentModel,
    traces: Sequence[Trace],
    objective: Objective,
    *,
    allow_misaligned: bool = False,
) -> None:
    """Refuse traces whose rows stand a position before or after their tokens.

    Two signs, either of which is enough: the sampled tokens, with the logprobs recorded for them, are found
    in the row before or after more often than in their own; or the student's KL to that row is clearly the
    lower one. The second needs a student that knows something, and finds a shift in the trainer too.

    Args:
        student: In training mode, as it is afterwards.
        traces: The first to be trained on, all usable; a few of them are looked at.
        objective: Of the training.
        allow_misaligned: Log what was found instead.

    Raises:
        MisalignmentError: with the shift, and what speaks for it.
    """
    looked_at = [trace for trace in traces if trace.top_k.k][:_TRACES]
    found = _shift_of_tokens(looked_at) or _shift_of_student(student, looked_at, objective)
    if not found:
        return
    if not allow_misaligned:
        raise MisalignmentError(
            found,
            "capture the stream again: row t has to be the distribution from which completion token t came; "
            "or train all the same with allow_misaligned",
        )
    logger.warning("training on shifted rows: %s", found)


def token_agreement(traces: Sequence[Trace], shift: int) -> tuple[float, int]:
    """Part of the positions whose sampled token, with its logprob, is in the row `shift` further on.

    Returns:
        The part, and the number of positions that have such a row; every shift is given the same positions.
    """
    agreed, positions = 0, 0
    for trace in traces:
        rows = slice(1 + shift, len(trace.completion_token_ids) - 1 + shift)
        inner = slice(1, len(trace.completion_token_ids) - 1)
        is_token_TK = trace.top_k.token_ids[rows] == trace.completion_token_ids[inner, None]
        gap_TK = np.abs(
            np.maximum(trace.top_k.logprobs[rows], np.float32(-1e4)) - trace.sampled_logprobs[inner, None]
        )
        agreed += int((is_token_TK & (gap_TK <= _SAME_LOGPROB)).any(1).sum())
        positions += len(is_token_TK)
    return (agreed / positions if positions else 0.0), positions


def student_kl(
    student: StudentModel, traces: Sequence[Trace], objective: Objective, shift: int
) -> tuple[float, int]:
    """Mean KL of the student to the rows `shift` further on, and the number of positions."""
    kl, positions = 0.0, 0
    sizes = PieceSizes(micro_batch_tokens=_LONGEST_TOKENS, max_sequence_tokens=_LONGEST_TOKENS)
    usable = [trace for trace in traces if len(trace.prompt_token_ids) < _LONGEST_TOKENS]
    for trace in usable:
        (piece,) = collate([trace], sizes, vocab_size=student.vocab_size)
        on_device = piece.to(student.device)
        length = len(on_device.targets)
        with torch.no_grad():
            hidden_NH = student.hidden_states(on_device.input_ids_BL).flatten(0, 1)[on_device.positions_N]
        kl_N, _ = measure_loss(
            hidden_NH[1 : length - 1],
            student.head_weight,
            on_device.targets.rows(1 + shift, max(1, length - 1) + shift),
            bias_V=student.head_bias,
            objective=objective,
        )
        kl += float(kl_N.double().sum())
        positions += len(kl_N)
    return (kl / positions if positions else 0.0), positions


def _shift_of_tokens(traces: Sequence[Trace]) -> str:
    agreement = {shift: token_agreement(traces, shift) for shift in SHIFTS}
    best = max(agreement, key=lambda shift: agreement[shift][0])
    part, positions = agreement[best]
    if not best or positions < _LEAST_POSITIONS or part < agreement[0][0] + _BETTER_AGREEMENT:
        return ""
    return (
        f"rows stand a position {_where(best)}: of {positions} tokens {part:.0%} are in the row "
        f"{_beside(best)} theirs, {agreement[0][0]:.0%} in their own"
    )


def _shift_of_student(student: StudentModel, traces: Sequence[Trace], objective: Objective) -> str:
    student.train(False)
    kls = {shift: student_kl(student, traces, objective, shift) for shift in SHIFTS}
    student.train(True)
    best = min(kls, key=lambda shift: kls[shift][0])
    kl, positions = kls[best]
    # Not `kl > …`: a student that is broken has a KL of NaN, and says nothing.
    if not best or positions < _LEAST_POSITIONS or not kl <= _BETTER_KL * kls[0][0]:
        return ""
    return (
        f"rows stand a position {_where(best)}: over {positions} positions the student's KL is {kl:.3g} to "
        f"the row {_beside(best)} its own, and {kls[0][0]:.3g} to its own"
    )


def _where(shift: int) -> str:
    return "late" if shift > 0 else "early"


def _beside(shift: int) -> str:
    return "after" if shift > 0 else "before"
