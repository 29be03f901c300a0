"""Writes a checkpoint as an MLX package, and checks what stock mlx_lm computes from it."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lynearm.export.checkpoint import (
    EMBEDDING,
    Checkpoint,
    linear_weight_names,
    load_weights,
    norm_weight_names,
    read_checkpoint,
)
from lynearm.export.config import MlxExportConfig
from lynearm.export.held_out import find_checkpoint
from lynearm.export.package_files import copy_tokenizer, write_card, write_config, write_tensors
from lynearm.export.parity import (
    HeldOutSequence,
    Parity,
    check_fidelity,
    check_loss,
    select_sequences,
)
from lynearm.export.progress import ExportProgress, OnProgress, ignore_progress
from lynearm.export.staging import MARKER_FILE, directory_size_bytes, staged_directory, write_json
from lynearm.wire.errors import MissingDependencyError

if TYPE_CHECKING:
    import torch

    from lynearm.export.reference import TorchReference

logger = logging.getLogger(__name__)

DEFAULT_GROUP_SIZES = {4: 32, 8: 64}
"""At 4 bits a scale and bias for each 32 weights, one bit per weight more than for 128, is what small models
need: SmolLM2-135M's KL falls from 0.50 at 64 to 0.42."""

FLOAT16_MAX = 65504.0


@dataclass(frozen=True, slots=True)
class MlxExport:
    """A package that was written and found to compute what it should."""

    path: Path
    size_bytes: int
    bits: int
    group_size: int
    """0 at 16 bits."""
    dtype: str
    """Of activations and of what is not quantised."""
    parity: Parity | None
    """Against the checkpoint in float32: the price of the bits. None where it was not checked."""
    fidelity: Parity | None
    """Against the weights that the package stores, in torch float32: the correctness of the package."""


@dataclass(frozen=True, slots=True)
class _Stored:
    """What a package stores, and what that stands for."""

    tensors: dict[str, torch.Tensor]
    """As they lie in the file."""
    meaning: dict[str, torch.Tensor]
    """Float32 weights by Hugging Face name."""


def export_mlx(
    checkpoint: Path,
    out: Path,
    config: MlxExportConfig | None = None,
    on_progress: OnProgress = ignore_progress,
) -> MlxExport:
    """Write a checkpoint as a directory that stock `mlx_lm.load` reads.

    Calibrates on, and compares with, the held-out traces that a lynearm trainer left in the checkpoint;
    without them, built-in prompts are compared and nothing is calibrated.

    Args:
        checkpoint: Directory in Hugging Face layout, or the output of a training run.
        out: Directory to make; replaced if lynearm wrote it.
        config: Bits and the like.
        on_progress: Called as each stage begins.

    Raises:
        CheckpointError: if the checkpoint is incomplete or of another architecture.
        InvalidInputError: if the group size does not fit, or `out` holds something else.
        ParityError: if the package does not compute what it should; nothing is left at `out`.
        MissingDependencyError: if torch, safetensors or mlx_lm is not installed.
    """
    config = config or MlxExportConfig()
    on_progress(ExportProgress("loading", 0.0))
    _check_mlx()
    source = read_checkpoint(find_checkpoint(checkpoint))
    weights = load_weights(source)
    from lynearm.export.reference import TorchReference, read_sequences

    calibrate, measure = read_sequences(source, bits=config.bits, rounding=config.rounding)
    measure = select_sequences(measure, config.parity_tokens, source.architecture.max_positions)
    reference = TorchReference(source, weights)
    dtype = _choose_dtype(config, weights)
    with staged_directory(out, overwrite=config.overwrite) as staging:
        on_progress(ExportProgress("quantising" if config.bits < 16 else "casting", 0.2))
        stored = _store(source, weights, config, dtype, reference, calibrate)
        _write_package(staging, source, stored, config, dtype)
        result = MlxExport(out, 0, config.bits, _group_size(config), dtype, None, None)
        if config.check_parity:
            on_progress(ExportProgress("comparing", 0.6))
            result = _check(staging, result, reference, weights, stored, measure)
        _describe(staging, source, result)
    on_progress(ExportProgress("done", 1.0))
    return replace(result, size_bytes=directory_size_bytes(out))


def _check_mlx() -> None:
    if importlib.util.find_spec("mlx_lm") is None:
        raise MissingDependencyError("mlx_lm is not installed", "pip install 'lynearm[mlx]'")


def _choose_dtype(config: MlxExportConfig, weights: dict[str, torch.Tensor]) -> str:
    if config.dtype != "auto":
        return config.dtype
    # float16 has eight times bfloat16's precision, but less range.
    largest = max(float(weight.abs().max()) for weight in weights.values())
    return "float16" if largest < FLOAT16_MAX else "bfloat16"


def _group_size(config: MlxExportConfig) -> int:
    if config.bits == 16:
        return 0
    return config.group_size or DEFAULT_GROUP_SIZES[config.bits]


def _store(
    source: Checkpoint,
    weights: dict[str, torch.Tensor],
    config: MlxExportConfig,
    dtype: str,
    reference: TorchReference,
    calibrate: Sequence[HeldOutSequence],
) -> _Stored:
    import torch

    kind: torch.dtype = getattr(torch, dtype)
    if config.bits == 16:
        cast_weights = {name: weight.to(kind) for name, weight in weights.items()}
        return _Stored(cast_weights, {name: weight.float() for name, weight in cast_weights.items()})
    from lynearm.export.quantise import GridFormat, pack_words, quantise

    grid = GridFormat(config.bits, _group_size(config), symmetric=False)
    layers = source.architecture.num_layers
    moments = reference.second_moments(calibrate, layers, config.calibration_tokens)
    stored = _Stored({}, {})
    for name in norm_weight_names(source.architecture):
        stored.tensors[name] = weights[name].to(kind)
        stored.meaning[name] = stored.tensors[name].float()
    for name in [EMBEDDING, *linear_weight_names(source.architecture)]:
        quantised = quantise(weights[name], grid, moments.get(name))
        prefix = name.removesuffix(".weight")
        stored.tensors[name] = pack_words(quantised.codes_RC, config.bits).view(torch.uint32)
        stored.tensors[f"{prefix}.scales"] = quantised.scales_RG.to(kind)
        stored.tensors[f"{prefix}.biases"] = quantised.biases_RG.to(kind)
        stored.meaning[name] = quantised.dequantise()
    return stored


def _write_package(
    directory: Path, source: Checkpoint, stored: _Stored, config: MlxExportConfig, dtype: str
) -> None:
    quantization = None
    if config.bits < 16:
        quantization = {"group_size": _group_size(config), "bits": config.bits, "mode": "affine"}
    write_tensors(directory, stored.tensors)
    write_config(directory, source, dtype, quantization)
    copy_tokenizer(directory, source)


def _check(
    directory: Path,
    result: MlxExport,
    reference: TorchReference,
    weights: dict[str, torch.Tensor],
    stored: _Stored,
    measure: Sequence[HeldOutSequence],
) -> MlxExport:
    """The result with both distances, which are within their limits."""
    from lynearm.export.mlx_run import run_mlx

    comparison = reference.compare(run_mlx(directory, measure), weights, stored.meaning, measure)
    check_fidelity(comparison.fidelity, result.dtype, result.path)
    check_loss(comparison.parity, result.bits, result.path)
    return replace(result, parity=comparison.parity, fidelity=comparison.fidelity)


def _describe(directory: Path, source: Checkpoint, result: MlxExport) -> None:
    facts = {"weights": f"{result.bits} bits", "activations": result.dtype}
    if result.group_size:
        facts["weights"] += f", a scale and bias per {result.group_size}"
    if result.parity is not None:
        facts["against the checkpoint in float32"] = result.parity.summary()
    write_card(directory, source, facts)
    write_json(
        directory / MARKER_FILE,
        {
            "format": "mlx",
            "checkpoint": source.path.name,
            "bits": result.bits,
            "group_size": result.group_size,
            "dtype": result.dtype,
            "parity": None if result.parity is None else asdict(result.parity),
            "fidelity": None if result.fidelity is None else asdict(result.fidelity),
            "lineage": source.lineage,
        },
    )
