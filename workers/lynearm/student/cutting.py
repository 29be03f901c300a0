"""A student made of some of its teacher's layers: the rest is left out, and what is left heals in training.

Which layers to leave out is measured. Block influence (1 − cos of a layer's input and output; Men et al.,
ShortGPT, 2024) costs one pass and names the layers that are worth a try; the KL to the whole teacher decides,
one layer after the other, given those that are gone already.
"""

from __future__ import annotations

import hashlib
import heapq
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lynearm.student.checkpoint import save_model
from lynearm.student.lineage import read_lineage, write_lineage
from lynearm.student.model import load_causal_lm
from lynearm.wire.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)

EXTRA_CANDIDATES = 6
"""Layers that are tried beyond the number to leave out, by least influence."""

CALIBRATION = (
    (
        "Mia has 14 marbles and buys 9 more. Why does she have 23 now?",
        "Mia starts with 14 marbles. She buys 9 more, so she has 14 + 9 = 23 marbles.",
    ),
    (
        "Write a Python function that doubles a number.",
        "```python\ndef double(x):\n    return 2 * x\n```\nCall it with any number to get twice its value.",
    ),
)
"""Questions and answers that candidates are measured on when no sequences are given. About 60 positions: each
costs half a forward pass for every candidate."""


@dataclass(frozen=True, slots=True)
class CalibrationSequence:
    """Token ids that layers are measured on."""

    token_ids: tuple[int, ...]
    completion_start: int
    """Index of the first token whose prediction counts; at least 1."""


@dataclass(frozen=True, slots=True)
class CutProgress:
    """How far a cut is."""

    message: str
    dropped: tuple[int, ...] = ()
    """Layers left out so far, in the order of their choice."""
    kl: float | None = None
    """KL to the teacher without them, nats per position."""


@dataclass(frozen=True, slots=True)
class CutReport:
    """What was cut."""

    directory: Path
    layers: tuple[int, ...]
    """The teacher's layers that were kept, ascending."""
    dropped: tuple[int, ...]
    """The others; in the order of their choice where they were chosen by measurement."""
    kl: float | None
    """KL to the teacher on the calibration sequences, nats per position; None where nothing was measured."""


@dataclass(frozen=True, slots=True)
class _Chosen:
    dropped: tuple[int, ...]
    kl: float | None = None


def cut_student(
    teacher_dir: Path,
    out_dir: Path,
    *,
    layers: Sequence[int] | None = None,
    num_layers: int | None = None,
    sequences: Sequence[CalibrationSequence] = (),
    on_progress: Callable[[CutProgress], None] = lambda _: None,
) -> CutReport:
    """Write a student that has some of a teacher's layers, its embeddings, head and tokenizer.

    Args:
        teacher_dir: A llama-like causal LM with its tokenizer.
        out_dir: Must not exist, or be empty.
        layers: The layers to keep. Give these or `num_layers`.
        num_layers: How many to keep, chosen by measurement.
        sequences: What to measure on; `CALIBRATION` through the chat template if not given.
        on_progress: Called after every choice.

    Raises:
        ConfigError: if the layers are not the teacher's, or both or neither of the two are given.
        CheckpointError: if the teacher cannot be loaded or cut, or `out_dir` is in use.
    """
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise CheckpointError(f"{out_dir} is in use", "name a new directory for the student")
    on_progress(CutProgress(f"loading {teacher_dir.name}"))
    model = load_causal_lm(teacher_dir)
    decoder = _Decoder(model, teacher_dir)
    if (layers is None) == (num_layers is None):
        raise ConfigError("give either the layers to keep or their number")
    if layers is not None:
        chosen = _check_layers(layers, decoder.num_layers)
    else:
        measured = [*sequences] or _calibration_sequences(teacher_dir)
        chosen = _choose(decoder, cast(int, num_layers), measured, on_progress)
    kept = tuple(layer for layer in range(decoder.num_layers) if layer not in chosen.dropped)
    on_progress(CutProgress(f"writing {out_dir}", chosen.dropped, chosen.kl))
    decoder.keep(kept)
    _write(model, teacher_dir, out_dir, kept)
    return CutReport(out_dir, kept, chosen.dropped, chosen.kl)


class _Decoder:
    """A llama-like decoder, run layer by layer.

    Shape legend: B = sequences, L = padded length, H = width, V = vocabulary, N = positions that count.
    """

    def __init__(self, model: Any, directory: Path) -> None:
        base = model.base_model
        if not all(hasattr(base, part) for part in ("embed_tokens", "layers", "norm", "rotary_emb")):
            raise CheckpointError(
                f"{directory} is a {type(model).__name__}, whose layers cannot be run one by one",
                "cut a llama-like model, or give a student made otherwise",
            )
        self._model = model.eval()
        self._base = base
        self.num_layers = len(base.layers)

    def embed(self, input_ids_BL: Tensor) -> Tensor:
        """Input of the first layer, [B, L, H]."""
        return cast(Tensor, self._base.embed_tokens(input_ids_BL))

    def run(self, states_BLH: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """Inputs of each of the layers, then the output of the last."""
        positions = torch.arange(states_BLH.shape[1])[None]
        rotary = self._base.rotary_emb(states_BLH, positions)
        inputs: list[Tensor] = []
        for layer in layers:
            inputs.append(states_BLH)
            output = self._base.layers[layer](
                states_BLH, attention_mask=None, position_ids=positions, position_embeddings=rotary
            )
            states_BLH = cast(Tensor, output[0] if isinstance(output, tuple) else output)
        return [*inputs, states_BLH]

    def logprobs(self, states_BLH: Tensor, counted_BL: Tensor) -> Tensor:
        """Log-softmax at the positions that count, [N, V]."""
        logits_NV = self._model.get_output_embeddings()(self._base.norm(states_BLH[counted_BL]))
        return torch.log_softmax(cast(Tensor, logits_NV), -1)

    def keep(self, layers: Sequence[int]) -> None:
        """Leave only these layers, renumbered."""
        kept = [self._base.layers[layer] for layer in layers]
        for index, layer in enumerate(kept):
            for module in cast("Iterable[Any]", layer.modules()):
                if hasattr(module, "layer_idx"):
                    module.layer_idx = index
        self._base.layers = nn.ModuleList(kept)
        config = self._model.config
        config.num_hidden_layers = len(kept)
        if getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[layer] for layer in layers]


def _check_layers(layers: Sequence[int], available: int) -> _Chosen:
    wrong = [layer for layer in layers if not 0 <= layer < available]
    if wrong or not layers or len(set(layers)) != len(layers):
        raise ConfigError(
            f"layers {list(layers)} are not different layers of a teacher that has 0 to {available - 1}"
        )
    return _Chosen(tuple(layer for layer in range(available) if layer not in layers))


@torch.no_grad()
def _choose(
    decoder: _Decoder,
    num_layers: int,
    sequences: Sequence[CalibrationSequence],
    on_progress: Callable[[CutProgress], None],
) -> _Chosen:
    """Leave out the layer whose loss raises the KL least, until `num_layers` are left.

    The KL without a layer hardly ever falls as others go, so that a value from an earlier round is a lower
    bound, and a candidate that beats all bounds needs no further comparison.
    """
    if not 1 <= num_layers <= decoder.num_layers:
        raise ConfigError(f"num_layers is {num_layers}, expected 1 to {decoder.num_layers}")
    trial = _Trial(decoder, sequences)
    wanted = decoder.num_layers - num_layers
    chosen = _Chosen((), 0.0)
    bounds = [(0.0, layer) for layer in trial.least_influential(wanted + EXTRA_CANDIDATES)]
    while len(chosen.dropped) < wanted:
        on_progress(CutProgress(f"{wanted - len(chosen.dropped)} layers to go", chosen.dropped, chosen.kl))
        trial.prepare(chosen.dropped)
        fresh: set[int] = set()
        while bounds[0][1] not in fresh:
            layer = bounds[0][1]
            heapq.heapreplace(bounds, (trial.kl_without(layer), layer))
            fresh.add(layer)
        kl, layer = heapq.heappop(bounds)
        chosen = _Chosen((*chosen.dropped, layer), kl)
        logger.info("left out layer %d: KL %.3f", layer, kl)
    return chosen


class _Trial:
    """Measures the teacher without some layers against the whole teacher."""

    def __init__(self, decoder: _Decoder, sequences: Sequence[CalibrationSequence]) -> None:
        self._decoder = decoder
        longest = max(len(sequence.token_ids) for sequence in sequences)
        input_ids_BL = torch.zeros(len(sequences), longest, dtype=torch.int64)
        self._real_BL = torch.zeros(len(sequences), longest, dtype=torch.bool)
        self._counted_BL = torch.zeros_like(self._real_BL)
        for row, sequence in enumerate(sequences):
            length = len(sequence.token_ids)
            input_ids_BL[row, :length] = torch.tensor(sequence.token_ids)
            self._real_BL[row, :length] = True
            self._counted_BL[row, max(0, sequence.completion_start - 1) : length - 1] = True
        self._layers = tuple(range(decoder.num_layers))
        self._inputs = decoder.run(decoder.embed(input_ids_BL), self._layers)
        self._teacher_NV = decoder.logprobs(self._inputs[-1], self._counted_BL)

    def least_influential(self, count: int) -> list[int]:
        """Layers that turn their input least, but for the first, which every later one builds on."""
        real = [states_BLH[self._real_BL] for states_BLH in self._inputs]
        influence = [
            1.0 - float(torch.cosine_similarity(real[layer], real[layer + 1], dim=-1).mean())
            for layer in self._layers
        ]
        return sorted(self._layers[1:], key=lambda layer: influence[layer])[:count]

    def prepare(self, dropped: Sequence[int]) -> None:
        """Take these layers as gone for good."""
        kept = tuple(layer for layer in self._layers if layer not in dropped)
        if len(kept) < len(self._layers):
            first = next(index for index, layer in enumerate(self._layers) if layer in dropped)
            tail = self._decoder.run(self._inputs[first], kept[first:])
            self._inputs = [*self._inputs[:first], *tail]
            self._layers = kept

    def kl_without(self, layer: int) -> float:
        """KL(teacher ‖ what is left without `layer` too), nats per position."""
        index = self._layers.index(layer)
        states_BLH = self._decoder.run(self._inputs[index], self._layers[index + 1 :])[-1]
        left_NV = self._decoder.logprobs(states_BLH, self._counted_BL)
        kl_N = (self._teacher_NV.exp() * (self._teacher_NV - left_NV)).sum(-1)
        return float(kl_N.mean())


def _calibration_sequences(teacher_dir: Path) -> list[CalibrationSequence]:
    from transformers import AutoTokenizer

    loader: Any = AutoTokenizer  # half typed
    tokenizer: Any = loader.from_pretrained(str(teacher_dir), local_files_only=True)
    sequences: list[CalibrationSequence] = []
    for question, answer in CALIBRATION:
        prompt = f"{question}\n"
        if tokenizer.chat_template is not None:
            messages = [{"role": "user", "content": question}]
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompt_ids = cast("list[int]", tokenizer.encode(prompt, add_special_tokens=False))
        answer_ids = cast("list[int]", tokenizer.encode(answer, add_special_tokens=False))
        sequences.append(CalibrationSequence((*prompt_ids, *answer_ids), len(prompt_ids)))
    return sequences


def _write(model: Any, teacher_dir: Path, out_dir: Path, kept: tuple[int, ...]) -> None:
    lineage = read_lineage(teacher_dir) | {
        "name": out_dir.resolve().name,
        "cut_from": {
            "name": teacher_dir.resolve().name,
            "revision": f"sha256:{_weights_sha256(teacher_dir)}",
            "layers": list(kept),
        },
    }
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}-", dir=out_dir.parent))
        unfinished.chmod(0o755)  # mkdtemp makes it private; a model is not
        try:
            save_model(model, unfinished, tokenizer_from=teacher_dir)
            write_lineage(unfinished, lineage)
            os.replace(unfinished, out_dir)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"student {out_dir} could not be written: {error}", "make room") from error


def _weights_sha256(directory: Path) -> str:
    """Over names and digests of the weight files: the revision that a teacher of the directory has."""
    digest = hashlib.sha256()
    for path in sorted([*directory.glob("*.safetensors"), *directory.glob("*.bin")]):
        with path.open("rb") as file:
            digest.update(f"{path.name}\n".encode())
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
