"""Keeps rollouts that are not in their stream yet, so that a kill loses none, and no score is paid for twice.

    DIRECTORY/wave-0000000096-0000000012.student     what the student wrote, before it is scored
    DIRECTORY/wave-0000000096-0000000012.0.scored    blocks as they are published
    DIRECTORY/position.json                          next number, and place in the prompts

A wave's files are named by the number of its first rollout and by an offset of the stream before which none
of its blocks can be. They are there from before the teacher is asked until the stream has the blocks.

Invariants: a file is complete, since it is written under another name, synced and renamed. A number is given
to one rollout. A wave whose blocks were published, and whose files are still there, is recognised by the
numbers in the stream.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lynearm.rollouts.waves import Wave
from lynearm.wire.codec import decode_block, encode_block
from lynearm.wire.errors import CodecError, InvalidInputError, StorageError

_WAVE_NAME = re.compile(r"wave-(\d{10,})-(\d{10,})\.student")
_POSITION_FILE = "position.json"
_UNFINISHED_SUFFIX = ".unfinished"


@dataclass(frozen=True, slots=True)
class SpoolPosition:
    """Where the writing goes on."""

    number: int = 0
    """Of the next rollout."""
    prompt: int = 0
    """Prompts that were taken in the pass in progress."""


@dataclass(frozen=True, slots=True)
class SpooledWave:
    """A wave that was not finished."""

    name: str
    wave: Wave
    offset: int
    """None of its blocks is before."""
    blocks: tuple[bytes, ...]
    """Scored; empty for a wave that was not."""


class Spool:
    """The files of one rollout process; one process at a time uses them.

    Args:
        directory: Created when missing.

    Raises:
        StorageError: if it cannot be written to.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        try:
            directory.mkdir(parents=True, exist_ok=True)
            for path in directory.glob(f"*{_UNFINISHED_SUFFIX}"):
                path.unlink()
        except OSError as error:
            raise _failed(directory, error) from error

    def position(self) -> SpoolPosition:
        """Where the writing goes on; the beginning where nothing says."""
        try:
            values = json.loads((self._directory / _POSITION_FILE).read_text(encoding="utf-8"))
            return SpoolPosition(int(values["number"]), int(values["prompt"]))
        except (OSError, ValueError, KeyError, TypeError):
            # Numbers are found in the stream too; prompts begin again.
            return SpoolPosition()

    def move_to(self, position: SpoolPosition) -> None:
        """Keep where the writing goes on.

        Raises:
            StorageError: if it cannot be kept.
        """
        self._write(_POSITION_FILE, json.dumps(asdict(position)).encode())

    def keep_rollouts(self, wave: Wave, *, offset: int, vocab_size: int) -> str:
        """Keep what the student wrote; the wave's name here.

        Args:
            wave: Not scored.
            offset: None of its blocks will be before.
            vocab_size: Of the student.

        Raises:
            StorageError: if it cannot be kept.
        """
        name = f"wave-{wave.first:010d}-{offset:010d}"
        block = encode_block(wave.rollouts, codec="exact", vocab_size=vocab_size)
        self._write(f"{name}.student", block)
        return name

    def keep_scored(self, name: str, blocks: Sequence[bytes]) -> None:
        """Keep a wave's blocks as they will be published.

        Raises:
            StorageError: if they cannot be kept.
        """
        # The last one first: what begins at 0 is whole.
        for number, block in reversed(list(enumerate(blocks))):
            self._write(f"{name}.{number}.scored", block)

    def forget(self, name: str) -> None:
        """Remove a wave: the stream has it, or nobody wants it."""
        for path in (self._directory / f"{name}.student", *self._scored_files(name)):
            path.unlink(missing_ok=True)

    def unfinished(self) -> Iterator[SpooledWave]:
        """The waves that were not finished, in their order. One that is damaged is removed."""
        for path in sorted(self._directory.glob("wave-*.student")):
            match = _WAVE_NAME.fullmatch(path.name)
            if match is None:
                continue
            name = path.name.removesuffix(".student")
            files = self._scored_files(name)
            is_scored = bool(files) and files[0].name == f"{name}.0.scored"
            blocks = tuple(file.read_bytes() for file in files) if is_scored else ()
            try:
                wave = Wave(decode_block(path.read_bytes()))
            except (CodecError, InvalidInputError):
                self.forget(name)
                continue
            yield SpooledWave(name, wave, int(match[2]), blocks)

    def _scored_files(self, name: str) -> list[Path]:
        files = self._directory.glob(f"{name}.*.scored")
        return sorted(files, key=lambda path: int(path.name.split(".")[1]))

    def _write(self, name: str, content: bytes) -> None:
        path = self._directory / name
        unfinished = path.with_name(f"{name}{_UNFINISHED_SUFFIX}")
        try:
            with unfinished.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        except OSError as error:
            raise _failed(path, error) from error


def _failed(path: Path, error: OSError) -> StorageError:
    return StorageError(
        f"{path} cannot be written: {error}", "make room, or name another directory with --out"
    )
