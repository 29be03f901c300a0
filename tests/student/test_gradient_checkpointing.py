"""Gradient checkpointing: the same gradients in less memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models.tiny_llama import build_tiny_llama

from lynearm.student.batches import Batch
from lynearm.student.config import TrainConfig
from lynearm.student.freezing import freeze
from lynearm.student.model import StudentModel, load_student
from lynearm.student.optimization import Optimization
from lynearm.wire.errors import ConfigError
from lynearm.wire.traces import Trace

LAYERS = 6


@pytest.fixture(scope="module")
def deep_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llama(tmp_path_factory.mktemp("deep") / "student", seed=4, num_layers=LAYERS)


def load(directory: Path, *, checkpointing: bool, frozen: tuple[str, ...] = ()) -> StudentModel:
    student = load_student(directory, device="cpu")
    freeze(student, frozen)
    if checkpointing:
        student.checkpoint_gradients()
    student.train(True)
    return student


@pytest.mark.parametrize("frozen", [(), ("embeddings", "layers.0-2")])
@pytest.mark.parametrize("packing", ["on", "off"])
def test_steps_are_the_same(
    deep_dir: Path, traces: list[Trace], frozen: tuple[str, ...], packing: str
) -> None:
    batch = Batch(tuple(traces[8:14]))
    found: list[dict[str, torch.Tensor]] = []
    for checkpointing in (False, True):
        student = load(deep_dir, checkpointing=checkpointing, frozen=frozen)
        optimization = Optimization(student, TrainConfig(packing=packing, freeze_embeddings=bool(frozen)))
        norms = [optimization.step(batch, step).gradient_norm for step in (1, 2)]
        found.append({**student.model.state_dict(), "norms": torch.tensor(norms)})
    for name, value in found[1].items():
        assert torch.equal(value, found[0][name]), name


def test_states_of_layers_keep_their_gradient(deep_dir: Path) -> None:
    """What a hook takes at a layer is part of the graph that is computed again."""
    gradients: list[list[torch.Tensor]] = []
    for checkpointing in (False, True):
        student = load(deep_dir, checkpointing=checkpointing)
        states, layers = student.layer_states(torch.arange(12)[None], None, (1, 4))
        (states.square().sum() + sum(layer.square().sum() for layer in layers)).backward()
        gradients.append([parameter.grad for _, parameter in student.named_parameters()])  # type: ignore[misc]  # each has one
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_what_is_kept_for_the_backward_pass_is_far_less(deep_dir: Path) -> None:
    kept = [count_kept(load(deep_dir, checkpointing=checkpointing)) for checkpointing in (False, True)]
    # The inputs of the layers, and what is outside them.
    assert kept[1] < 0.2 * kept[0]


def count_kept(student: StudentModel) -> int:
    """Bytes that autograd keeps of a forward pass, parameters left out."""
    parameters = {parameter.data_ptr() for _, parameter in student.named_parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage: Any = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        states = student.hidden_states(torch.arange(300)[None])
    assert states.requires_grad
    return sum(kept.values())


def test_an_architecture_without_it_is_refused(deep_dir: Path) -> None:
    student = load_student(deep_dir, device="cpu")
    student.model.supports_gradient_checkpointing = False
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no gradient checkpointing"):
        student.checkpoint_gradients()
