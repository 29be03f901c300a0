"""The student as the trainer sees it: states under an output head, and a tokenizer's identity."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from lynearm.student.adapters import Adapter, add_adapter, find_base, load_adapter
from lynearm.student.lora_settings import LoraSettings
from lynearm.wire.errors import CheckpointError, ConfigError
from lynearm.wire.hidden import FINAL_NORM, Layer
from lynearm.wire.specs import TokenizerSpec, hash_chat_template, hash_vocab

if TYPE_CHECKING:
    from lynearm.student.sharding import Shards

_PLAIN_HEAD_TOLERANCE = 1e-3
"""Largest difference of logits that rounding explains; a soft cap or a logit scale is far above."""

_PACKED_TOLERANCE = 1e-4
_PACKED_HALF_TOLERANCE = 3e-2
"""Parts of the largest state that another order of summation explains; a leak is of order 1."""


@dataclass(frozen=True, slots=True)
class StudentModel:
    """A transformers causal LM in float32, split into its decoder and its output head."""

    directory: Path
    """Where it was loaded from; its tokenizer files are there."""
    model: Any
    """The transformers model; untyped, since every architecture has its own class."""
    tokenizer: TokenizerSpec
    device: torch.device
    compute_dtype: torch.dtype
    """Of the decoder's matrix products; weights stay float32."""
    adapter: Adapter | None = None
    """What is trained on the model, where that is an adapter; within `model` already."""
    shards: Shards | None = None
    """What gathers the parameters, where they are spread over the ranks: `head_weight` and `head_bias` are
    then whole only after `hidden_states`, until the backward pass has ended."""

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return int(self.head_weight.shape[0])

    @property
    def head_weight(self) -> Tensor:
        """Weight of the output head, [V, H]."""
        return cast(Tensor, self.model.get_output_embeddings().weight)

    @property
    def head_bias(self) -> Tensor | None:
        """Bias of the output head, [V]."""
        return cast("Tensor | None", getattr(self.model.get_output_embeddings(), "bias", None))

    @property
    def hidden_size(self) -> int:
        """H."""
        return int(self.head_weight.shape[1])

    @property
    def decoder_layers(self) -> Sequence[nn.Module]:
        """In their order; none where the architecture does not hold them as its `layers`."""
        return cast("Sequence[nn.Module]", getattr(self.model.base_model, "layers", ()))

    def hidden_states(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """What the output head is applied to, [B, L, H].

        Args:
            input_ids: [B, L], padded at the end: causal attention keeps padding from what is before it.
            position_ids: [B, L], for rows that hold several sequences end to end: 0 where one begins. Only
                for models that `packs_without_leaks`.
        """
        with torch.autocast(
            self.device.type, self.compute_dtype, enabled=self.compute_dtype != torch.float32
        ):
            decode = self.model.base_model if self.shards is None else self.shards.decode
            outputs = decode(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        return cast(Tensor, outputs.last_hidden_state)

    def layer_states(
        self, input_ids: Tensor, position_ids: Tensor | None, layers: Sequence[Layer]
    ) -> tuple[Tensor, list[Tensor]]:
        """`hidden_states`, and the states of some layers from the same pass, [B, L, H] each.

        Those of a decoder layer are the residual stream behind it, as a stream has them: what transformers
        returns as `hidden_states[layer + 1]`, but for the last layer, where that is the final norm's output
        already, and which is why they are taken at the layers themselves.

        Args:
            input_ids: As there.
            position_ids: As there.
            layers: Numbers of `decoder_layers`, or "norm" for what the output head is applied to.
        """
        found: dict[Layer, Tensor] = {}
        numbers = [layer for layer in layers if layer != FINAL_NORM]
        hooks = [
            self.decoder_layers[number].register_forward_hook(_keep(number, found)) for number in numbers
        ]
        try:
            found[FINAL_NORM] = self.hidden_states(input_ids, position_ids)
        finally:
            for hook in hooks:
                hook.remove()
        return found[FINAL_NORM], [found[layer] for layer in layers]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Name and parameter, each parameter once though it may be tied."""
        if self.shards is not None:
            self.shards.reshard()
        return cast("Iterator[tuple[str, nn.Parameter]]", self.model.named_parameters())

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """What the optimizer changes, by name, in the model's order."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def freeze_embeddings(self) -> None:
        """Leave token embeddings and output head as they are."""
        for module in (self.model.get_input_embeddings(), self.model.get_output_embeddings()):
            for parameter in cast("Iterable[nn.Parameter]", module.parameters()):
                parameter.requires_grad_(False)

    def checkpoint_gradients(self) -> None:
        """Compute each layer again in the backward pass, instead of keeping what it computed.

        Raises:
            ConfigError: if the architecture cannot.
        """
        if not getattr(self.model, "supports_gradient_checkpointing", False):
            raise ConfigError(
                f"{type(self.model).__name__} has no gradient checkpointing", "train without it"
            )
        # The reentrant kind leaves out layers whose input needs no gradient, as behind frozen embeddings.
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def train(self, training: bool) -> None:
        """Turn dropout on or off."""
        self.model.train(training)


def load_student(
    directory: Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    on_host: bool = False,
    lora: LoraSettings | None = None,
    seed: int = 0,
) -> StudentModel:
    """Load a causal LM with its tokenizer, or an adapter on its base.

    Args:
        directory: In the layout of transformers' `save_pretrained`, or an adapter in peft's.
        device: A torch device; "auto" is CUDA where there is one, else the CPU.
        dtype: "float32", "bfloat16", or "auto": bfloat16 on CUDA.
        on_host: Leave the weights on the CPU, for `shard_student` to spread over the devices.
        lora: Put a new adapter of this kind on it.
        seed: Of the new adapter.

    Raises:
        CheckpointError: if there is no such model, its logits are not a plain head over its states, or the
            base of an adapter is not there.
        ConfigError: if no adapter of this kind fits, or there is one already; or torch has no such device.
        MissingDependencyError: if an adapter needs peft, and it is not installed.
    """
    base = find_base(directory)
    if not (base / "config.json").is_file():
        raise CheckpointError(
            f"{directory} is not a model: it has no config.json",
            "name a directory with config.json, model.safetensors and a tokenizer",
        )
    place = _choose_device(device)
    half = dtype == "bfloat16" or (dtype == "auto" and place.type == "cuda")
    tokenizer = read_tokenizer_spec(directory)
    model = load_causal_lm(base)
    adapter = _put_adapter(model, directory, base=base, lora=lora, seed=seed)
    if not on_host:
        model = model.to(place)
    compute_dtype = torch.bfloat16 if half else torch.float32
    student = StudentModel(directory, model, tokenizer, place, compute_dtype, adapter)
    _check_plain_head(student)
    return student


def _choose_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(name)
        torch.empty(0, device=place)
    # torch without CUDA raises AssertionError, and RuntimeError for a name or a number that is none.
    except (AssertionError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"device is {name!r}, which torch cannot use here ({reason})",
            'train with "cpu" or "auto", or install torch for this device and see that the system has it',
        ) from error
    return place


def packs_without_leaks(student: StudentModel) -> bool:
    """Whether sequences laid end to end in one row, told apart by positions alone, are computed as if alone.

    Measured on two short ones: transformers derives the mask from the positions, but not for every
    architecture, and models that carry a state along the row mix the sequences.
    """
    first = torch.arange(5, device=student.device) % student.vocab_size
    second = torch.arange(7, 14, device=student.device) % student.vocab_size
    packed = torch.cat((first, second))[None]
    positions = torch.cat((torch.arange(5), torch.arange(7)))[None].to(student.device)
    was_training = bool(student.model.training)
    student.train(False)
    try:
        with torch.no_grad():
            alone = student.hidden_states(second[None])[0]
            together = student.hidden_states(packed, positions)[0, 5:]
    except TypeError:
        # A model that takes no positions.
        return False
    finally:
        student.train(was_training)
    scale = float(alone.float().abs().max().clamp_min(1e-6))
    tolerance = _PACKED_TOLERANCE if student.compute_dtype == torch.float32 else _PACKED_HALF_TOLERANCE
    return float((together.float() - alone.float()).abs().max()) <= tolerance * scale


def load_causal_lm(directory: Path) -> Any:
    """The transformers model of a directory, float32, on the CPU; untyped as in `StudentModel`.

    Raises:
        CheckpointError: if transformers cannot load it, or has to invent weights that are missing.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    loader: Any = AutoModelForCausalLM  # half typed
    try:
        model, info = cast(
            "tuple[Any, dict[str, Any]]",
            loader.from_pretrained(
                str(directory), dtype=torch.float32, local_files_only=True, output_loading_info=True
            ),
        )
    except Exception as error:
        # transformers, safetensors and json raise a dozen unrelated classes for a broken directory.
        raise CheckpointError(
            f"{directory} cannot be loaded as a causal LM: {error}",
            "save the model again with save_pretrained",
        ) from error
    missing = sorted(info.get("missing_keys", ()))
    if missing:
        raise CheckpointError(
            f"the weights of {directory} lack {', '.join(missing[:3])}{' …' if len(missing) > 3 else ''}",
            "save the model again with save_pretrained",
        )
    return model


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer in a model's directory, as transformers has it.

    Raises:
        CheckpointError: if there is none that transformers can load.
    """
    from transformers import AutoTokenizer

    loader: Any = AutoTokenizer  # half typed
    try:
        return loader.from_pretrained(str(directory), local_files_only=True)
    except Exception as error:
        # As for models: many classes of error, one meaning.
        raise CheckpointError(
            f"{directory} has no tokenizer that can be loaded: {type(error).__name__}: {error}",
            "copy the teacher's tokenizer files beside the model",
        ) from error


def read_tokenizer_spec(directory: Path) -> TokenizerSpec:
    """Identity of the tokenizer in a model's directory.

    End tokens are the tokenizer's and those of the generation configuration, which are what ends a
    completion when the model generates.

    Raises:
        CheckpointError: if there is no tokenizer that transformers can load.
    """
    tokenizer = load_tokenizer(directory)
    vocab = cast("dict[str, int]", tokenizer.get_vocab())
    template = cast("str | dict[str, str] | None", tokenizer.chat_template)
    ends = {tokenizer.eos_token_id, *_generation_ends(directory)} - {None}
    return TokenizerSpec(
        name=directory.resolve().name,
        vocab_sha256=hash_vocab(vocab.items()),
        chat_template_sha256=hash_chat_template(
            template
            if template is None or isinstance(template, str)
            else json.dumps(template, sort_keys=True)
        ),
        vocab_size=len(vocab),
        eos_token_ids=tuple(sorted(cast("set[int]", ends))),
    )


def _keep(
    number: int, found: dict[Layer, Tensor]
) -> Callable[[nn.Module, Any, Tensor | tuple[Tensor]], None]:
    def hook(_module: nn.Module, _inputs: Any, output: Tensor | tuple[Tensor]) -> None:
        # Some architectures return attention weights, too.
        found[number] = output if isinstance(output, Tensor) else output[0]

    return hook


def _put_adapter(
    model: Any, directory: Path, *, base: Path, lora: LoraSettings | None, seed: int
) -> Adapter | None:
    if base == directory:
        return add_adapter(model, lora, base=base, seed=seed) if lora else None
    if lora:
        raise ConfigError(
            f"{directory} is an adapter already",
            "go on training it without --lora, or merge it first with lynearm student merge",
        )
    return load_adapter(model, directory, base=base)


def _generation_ends(directory: Path) -> list[int]:
    path = directory / "generation_config.json"
    if not path.is_file():
        return []
    ends: object = cast("dict[str, object]", json.loads(path.read_text(encoding="utf-8"))).get("eos_token_id")
    if isinstance(ends, list):
        return [int(end) for end in cast("list[int]", ends)]
    return [ends] if isinstance(ends, int) else []


def _check_plain_head(student: StudentModel) -> None:
    # The loss applies the head itself; soft caps, logit scales and the like would be left out in silence.
    student.train(False)
    input_ids = torch.arange(4, device=student.head_weight.device)[None] % student.vocab_size
    with torch.no_grad():
        states_H = student.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state[0, -1]
        ours_V = states_H @ student.head_weight.T
        if student.head_bias is not None:
            ours_V = ours_V + student.head_bias
        theirs_V = student.model(input_ids=input_ids, use_cache=False).logits[0, -1]
    if ours_V.shape != theirs_V.shape or float(
        (ours_V - theirs_V).abs().max()
    ) > _PLAIN_HEAD_TOLERANCE * float(theirs_V.abs().max().clamp_min(1.0)):
        raise CheckpointError(
            f"the logits of {student.directory} are not its output head applied to its last states",
            "models with soft caps or scaled logits cannot be trained here",
        )
