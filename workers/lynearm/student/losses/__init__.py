"""Losses between a teacher's rows and a student, from its hidden states and output head, in little memory.

Public names: `Targets`, `distillation_loss`, `backpropagate_loss`, `measure_loss`, `DistillationLoss`;
`accumulate_rows` spares memory where token embeddings are trained. What is summed is an
`objective.Objective`.
"""

from lynearm.student.losses.accumulation import accumulate_rows
from lynearm.student.losses.head import (
    DistillationLoss,
    backpropagate_loss,
    distillation_loss,
    measure_loss,
)
from lynearm.student.losses.targets import Targets

__all__ = [
    "DistillationLoss",
    "Targets",
    "accumulate_rows",
    "backpropagate_loss",
    "distillation_loss",
    "measure_loss",
]
