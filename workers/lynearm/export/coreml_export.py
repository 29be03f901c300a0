"""Writes a checkpoint as a stateful Core ML package, and checks what the saved program computes."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lynearm.export.checkpoint import (
    Checkpoint,
    load_weights,
    norm_weight_names,
    read_checkpoint,
)
from lynearm.export.config import CoreMlExportConfig
from lynearm.export.held_out import find_checkpoint
from lynearm.export.package_files import copy_tokenizer, write_config
from lynearm.export.parity import (
    HeldOutSequence,
    Parity,
    check_fidelity,
    check_loss,
    select_sequences,
)
from lynearm.export.progress import ExportProgress, OnProgress, ignore_progress
from lynearm.export.staging import MARKER_FILE, directory_size_bytes, staged_directory, write_json
from lynearm.wire.errors import CheckpointError, InvalidInputError

if TYPE_CHECKING:
    import torch

    from lynearm.export.mil_llama import StoredWeight
    from lynearm.export.reference import TorchReference

ACTIVATION_DTYPE = "float16"
"""Of activations and caches; norms compute in float32."""


@dataclass(frozen=True, slots=True)
class CoreMlExport:
    """A package that was written, and whose saved program computes what it should.

    "Computes" in an interpreter of the saved program: it was not run on Apple hardware.
    """

    path: Path
    """The directory that holds the `.mlpackage`."""
    size_bytes: int
    bits: int
    parity: Parity | None
    """Against the checkpoint in float32: the price of the bits. None where it was not checked."""
    fidelity: Parity | None
    """Against the weights that the package stores, in torch float32: the correctness of the package."""
    package: Path
    """The `.mlpackage` itself."""
    context_length: int
    """Tokens that the key-value cache holds."""


@dataclass(frozen=True, slots=True)
class _Stored:
    """What a package stores, and what that stands for."""

    weights: dict[str, StoredWeight]
    meaning: dict[str, torch.Tensor]
    """Float32 weights by Hugging Face name."""


def export_coreml(
    checkpoint: Path,
    out: Path,
    config: CoreMlExportConfig | None = None,
    on_progress: OnProgress = ignore_progress,
) -> CoreMlExport:
    """Write a checkpoint as a directory with a `.mlpackage` for iOS 18 and macOS 15, tokenizer and card.

    Calibrates on, and compares with, the held-out traces that a lynearm trainer left in the checkpoint;
    without them, built-in prompts are compared and nothing is calibrated. The comparison executes the saved
    file in an interpreter, whole sequences and cached steps, since Core ML runs on Apple hardware only.

    Args:
        checkpoint: Directory in Hugging Face layout, or the output of a training run.
        out: Directory to make; replaced if lynearm wrote it. The package in it takes its name.
        config: Bits and the like. A context longer than the checkpoint's positions is cut to them.
        on_progress: Called as each stage begins.

    Raises:
        CheckpointError: if the checkpoint is incomplete, of another architecture or beyond float16's range.
        InvalidInputError: if the block size does not fit, no held-out sequence fits into the context, or
            `out` holds something else.
        ParityError: if the saved program does not compute what it should; nothing is left at `out`.
        MissingDependencyError: if torch, safetensors or coremltools is not installed.
    """
    config = config or CoreMlExportConfig()
    _check_name(out)
    on_progress(ExportProgress("loading", 0.0))
    source = read_checkpoint(find_checkpoint(checkpoint))
    config = replace(config, context_length=min(config.context_length, source.architecture.max_positions))
    weights = load_weights(source)
    # Imported before anything is computed, to say at once where it is missing.
    importlib.import_module("lynearm.export.coreml_library")
    from lynearm.export.reference import TorchReference

    reference = TorchReference(source, weights)
    calibrate, measure = _choose_sequences(source, config)
    name = f"{out.name}.mlpackage"
    with staged_directory(out, overwrite=config.overwrite) as staging:
        on_progress(ExportProgress("quantising" if config.bits < 16 else "casting", 0.2))
        stored = _store(source, weights, config, reference, calibrate)
        on_progress(ExportProgress("converting", 0.4))
        _write_package(staging / name, source, stored, config)
        result = CoreMlExport(out, 0, config.bits, None, None, out / name, config.context_length)
        if config.check_parity:
            on_progress(ExportProgress("comparing", 0.7))
            result = _check(staging, result, reference, weights, stored, measure)
        _describe(staging, source, result)
    on_progress(ExportProgress("done", 1.0))
    return replace(result, size_bytes=directory_size_bytes(out))


def _check_name(out: Path) -> None:
    if out.suffix in (".mlpackage", ".mlmodelc"):
        raise InvalidInputError(
            f"{out} is the name of a package", f"name a directory for package and card: {out.stem}"
        )


def _choose_sequences(
    source: Checkpoint, config: CoreMlExportConfig
) -> tuple[list[HeldOutSequence], list[HeldOutSequence]]:
    """Sequences to calibrate on and to compare on."""
    from lynearm.export.reference import read_sequences

    calibrate, measure = read_sequences(source, bits=config.bits, rounding=config.rounding)
    measure = select_sequences(measure, config.parity_tokens, config.context_length)
    if config.check_parity and not measure:
        raise InvalidInputError(
            f"no sequence to compare on fits into a context of {config.context_length} tokens",
            "set a longer context_length",
        )
    return calibrate, measure


def _store(
    source: Checkpoint,
    weights: dict[str, torch.Tensor],
    config: CoreMlExportConfig,
    reference: TorchReference,
    calibrate: Sequence[HeldOutSequence],
) -> _Stored:
    layers = source.architecture.num_layers
    moments = reference.second_moments(calibrate, layers, config.calibration_tokens)
    norms = set(norm_weight_names(source.architecture))
    stored = _Stored({}, {})
    for name, weight in weights.items():
        if config.bits == 16 or name in norms:
            half = weight.half()
            if not bool(half.isfinite().all()):
                raise CheckpointError(f"{name} exceeds the range of float16", "export to MLX as bfloat16")
            stored.weights[name], stored.meaning[name] = half.numpy(), half.float()
        else:
            _store_quantised(stored, name, weight, config, moments.get(name))
    return stored


def _store_quantised(
    stored: _Stored,
    name: str,
    weight: torch.Tensor,
    config: CoreMlExportConfig,
    moment: torch.Tensor | None,
) -> None:
    import torch

    from lynearm.export.mil_llama import BlockQuantised
    from lynearm.export.quantise import GridFormat, quantise

    grid = GridFormat(config.bits, config.block_size, symmetric=True)
    quantised = quantise(weight, grid, moment)
    signed = (quantised.codes_RC.to(torch.int16) - (grid.top_code + 1) // 2).to(torch.int8)
    scales = quantised.scales_RG.half()
    stored.weights[name] = BlockQuantised(signed.numpy(), scales.numpy(), config.bits)
    stored.meaning[name] = quantised.dequantise()


def _write_package(package: Path, source: Checkpoint, stored: _Stored, config: CoreMlExportConfig) -> None:
    from lynearm.export.coreml_package import save_program, write_metadata
    from lynearm.export.mil_llama import build_program

    save_program(build_program(source.architecture, stored.weights, config.context_length), package)
    write_metadata(package, source, config.hub_id or source.path.name, f"weights of {config.bits} bits")
    copy_tokenizer(package.parent, source)
    write_config(package.parent, source, ACTIVATION_DTYPE, None)


def _check(
    directory: Path,
    result: CoreMlExport,
    reference: TorchReference,
    weights: dict[str, torch.Tensor],
    stored: _Stored,
    measure: Sequence[HeldOutSequence],
) -> CoreMlExport:
    """The result with both distances, which are within their limits; adds the check for a Mac."""
    from lynearm.export.coreml_package import write_mac_check
    from lynearm.export.coreml_run import run_coreml

    found = run_coreml(directory / result.package.name, measure)
    comparison = reference.compare(found, weights, stored.meaning, measure)
    check_fidelity(comparison.fidelity, ACTIVATION_DTYPE, result.path)
    check_loss(comparison.parity, result.bits, result.path)
    write_mac_check(directory, measure[0], comparison.own)
    return replace(result, parity=comparison.parity, fidelity=comparison.fidelity)


def _describe(directory: Path, source: Checkpoint, result: CoreMlExport) -> None:
    from lynearm.export.coreml_package import write_card

    facts = {
        "weights": f"{result.bits} bits",
        "activations and caches": ACTIVATION_DTYPE,
        "context": f"{result.context_length} tokens",
    }
    if result.parity is not None:
        facts["against the checkpoint in float32"] = result.parity.summary()
    write_card(directory, source, result.package.name, facts)
    write_json(
        directory / MARKER_FILE,
        {
            "format": "coreml",
            "checkpoint": source.path.name,
            "package": result.package.name,
            "bits": result.bits,
            "context_length": result.context_length,
            "dtype": ACTIVATION_DTYPE,
            "run_on_apple_hardware": False,
            "parity": None if result.parity is None else asdict(result.parity),
            "fidelity": None if result.fidelity is None else asdict(result.fidelity),
            "lineage": source.lineage,
        },
    )
