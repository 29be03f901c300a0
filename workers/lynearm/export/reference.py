"""What torch computes in float32: the yardstick of every export.

Imported by entry functions only, since it loads torch and transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lynearm.export.checkpoint import EMBEDDING, LM_HEAD, Checkpoint
from lynearm.export.held_out import read_held_out
from lynearm.export.parity import (
    DECODE_STEPS,
    DEFAULT_PROMPTS,
    FloatArray,
    HeldOutSequence,
    PackageLogits,
    Parity,
    compare,
    split_for_calibration,
)

# Layers that share an input share its second moments; these are the ones listened to.
_LISTENED = {
    "self_attn.q_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}


@dataclass(frozen=True, slots=True)
class Comparison:
    """A package against torch in float32."""

    parity: Parity
    """With the checkpoint's weights: the price of the bits."""
    fidelity: Parity
    """With the weights that the package stores: the correctness of the package."""
    own: PackageLogits
    """What torch computes from the weights that the package stores."""


class TorchReference:
    """The checkpoint's decoder in torch: float32, eager attention, one sequence at a time.

    Args:
        checkpoint: Where the configuration comes from.
        weights: Float32 weights by Hugging Face name; shared, not copied.
    """

    def __init__(self, checkpoint: Checkpoint, weights: Mapping[str, torch.Tensor]) -> None:
        config: Any = LlamaConfig(**checkpoint.config)
        config._attn_implementation = "eager"
        # On the meta device, since the weights are assigned: a second copy would be thrown away.
        with torch.device("meta"):
            model: Any = LlamaForCausalLM(config)
        self._model = model
        self._tied = checkpoint.architecture.tied
        self.set_weights(weights)
        # Non-persistent buffers (the rotary frequencies) are in no checkpoint: compute them for real.
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
        model.eval()

    def set_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Takes other weights, for example those that a quantised package stores."""
        state = dict(weights)
        if self._tied:
            state[LM_HEAD] = state[EMBEDDING]
        self._model.load_state_dict(state, strict=True, assign=True)

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int], start: int = 0) -> FloatArray:
        """Logits at positions `start` and later of one sequence, shape [T, V]."""
        output = self._model(torch.tensor([list(token_ids)]), logits_to_keep=len(token_ids) - start)
        return cast(FloatArray, output.logits[0].numpy())

    def run(self, sequences: Sequence[HeldOutSequence]) -> PackageLogits:
        """Everything that a package is compared with."""
        full = tuple(self.logits(s.token_ids[:-1], s.completion_start - 1) for s in sequences)
        first = sequences[0]
        greedy = self._greedy(first.token_ids[: first.completion_start])
        return PackageLogits(full, full[0][:DECODE_STEPS], greedy)

    @torch.inference_mode()
    def second_moments(
        self, sequences: Sequence[HeldOutSequence], architecture_layers: int, max_tokens: int
    ) -> dict[str, torch.Tensor]:
        """Mean of x·xᵀ over the inputs x of each linear layer, by weight name, each [C, C] float32.

        A tied embedding gets those of the head. Sequences are used in order up to `max_tokens` tokens; of
        none there are no moments.
        """
        if not sequences:
            return {}
        sums: dict[str, torch.Tensor] = {}
        hooks = [self._listen(name, sums) for name in _listened_modules(architecture_layers)]
        used = 0
        for sequence in sequences:
            ids = sequence.token_ids[: max_tokens - used]
            if not ids:
                break
            self.logits(ids)
            used += len(ids)
        for hook in hooks:
            hook.remove()
        return _by_weight({name: total / used for name, total in sums.items()}, tied=self._tied)

    def _listen(self, name: str, sums: dict[str, torch.Tensor]) -> Any:
        def add(_module: object, inputs: tuple[torch.Tensor, ...]) -> None:
            rows_TC = inputs[0].reshape(-1, inputs[0].shape[-1])
            moment_CC = rows_TC.T @ rows_TC
            sums[name] = sums[name].add_(moment_CC) if name in sums else moment_CC

        return self._model.get_submodule(name).register_forward_pre_hook(add)

    @torch.inference_mode()
    def _greedy(self, prompt_ids: Sequence[int]) -> tuple[int, ...]:
        cache, next_ids, found = None, list(prompt_ids), list[int]()
        for _ in range(DECODE_STEPS):
            output = self._model(
                torch.tensor([next_ids]), past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            cache, next_ids = output.past_key_values, [int(output.logits[0, -1].argmax())]
            found += next_ids
        return tuple(found)

    def compare(
        self,
        found: PackageLogits,
        weights: Mapping[str, torch.Tensor],
        meaning: Mapping[str, torch.Tensor],
        sequences: Sequence[HeldOutSequence],
    ) -> Comparison:
        """How far a package is from the checkpoint, and from what it stores itself.

        Args:
            found: What the package computes from the sequences.
            weights: The checkpoint's, which the reference holds before and after.
            meaning: What the package's stored weights stand for, float32 by Hugging Face name.
            sequences: At least one.
        """
        expected = self.run(sequences)
        self.set_weights(meaning)
        own = self.run(sequences)
        self.set_weights(weights)
        return Comparison(compare(expected, found), compare(own, found), own)


def read_sequences(
    checkpoint: Checkpoint, *, bits: int, rounding: str
) -> tuple[list[HeldOutSequence], list[HeldOutSequence]]:
    """Sequences to calibrate on and to compare on.

    A trainer's held-out traces, or built-in prompts, on which nothing is calibrated. Only 4 bits calibrate:
    at 8, rounding to nearest loses nothing that could be measured.
    """
    held_out = read_held_out(checkpoint.path)
    if not held_out:
        return [], default_sequences(checkpoint)
    if bits == 4 and rounding != "nearest":
        return split_for_calibration(held_out)
    return [], held_out


def default_sequences(checkpoint: Checkpoint) -> list[HeldOutSequence]:
    """The built-in prompts in the checkpoint's own tokens; every position after the first counts."""
    loader: Any = AutoTokenizer
    tokenizer: Any = loader.from_pretrained(str(checkpoint.path), local_files_only=True)
    encoded: list[list[int]] = [tokenizer.encode(text, add_special_tokens=False) for text in DEFAULT_PROMPTS]
    return [HeldOutSequence(tuple(ids), max(1, len(ids) // 3)) for ids in encoded if len(ids) > 1]


def _listened_modules(layers: int) -> list[str]:
    return [*(f"model.layers.{i}.{part}" for i in range(layers) for part in _LISTENED), "lm_head"]


def _by_weight(moments: dict[str, torch.Tensor], *, tied: bool) -> dict[str, torch.Tensor]:
    named = {EMBEDDING if tied else LM_HEAD: moments.pop("lm_head")}
    for name, moment in moments.items():
        prefix, part = name.rsplit(".", 2)[0], ".".join(name.rsplit(".", 2)[1:])
        named |= {f"{prefix}.{sharer}.weight": moment for sharer in _LISTENED[part]}
    return named
