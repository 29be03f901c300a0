"""Stream specs: who the teacher is, whose tokenizer, which codec, under what licence."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

from lynearm.wire.errors import InvalidInputError
from lynearm.wire.hidden import HiddenStatesSpec

LogprobsMode: TypeAlias = Literal["raw", "processed"]
CodecMode: TypeAlias = Literal["exact", "fine", "standard", "compact", "sampled"]
CODEC_MODES: tuple[CodecMode, ...] = get_args(CodecMode)
LOGPROBS_MODES: tuple[LogprobsMode, ...] = get_args(LogprobsMode)

NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
"""Stream names, producer ids and label keys."""

MAX_VOCAB_SIZE = 1 << 20
MAX_TOP_K = 1024
MAX_DRAWS = 1 << 16
MAX_TAIL_DRAWS = 16


def check_name(name: str, *, what: str = "stream name") -> str:
    """The name, unchanged.

    Raises:
        InvalidInputError: if it does not match `NAME_PATTERN`.
    """
    if NAME_PATTERN.fullmatch(name) is None:
        raise InvalidInputError(
            f"{what} {name[:140]!r} is not allowed",
            "use 1 to 128 of a-z, 0-9, '.', '_' and '-', and begin with a letter or a digit",
        )
    return name


@dataclass(frozen=True, slots=True)
class TeacherSpec:
    """Who wrote the distributions, and under which conventions."""

    model: str
    revision: str
    """Hub commit, or "sha256:" and the digest of the weight files."""
    engine: str
    """Program and version, for example "vllm 0.32.0"."""
    dtype: str
    vocab_size: int
    """Width of the logits."""
    max_model_len: int
    """Tokens."""
    logprobs_mode: LogprobsMode = "raw"
    logprobs_temperature: float = 1.0


@dataclass(frozen=True, slots=True)
class TokenizerSpec:
    """The tokenizer and chat template that teacher and student share."""

    name: str
    vocab_sha256: bytes
    """32 bytes; see `hash_vocab`."""
    chat_template_sha256: bytes
    """32 bytes, or empty without a template."""
    vocab_size: int
    eos_token_ids: tuple[int, ...]


_BYTES_PER_ENTRY: Mapping[CodecMode, float] = {
    "exact": 6.0,
    "fine": 3.5,
    "standard": 2.5,
    "compact": 2.5,
    "sampled": 4.0,
}
"""Upper estimate of an encoded entry, an id and a logprob; measured were 4.5, 2.1, 1.6, 1.4 and 2.1."""

_BYTES_PER_TAIL_DRAW = 2.5
"""Upper estimate of an encoded draw from the tail; measured was 1.8."""

_BYTES_PER_TOKEN = 16
"""Upper estimate of what a position has besides: its token, the token's logprob, the tail's mass."""


def bound_position_bytes(mode: CodecMode, entries: int, tail_draws: int = 0) -> float:
    """Upper estimate of an encoded position, bytes.

    Args:
        mode: Of the codec; one that is not known counts as `exact`, and is for others to refuse.
        entries: Kept in a row, or drawn.
        tail_draws: Draws from its tail.
    """
    entry_bytes = _BYTES_PER_ENTRY.get(mode, _BYTES_PER_ENTRY["exact"])
    return _BYTES_PER_TOKEN + entries * entry_bytes + tail_draws * _BYTES_PER_TAIL_DRAW


@dataclass(frozen=True, slots=True)
class CodecSpec:
    """How the payloads of a stream are encoded."""

    mode: CodecMode = "standard"
    top_k: int = 64
    """Most entries kept per position."""
    min_probability: float = 0.0
    """Adaptive k: of those, the entries with at least this probability, and at least one; 0 keeps all."""
    draws: int = 0
    """Draws per position in mode "sampled"; 0 in every other mode."""
    hidden: HiddenStatesSpec | None = None
    """Hidden states that every trace carries; None: none."""
    tail_draws: int = 0
    """Tokens drawn from each position's tail, which stand for its mass in equal parts; at most
    MAX_TAIL_DRAWS, and 0 in mode "sampled", whose rows have no tail."""


@dataclass(frozen=True, slots=True)
class StreamSpec:
    """What a stream is; fixed when it is created.

    Raises:
        InvalidInputError: naming the field that is missing or out of range.
    """

    name: str
    teacher: TeacherSpec
    tokenizer: TokenizerSpec
    codec: CodecSpec
    license: str
    """SPDX expression or URL of the terms under which the teacher may be distilled."""
    labels: Mapping[str, str] = field(default_factory=dict[str, str])

    def __post_init__(self) -> None:
        """Check every field."""
        check_name(self.name)
        for key in self.labels:
            check_name(key, what="label key")
        digests = (self.tokenizer.vocab_sha256, self.tokenizer.chat_template_sha256)
        checks = {
            "teacher.model is empty": bool(self.teacher.model),
            "teacher.revision is empty": bool(self.teacher.revision),
            f"teacher.logprobs_mode {self.teacher.logprobs_mode!r} is not known": (
                self.teacher.logprobs_mode in LOGPROBS_MODES
            ),
            f"teacher.vocab_size {self.teacher.vocab_size} is outside 1..2^20": (
                0 < self.teacher.vocab_size <= MAX_VOCAB_SIZE
            ),
            "teacher.max_model_len is 0": self.teacher.max_model_len > 0,
            "teacher.logprobs_temperature is not positive": self.teacher.logprobs_temperature > 0,
            "tokenizer.vocab_sha256 is not 32 bytes": len(digests[0]) == 32,
            "tokenizer.chat_template_sha256 is neither empty nor 32 bytes": len(digests[1]) in (0, 32),
            f"codec.mode {self.codec.mode!r} is not known": self.codec.mode in CODEC_MODES,
            f"codec.top_k {self.codec.top_k} is outside 0..{MAX_TOP_K}": 0 <= self.codec.top_k <= MAX_TOP_K,
            f"codec.min_probability {self.codec.min_probability} is outside 0..1": (
                0 <= self.codec.min_probability <= 1
            ),
            f"codec.draws {self.codec.draws} does not suit mode {self.codec.mode!r}": (
                0 < self.codec.draws <= MAX_DRAWS if self.codec.mode == "sampled" else self.codec.draws == 0
            ),
            f"codec.tail_draws {self.codec.tail_draws} is outside 0..{MAX_TAIL_DRAWS}": (
                0 <= self.codec.tail_draws <= MAX_TAIL_DRAWS
            ),
            f"codec.tail_draws {self.codec.tail_draws} does not suit mode 'sampled', which has no tail": (
                self.codec.mode != "sampled" or self.codec.tail_draws == 0
            ),
            "license is empty": bool(self.license),
            "more than 64 labels": len(self.labels) <= 64,
        }
        for problem, holds in checks.items():
            if not holds:
                raise InvalidInputError(f"stream spec of {self.name!r}: {problem}")


def hash_vocab(tokens: Iterable[tuple[str, int]]) -> bytes:
    """Digest of a vocabulary: the same for any two tokenizers that map the same tokens to the same ids.

    Args:
        tokens: Every (token, id) pair, added tokens included, in any order.

    Returns:
        SHA-256, 32 bytes, over the lines "id<TAB>token<LF>" in UTF-8, ascending by id.
    """
    digest = hashlib.sha256()
    for token, token_id in sorted(tokens, key=lambda pair: (pair[1], pair[0])):
        digest.update(f"{token_id}\t{token}\n".encode("utf-8", "surrogatepass"))
    return digest.digest()


def hash_chat_template(template: str | None) -> bytes:
    """SHA-256, 32 bytes, of the template in UTF-8; empty without one."""
    return hashlib.sha256(template.encode()).digest() if template else b""


def alignment_differences(teacher: TokenizerSpec, student: TokenizerSpec) -> list[str]:
    """What a student's tokenizer does not share with the teacher's, one line each; empty when aligned."""
    differences: list[str] = []
    if teacher.vocab_sha256 != student.vocab_sha256:
        differences.append(
            f"vocabulary: teacher {teacher.name!r} has {teacher.vocab_size} tokens "
            f"({teacher.vocab_sha256.hex()[:12]}), student {student.name!r} has {student.vocab_size} "
            f"({student.vocab_sha256.hex()[:12]})"
        )
    if teacher.chat_template_sha256 != student.chat_template_sha256:
        shown = [
            digest.hex()[:12] or "none"
            for digest in (teacher.chat_template_sha256, student.chat_template_sha256)
        ]
        differences.append(f"chat template: teacher {shown[0]}, student {shown[1]}")
    if set(teacher.eos_token_ids) != set(student.eos_token_ids):
        differences.append(
            f"end tokens: teacher {sorted(teacher.eos_token_ids)}, student {sorted(student.eos_token_ids)}"
        )
    return differences


def spec_differences(existing: StreamSpec, wanted: StreamSpec) -> list[str]:
    """What distinguishes two stream specs besides their names, one line for each field."""
    pairs: list[tuple[str, object, object]] = [
        ("license", existing.license, wanted.license),
        ("labels", dict(existing.labels), dict(wanted.labels)),
    ]
    for part in ("teacher", "tokenizer", "codec"):
        before, after = getattr(existing, part), getattr(wanted, part)
        pairs += [
            (f"{part}.{name}", getattr(before, name), getattr(after, name)) for name in before.__slots__
        ]
    return [f"{name} is {_shown(old)}, wanted {_shown(new)}" for name, old, new in pairs if old != new]


def _shown(value: object) -> str:
    return value.hex()[:12] if isinstance(value, bytes) else repr(value)
