"""Low-rank adapters on a student, through peft: a small set of weights beside a base that stays as it is.

An adapter is saved in peft's own layout (`adapter_config.json`, `adapter_model.safetensors`), which
`PeftModel.from_pretrained` loads beside the base. It names the base's directory; the manifest beside it names
the digest of the base's weights, so that another base is not taken for it. Nothing is written into the base:
any number of specialists can share one.
"""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lynearm.student.lineage import JsonObject, read_lineage
from lynearm.student.lora_settings import ALL_LINEAR, OUTSIDE, LoraSettings
from lynearm.student.run_directory import ADAPTER_CONFIG_FILE, is_adapter
from lynearm.wire.errors import CheckpointError, ConfigError, MissingDependencyError
from lynearm.wire.weight_files import weights_revision

ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"

_NAME = "default"
"""Of the one adapter that a student has, within peft."""

_SAFETENSORS: Any = safetensors.torch  # half typed


@dataclass(frozen=True, slots=True)
class Adapter:
    """On a student's model, whose linear layers it has replaced by peft's."""

    peft_model: Any
    """Around the student's own model; untyped, as peft is."""
    base: Path
    """Directory of the model that it changes."""
    base_revision: str
    """Digest of the base's weights."""

    def account(self) -> JsonObject:
        """What a manifest says of it."""
        config = self.peft_model.peft_config[_NAME]
        return {
            "kind": "lora",
            "r": config.r,
            "alpha": config.lora_alpha,
            "dropout": config.lora_dropout,
            "targets": sorted(config.target_modules),
            "base": {"name": self.base.resolve().name, "revision": self.base_revision},
        }

    def weights(self) -> dict[str, Tensor]:
        """The trained tensors by the names of peft's files; not copied."""
        found = _peft().get_peft_model_state_dict(self.peft_model, save_embedding_layers=False)
        return cast("dict[str, Tensor]", found)

    def save(self, directory: Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Write it into a directory.

        Args:
            directory: An existing one.
            weights: A copy of `weights`, for an adapter that is trained meanwhile.
        """
        tensors = {name: tensor.contiguous() for name, tensor in (weights or self.weights()).items()}
        _SAFETENSORS.save_file(tensors, directory / ADAPTER_WEIGHTS_FILE, metadata={"format": "pt"})
        config = copy.copy(self.peft_model.peft_config[_NAME])
        config.inference_mode = True
        # A set, whose order would differ between two runs.
        config.target_modules = sorted(config.target_modules)
        config.save_pretrained(str(directory))

    def merge(self) -> Any:
        """The base with the adapter added to its weights: a plain model. The adapter is gone afterwards."""
        return self.peft_model.merge_and_unload(safe_merge=True)


def add_adapter(model: Any, settings: LoraSettings, *, base: Path, seed: int) -> Adapter:
    """Put a new adapter on a model; the model computes what it did, and only the adapter is trainable.

    Args:
        model: A transformers model, changed in place; untyped, since every architecture has its class.
        settings: Of the adapter.
        base: Directory of the model.
        seed: Of the adapter's first weights: ranks that share one begin alike.

    Raises:
        ConfigError: if the model has no such layers.
        MissingDependencyError: if peft is not installed.
    """
    targets = settings.targets if settings.targets != (ALL_LINEAR,) else _linear_names(model)
    config = _peft().LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(targets),
    )
    try:
        return _attach(model, config, base, seed)
    except ValueError as error:
        # What peft says names the targets; of other values it has no opinion.
        raise ConfigError(
            f"no adapter fits {base.name}: {error}", f"name linear layers that it has, or {ALL_LINEAR}"
        ) from error


def load_adapter(model: Any, directory: Path, *, base: Path) -> Adapter:
    """Put a saved adapter on its base, to be trained on.

    Args:
        model: The base, changed in place.
        directory: Of the adapter.
        base: Directory of the base.

    Raises:
        CheckpointError: if it is not of this base, or cannot be read.
        MissingDependencyError: if peft is not installed.
    """
    peft = _peft()
    remedy = "name another checkpoint of the run, or merge it where its base is"
    try:
        config = peft.PeftConfig.from_pretrained(str(directory))
        saved = cast("dict[str, Tensor]", _SAFETENSORS.load_file(directory / ADAPTER_WEIGHTS_FILE))
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{directory} is no adapter that can be read: {error}", remedy) from error
    if not isinstance(config, peft.LoraConfig):
        raise CheckpointError(f"{directory} is an adapter of type {type(config).__name__}, expected LoRA")
    try:
        adapter = _attach(model, config, base, seed=0)
    except ValueError as error:
        raise CheckpointError(f"{directory} does not fit {base}: {error}", remedy) from error
    own = {name: tuple(tensor.shape) for name, tensor in adapter.weights().items()}
    found = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    if own != found:
        different = sorted(set(own.items()) ^ set(found.items()))
        raise CheckpointError(f"{directory} does not fit {base}: {different[0]} and more differ", remedy)
    _check_base(adapter, directory)
    peft.set_peft_model_state_dict(adapter.peft_model, saved)
    return adapter


def find_base(directory: Path) -> Path:
    """The model that a directory is about: the base of an adapter, and itself for any other.

    Raises:
        CheckpointError: if the base is not where the adapter says.
    """
    if not is_adapter(directory):
        return directory
    path = directory / ADAPTER_CONFIG_FILE
    name = cast("dict[str, object]", _read_json(path)).get("base_model_name_or_path")
    # Relative to the working directory, as peft takes it.
    base = Path(str(name))
    if not name or not (base / "config.json").is_file():
        raise CheckpointError(
            f"{directory} is an adapter of {name}, which is not a model here",
            f"put the base back, or write where it is into {path.name} as base_model_name_or_path",
        )
    return base


def _attach(model: Any, config: Any, base: Path, seed: int) -> Adapter:
    config.inference_mode = False
    # peft writes down by which name the model was loaded, which may be relative, over what its settings say.
    config.base_model_name_or_path = model.name_or_path = str(base.resolve())
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):  # pyright: ignore[reportUnknownMemberType]
        torch.manual_seed(seed)  # pyright: ignore[reportUnknownMemberType]  # torch leaves it half typed
        peft_model = _peft().get_peft_model(model, config)
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in OUTSIDE and hasattr(module, "lora_A"):
            raise ValueError(f"{name} would get one, which the loss does not apply")
    return Adapter(peft_model, base, weights_revision(base))


def _linear_names(model: Any) -> set[str]:
    """Last names of the decoder's linear layers; peft would name each layer in full."""
    modules = cast("Iterable[tuple[str, nn.Module]]", model.base_model.named_modules())
    return {name.rpartition(".")[2] for name, module in modules if isinstance(module, nn.Linear)}


def _peft() -> Any:
    """The package, untyped: its functions have half of their types."""
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise MissingDependencyError(
            f"adapters need peft, which cannot be imported: {error}", "pip install 'lynearm[lora]'"
        ) from error


def _check_base(adapter: Adapter, directory: Path) -> None:
    account = cast(JsonObject, read_lineage(directory).get("adapter") or {})
    expected = str(cast(JsonObject, account.get("base") or {}).get("revision", adapter.base_revision))
    if expected != adapter.base_revision:
        raise CheckpointError(
            f"{directory} was trained on a base at {expected[:24]}, and {adapter.base} is at "
            f"{adapter.base_revision[:24]}",
            "give it back the weights that it was trained on",
        )


def _read_json(path: Path) -> object:
    try:
        parsed: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return cast(object, parsed)
