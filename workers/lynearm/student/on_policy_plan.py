"""What `--on-policy` means for a run: one more stream, how it is mixed, and what its traces may look like.

Rollouts are a stream like any other: the trainer has one kind of input. Its share λ of the tokens is taken
from those of the other streams, whose weights keep their proportions. Loads no torch.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from lynearm.client import TeacherClient, TraceClient
from lynearm.rollouts.waves import SOURCE, SOURCE_TAG, student_step
from lynearm.student.config import TrainConfig
from lynearm.student.mixing import StreamPlan, StreamState, parse_streams
from lynearm.student.rollout_share import mix_rollouts, parse_share
from lynearm.student.run_account import NOT_TOLD
from lynearm.wire.errors import ConfigError
from lynearm.wire.protobuf import StreamInfo
from lynearm.wire.scoring import TeacherInfo
from lynearm.wire.specs import CodecSpec, StreamSpec
from lynearm.wire.traces import Trace

RUN_LABEL = "run"
"""Label of a rollout stream: a digest of what its student begins with, and of how it is trained."""


def add_rollouts(plans: Sequence[StreamPlan], config: TrainConfig) -> tuple[StreamPlan, ...]:
    """The streams of an on-policy run in their order, that of the rollouts last.

    Args:
        plans: Of the other streams.
        config: What the run is told.
    """
    return mix_rollouts(plans, rollout_plan(config), parse_share(config.on_policy_share))


def rollout_plan(config: TrainConfig) -> StreamPlan:
    """How rollouts take part, their weight aside: none is held out, and no run goes on for them."""
    return StreamPlan(
        rollout_stream_name(config),
        accepts=partial(is_fresh, max_staleness=config.max_staleness),
        measured=False,
        endless=True,
    )


def is_fresh(trace: Trace, step: int, *, max_staleness: int) -> bool:
    """Whether a rollout is still wanted when `step` steps are done. Once refused, it stays so.

    Raises:
        CorruptBlockError: if the trace is no rollout.
    """
    return step - student_step(trace) <= max_staleness


def rollout_stream_name(config: TrainConfig) -> str:
    """Where the rollouts go: named after the first stream and the run's directory, unless it is said."""
    if config.rollout_stream:
        return config.rollout_stream
    first = parse_streams(config.streams)[0].name
    run = re.sub(r"[^a-z0-9._-]+", "-", config.out.name.lower()).strip("-.") or "run"
    return f"{first[:64]}.{run[:48]}.rollouts"


def open_rollout_stream(client: TraceClient, config: TrainConfig, others: Sequence[StreamInfo]) -> StreamInfo:
    """The stream of a run's rollouts; made by a run that begins.

    A run that was killed before its first checkpoint finds the rollouts of its first try, and goes through
    the same steps with them. One with another student, or other settings, is refused.

    Args:
        client: Of the trace service.
        config: What the run is told.
        others: The other streams: their teacher's terms hold for what it says of rollouts.

    Raises:
        StreamNotFoundError: if a run is resumed, and its rollouts are gone.
        StreamExistsError: if there are rollouts of another run under this name.
        ServiceUnavailableError: if no teacher answers that a new stream could be of.
        ConfigError: if the teacher does not score as many tokens as are wanted.
    """
    name = rollout_stream_name(config)
    if config.resume:
        return client.get_stream(name)
    with TeacherClient(config.teacher, timeout_seconds=config.service_timeout_seconds) as teacher:
        if config.wait_seconds:
            teacher.wait_until_ready(config.wait_seconds)
        info = teacher.describe()
    _check_room(info, config)
    return client.open_stream(rollout_spec(name, info, config, others))


def rollout_spec(
    name: str, teacher: TeacherInfo, config: TrainConfig, others: Sequence[StreamInfo]
) -> StreamSpec:
    """What a stream of rollouts is.

    Args:
        name: Of the stream.
        teacher: Who scores.
        config: What the run is told.
        others: The other streams.
    """
    same = [info.spec for info in others if info.spec.teacher.revision == teacher.spec.revision]
    return StreamSpec(
        name=name,
        teacher=replace(teacher.spec, logprobs_temperature=config.temperature),
        tokenizer=teacher.tokenizer,
        codec=CodecSpec("standard", config.rollout_top_k, tail_draws=config.rollout_tail_draws),
        license=teacher.license or next((spec.license for spec in same), "unknown"),
        labels={
            SOURCE_TAG: SOURCE,
            "support": config.rollout_support,
            "prompts": Path(config.rollout_prompts).name or f"stream {others[0].spec.name}",
            RUN_LABEL: digest_run(config),
        },
    )


def digest_run(config: TrainConfig) -> str:
    """Names what a run's weights depend on besides its streams: the student's files, and the settings.

    Raises:
        ConfigError: if the student cannot be read.
    """
    settings = {key: value for key, value in asdict(config).items() if key not in NOT_TOLD}
    digest = hashlib.sha256(repr(sorted(settings.items())).encode())
    try:
        files = sorted([*config.student.glob("*.safetensors"), *config.student.glob("config.json")])
        for path in files:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    except OSError as error:
        raise ConfigError(f"the student in {config.student} cannot be read: {error}") from error
    return digest.hexdigest()[:32]


def expected_per_step(config: TrainConfig) -> float:
    """Rollouts that a step should take, where λ is at its highest: an estimate, since λ is of the tokens."""
    share = max(weight for _, weight in parse_share(config.on_policy_share).knots)
    if config.batch_tokens:
        # As if all were as long as they may be: of more than are used, some would grow too old.
        return max(0.5, share * config.batch_tokens / config.rollout_tokens)
    return max(0.1, share * config.batch_sequences)


def rollouts_ahead(config: TrainConfig) -> int:
    """Rollouts that may be under way or wait: as many as are used before they are too old."""
    steps = max(1, config.max_staleness + 1 - config.refresh_every_steps)
    return max(config.rollout_batch, math.ceil(steps * expected_per_step(config)), 1)


def rollouts_at_once(config: TrainConfig) -> int:
    """Rollouts of a wave: half of those ahead, so that some are written while others are trained on."""
    return config.rollout_batch or min(64, max(1, rollouts_ahead(config) // 2))


def _check_room(teacher: TeacherInfo, config: TrainConfig) -> None:
    on_student = config.rollout_support == "student"
    most = teacher.max_chosen_ids if on_student else teacher.max_top_k
    if config.rollout_top_k > most:
        flag = "--max-chosen-ids" if on_student else "--top-k"
        raise ConfigError(
            f"rollout_top_k is {config.rollout_top_k}, and the teacher at {config.teacher} scores {most} "
            "tokens of a position",
            f"lower it, or start the teacher with {flag} {config.rollout_top_k}",
        )


def mean_staleness(traces: Sequence[Trace], step: int) -> float | None:
    """Steps by which rollouts are behind, on average; None where there are none.

    Args:
        traces: Rollouts of a batch.
        step: Steps done before it.
    """
    behind = [step - student_step(trace) for trace in traces]
    return sum(behind) / len(behind) if behind else None


def account_for_rollouts(streams: Sequence[StreamState], spec: StreamSpec) -> dict[str, object]:
    """What a manifest says of the part that a student's own writing had in its training.

    Args:
        streams: Of a run, that of the rollouts last.
        spec: Of that one.
    """
    tokens = sum(stream.tokens for stream in streams)
    rollouts = streams[-1]
    return {
        "stream": rollouts.name,
        "support": spec.labels.get("support", "unknown"),
        "traces": rollouts.traces,
        "completion_tokens": rollouts.tokens,
        "share_of_tokens": rollouts.tokens / tokens if tokens else 0.0,
    }
