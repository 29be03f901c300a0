"""Codes and grids: what MLX reads back, and what the better rounding gains."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import torch

from lynearm.export.quantise import (
    GridFormat,
    GroupedWeight,
    pack_words,
    quantise_nearest,
    quantise_with_feedback,
)
from lynearm.wire.errors import InvalidInputError


def make_weight(rows: int = 24, columns: int = 128) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)) * 0.1


def make_inputs(columns: int = 128) -> torch.Tensor:
    """Inputs that vary together, as activations do."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(2000, 40, generator=generator) @ torch.randn(40, columns, generator=generator)


def output_error(weight: torch.Tensor, quantised: GroupedWeight, inputs: torch.Tensor) -> float:
    return float(((weight - quantised.dequantise()) @ inputs.T).square().mean())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 64])
def test_mlx_reads_back_what_the_codes_stand_for(bits: int, group_size: int) -> None:
    quantised = quantise_nearest(make_weight(), GridFormat(bits, group_size, symmetric=False))
    words = mx.array(pack_words(quantised.codes_RC, bits).numpy().view(np.uint32))
    scales, biases = (mx.array(one.numpy()) for one in (quantised.scales_RG, quantised.biases_RG))
    read = np.array(mx.dequantize(words, scales, biases, group_size=group_size, bits=bits))
    np.testing.assert_allclose(read, quantised.dequantise().numpy(), atol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_our_grid_is_at_least_as_close_as_mlx_own(bits: int) -> None:
    weight = make_weight()
    ours = quantise_nearest(weight, GridFormat(bits, 64, symmetric=False)).dequantise()
    words, scales, biases = mx.quantize(mx.array(weight.numpy()), group_size=64, bits=bits)
    theirs = torch.from_numpy(np.array(mx.dequantize(words, scales, biases, group_size=64, bits=bits)))
    assert (weight - ours).square().mean() <= (weight - theirs).square().mean() * 1.001


@pytest.mark.parametrize("symmetric", [False, True])
def test_feedback_keeps_the_outputs_closer_than_nearest(symmetric: bool) -> None:
    weight, inputs = make_weight(), make_inputs()
    grid = GridFormat(4, 32, symmetric=symmetric)
    nearest = quantise_nearest(weight, grid)
    feedback = quantise_with_feedback(weight, grid, inputs.T @ inputs / len(inputs))
    assert output_error(weight, feedback, inputs) < 0.5 * output_error(weight, nearest, inputs)


@pytest.mark.parametrize("symmetric", [False, True])
def test_constant_and_zero_groups_are_exact_enough(symmetric: bool) -> None:
    weight = torch.cat([torch.zeros(2, 64), torch.full((2, 64), 0.25)])
    read = quantise_nearest(weight, GridFormat(4, 32, symmetric=symmetric)).dequantise()
    assert (read - weight).abs().max() < 0.02


def test_rows_that_do_not_split_into_groups_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="not a multiple of the group size 48"):
        quantise_nearest(make_weight(), GridFormat(4, 48, symmetric=False))
