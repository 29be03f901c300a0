"""What a teacher is told: which model, which prompts, how to sample, and where the traces go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

from lynearm.teacher.inside_options import parse_capture, parse_stats
from lynearm.teacher.routing import PromptRoute
from lynearm.wire.blocks import MAX_PAYLOAD_BYTES
from lynearm.wire.errors import ConfigError, InvalidInputError
from lynearm.wire.sampling import sampling_problem
from lynearm.wire.specs import (
    CODEC_MODES,
    MAX_TAIL_DRAWS,
    MAX_TOP_K,
    CodecMode,
    bound_position_bytes,
    check_name,
)
from lynearm.wire.traces import SamplingParams

Dtype: TypeAlias = Literal["auto", "float32", "bfloat16", "float16"]
Keep: TypeAlias = Literal["all", "correct", "shortest-correct"]

TemplateValue: TypeAlias = bool | int | float | str

_TEMPLATE_OWN = ("messages", "add_generation_prompt", "tokenize", "enable_thinking", "thinking")
"""Arguments of a chat template that the teacher gives itself."""


@dataclass(frozen=True, slots=True)
class TeachConfig:
    """One run of a teacher over a file of prompts.

    Raises:
        ConfigError: naming the field that is out of range.
    """

    model: str
    """Directory in the transformers layout, name of a model of the hub, or GGUF file."""
    prompts: str
    """JSON lines, Parquet files or a Hugging Face dataset; see `lynearm.teacher.prompt_rows`."""
    stream: str
    """Where the traces go. Created when missing; an existing one must have the same spec."""
    license: str = ""
    """SPDX expression or URL of the terms under which the teacher may be distilled. Empty: what the model's
    card or file says; "unknown", with a warning, where it says nothing."""
    service: str = "127.0.0.1:7411"
    """host:port of the trace service; several servers of one catalog with commas between."""
    producer_id: str = "teacher"
    """Stable name of the producers; each worker adds a number. A second run under it fences off the first."""
    model_name: str = ""
    """Name of the teacher in the stream's spec; the last part of `model` when empty."""
    labels: Mapping[str, str] = field(default_factory=dict[str, str])
    """Free text in the stream's spec."""
    revision: str = ""
    """Commit, tag or branch of a model of the hub; empty for its main branch. The stream records the commit
    that it stood for."""

    prompt_column: str = ""
    """Field or column with a text, instead of "prompt"."""
    messages_column: str = ""
    """Field or column with a chat, instead of "messages"."""
    token_ids_column: str = ""
    """Field or column with token ids, instead of "prompt_token_ids"."""
    id_column: str = ""
    """Field or column with the prompt's id, instead of "id"."""
    tag_columns: tuple[str, ...] = ()
    """Fields or columns whose values become tags of the traces; TAG=COLUMN gives the tag another name."""
    limit: int = 0
    """Take the first rows only; 0 takes all."""
    system: str = ""
    """System prompt of every chat that brings none."""
    thinking: bool | None = None
    """Whether the model is to think before it answers, for chat templates with a switch for it. None leaves
    it to the template."""
    template_args: Mapping[str, TemplateValue] = field(default_factory=dict[str, TemplateValue])
    """What else the chat template reads, for example reasoning_effort = "high"."""

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
    tail_draws: int = 0
    """Tokens drawn from the tail of every position, of the teacher's distribution over what is not kept: they
    show a student what the tail is made of. 1 takes some 14 bits a position; 0 with codec "sampled"."""
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
    """Draw from the likeliest tokens that hold this probability together."""
    sample_top_k: int = 0
    """Draw from this many of the likeliest tokens; 0 from all. Not to be confused with `top_k`."""
    min_p: float = 0.0
    """Draw from tokens with at least this share of the likeliest one's probability."""
    presence_penalty: float = 0.0
    """Of sampling, -2 to 2: taken from the logit of each token that the completion has so far. Recorded
    distributions and logprobs stay the model's own, with this and the other penalties."""
    frequency_penalty: float = 0.0
    """-2 to 2: the same for each time that it has it."""
    repetition_penalty: float = 1.0
    """Divides positive logits, and multiplies negative ones, of tokens that prompt or completion have so far;
    1 changes nothing."""
    stop: tuple[str, ...] = ()
    """Texts of which the first one to appear ends a completion, and is its end; the trace says which."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a completion as its end tokens do."""
    min_tokens: int = 0
    """Tokens before which neither an end token nor any of these ends it; less where the context ends."""
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
    """What opens the reasoning. "auto": the marker that the vocabulary has, `<think>` or another usual one,
    or the channels of harmony; else a token, "ids:27,91" for several, "text:<reasoning>" for a text that is
    no token; empty: nothing."""
    reasoning_end: str = "auto"
    """What closes the reasoning, likewise."""
    answer_pattern: str = ""
    """Regular expression that finds the answer of a model that marks no reasoning: the group "answer", else
    the first group, else the match; "gsm8k" and "boxed" name two. Empty: none."""
    verify: str = ""
    """How answers are judged: "maths", "regex:PATTERN", "json-schema:FILE" or "python:MODULE:FUNCTION". Each
    trace is then tagged with its verdict. Empty: not at all."""
    answer_tag: str = "answer"
    """Tag of a prompt that holds its reference answer, for "maths"."""
    verify_seconds: float = 10.0
    """How long a Python verifier may think about one answer."""
    keep: Keep = "all"
    """Which completions are published: "all", "correct", or "shortest-correct", one for each prompt. Of a
    prompt with none, a record without tokens says what became of it."""
    route: PromptRoute | None = field(default=None, metadata={"settable": False})
    """Which prompts go to this teacher of several, and under which names; None: all. Made of a job file."""

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
    ray_address: str = ""
    """host:port of a Ray to join; "auto" joins the one that runs here; "local" starts one of its own. Empty:
    that of RAY_ADDRESS, which Ray sets for a submitted job, else "local"."""

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
            "prompts is empty": bool(str(self.prompts)),
            "prompt_column, messages_column and token_ids_column name one thing each; give one of them": (
                sum(map(bool, (self.prompt_column, self.messages_column, self.token_ids_column))) <= 1
            ),
            f"limit {self.limit} is negative": self.limit >= 0,
            "system, thinking and template_args are for chats; they exclude chat = false": self.chat
            or not (self.system or self.thinking is not None or self.template_args),
            f"template_args may not hold {', '.join(_TEMPLATE_OWN)}; thinking has a flag of its own": (
                not set(self.template_args) & set(_TEMPLATE_OWN)
            ),
            f"codec {self.codec!r} is none of {', '.join(CODEC_MODES)}": self.codec in CODEC_MODES,
            f"min_probability {self.min_probability} is outside 0..1": 0 <= self.min_probability <= 1,
            f"draws {self.draws} is outside 1..{MAX_TOP_K}: codec 'sampled' needs them": (
                self.codec != "sampled" or 1 <= self.draws <= MAX_TOP_K
            ),
            f"draws {self.draws} with codec {self.codec!r}: only 'sampled' draws": (
                self.codec == "sampled" or self.draws == 0
            ),
            f"tail_draws {self.tail_draws} is outside 0..{MAX_TAIL_DRAWS}": (
                0 <= self.tail_draws <= MAX_TAIL_DRAWS
            ),
            f"tail_draws {self.tail_draws} with codec 'sampled', which leaves no tail to draw from": (
                self.codec != "sampled" or self.tail_draws == 0
            ),
            f"top_k {self.top_k} is outside 0..{MAX_TOP_K}": 0 <= self.top_k <= MAX_TOP_K,
            f"temperature {self.temperature} is negative": self.temperature >= 0,
            f"logprobs_temperature {self.logprobs_temperature} is outside (0, 100]": (
                0 < self.logprobs_temperature <= 100
            ),
            f"top_p {self.top_p} is outside (0, 1]": 0 < self.top_p <= 1,
            f"sample_top_k {self.sample_top_k} is negative": self.sample_top_k >= 0,
            f"min_p {self.min_p} is outside 0..1": 0 <= self.min_p <= 1,
            f"{self.completions} completions at temperature 0 are all the same; ask for one, or raise it": (
                self.completions == 1 or self.temperature > 0
            ),
            f"max_tokens {self.max_tokens} is below 1": self.max_tokens >= 1,
            f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}": (
                self.min_tokens <= self.max_tokens
            ),
            f"completions {self.completions} is below 1": self.completions >= 1,
            f"max_model_len {self.max_model_len} is below 2": self.max_model_len >= 2,
            f"verify_seconds {self.verify_seconds} is not positive": self.verify_seconds > 0,
            f"keep {self.keep!r} is none of {', '.join(get_args(Keep))}": self.keep in get_args(Keep),
            f"keep {self.keep!r} without verify: nothing says what is correct": (
                self.keep == "all" or bool(self.verify)
            ),
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
        problem = sampling_problem(self.sampling())
        if problem:
            raise ConfigError(problem)
        parse_capture(self.capture)
        parse_stats(self.stats)

    def sampling(self) -> SamplingParams:
        """How completions are drawn; without a seed, of which each has its own."""
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.sample_top_k,
            min_p=self.min_p,
            max_tokens=self.max_tokens,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            min_tokens=self.min_tokens,
            stop=self.stop,
            stop_token_ids=self.stop_token_ids,
        )

    def bytes_per_token(self) -> float:
        """Upper estimate of an encoded position, bytes."""
        return bound_position_bytes(self.codec, self.draws or self.top_k, self.tail_draws)

    def prompt_bytes_bound(self) -> float:
        """Upper estimate of everything that one prompt adds to a block, bytes."""
        tokens = min(self.max_tokens, self.max_model_len)
        return self.completions * (tokens * self.bytes_per_token() + 4 * self.max_model_len)
