"""Choosing 4- and 8-bit codes: grids per group of weights, and rounding with error feedback.

The stored format is fixed by the readers (MLX: weight = scale · code + bias; Core ML: weight = scale · code),
but which scale, bias and codes are written is ours to choose. Two choices pay (SmolLM2-135M, mean KL to the
float32 model, 4 bits in groups of 64: MLX's own 0.52):

* the grid of a group minimises the squared error weighted by how much each input is used, by a search over
  clipped ranges with a least-squares refit of scale and bias;
* with second moments of the inputs at hand, columns are rounded one after the other and each error is spread
  over the columns still to come (Frantar et al., "GPTQ", arXiv 2210.17323).
"""

# R = rows (outputs), C = columns (inputs), G = groups per row, S = weights per group

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch

from lynearm.wire.errors import InvalidInputError

CLIP_RATIOS = (1.0, 0.85)
"""Ranges tried per group, as shares of the full one; finer steps gained nothing measurable."""

DAMPING = 0.01
"""Share of the mean diagonal added to second moments, so that unused directions cannot explode."""

GRIDS_PER_RANGE = 2
"""Tried per range: the range itself, and one least-squares refit; each costs a pass over the weights."""

CHUNK_WEIGHTS = 1 << 17
"""Weights searched at once: the temporaries stay in the processor's cache."""

FLOAT16_MAX = 65504.0
TINY_SCALE = 1e-7


@dataclass(frozen=True, slots=True)
class GridFormat:
    """What the reader can store for each group."""

    bits: int
    group_size: int
    symmetric: bool
    """No bias of its own: codes are signed integers times the scale."""

    @property
    def top_code(self) -> int:
        """Largest unsigned code."""
        return (1 << self.bits) - 1


@dataclass(frozen=True, slots=True)
class GroupedWeight:
    """A matrix on its grid: weight = scale · code + bias."""

    grid: GridFormat
    codes_RC: torch.Tensor
    """uint8, 0 to `grid.top_code`; for symmetric grids the signed code plus half the range."""
    scales_RG: torch.Tensor
    """float32, but each value is one of float16."""
    biases_RG: torch.Tensor
    """float32, but each value is one of float16; for symmetric grids exactly −scale times half the range."""

    def dequantise(self) -> torch.Tensor:
        """The matrix that the codes stand for, float32, shape [R, C]."""
        rows, columns = self.codes_RC.shape
        codes_RGS = self.codes_RC.view(rows, -1, self.grid.group_size).float()
        return (codes_RGS * self.scales_RG[..., None] + self.biases_RG[..., None]).view(rows, columns)


def quantise(
    weight_RC: torch.Tensor, grid: GridFormat, second_moment_CC: torch.Tensor | None
) -> GroupedWeight:
    """Codes with error feedback where second moments of the inputs are known, else nearest ones.

    Raises:
        InvalidInputError: if C is not a multiple of the group size.
    """
    if second_moment_CC is None:
        return quantise_nearest(weight_RC, grid)
    return quantise_with_feedback(weight_RC, grid, second_moment_CC)


def quantise_nearest(
    weight_RC: torch.Tensor, grid: GridFormat, importance_C: torch.Tensor | None = None
) -> GroupedWeight:
    """Each weight to its nearest code, on the grid of least squared error found for its group.

    Args:
        weight_RC: float32, shape [R, C]; C must be a multiple of the group size.
        grid: What the reader stores.
        importance_C: Weights of the squared errors, such as mean squares of the inputs; all 1 if None.

    Raises:
        InvalidInputError: if C is not a multiple of the group size.
    """
    columns = weight_RC.shape[1]
    check_divisible(columns, grid.group_size)
    importance = torch.ones(columns) if importance_C is None else importance_C
    importance_GS = importance.float().view(-1, grid.group_size)
    codes: list[torch.Tensor] = []
    scales: list[torch.Tensor] = []
    biases: list[torch.Tensor] = []
    for chunk_RC in torch.split(weight_RC, max(1, CHUNK_WEIGHTS // columns)):
        chunk_RGS = chunk_RC.reshape(chunk_RC.shape[0], -1, grid.group_size)
        scale, bias = fit_grid(chunk_RGS, importance_GS, grid)
        codes.append(_encode(chunk_RGS, scale, bias, grid).to(torch.uint8).view_as(chunk_RC))
        scales.append(scale.squeeze(-1))
        biases.append(bias.squeeze(-1))
    return GroupedWeight(grid, torch.cat(codes), torch.cat(scales), torch.cat(biases))


def quantise_with_feedback(
    weight_RC: torch.Tensor, grid: GridFormat, second_moment_CC: torch.Tensor
) -> GroupedWeight:
    """Codes that keep the outputs, not the weights: errors are spread over the columns still to come.

    Args:
        weight_RC: float32, shape [R, C].
        grid: What the reader stores.
        second_moment_CC: Mean of x·xᵀ over the inputs of this layer, float32.

    Raises:
        InvalidInputError: if C is not a multiple of the group size.
    """
    columns = weight_RC.shape[1]
    size = grid.group_size
    check_divisible(columns, size)
    spread_CC = _spread_factors(second_moment_CC)
    importance_C = second_moment_CC.diagonal()
    rest_CR = weight_RC.T.clone(memory_format=torch.contiguous_format)
    codes_CR = torch.empty_like(rest_CR)
    scales: list[torch.Tensor] = []
    biases: list[torch.Tensor] = []
    for start in range(0, columns, size):
        group = slice(start, start + size)
        scale_R, bias_R = _fit_columns(rest_CR[group], importance_C[group], grid)
        errors_SR = _round_columns(
            rest_CR[group], codes_CR[group], scale_R, bias_R, spread_CC[group, group], grid
        )
        rest_CR[start + size :].sub_(spread_CC[group, start + size :].T @ errors_SR)
        scales.append(scale_R)
        biases.append(bias_R)
    codes_RC = codes_CR.to(torch.uint8).T.contiguous()
    return GroupedWeight(grid, codes_RC, torch.stack(scales, 1), torch.stack(biases, 1))


def fit_grid(
    weight_RGS: torch.Tensor, importance_GS: torch.Tensor, grid: GridFormat
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and bias per group that minimise the weighted squared error of nearest codes.

    Tries shares of each group's range, refits by least squares after each, and keeps the best.

    Returns:
        Two tensors of shape [R, G, 1], float32, rounded to float16.
    """
    importance = importance_GS + 1e-8 * importance_GS.mean() + 1e-30
    best_error: torch.Tensor | None = None
    best_scale = best_bias = torch.empty(0)
    for ratio in CLIP_RATIOS if grid.bits < 8 else (1.0,):
        scale, bias = _clipped_range(weight_RGS, ratio, grid)
        for _ in range(GRIDS_PER_RANGE):
            scale, bias = _as_float16(scale, bias, grid)
            codes = _encode(weight_RGS, scale, bias, grid)
            error = (importance * (codes * scale + bias - weight_RGS).square_()).sum(-1, keepdim=True)
            if best_error is None:
                best_error, best_scale, best_bias = error, scale, bias
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale = torch.where(better, scale, best_scale)
            best_bias = torch.where(better, bias, best_bias)
            scale, bias = _refit(weight_RGS, codes, importance, scale, grid)
    return best_scale, best_bias


def pack_words(codes_RC: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes as MLX packs them: little-endian 32-bit words, the first code in the lowest bits.

    Returns:
        int32 holding the bits of the unsigned words, shape [R, C · bits / 32].
    """
    if bits == 4:
        codes_RC = codes_RC[:, 0::2] | (codes_RC[:, 1::2] << 4)
    return codes_RC.contiguous().view(torch.int32)


def check_divisible(columns: int, group_size: int) -> None:
    """Refuses a matrix whose rows do not split into whole groups.

    Raises:
        InvalidInputError: if they do not.
    """
    if columns % group_size:
        raise InvalidInputError(
            f"a layer has {columns} inputs, not a multiple of the group size {group_size}",
            "choose a smaller group size, or 16 bits",
        )


def _clipped_range(
    weight_RGS: torch.Tensor, ratio: float, grid: GridFormat
) -> tuple[torch.Tensor, torch.Tensor]:
    if grid.symmetric:
        # Codes reach one step further below zero than above it; the sign stays positive for simple readers.
        scale = weight_RGS.abs().amax(-1, keepdim=True) * (ratio / (grid.top_code // 2))
        return scale, -scale * ((grid.top_code + 1) // 2)
    low, high = weight_RGS.amin(-1, keepdim=True), weight_RGS.amax(-1, keepdim=True)
    scale = (high - low) * (ratio / grid.top_code)
    return scale, (high + low) / 2 - scale * (grid.top_code / 2)


def _refit(
    weight_RGS: torch.Tensor,
    codes_RGS: torch.Tensor,
    importance_GS: torch.Tensor,
    scale: torch.Tensor,
    grid: GridFormat,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted least squares of weight on code; where it has no answer, the old scale stays."""
    if grid.symmetric:
        half = (grid.top_code + 1) // 2
        signed = codes_RGS - half
        fitted = (importance_GS * signed * weight_RGS).sum(-1, keepdim=True)
        square = (importance_GS * signed.square()).sum(-1, keepdim=True)
        fitted = torch.where((square > 0) & (fitted > 0), fitted / square, scale)
        return fitted, -fitted * half
    total = importance_GS.sum(-1, keepdim=True)
    mean_code = (importance_GS * codes_RGS).sum(-1, keepdim=True) / total
    mean_weight = (importance_GS * weight_RGS).sum(-1, keepdim=True) / total
    centred = codes_RGS - mean_code
    weighted = importance_GS * centred
    square = (weighted * centred).sum(-1, keepdim=True)
    fitted = (weighted * weight_RGS).sum(-1, keepdim=True)
    fitted = torch.where((square > 0) & (fitted > 0), fitted / square, scale)
    return fitted, mean_weight - fitted * mean_code


def _as_float16(
    scale: torch.Tensor, bias: torch.Tensor, grid: GridFormat
) -> tuple[torch.Tensor, torch.Tensor]:
    # The reader keeps float16: errors are measured with what it will see.
    scale = scale.clamp(TINY_SCALE, FLOAT16_MAX).half().float()
    if grid.symmetric:
        return scale, -scale * ((grid.top_code + 1) // 2)
    return scale, bias.clamp(-FLOAT16_MAX, FLOAT16_MAX).half().float()


def _encode(weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, grid: GridFormat) -> torch.Tensor:
    return ((weight - bias) / scale).round_().clamp_(0, grid.top_code)


def _spread_factors(second_moment_CC: torch.Tensor) -> torch.Tensor:
    """Upper Cholesky factor of the damped inverse: row j says how column j's error moves the later ones."""
    diagonal = second_moment_CC.diagonal().mean().clamp(min=1e-12)
    damped = second_moment_CC + DAMPING * diagonal * torch.eye(second_moment_CC.shape[0])
    # Any: torch leaves its linear algebra half typed.
    linalg: Any = torch.linalg
    inverse = torch.cholesky_inverse(cast(torch.Tensor, linalg.cholesky(damped)))
    return cast(torch.Tensor, linalg.cholesky(inverse, upper=True))


def _fit_columns(
    group_SR: torch.Tensor, importance_S: torch.Tensor, grid: GridFormat
) -> tuple[torch.Tensor, torch.Tensor]:
    scales: list[torch.Tensor] = []
    biases: list[torch.Tensor] = []
    for chunk_SR in torch.split(group_SR, CHUNK_WEIGHTS // grid.group_size, dim=1):
        scale, bias = fit_grid(chunk_SR.T.contiguous()[:, None], importance_S[None], grid)
        scales.append(scale.flatten())
        biases.append(bias.flatten())
    return torch.cat(scales), torch.cat(biases)


def _round_columns(
    rest_SR: torch.Tensor,
    codes_SR: torch.Tensor,
    scale_R: torch.Tensor,
    bias_R: torch.Tensor,
    spread_SS: torch.Tensor,
    grid: GridFormat,
) -> torch.Tensor:
    """Rounds one group's columns in order, in place; returns the scaled errors for the later groups."""
    errors_SR = torch.empty_like(rest_SR)
    for column in range(rest_SR.shape[0]):
        codes_SR[column] = _encode(rest_SR[column], scale_R, bias_R, grid)
        error_R = rest_SR[column] - (codes_SR[column] * scale_R + bias_R)
        errors_SR[column] = error_R / spread_SS[column, column]
        rest_SR[column + 1 :].addr_(spread_SS[column, column + 1 :], errors_SR[column], alpha=-1.0)
    return errors_SR
