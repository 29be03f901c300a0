"""The alignment contract, from the student's side: what it must share with a stream's teacher.

The loss compares probabilities token id by token id. A student that numbers its tokens otherwise trains
without an error and learns nothing, so that every difference is refused unless someone says to ignore it.
"""

from __future__ import annotations

import logging

from lynearm.student.model import StudentModel
from lynearm.wire.errors import MisalignmentError
from lynearm.wire.specs import StreamSpec, alignment_differences

logger = logging.getLogger(__name__)


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
    """What the student does not share with the stream, one line each; empty when aligned."""
    differences = alignment_differences(spec.tokenizer, student.tokenizer)
    if spec.teacher.vocab_size != student.vocab_size:
        differences.append(
            f"width of the logits: teacher {spec.teacher.vocab_size}, student {student.vocab_size}"
        )
    if spec.teacher.logprobs_mode != "raw" or spec.teacher.logprobs_temperature != 1.0:
        differences.append(
            f"logprobs: the teacher's are {spec.teacher.logprobs_mode} at temperature "
            f"{spec.teacher.logprobs_temperature:g}, the student's are raw at temperature 1"
        )
    return differences
