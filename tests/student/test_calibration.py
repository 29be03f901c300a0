"""Agreement and calibration against sums over dense probabilities."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from lynearm.student.calibration import BINS, PredictionSums, count_predictions
from lynearm.student.losses import Targets, measure_loss

VOCAB, WIDTH = 13, 5


def make_rows(count: int, *, k: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, Targets]:
    generator = torch.Generator().manual_seed(seed)
    hidden_NH = torch.randn(count, WIDTH, generator=generator)
    head_VH = torch.randn(VOCAB, WIDTH, generator=generator)
    teacher_NV = torch.log_softmax(torch.randn(count, VOCAB, generator=generator), -1)
    kept_NK, ids_NK = teacher_NV.topk(k, -1)
    order_NK = torch.argsort(torch.rand(count, k, generator=generator), -1)
    return (
        hidden_NH,
        head_VH,
        Targets(
            # Which entry is the largest must not hang on their order.
            ids_NK.gather(1, order_NK),
            kept_NK.gather(1, order_NK),
            1 - kept_NK.exp().sum(-1),
            torch.randint(0, VOCAB, (count,), generator=generator),
        ),
    )


def measure_predictions(
    hidden_NH: torch.Tensor, head_VH: torch.Tensor, targets: Targets, *, bias_V: torch.Tensor | None = None
) -> PredictionSums:
    """As an evaluation does, beside the losses."""
    counted: list[PredictionSums] = []
    measure_loss(
        hidden_NH,
        head_VH,
        targets,
        bias_V=bias_V,
        look_at=lambda logits_CV, rows: counted.append(count_predictions(logits_CV, rows)),
    )
    return sum(counted, PredictionSums())


@pytest.mark.parametrize("count", [1, 255, 256, 600])
def test_sums_are_those_of_dense_probabilities(count: int) -> None:
    hidden_NH, head_VH, targets = make_rows(count)
    bias_V = torch.linspace(-1, 1, VOCAB)
    sums = measure_predictions(hidden_NH, head_VH, targets, bias_V=bias_V)
    probabilities_NV = torch.softmax((hidden_NH @ head_VH.T + bias_V).double(), -1).numpy()
    student_N, confidence_N = probabilities_NV.argmax(1), probabilities_NV.max(1)
    teacher_N = targets.token_ids_NK.numpy()[np.arange(count), targets.logprobs_NK.numpy().argmax(1)]
    accurate_N = student_N == targets.sampled_ids_N.numpy()
    assert sums.agreement == pytest.approx(float((student_N == teacher_N).mean()))
    edges = np.linspace(0, 1, BINS + 1)
    gaps = [
        abs(accurate_N[within].sum() - confidence_N[within].sum())
        for low, high in itertools.pairwise(edges)
        if (within := (confidence_N > low) & (confidence_N <= high)).any()
    ]
    assert sums.calibration_error == pytest.approx(sum(gaps) / count, abs=1e-6)


def test_ranks_that_share_the_rows_find_the_same() -> None:
    hidden_NH, head_VH, targets = make_rows(40)
    whole = measure_predictions(hidden_NH, head_VH, targets)
    parts = [
        measure_predictions(hidden_NH[start : start + 13], head_VH, targets.rows(start, start + 13))
        for start in (0, 13, 26, 39)
    ]
    together = PredictionSums.from_values(
        [sum(values) for values in zip(*(part.values() for part in parts), strict=True)]
    )
    assert together.values() == pytest.approx(whole.values())
    added = parts[0] + parts[1] + parts[2] + parts[3]
    assert added.values() == pytest.approx(whole.values())


def test_positions_without_a_kept_entry_are_not_compared() -> None:
    hidden_NH, head_VH, targets = make_rows(6)
    targets.logprobs_NK[:4] = -math.inf
    sums = measure_predictions(hidden_NH, head_VH, targets)
    assert sums.compared == 2
    assert sum(sums.bin_positions) == 6
    nothing_kept = Targets(
        targets.token_ids_NK[:, :0], targets.logprobs_NK[:, :0], torch.ones(6), targets.sampled_ids_N
    )
    assert measure_predictions(hidden_NH, head_VH, nothing_kept).agreement is None


def test_nothing_measured_is_nothing_known() -> None:
    assert PredictionSums().agreement is None
    assert PredictionSums().calibration_error is None


def test_a_sure_and_right_student_is_calibrated() -> None:
    head_VH = 100 * torch.eye(VOCAB)
    ids_N = torch.arange(VOCAB)
    targets = Targets(ids_N[:, None], torch.zeros(VOCAB, 1), torch.zeros(VOCAB), ids_N)
    sums = measure_predictions(torch.eye(VOCAB), head_VH, targets)
    assert sums.agreement == 1.0
    assert sums.calibration_error == pytest.approx(0.0, abs=1e-9)
