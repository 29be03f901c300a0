"""Models of GGUF files on disk, in the layout that transformers, vLLM, MLX and our exporters load.

The weights are dequantised to float32 once and kept in a cache directory, which is named by a digest of the
GGUF file and of this converter's version. Plain llamas with SmolLM2's tokenizer are read by our own code, in
a tenth of the time; every other architecture and type of tensor by transformers, where it knows them.

Invariants: a directory under its final name is complete, since it is written elsewhere, synced and renamed;
one process converts while others wait at the lock; what a killed process left behind is removed by the next.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TypeAlias

from lynearm.teacher.gguf_file import GgufFile, UnsupportedGgufError, read_gguf, read_gguf_metadata
from lynearm.teacher.llama_files import knows_tokenizer, write_json, write_llama, write_tokenizer
from lynearm.wire.errors import CheckpointError, StorageError, StorageFullError

Progress: TypeAlias = Callable[[str, float], None]
"""Called with what is being done, and the share of it that is done, 0 to 1."""

CONVERTER_VERSION = 1
"""Part of the cache key: raise it when the files come out differently."""

SPARE_BYTES = 64 << 20
"""Disk space asked for beyond the weights: tokenizer, card, and a margin for the file system."""

SOURCE_FILE = "conversion.json"
"""What a converted directory says of the file that it was made of."""

_CARD = """---
{front_matter}---

# {name}, dequantised

The weights of a GGUF file, `{file}` (SHA-256 `{digest}`), converted to float32 without training: the values
are those of that file, not of the model that it was quantised from.
"""


def default_cache_dir() -> Path:
    """Where lynearm keeps what it can make again: $XDG_CACHE_HOME/lynearm, or ~/.cache/lynearm.

    As the XDG specification asks, a relative XDG_CACHE_HOME is ignored.
    """
    configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (configured if configured.is_absolute() else Path.home() / ".cache") / "lynearm"


def convert_gguf(
    gguf_path: Path,
    cache_dir: Path,
    on_progress: Progress | None = None,
    *,
    name: str = "",
    card: str = "",
) -> Path:
    """The model as a float32 safetensors directory with tokenizer; converted on the first call.

    Args:
        gguf_path: The file.
        cache_dir: Parent of the directory; made if absent. See `default_cache_dir`.
        on_progress: Called after each tensor; never when the directory is there already.
        name: Begins the directory's name; the file's own when empty.
        card: Model card, in which "{digest}" stands for that of the file; one of our own when empty.

    Returns:
        A directory with model.safetensors, config.json, tokenizer and a model card. Treat it as read-only.

    Raises:
        CheckpointError: if the file is damaged, or holds a kind of model that nobody here reads.
        StorageFullError: if the disk has no room; nothing is left behind.
        StorageError: if the cache directory cannot be written.
    """
    digest = gguf_digest(gguf_path)
    name = name or re.sub(r"[^a-z0-9.-]+", "-", gguf_path.stem.lower()).strip("-.") or "model"
    target = cache_dir / f"{name}-{digest[:16]}-v{CONVERTER_VERSION}"
    with _storage_errors(cache_dir):
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _locked(cache_dir / f".{target.name}.lock"):
            if not _is_complete(target):
                _Conversion(gguf_path, digest, card, on_progress).replace(target)
    return target


def gguf_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal.

    Raises:
        CheckpointError: if it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}", "check the path") from error


class _Conversion:
    def __init__(self, path: Path, digest: str, card: str, on_progress: Progress | None) -> None:
        self._path = path
        self._digest = digest
        self._card = card
        self._on_progress = on_progress

    def replace(self, target: Path) -> None:
        """Write the directory anew, and remove what was left of earlier tries."""
        prefix = f".{target.name}.partial-"
        for leftover in [*target.parent.glob(prefix + "*"), target]:
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            gguf: GgufFile | None = read_gguf(self._path)
        except UnsupportedGgufError:
            gguf = None
        self._check_room(target.parent, gguf)
        staging = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
        try:
            staging.chmod(0o755)
            self._write(staging, gguf)
            staging.rename(target)
            _sync(target.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _write(self, directory: Path, gguf: GgufFile | None) -> None:
        try:
            if gguf is None:
                raise UnsupportedGgufError(f"{self._path} holds tensors of types that we do not dequantise")
            write_llama(directory, gguf, self._tell)
        except UnsupportedGgufError as reason:
            from lynearm.teacher.gguf_transformers import write_with_transformers

            write_with_transformers(directory, self._path, reason)
            metadata = read_gguf_metadata(self._path)
            # Of that of SmolLM2, transformers makes another one than the model was trained with.
            if knows_tokenizer(metadata):
                write_tokenizer(directory, metadata)
        card = self._card.replace("{digest}", self._digest) or self._own_card()
        (directory / "README.md").write_text(card, encoding="utf-8")
        sizes = {path.name: path.stat().st_size for path in sorted(directory.iterdir())}
        for name in sizes:
            _sync(directory / name)
        write_json(directory / SOURCE_FILE, {"gguf_sha256": self._digest, "sizes_bytes": sizes})
        _sync(directory / SOURCE_FILE)
        _sync(directory)

    def _tell(self, done_bytes: int, total_bytes: int) -> None:
        if self._on_progress is not None:
            written = f"{done_bytes / 1e6:.0f} of {total_bytes / 1e6:.0f} MB"
            self._on_progress(f"converting {self._path.name}, {written}", done_bytes / total_bytes)

    def _own_card(self) -> str:
        gguf = read_gguf_metadata(self._path)
        keys = {"license": "license", "license_name": "license.name", "license_link": "license.link"}
        fields = {ours: gguf.text_if_any(f"general.{theirs}") for ours, theirs in keys.items()}
        return _CARD.format(
            front_matter="".join(f"{key}: {json.dumps(value)}\n" for key, value in fields.items() if value),
            name=gguf.text_if_any("general.name") or self._path.stem,
            file=self._path.name,
            digest=self._digest,
        )

    def _check_room(self, directory: Path, gguf: GgufFile | None) -> None:
        # Where the types are not known: at two bits a weight, float32 takes 16 times the file.
        weights = 16 * self._path.stat().st_size
        if gguf is not None:
            weights = 4 * sum(tensor.values for tensor in gguf.tensors)
        free = shutil.disk_usage(directory).free
        if free < weights + SPARE_BYTES:
            raise StorageFullError(
                f"{directory} has {free >> 20} MiB free, the model as float32 needs "
                f"{'' if gguf else 'up to '}{(weights + SPARE_BYTES) >> 20} MiB",
                "make room, or set XDG_CACHE_HOME to a folder on another disk",
            )


def _is_complete(target: Path) -> bool:
    try:
        sizes = json.loads((target / SOURCE_FILE).read_text(encoding="utf-8"))["sizes_bytes"]
        return all((target / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


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
