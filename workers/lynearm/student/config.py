"""Everything a student trainer can be told."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lynearm.rollouts.config import SUPPORTS, Support
from lynearm.student.freezing import parse_patterns
from lynearm.student.lora_settings import parse_lora
from lynearm.student.mixing import parse_streams
from lynearm.student.objective import DEFAULT_LOSS, Objective, parse_terms
from lynearm.student.rollout_share import parse_share
from lynearm.student.weighting import PositionWeighting
from lynearm.wire.errors import ConfigError
from lynearm.wire.specs import MAX_TAIL_DRAWS, NAME_PATTERN

SCHEDULES = ("constant", "cosine")
PACKINGS = ("auto", "on", "off")
DTYPES = ("auto", "float32", "bfloat16")
SHARDINGS = ("none", "full")
CORRUPT_POLICIES = ("stop", "skip")
TRACKERS = ("tensorboard", "wandb", "trackio")


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """Configuration of one training run.

    Raises:
        ConfigError: naming the field that is out of range.
    """

    student: Path = Path("student")
    """Directory of a transformers causal LM with its tokenizer: where training begins."""

    streams: tuple[str, ...] = field(default=("default",), metadata={"singular": "stream"})
    """Streams of traces to train on, each NAME[:WEIGHT]: `mixing` explains weights that change. Of several,
    each counts by its share of the completion tokens."""

    service: str = "127.0.0.1:7411"
    """host:port of the trace service; several servers of one catalog with commas between."""

    service_timeout_seconds: float = 30.0
    """How long one call to the service may take."""

    patience_seconds: float = math.inf
    """How long the service may stay away in the middle of a run before the run saves and gives up."""

    wait_seconds: float = 0.0
    """How long to wait for a service and a stream that are not there yet. None, since a stream that is not
    there is more often a slip of the pen than a teacher about to start."""

    out: Path = Path("runs/student")
    """Directory that receives the checkpoints."""

    resume: bool = False
    """Go on from the latest checkpoint in `out` instead of from `student`."""

    learning_rate: float = 5e-4
    """Peak rate. Students that lost a third of their layers heal fastest between 4e-4 and 1e-3."""

    schedule: str = "constant"
    """"constant", since an online run does not know its end; or "cosine", down to a tenth at `max_steps`."""

    warmup_steps: int = 10
    """Steps from 0 to the peak rate; AdamW's second moments are noise before."""

    weight_decay: float = 0.0
    """Decay of matrices per step, times the rate; none, since one pass over fresh data does not overfit."""

    beta1: float = 0.9
    """AdamW's memory of the gradient."""

    beta2: float = 0.95
    """AdamW's memory of the squared gradient; shorter than the usual 0.999, since runs are short."""

    grad_clip: float = 1.0
    """Largest global norm of a step's gradient; 0 does not clip."""

    loss: tuple[str, ...] = ()
    """What is summed, each NAME[@MIX][:WEIGHT], as docs/losses.md explains. Empty: forward-kl:1 and
    cross-entropy:0.1, and on streams with draws from the tail tail-cross-entropy:1."""

    temperature: float = 1.0
    """At which student and teacher are compared; the stream's, unless `retemper`."""

    retemper: bool = False
    """Bring a stream of another temperature to this one. The tail is then an estimate."""

    span_weights: Mapping[str, float] = field(default_factory=dict[str, float])
    """How much positions count by the kind of their span: reasoning, answer, truncated_reasoning, or other
    for those outside any span; 1 where nothing is said, and 0 leaves them out."""

    tag_weights: Mapping[str, float] = field(default_factory=dict[str, float])
    """How much a trace's positions count by its tags, each written KEY=VALUE; several multiply."""

    batch_sequences: int = 8
    """Traces per optimizer step."""

    batch_tokens: int = 0
    """Completion tokens per optimizer step, at least, instead of `batch_sequences`: steps of even weight
    where completions differ much in length. 0 counts traces."""

    packing: str = "auto"
    """"on" lays traces end to end in rows of `micro_batch_tokens`, kept apart by the attention mask; "off"
    lays each in a row of its own, beside others of its length. "auto" packs on CUDA where the model allows
    it: on a CPU attention computes what the mask then hides. The result does not depend on it."""

    micro_batch_tokens: int = 1024
    """Padded tokens computed at once; a batch is cut by length into such pieces. Bounds memory;
    the result does not depend on it."""

    max_sequence_tokens: int = 2048
    """Prompt and completion that are trained on; longer completions are cut, longer prompts skipped."""

    max_steps: int = 0
    """Optimizer steps of the whole run, resumed ones included; 0 goes on until the stream has ended."""

    max_seconds: float = 0.0
    """Wall time of training in this process; 0 sets no bound. A run that it ends can be resumed."""

    epochs: int = 1
    """Passes over each stream; the later ones replay it from its start once it is sealed, without waiting for
    other streams to come to their end."""

    held_out_traces: int = 32
    """Traces of each stream kept back to measure the KL to its teacher; 0 measures none."""

    held_out_fraction: float = 0.1
    """Part of the prompts that is never trained on, chosen by a hash of the prompt id. A trace tagged
    `split=train` or `split=held_out` follows its tag instead."""

    held_out_window: int = 256
    """Training traces of a stream that may go by before the first step while held-out ones are still too
    few. Bounds the memory and the wait; after it, those that were found are the held-out set."""

    eval_every_steps: int = 50
    """Steps between measurements of the held-out KL; 0 measures only before and after."""

    questions: Path | None = None
    """File of questions with a number for an answer, as in GSM8K; the part that the student answers exactly
    is measured with the held-out KL. Writing answers takes longer than all other measurements: give some 50
    questions."""

    question_tokens: int = 256
    """Longest answer to a question; GSM8K's take about 100."""

    lm_eval: tuple[str, ...] = ()
    """Tasks of EleutherAI's lm-eval that run with each measurement of the held-out KL. They take long: think
    of `lm_eval_limit` and `eval_every_steps`."""

    lm_eval_path: Path | None = None
    """Folder of further tasks, as lm-eval's `--include_path` takes it."""

    lm_eval_limit: int = 100
    """Examples of each task, the first ones; 0 for all. A hundred show where a run is going."""

    early_stop_patience: int = 0
    """Measurements in a row without a lower held-out KL after which the run stops; 0 never stops for that.
    Else each measurement that lowers it is saved too, so that the best checkpoint has the lowest of all."""

    trackers: tuple[str, ...] = ()
    """Where figures go besides `metrics.jsonl`: "tensorboard", "wandb", "trackio"."""

    checkpoint_every_steps: int = 200
    """Steps between checkpoints; 0 saves only at the end and when interrupted. Each is measured, unless
    `eval_every_steps` is 0, so that the best one is known."""

    keep_checkpoints: int = 2
    """Newest checkpoints that stay, besides the best. Two, so that a disk fault in the newest costs one
    interval."""

    async_checkpoints: bool = True
    """Write checkpoints beside the training, from a copy of weights and optimizer state in memory (12 bytes a
    weight, while one is written); False holds the training up instead."""

    freeze_embeddings: bool = False
    """Leave token embeddings and output head as they are: saves a third of the head's cost and its optimizer
    state. Right for a student cut from its teacher, whose embeddings are the teacher's."""

    freeze: tuple[str, ...] = ()
    """What else stays as it is: embeddings, head, norms, layers.0-9, or parameters by name with wildcards;
    docs/students.md lists the patterns."""

    lora: str = ""
    """Train a low-rank adapter instead of the weights, for example "r=16,alpha=32,targets=all-linear", or
    "default". Checkpoints then hold the adapter alone."""

    gradient_checkpointing: bool = False
    """Keep only the input of each layer for the backward pass and compute the rest again: the same gradients,
    a quarter to a half more time, less memory the more tokens a micro-batch has."""

    seed: int = 0
    """Of the held-out hash, of dropout and of a new adapter."""

    threads: int = 0
    """CPU threads while the stream is live; 0 takes torch's own choice."""

    replay_threads: int = 0
    """CPU threads in the later epochs, when the teacher has left its cores; 0 as `threads`."""

    prefetch_blocks: int = 8
    """Decoded blocks of each stream that wait for the trainer; the service holds back what comes after."""

    on_corrupt: str = "stop"
    """At a block of a stream that is damaged: "stop" saves and ends the run, "skip" trains on without its
    traces. The manifest names the blocks that were passed over."""

    device: str = "auto"
    """A torch device; "auto" is CUDA where there is one, else the CPU."""

    dtype: str = "auto"
    """Type to compute in; weights stay float32. "auto" is bfloat16 on CUDA, float32 on a CPU."""

    ranks: int = 0
    """With `ray`, processes that share each batch: 0 is one for each GPU of the cluster, or one. Without it
    the launcher says: torchrun --nproc-per-node."""

    sharding: str = "none"
    """"none" has every rank hold the whole student; "full" spreads parameters, gradients and optimizer state
    over the ranks (FSDP2), for students that one device has no room for. A run may go on with the other."""

    ray: bool = False
    """Let Ray Train place the ranks, and start them again when one is lost; `out` has to be on storage that
    all nodes share."""

    ray_address: str = "auto"
    """Which Ray: "auto" joins the one that runs here, as under `ray job submit`; "local" starts one."""

    on_policy: bool = False
    """Let the student write, have the teacher score it, and train on that too; docs/on-policy.md explains."""

    teacher: str = "127.0.0.1:7412"
    """host:port of the served teacher that scores rollouts; several of the same model with commas between."""

    on_policy_share: str = "0.5"
    """Part of the completion tokens that are rollouts: λ. It moves as a stream's weight does:
    0..0.5@500 goes from none to half until step 500."""

    max_staleness: int = 16
    """Steps that a rollout may be behind the student that learns from it; older ones are passed over."""

    refresh_every_steps: int = 4
    """Steps after which the student that writes gets newer weights, once it has those before."""

    rollout_loss: tuple[str, ...] = ("reverse-kl:1",)
    """What is summed on rollouts, as `loss` is on the other streams. Reverse KL, since on the student's own
    text it says what the teacher would not have written."""

    rollout_stream: str = ""
    """Stream of the rollouts; empty: named after the first stream and `out`."""

    rollout_prompts: str = ""
    """What the student answers: a source of prompts as for `lynearm teach`. Empty: the prompts of the first
    stream, but for those that are held out."""

    rollout_tokens: int = 256
    """Bound on a rollout, tokens."""

    rollout_temperature: float = 1.0
    """Of the student's sampling. At 1 the gradient of reverse KL is that on its own distribution."""

    rollout_top_k: int = 64
    """Tokens of each position whose probabilities the teacher gives."""

    rollout_support: Support = "teacher"
    """Whose likeliest tokens those are. "teacher"; or "student": reverse KL counts what the student holds
    likely, and this says what the teacher thinks of just that."""

    rollout_tail_draws: int = 0
    """Tokens that the teacher draws from the tail of each position, for tail-cross-entropy in `rollout_loss`;
    with support "teacher" alone."""

    rollout_batch: int = 0
    """Rollouts that are written, scored and published together; 0 for half of those that are used before they
    are too old, at most 64."""

    rollout_threads: int = 0
    """CPU threads of the student that writes; 0 for all."""

    rollout_kv_cache_mib: int = 0
    """Memory for its KV cache; 0: on a CPU what it needs, on a GPU what vLLM finds free: say it where it
    shares a GPU with the trainer."""

    rollout_gpus: str = ""
    """GPUs that it sees, as in CUDA_VISIBLE_DEVICES; empty: those that the trainer sees."""

    rollout_weights: Path | None = None
    """Directory over which it gets its weights, one or two copies of the model; empty: in `out`. Better one
    on this machine where `out` is not: /dev/shm has no disk behind it."""

    check_alignment: bool = True
    """Before the first step, look whether the teacher's rows stand at the positions of their tokens, and
    refuse to train when they are shifted. Costs one forward pass over four short traces."""

    allow_misaligned: bool = False
    """Train although tokenizer, template, vocabulary or logprobs differ. The loss compares token ids: only
    for those who know that the differences do not touch them."""

    allow_terms: bool = False
    """Train on a stream whose terms forbid it; the manifest records it. For those whom the terms, or a
    contract, permit it all the same."""

    def __post_init__(self) -> None:
        """Check every field."""
        parse_streams(self.streams)
        for problem, holds in self._checks().items():
            if not holds:
                raise ConfigError(problem)
        parse_patterns(self.freeze)
        if self.lora:
            parse_lora(self.lora)
        Objective(parse_terms(self.loss or DEFAULT_LOSS))
        Objective(parse_terms(self.rollout_loss))
        parse_share(self.on_policy_share)
        PositionWeighting(self.span_weights, self.tag_weights)

    def _checks(self) -> dict[str, bool]:
        counts_from_zero = (
            "warmup_steps max_steps held_out_traces held_out_window eval_every_steps checkpoint_every_steps "
            "threads replay_threads seed batch_tokens ranks early_stop_patience lm_eval_limit max_staleness "
            "rollout_batch rollout_threads rollout_kv_cache_mib rollout_temperature"
        )
        counts_from_one = (
            "question_tokens batch_sequences micro_batch_tokens epochs keep_checkpoints prefetch_blocks "
            "refresh_every_steps rollout_tokens rollout_top_k"
        )
        not_negative = "weight_decay grad_clip max_seconds wait_seconds"
        checks = {f"{name} is {getattr(self, name)}, expected 0 or more": getattr(self, name) >= 0
                  for name in f"{counts_from_zero} {not_negative}".split()}  # fmt: skip
        checks |= {f"{name} is {getattr(self, name)}, expected 1 or more": getattr(self, name) >= 1
                   for name in counts_from_one.split()}  # fmt: skip
        return checks | {
            f"learning_rate is {self.learning_rate}, expected above 0 and at most 1": 0
            < self.learning_rate
            <= 1,
            f"beta1 is {self.beta1}, expected 0 to below 1": 0 <= self.beta1 < 1,
            f"beta2 is {self.beta2}, expected 0 to below 1": 0 <= self.beta2 < 1,
            f"temperature is {self.temperature}, expected above 0": 0 < self.temperature < math.inf,
            f"max_sequence_tokens is {self.max_sequence_tokens}, expected 2 or more": self.max_sequence_tokens
            >= 2,
            f"held_out_fraction is {self.held_out_fraction}, expected 0 to 0.9": 0
            <= self.held_out_fraction
            <= 0.9,
            f"service_timeout_seconds is {self.service_timeout_seconds}, expected above 0": (
                self.service_timeout_seconds > 0
            ),
            f"patience_seconds is {self.patience_seconds}, expected 0 or more": self.patience_seconds >= 0,
            f"schedule is {self.schedule!r}, expected one of {SCHEDULES}": self.schedule in SCHEDULES,
            f"dtype is {self.dtype!r}, expected one of {DTYPES}": self.dtype in DTYPES,
            f"sharding is {self.sharding!r}, expected one of {SHARDINGS}": self.sharding in SHARDINGS,
            f"on_corrupt is {self.on_corrupt!r}, expected one of {CORRUPT_POLICIES}": self.on_corrupt
            in CORRUPT_POLICIES,
            f"packing is {self.packing!r}, expected one of {PACKINGS}": self.packing in PACKINGS,
            f"trackers is {list(self.trackers)}, expected some of {TRACKERS}": set(self.trackers)
            <= set(TRACKERS),
            "questions are asked when held-out traces are measured: held_out_traces is 0": self.questions
            is None
            or self.held_out_traces > 0,
            "tasks of lm_eval run when held-out traces are measured: held_out_traces is 0": not self.lm_eval
            or self.held_out_traces > 0,
            "lm_eval runs on one rank, which has to hold the whole student: not with sharding 'full'": not (
                self.lm_eval and self.sharding == "full"
            ),
            "early_stop_patience needs held_out_traces and eval_every_steps": not self.early_stop_patience
            or (self.held_out_traces > 0 and self.eval_every_steps > 0),
            f"refresh_every_steps is {self.refresh_every_steps}, expected at most max_staleness + 1, "
            f"which is {self.max_staleness + 1}: rollouts would be too old before there are newer weights": (
                self.refresh_every_steps <= self.max_staleness + 1
            ),
            f"rollout_support is {self.rollout_support!r}, expected one of {SUPPORTS}": self.rollout_support
            in SUPPORTS,
            f"rollout_tail_draws is {self.rollout_tail_draws}, expected 0 to {MAX_TAIL_DRAWS}": (
                0 <= self.rollout_tail_draws <= MAX_TAIL_DRAWS
            ),
            "rollout_tail_draws goes with rollout_support 'teacher': beside the student's tokens, nothing is "
            "drawn": self.rollout_tail_draws == 0 or self.rollout_support == "teacher",
            f"rollout_stream is {self.rollout_stream!r}, expected a name": not self.rollout_stream
            or NAME_PATTERN.fullmatch(self.rollout_stream) is not None,
            "hidden states are compared in loss, and rollouts have none: not with on_policy": not (
                self.on_policy
                and any(
                    Objective(parse_terms(terms)).hidden_terms
                    for terms in (self.loss or DEFAULT_LOSS, self.rollout_loss)
                )
            ),
            "on_policy does not go with ray: start the run with torchrun, or on one process": not (
                self.on_policy and self.ray
            ),
            "on_policy hands over weights that one rank holds whole: not with sharding 'full'": not (
                self.on_policy and self.sharding == "full"
            ),
            "lora does not go with sharding or on_policy: an adapter is whole on every rank, and not handed "
            "to rollouts": not (self.lora and (self.sharding == "full" or self.on_policy)),
            "schedule 'cosine' needs max_steps": self.schedule != "cosine" or self.max_steps > 0,
        }
