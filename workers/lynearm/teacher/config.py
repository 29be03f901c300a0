"""What a teacher is told: which model, which prompts, how to sample, and where the traces go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from lynearm.teacher.inside_options import parse_capture, parse_stats
from lynearm.wire.blocks import MAX_PAYLOAD_BYTES
from lynearm.wire.errors import ConfigError, InvalidInputError
from lynearm.wire.specs import BYTES_PER_ENTRY, CODEC_MODES, MAX_TOP_K, CodecMode, check_name

Dtype: TypeAlias = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, slots=True)
class TeachConfig:
    """One run of a teacher over a file of prompts.

    Raises:
        ConfigError: naming the field that is out of range.
    """

    model: str
    """Directory in the transformers layout, or the name of a model that vLLM can fetch."""
    prompts: Path
    """JSON lines; see `lynearm.teacher.prompts`."""
    stream: str
    """Where the traces go. Created when missing; an existing one must have the same spec."""
    license: str
    """SPDX expression or URL of the terms under which the teacher may be distilled. No default: only
    the user can know."""
    service: str = "127.0.0.1:7411"
    """host:port of the trace service; several servers of one catalog with commas between."""
    producer_id: str = "teacher"
    """Stable name of the producers; each worker adds a number. A second run under it fences off the first."""
    model_name: str = ""
    """Name of the teacher in the stream's spec; the last part of `model` when empty."""
    labels: Mapping[str, str] = field(default_factory=dict[str, str])
    """Free text in the stream's spec."""

    top_k: int = 64
    """Entries kept per position: at 64 the tail of a small model holds 5 % of the mass."""
    codec: CodecMode = "standard"
    """"exact" keeps every logprob bit for bit; "fine", "standard" and "compact" add a KL divergence of at
    most 1e-6, 1e-4 and 1e-3 nats to a mean position; "sampled" keeps `draws` draws from the whole
    distribution, with their counts."""
    min_probability: float = 0.0
    """Adaptive k: of the top_k entries, keep those with at least this probability (and at least one).
    0 keeps all. At 1e-3 a position takes less than half of the bits."""
    draws: int = 0
    """Draws per position with codec "sampled", for example 50; 0 with every other."""
    dictionary: bool = True
    """Train a codec dictionary on the stream's first blocks: small blocks shrink by a few per cent."""

    capture: str = ""
    """Hidden states that traces carry: "hidden:layers=4,8,-1,dtype=bf16", with "norm" for the final norm;
    empty: none. The engine then runs without compiled graphs."""
    stats: str = ""
    """Statistics of layers that are stored with the stream: "layers", or "layers:every=1" for every step of
    the engine in place of one in eight; empty: none. The engine then runs without compiled graphs."""

    temperature: float = 1.0
    """Of sampling; 0 is greedy. The recorded logprobs are those of the model itself, whatever it is."""
    logprobs_temperature: float = 1.0
    """Of the recorded distributions, tail and sampled tokens included: the logits of the whole vocabulary are
    divided by it before anything is kept. Part of the stream's spec, and no matter of sampling."""
    top_p: float = 1.0
    max_tokens: int = 256
    """Bound on a completion, tokens; less where the context ends before."""
    completions: int = 1
    """Completions drawn for each prompt."""
    seed: int | None = 0
    """Every completion has its own seed, made of this, the prompt's id and the sample's number, so that
    a restarted teacher writes what it would have written. None draws afresh."""
    chat: bool = True
    """Pass a plain `prompt` through the chat template, as one user message, where the model has one."""
    reasoning_start: str = "auto"
    """Token that opens the reasoning. "auto": `<think>` where the vocabulary has it; empty: none."""
    reasoning_end: str = "auto"
    """Token that closes the reasoning; "auto" is `</think>`."""

    max_model_len: int = 2048
    """Longest prompt plus completion, tokens; at most what the model was made for."""
    max_batch: int = 64
    """Sequences generated at once. On a CPU a batch of 64 takes a third less time per token than 16."""
    dtype: Dtype = "auto"
    """"auto" is float32 on a CPU (without bf16 units, bfloat16 takes four times as long there) and the
    model's own elsewhere."""
    kv_cache_mib: int = 0
    """Memory for the KV cache. 0: on a CPU what `max_batch` sequences need, at most 1 GiB; on a GPU
    what vLLM finds free."""
    threads: int = 0
    """CPU threads of the engine; 0 for all."""

    block_bytes: int = 256 << 10
    """A block goes out when about this much is encoded: smaller ones cost more per byte on the way."""
    flush_seconds: float = 2.0
    """A smaller block goes out after this time, so that a student that trains meanwhile has data early."""
    seal: bool = True
    """Seal the stream when every prompt is finished, so that subscribers end."""
    strict: bool = False
    """Refuse a prompt file with a bad line before anything starts, instead of skipping the line."""
    job: str = ""
    """Name of the job in the service, so that a command that is repeated goes on with it. Empty: a digest of
    the prompts, so that other prompts are another job."""
    workers: int = 0
    """Engines at the same time, each with a share of some node; 0 for as many as the cluster has room for,
    more when nodes join and fewer when they leave. A Ray of our own has room for one."""
    tensor_parallel: int = 1
    """GPUs of one node over which each engine spreads the model."""
    ray_address: str = "local"
    """"local" starts a Ray of its own; "auto" joins the one that runs here, as under `ray job submit`."""

    def __post_init__(self) -> None:
        """Check every field."""
        try:
            check_name(self.stream)
            check_name(self.producer_id, what="producer id")
            check_name(self.job or "job", what="job")
        except InvalidInputError as error:
            raise ConfigError(error.message, error.remedy) from error
        checks = {
            "model is empty": bool(self.model),
            "license is empty; name the terms of the teacher, for example Apache-2.0": bool(self.license),
            f"codec {self.codec!r} is none of {', '.join(CODEC_MODES)}": self.codec in CODEC_MODES,
            f"min_probability {self.min_probability} is outside 0..1": 0 <= self.min_probability <= 1,
            f"draws {self.draws} is outside 1..{MAX_TOP_K}: codec 'sampled' needs them": (
                self.codec != "sampled" or 1 <= self.draws <= MAX_TOP_K
            ),
            f"draws {self.draws} with codec {self.codec!r}: only 'sampled' draws": (
                self.codec == "sampled" or self.draws == 0
            ),
            f"top_k {self.top_k} is outside 0..{MAX_TOP_K}": 0 <= self.top_k <= MAX_TOP_K,
            f"temperature {self.temperature} is negative": self.temperature >= 0,
            f"logprobs_temperature {self.logprobs_temperature} is outside (0, 100]": (
                0 < self.logprobs_temperature <= 100
            ),
            f"top_p {self.top_p} is outside (0, 1]": 0 < self.top_p <= 1,
            f"max_tokens {self.max_tokens} is below 1": self.max_tokens >= 1,
            f"completions {self.completions} is below 1": self.completions >= 1,
            f"max_model_len {self.max_model_len} is below 2": self.max_model_len >= 2,
            f"max_batch {self.max_batch} is below 1": self.max_batch >= 1,
            f"threads {self.threads} is negative": self.threads >= 0,
            f"producer id {self.producer_id!r} has {len(self.producer_id)} characters, expected at most 100: "
            "workers add numbers": len(self.producer_id) <= 100,
            f"workers {self.workers} is negative": self.workers >= 0,
            f"tensor_parallel {self.tensor_parallel} is below 1": self.tensor_parallel >= 1,
            f"kv_cache_mib {self.kv_cache_mib} is negative": self.kv_cache_mib >= 0,
            f"block_bytes {self.block_bytes} is outside 1..{MAX_PAYLOAD_BYTES}": (
                1 <= self.block_bytes <= MAX_PAYLOAD_BYTES
            ),
            f"flush_seconds {self.flush_seconds} is not positive": self.flush_seconds > 0,
            f"{self.completions} completions of {self.max_tokens} tokens with top_k {self.top_k} can exceed "
            f"a block of {MAX_PAYLOAD_BYTES} bytes, and those of one prompt share a block": (
                self.prompt_bytes_bound() <= MAX_PAYLOAD_BYTES
            ),
        }
        for problem, holds in checks.items():
            if not holds:
                raise ConfigError(problem)
        parse_capture(self.capture)
        parse_stats(self.stats)

    def bytes_per_token(self) -> float:
        """Upper estimate of an encoded position, bytes."""
        return 16 + (self.draws or self.top_k) * BYTES_PER_ENTRY.get(self.codec, 8.0)

    def prompt_bytes_bound(self) -> float:
        """Upper estimate of everything that one prompt adds to a block, bytes."""
        tokens = min(self.max_tokens, self.max_model_len)
        return self.completions * (tokens * self.bytes_per_token() + 4 * self.max_model_len)
