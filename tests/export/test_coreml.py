"""Core ML packages: the saved program, executed by the interpreter and compared with torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lynearm.export import coreml_export, mil_llama, verify_on_mac
from lynearm.export.checkpoint import read_checkpoint
from lynearm.export.config import CoreMlExportConfig
from lynearm.export.coreml_export import CoreMlExport, export_coreml
from lynearm.export.coreml_library import Model_pb2, mb
from lynearm.export.coreml_package import save_program
from lynearm.export.mil_interpreter import MODEL_FILE, WEIGHT_FILE, MilInterpreter
from lynearm.export.progress import ExportProgress
from lynearm.wire.errors import CheckpointError, ConfigError, InvalidInputError, ParityError

FILES = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "lynearm_export.json",
    "out.mlpackage",
    "reference.npz",
    "tokenizer.json",
    "tokenizer_config.json",
    "verify_on_mac.py",
}
CONTEXT = 64


def export(checkpoint: Path, out: Path, **values: Any) -> CoreMlExport:
    return export_coreml(checkpoint, out, CoreMlExportConfig(**{"context_length": CONTEXT, **values}))


@pytest.fixture(scope="module")
def exported(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> CoreMlExport:
    """At 16 bits; read only."""
    return export(tiny_checkpoint, tmp_path_factory.mktemp("coreml") / "out", hub_id="someone/student")


def additive_mask(begin: int, end: int) -> torch.Tensor:
    return torch.triu(torch.full((end - begin, end), -65504.0), diagonal=begin + 1)[None, None]


def feed(interpreter: MilInterpreter, token_ids: list[int], begin: int) -> torch.Tensor:
    inputs = {
        "inputIds": torch.tensor([token_ids], dtype=torch.int32),
        "fullAttentionMask": additive_mask(begin, begin + len(token_ids)),
    }
    return interpreter.run(inputs)["logits"][0]


def conversations(package: Path) -> Callable[[], verify_on_mac.Predict]:
    """What coremltools gives on a Mac, from the interpreter."""

    def start() -> verify_on_mac.Predict:
        interpreter = MilInterpreter(package)

        def predict(inputs: dict[str, Any]) -> dict[str, Any]:
            tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
            tensors["fullAttentionMask"] = tensors["fullAttentionMask"].float()
            return {name: tensor.numpy() for name, tensor in interpreter.run(tensors).items()}

        return predict

    return start


def test_a_package_computes_what_the_checkpoint_computes(exported: CoreMlExport) -> None:
    assert exported.parity is not None
    assert exported.fidelity is not None
    assert exported.parity.kl_mean < 1e-4
    assert exported.parity.decode_positions == 8
    assert exported.parity.greedy_matched == exported.parity.greedy_total == 8
    assert {path.name for path in exported.path.iterdir()} >= FILES
    assert exported.package == exported.path / "out.mlpackage"
    assert exported.size_bytes == sum(p.stat().st_size for p in exported.path.rglob("*") if p.is_file())


@pytest.mark.parametrize(("bits", "limit"), [(8, 1e-2), (4, 2.0)])
def test_quantised_packages_compute_what_their_weights_say(
    tiny_checkpoint: Path, tmp_path: Path, exported: CoreMlExport, bits: int, limit: float
) -> None:
    result = export(tiny_checkpoint, tmp_path / "out", bits=bits)
    assert result.parity is not None
    assert result.fidelity is not None
    assert result.parity.kl_mean < limit
    assert result.fidelity.kl_mean < 1e-4
    weights = (result.package / WEIGHT_FILE).stat().st_size
    # A float16 scale for every 32 weights is half a bit more for each.
    assert weights < (exported.package / WEIGHT_FILE).stat().st_size * (bits + 0.5) / 16 * 1.1


def test_an_untied_head_is_used(untied_checkpoint: Path, tmp_path: Path) -> None:
    result = export(untied_checkpoint, tmp_path / "out")
    assert result.parity is not None
    assert result.parity.kl_mean < 1e-4


def test_the_package_keeps_the_contract_of_swift_transformers(exported: CoreMlExport) -> None:
    spec = Model_pb2.Model()
    spec.ParseFromString((exported.package / MODEL_FILE).read_bytes())
    description = spec.description
    inputs = {one.name: one.type.multiArrayType for one in description.input}
    assert set(inputs) == {"inputIds", "fullAttentionMask"}
    ranges = [r.upperBound for r in inputs["fullAttentionMask"].shapeRange.sizeRanges]
    assert ranges == [1, 1, CONTEXT, CONTEXT]
    assert [r.upperBound for r in inputs["inputIds"].shapeRange.sizeRanges] == [1, CONTEXT]
    shapes = {one.name: list(one.type.stateType.arrayType.shape) for one in description.state}
    assert set(shapes) == {"keyCache", "valueCache"}
    assert all(shape[0] == 3 and shape[-2] == CONTEXT for shape in shapes.values())
    assert [one.name for one in description.output] == ["logits"]
    assert description.metadata.userDefined["co.huggingface.exporters.name"] == "someone/student"
    assert spec.specificationVersion >= 9  # states came with iOS 18


def test_the_cache_is_good_up_to_its_last_position(exported: CoreMlExport) -> None:
    interpreter = MilInterpreter(exported.package)
    ids = np.random.default_rng(3).integers(5, 384, CONTEXT).tolist()
    at_once = feed(interpreter, ids, 0)
    interpreter.reset()
    parts = [feed(interpreter, ids[:-9], 0), feed(interpreter, ids[-9:-4], CONTEXT - 9)]
    parts += [feed(interpreter, [ids[i]], i) for i in range(CONTEXT - 4, CONTEXT)]
    torch.testing.assert_close(torch.cat(parts), at_once, atol=0.02, rtol=0.0)


def test_reading_a_state_in_every_layer_is_noticed(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The conversion merges such reads, and all layers but the last lose what they wrote.
    class Rereading(mil_llama._Cache):
        def update(self, layer: int, new: Any, begin: Any, end: Any) -> Any:
            self._value = mb.read_state(input=self._state)
            return super().update(layer, new, begin, end)

    monkeypatch.setattr(mil_llama, "_Cache", Rereading)
    with pytest.raises(ParityError, match="differs from its own weights"):
        export(tiny_checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_lost_rotary_base_is_noticed(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    honest = mil_llama.rotary_tables
    monkeypatch.setattr(
        mil_llama, "rotary_tables", lambda a, length: honest(replace(a, rope_theta=10_000.0), length)
    )
    with pytest.raises(ParityError, match="differs from its own weights"):
        export(tiny_checkpoint, tmp_path / "out")


def test_a_damaged_weight_is_noticed(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = mil_llama.build_program

    def build_damaged(architecture: Any, weights: dict[str, Any], context_length: int) -> Any:
        name = "model.layers.1.mlp.down_proj.weight"
        return honest(architecture, {**weights, name: np.roll(weights[name], 1, axis=0)}, context_length)

    monkeypatch.setattr(mil_llama, "build_program", build_damaged)
    with pytest.raises(ParityError):
        export(tiny_checkpoint, tmp_path / "out")


def test_a_damaged_weight_file_is_noticed(exported: CoreMlExport, tmp_path: Path) -> None:
    package = tmp_path / "out.mlpackage"
    shutil.copytree(exported.package, package)
    blob = bytearray((package / WEIGHT_FILE).read_bytes())
    (package / WEIGHT_FILE).write_bytes(b"\0" * len(blob))
    with pytest.raises(ParityError, match="no blob at offset"):
        MilInterpreter(package)


def test_an_operation_that_we_never_emit_is_named(tmp_path: Path) -> None:
    @mb.program(input_specs=[mb.TensorSpec((1, 4))])
    def program(x: Any) -> Any:
        return mb.erf(x=x)

    save_program(program, tmp_path / "other.mlpackage")
    (tmp_path / "other.mlpackage" / WEIGHT_FILE).parent.mkdir(exist_ok=True)
    (tmp_path / "other.mlpackage" / WEIGHT_FILE).write_bytes(bytes(64))
    with pytest.raises(ParityError, match="'erf'"):
        MilInterpreter(tmp_path / "other.mlpackage").run({"x": torch.zeros(1, 4)})


def test_the_check_for_a_mac_passes_on_the_package_that_it_travels_with(exported: CoreMlExport) -> None:
    with np.load(exported.path / "reference.npz") as stored:
        reference = {name: stored[name] for name in stored.files}
    findings = verify_on_mac.check(conversations(exported.package), reference)
    assert findings.passed
    assert findings.greedy_matched == findings.greedy_total == 8
    reference["logits"] = np.roll(reference["logits"], 1, axis=0)
    assert not verify_on_mac.check(conversations(exported.package), reference).passed


def test_the_card_says_that_no_apple_device_ran_it(exported: CoreMlExport) -> None:
    card = (exported.path / "README.md").read_text()
    assert "Not run on Apple hardware" in card
    assert "python verify_on_mac.py" in card
    assert json.loads((exported.path / "lynearm_export.json").read_text())["run_on_apple_hardware"] is False


def test_an_earlier_export_is_replaced_and_nothing_else(tiny_checkpoint: Path, tmp_path: Path) -> None:
    export(tiny_checkpoint, tmp_path / "out", check_parity=False)
    result = export(tiny_checkpoint, tmp_path / "out", check_parity=False)
    assert result.parity is None
    assert not (result.path / "verify_on_mac.py").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(InvalidInputError, match="not written by lynearm"):
        export(tiny_checkpoint, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_progress_ends_at_one(tiny_checkpoint: Path, tmp_path: Path) -> None:
    events: list[ExportProgress] = []
    config = CoreMlExportConfig(context_length=CONTEXT, check_parity=False)
    export_coreml(tiny_checkpoint, tmp_path / "out", config, events.append)
    fractions = [event.fraction for event in events]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0


def test_a_context_longer_than_the_positions_is_cut(tiny_checkpoint: Path, tmp_path: Path) -> None:
    result = export(tiny_checkpoint, tmp_path / "out", context_length=32_768, check_parity=False)
    assert result.context_length == read_checkpoint(tiny_checkpoint).architecture.max_positions


def test_a_context_without_room_for_any_sequence_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coreml_export, "select_sequences", lambda *_: [])
    with pytest.raises(InvalidInputError, match="longer context_length"):
        export(tiny_checkpoint, tmp_path / "out")


def test_a_weight_beyond_float16_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    huge = tmp_path / "huge"
    shutil.copytree(tiny_checkpoint, huge)
    weights = load_file(huge / "model.safetensors")
    weights["model.norm.weight"][0] = 1e6
    save_file(weights, huge / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight exceeds the range of float16"):
        export(huge, tmp_path / "out")


def test_a_package_name_for_the_directory_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="name a directory"):
        export(tiny_checkpoint, tmp_path / "student.mlpackage")


def test_a_block_size_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    from models.tiny_llama import build_tiny_llama

    narrow = build_tiny_llama(tmp_path / "narrow", hidden_size=64)
    with pytest.raises(InvalidInputError, match="not a multiple of the group size 128"):
        export(narrow, tmp_path / "out", bits=8, block_size=128)


@pytest.mark.parametrize("values", [{"bits": 3}, {"block_size": 48}, {"context_length": 4}])
def test_choices_that_no_exporter_knows_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        CoreMlExportConfig(**values)
