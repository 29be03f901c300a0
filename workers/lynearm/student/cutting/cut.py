"""Makes a student out of some of a teacher's layers, heads, neurons and channels."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import nn

from lynearm.student.checkpoint import save_model
from lynearm.student.cutting.channels import choose_channels
from lynearm.student.cutting.config import CutConfig
from lynearm.student.cutting.layers import (
    drop_by_measurement,
    drop_evenly,
    drop_least_influential,
    drop_others,
)
from lynearm.student.cutting.measuring import mean_kl, measure_profile
from lynearm.student.cutting.progress import CutProgress, CutReport, LayerRow
from lynearm.student.cutting.sequences import CalibrationSequence, default_sequences
from lynearm.student.cutting.shape import DecoderShape, check_decoder, check_width, read_shape
from lynearm.student.cutting.slicing import KeptUnits, make_student
from lynearm.student.cutting.width import Width, choose_heads, choose_units, settle_width, share
from lynearm.student.lineage import JsonObject, read_lineage, write_lineage
from lynearm.student.model import load_causal_lm
from lynearm.student.new_model import new_directory, refuse_used
from lynearm.wire.errors import MisalignmentError
from lynearm.wire.profiles import Float64Array, TeacherProfile
from lynearm.wire.weight_files import weights_revision

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a cut is decided by."""

    profile: TeacherProfile | None = None
    """Of the teacher; measured on the sequences where there is none."""
    sequences: Sequence[CalibrationSequence] = ()
    """Token ids to measure on; two short answers through the chat template if there are none."""


def cut_student(
    teacher_dir: Path,
    out_dir: Path,
    config: CutConfig,
    *,
    evidence: Evidence | None = None,
    on_progress: Callable[[CutProgress], None] = lambda _: None,
) -> CutReport:
    """Write a student that has some of a teacher's weights, and its tokenizer.

    Args:
        teacher_dir: A llama-like causal LM with its tokenizer.
        out_dir: Must not exist, or be empty.
        config: How much to keep.
        evidence: What to decide by.
        on_progress: Called after every choice.

    Raises:
        ConfigError: if the teacher has not what should be kept.
        MisalignmentError: if the profile is of a model of another shape.
        CheckpointError: if the teacher cannot be loaded or cut, or `out_dir` is in use.
    """
    refuse_used(out_dir, "student")
    on_progress(CutProgress(f"loading {teacher_dir.name}"))
    cut = _Cut(teacher_dir, config, evidence or Evidence())
    dropped = cut.choose_layers(on_progress)
    kept = cut.choose_units(dropped)
    on_progress(CutProgress("measuring the student", dropped))
    student = make_student(cut.model, kept, cut.width, shape=cut.shape, directory=teacher_dir)
    kl = mean_kl(cut.model, student, cut.sequences)
    on_progress(CutProgress(f"writing {out_dir}", dropped, kl))
    _write(student, teacher_dir, out_dir, cut.account(kept))
    return CutReport(
        directory=out_dir,
        layers=kept.layers,
        dropped=dropped,
        kl=kl,
        rows=cut.rows(kept),
        parameters=_count(student),
        teacher_parameters=_count(cut.model),
        measured_on=cut.measured_on,
    )


class _Cut:
    """A teacher, what is known of it, and what should be kept."""

    def __init__(self, directory: Path, config: CutConfig, evidence: Evidence) -> None:
        self.model: Any = load_causal_lm(directory).eval()
        check_decoder(self.model, directory)
        if config.narrows:
            check_width(self.model, directory)
        self.shape: DecoderShape = read_shape(self.model.config)
        self.width: Width = settle_width(config, self.shape)
        self.sequences = [*evidence.sequences] or default_sequences(directory)
        self._config = config
        self._revision = weights_revision(directory)
        if evidence.profile is None:
            self._profile = measure_profile(
                self.model, self.sequences, name=directory.resolve().name, revision=self._revision
            )
        else:
            self._profile = evidence.profile
            _check_profile(self._profile, self.shape, config)
        given = "the teacher profile" if evidence.profile else "calibration text"
        self.measured_on = f"{given}, {self._profile.positions:,} positions"
        if self._profile.revision != self._revision:
            logger.warning(
                "the profile is of %r at %s, the teacher in %s is at %s: the choice may not be the best",
                *(self._profile.model, self._profile.revision[:24], directory, self._revision[:24]),
            )

    def choose_layers(self, on_progress: Callable[[CutProgress], None]) -> tuple[int, ...]:
        """Layers to leave out."""
        config, layers = self._config, self.shape.layers
        if config.keep:
            return drop_others(config.keep, layers)
        if not config.layers:
            return ()
        if config.choose == "evenly":
            return drop_evenly(layers, config.layers)
        influence = [self._profile.layers[layer].influence for layer in range(layers)]
        if config.choose == "influence":
            return drop_least_influential(influence, config.layers)
        return drop_by_measurement(
            self.model,
            config.layers,
            sequences=self.sequences,
            influence=influence,
            on_progress=on_progress,
        )

    def choose_units(self, dropped: Sequence[int]) -> KeptUnits:
        """What is kept, of the layers that are not dropped."""
        kept = tuple(layer for layer in range(self.shape.layers) if layer not in dropped)
        heads: tuple[tuple[int, ...], ...] = ()
        neurons: tuple[tuple[int, ...], ...] = ()
        if self.width.heads != self.shape.heads:
            heads = tuple(choose_heads(self._head_importance(one), self.width, self.shape) for one in kept)
        if self.width.neurons != self.shape.neurons:
            neurons = tuple(choose_units(self._neuron_importance(one), self.width.neurons) for one in kept)
        channels = None
        if self.width.hidden_size != self.shape.hidden_size:
            channels = choose_channels(self.model, self.sequences, self.width.hidden_size)
        return KeptUnits(kept, heads, neurons, channels)

    def rows(self, kept: KeptUnits) -> tuple[LayerRow, ...]:
        """Of all the teacher's layers."""
        return tuple(self._row(layer, kept) for layer in range(self.shape.layers))

    def account(self, kept: KeptUnits) -> JsonObject:
        """What a manifest says of the cut."""
        config, shape = self._config, self.shape
        how = "named" if config.keep else config.choose if config.layers else "all"
        account: JsonObject = {"revision": self._revision, "layers": list(kept.layers), "chosen": how}
        if kept.heads:
            account["heads"] = {"of": shape.heads, "kept": [list(heads) for heads in kept.heads]}
        if kept.neurons:
            masks = [_mask(units, shape.neurons) for units in kept.neurons]
            account["neurons"] = {"of": shape.neurons, "kept": self.width.neurons, "masks": masks}
        if kept.channels:
            mask = _mask(kept.channels.kept, shape.hidden_size)
            account["channels"] = {"of": shape.hidden_size, "kept": self.width.hidden_size, "mask": mask}
        profile = self._profile
        account["profile"] = {
            "model": profile.model,
            "revision": profile.revision,
            "positions": profile.positions,
        }
        return account

    def _row(self, layer: int, kept: KeptUnits) -> LayerRow:
        influence = self._profile.layers[layer].influence
        if layer not in kept.layers:
            return LayerRow(layer, influence, kept=False)
        number = kept.layers.index(layer)
        heads = kept.heads[number] if kept.heads else tuple(range(self.shape.heads))
        return LayerRow(
            layer,
            influence,
            kept=True,
            heads=heads,
            neurons=self.width.neurons,
            head_share=share(self._head_importance(layer), heads) if kept.heads else 1.0,
            neuron_share=(
                share(self._neuron_importance(layer), kept.neurons[number]) if kept.neurons else 1.0
            ),
        )

    def _head_importance(self, layer: int) -> Float64Array:
        return self._profile.layers[layer].head_contributions

    def _neuron_importance(self, layer: int) -> Float64Array:
        return self._profile.layers[layer].neuron_activations


def _check_profile(profile: TeacherProfile, shape: DecoderShape, config: CutConfig) -> None:
    """Refuse a profile that cannot be of such a model, or lacks what has to be chosen."""
    if set(profile.layers) != set(range(shape.layers)):
        raise MisalignmentError(
            f"the profile of {profile.model!r} has {len(profile.layers)} layers, the teacher {shape.layers}",
            "give the profile of this teacher, or none: the cut then measures by itself",
        )
    needed = {"head_contribution_sums": shape.heads} if config.heads or config.kv_heads else {}
    needed |= {"neuron_sums": shape.neurons} if config.neurons else {}
    for number, layer in profile.layers.items():
        for name, size in needed.items():
            found = int(getattr(layer, name).size)
            if found != size:
                raise MisalignmentError(
                    f"layer {number} of the profile has {found} {name.split('_')[0]}s, the teacher {size}",
                    "give the profile of this teacher, or none: the cut then measures by itself",
                )


def _mask(units: Sequence[int], count: int) -> str:
    """As hexadecimal digits: bit i, from the lowest, is set where unit i was kept."""
    number = sum(1 << unit for unit in units)
    return f"{number:0{-(-count // 4)}x}"


def _count(model: Any) -> int:
    """Parameters, tied ones once."""
    return sum(parameter.numel() for parameter in cast("nn.Module", model).parameters())


def _write(model: Any, teacher_dir: Path, out_dir: Path, account: Mapping[str, Any]) -> None:
    lineage = read_lineage(teacher_dir) | {
        "name": out_dir.resolve().name,
        "cut_from": {"name": teacher_dir.resolve().name, **account},
    }
    with new_directory(out_dir, "student") as unfinished:
        save_model(model, unfinished, tokenizer_from=teacher_dir)
        write_lineage(unfinished, lineage)
