"""What an import is told: which files, which stream, and what the files themselves do not say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from lynearm.wire.errors import ConfigError, InvalidInputError
from lynearm.wire.specs import CODEC_MODES, LOGPROBS_MODES, MAX_TOP_K, CodecMode, LogprobsMode, check_name

FileFormat: TypeAlias = Literal["parquet", "openai-jsonl"]
FILE_FORMATS: tuple[FileFormat, ...] = get_args(FileFormat)

_SUFFIXES: Mapping[str, FileFormat] = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".jsonl": "openai-jsonl",
    ".ndjson": "openai-jsonl",
}


@dataclass(frozen=True, slots=True)
class ImportConfig:
    """One import of some files into one stream.

    Fields that describe the stream are None, or empty, where nothing was said: then the file tells, or the
    stream that exists, or the tokenizer's directory.

    Raises:
        ConfigError: naming the field that is out of range.
    """

    files: tuple[Path, ...]
    stream: str = ""
    """Where the traces go; empty for the name of the stream that a Parquet file was exported from."""
    format: FileFormat | None = None
    """None tells it from each file's suffix."""
    service: str = "127.0.0.1:7411"
    """host:port of the trace service."""
    producer_id: str = "import-0"
    """Stable name of this producer. A second run under the same name fences off the first."""
    seal: bool = False
    """Seal the stream at the end. No default of the teacher's: more files may follow."""

    license: str = ""
    """SPDX expression or URL of the terms under which the teacher may be distilled."""
    teacher_model: str = ""
    teacher_revision: str = ""
    """Hub commit, or "sha256:" and the digest of the weight files."""
    engine: str = ""
    dtype: str = ""
    vocab_size: int | None = None
    """Width of the teacher's logits."""
    max_model_len: int | None = None
    """Tokens."""
    logprobs_mode: LogprobsMode | None = None
    logprobs_temperature: float | None = None
    tokenizer: str = ""
    """Directory of the teacher, or its name for transformers: says what students must share, and which id a
    token has that a server gave as text."""
    codec: CodecMode | None = None
    top_k: int | None = None
    """Entries kept per position. JSONL positions that have more are cut to the likeliest."""

    temperature: float | None = None
    """How the completions of JSONL were drawn, which responses do not say; 1 when None."""
    top_p: float | None = None
    """As `temperature`."""

    def __post_init__(self) -> None:
        """Check every field."""
        try:
            if self.stream:
                check_name(self.stream)
            check_name(self.producer_id, what="producer id")
        except InvalidInputError as error:
            raise ConfigError(error.message, error.remedy) from error
        checks = {
            "no file is named": bool(self.files),
            "a file is named twice": len(set(self.files)) == len(self.files),
            f"format {self.format!r} is none of {', '.join(FILE_FORMATS)}": (
                self.format is None or self.format in FILE_FORMATS
            ),
            f"codec {self.codec!r} is none of {', '.join(CODEC_MODES)}": (
                self.codec is None or self.codec in CODEC_MODES
            ),
            f"logprobs_mode {self.logprobs_mode!r} is none of {', '.join(LOGPROBS_MODES)}": (
                self.logprobs_mode is None or self.logprobs_mode in LOGPROBS_MODES
            ),
            f"top_k {self.top_k} is outside 0..{MAX_TOP_K}": (
                self.top_k is None or 0 <= self.top_k <= MAX_TOP_K
            ),
            f"temperature {self.temperature} is negative": self.temperature is None or self.temperature >= 0,
            f"top_p {self.top_p} is outside (0, 1]": self.top_p is None or 0 < self.top_p <= 1,
        }
        for problem, holds in checks.items():
            if not holds:
                raise ConfigError(problem)

    def format_of(self, path: Path) -> FileFormat:
        """The format of one of the files.

        Raises:
            ConfigError: if neither `format` nor the suffix tells.
        """
        known = self.format or _SUFFIXES.get(path.suffix.lower())
        if known is None:
            raise ConfigError(
                f"the suffix of {path} does not tell its format", f"give --format {' or '.join(FILE_FORMATS)}"
            )
        return known
