"""The files of a Core ML export: the package itself, its card, and a check to run on a Mac."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lynearm.export import verify_on_mac
from lynearm.export.checkpoint import Checkpoint
from lynearm.export.coreml_library import Model_pb2, ct, quiet
from lynearm.export.mil_interpreter import MODEL_FILE
from lynearm.export.mil_llama import ATTENTION_MASK, INPUT_IDS, KEY_CACHE, LOGITS, VALUE_CACHE, MilProgram
from lynearm.export.package_files import card_facts, card_header, find_licenses
from lynearm.export.parity import HeldOutSequence, PackageLogits

DESCRIPTIONS = {
    INPUT_IDS: "Token ids that follow those already in the caches, [1, q].",
    ATTENTION_MASK: "Added to attention scores, [1, 1, q, e], e tokens in all: 0 or -65504.",
    LOGITS: "Unnormalised log probabilities of the token after each input, [1, q, vocabulary].",
    KEY_CACHE: "Keys of the tokens so far.",
    VALUE_CACHE: "Values of the tokens so far.",
}

NOT_RUN_ON_APPLE = (
    "Not run on Apple hardware: what was compared is the saved program, executed by an interpreter on Linux."
)


def save_program(program: MilProgram, package: Path) -> None:
    """Converts a program and writes the `.mlpackage`.

    Types stay as the program says. Only clean-up passes run: the program holds nothing that the many fusing
    passes look for, and they take most of the time of a conversion.
    """
    with quiet():
        ct.convert(
            program,
            source="milinternal",
            convert_to="mlprogram",
            minimum_deployment_target=ct.target.iOS18,
            compute_precision=ct.precision.FLOAT32,
            pass_pipeline=ct.PassPipeline.CLEANUP,
            skip_model_load=True,
            package_dir=str(package),
        )


def write_metadata(package: Path, source: Checkpoint, hub_id: str, weights: str) -> None:
    """Says in the package what it is, in the fields that Xcode shows and swift-transformers reads.

    Args:
        package: The `.mlpackage`.
        source: Where it came from.
        hub_id: Repository from which swift-transformers fetches the tokenizer.
        weights: How weights are stored, for people.
    """
    path = package / MODEL_FILE
    spec = Model_pb2.Model()
    spec.ParseFromString(path.read_bytes())
    metadata = spec.description.metadata
    metadata.shortDescription = f"{source.path.name}: a student distilled with lynearm; {weights}."
    metadata.author = "lynearm"
    metadata.license = ", ".join(find_licenses(source.lineage))
    metadata.userDefined["co.huggingface.exporters.name"] = hub_id
    metadata.userDefined["co.huggingface.exporters.task"] = "text-generation"
    for features in (spec.description.input, spec.description.output, spec.description.state):
        for feature in features:
            feature.shortDescription = DESCRIPTIONS[feature.name]
    path.write_bytes(spec.SerializeToString())


def write_mac_check(directory: Path, sequence: HeldOutSequence, expected: PackageLogits) -> None:
    """A script that runs the package beside it on a Mac, and what torch computes from the same weights."""
    rows = len(expected.decode)
    np.savez_compressed(
        directory / verify_on_mac.REFERENCE_FILE,
        token_ids=np.array(sequence.token_ids[: sequence.completion_start + rows - 1], np.int32),
        prompt_length=np.array(sequence.completion_start),
        logits=expected.decode.astype(np.float16),
        greedy=np.array(expected.greedy, np.int32),
    )
    shutil.copyfile(verify_on_mac.__file__, directory / "verify_on_mac.py")


def write_card(directory: Path, source: Checkpoint, package_name: str, facts: Mapping[str, str]) -> None:
    """README.md: what the package is, how far it is from its checkpoint, and how to check it on a Mac."""
    lines = [
        *card_header("coreml", source),
        "",
        f"# {source.path.name} for Core ML",
        "",
        f"`{package_name}` is a student distilled with lynearm, for iOS 18, macOS 15 and later. Its",
        f"key-value cache is a pair of states; inputs `{INPUT_IDS}` and `{ATTENTION_MASK}` and output",
        f"`{LOGITS}` are those that swift-transformers drives.",
        "",
        *card_facts(source, facts),
        "",
        NOT_RUN_ON_APPLE,
    ]
    if (directory / verify_on_mac.REFERENCE_FILE).is_file():
        lines += [
            "On a Mac, this runs it and compares it with stored logits:",
            "",
            "```sh",
            "pip install coremltools numpy",
            "python verify_on_mac.py",
            "```",
        ]
    (directory / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
