"""What a manifest says of one run: settings, versions, what was overridden and what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any, cast

from lynearm.student.config import TrainConfig
from lynearm.student.lineage import JsonObject
from lynearm.student.progress import EvaluationRecord
from lynearm.student.terms import read_terms
from lynearm.wire.specs import StreamSpec

PACKAGES = ("lynearm", "torch", "transformers")
"""Whose versions may change what a run computes."""

NOT_TOLD = frozenset(
    {
        "student",
        "questions",
        "lm_eval_path",
        "out",
        "resume",
        "max_seconds",
        "trackers",
        "allow_misaligned",
        "allow_terms",
    }
    | {"service", "service_timeout_seconds", "patience_seconds", "wait_seconds", "prefetch_blocks"}
    | {"checkpoint_every_steps", "keep_checkpoints", "async_checkpoints", "on_corrupt"}
    | {"threads", "replay_threads", "ray", "ray_address"}
    | {"teacher", "rollout_stream", "rollout_prompts", "rollout_threads", "rollout_kv_cache_mib"}
    | {"rollout_gpus", "rollout_weights"}
)
"""Settings that do not change the student, name a machine's paths, or are among the overrides."""


def describe_run(
    config: TrainConfig,
    specs: Sequence[StreamSpec],
    *,
    differences: Sequence[str] = (),
    evaluations: Sequence[EvaluationRecord] = (),
    world_size: int = 1,
) -> JsonObject:
    """One entry of a manifest's `runs`.

    Args:
        config: What the run was told.
        specs: Of its streams.
        differences: What the student does not share with its streams, where that was overridden.
        evaluations: Of the run so far.
        world_size: Processes that share each batch.
    """
    settings = {name: value for name, value in asdict(config).items() if name not in NOT_TOLD}
    if not config.loss:
        del settings["loss"]  # each stream's is told beside what was taken from it
    account: JsonObject = {
        "streams": [spec.name for spec in specs],
        "settings": cast(JsonObject, _plain(settings)),
        "ranks": world_size,
        "code": code_versions(*(["peft"] if config.lora else [])),
        "overrides": _overrides(specs, differences),
    }
    if evaluations:
        account["held_out"] = {"before": _measured(evaluations[0]), "last": _measured(evaluations[-1])}
    return account


def list_earlier(before: JsonObject, now: JsonObject, step: int) -> list[JsonObject]:
    """What was other than now until some step, in a run that goes on: a manifest's `earlier`.

    Args:
        before: Of the checkpoint that the run goes on from, its entry of `runs`.
        now: The entry that takes its place.
        step: Of that checkpoint.

    Returns:
        In the order of their steps: {"until_step": 12, "settings": {…}, "code": {…}, "ranks": 2}, each with
        the values until that step of what changed there, null where nothing was said.
    """
    earlier = [dict(one) for one in cast("Sequence[JsonObject]", before.get("earlier", []))]
    was = {part: before.get(part) for part in _MAY_CHANGE}
    if earlier and earlier[-1]["until_step"] == step:
        # Nothing was learnt with what came after it.
        was = {part: _put_over(value, earlier[-1].get(part)) for part, value in was.items()}
        earlier.pop()
    changed = {part: difference for part, value in was.items()
               if (difference := _difference(value, now.get(part))) is not None}  # fmt: skip
    if changed and step:
        earlier.append({"until_step": step, **changed})
    return earlier


_MAY_CHANGE = ("settings", "code", "ranks")


def _put_over(value: Any, other: Any) -> Any:  # Any: parsed JSON
    if isinstance(value, dict) and isinstance(other, dict):
        return {**cast(JsonObject, value), **cast(JsonObject, other)}
    return cast(Any, value if other is None else other)


def _difference(before: Any, now: Any) -> Any:  # Any: parsed JSON
    """What `before` says otherwise; None where it says the same, or nothing."""
    if isinstance(before, dict) and isinstance(now, dict):
        was, is_now = cast(JsonObject, before), cast(JsonObject, now)
        names = dict.fromkeys((*was, *is_now))
        return {name: was.get(name) for name in names if was.get(name) != is_now.get(name)} or None
    return cast(Any, None if before == now else before)


def code_versions(*more: str) -> dict[str, str]:
    """Versions of the packages that decide what a run computes; "unknown" for one that is not installed.

    Args:
        more: Packages besides `PACKAGES`.
    """
    versions: dict[str, str] = {}
    for package in (*PACKAGES, *more):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "unknown"
    return versions


def _overrides(specs: Sequence[StreamSpec], differences: Sequence[str]) -> JsonObject:
    """What would have been refused without a flag, by the flag's name."""
    overrides: JsonObject = {}
    terms = [(spec, read_terms(spec)) for spec in specs]
    forbidden = [
        f"licence {spec.license!r} of stream {spec.name!r}: {said.reason}"
        for spec, said in terms
        if said.verdict == "forbidden"
    ]
    if forbidden:
        overrides["allow_terms"] = "; ".join(forbidden)
    if differences:
        overrides["allow_misaligned"] = list(differences)
    return overrides


def _measured(record: EvaluationRecord) -> JsonObject:
    return cast(JsonObject, _plain({**asdict(record), "perplexity": record.perplexity}))


def _plain(value: object) -> object:
    """The value in the types of JSON; what is not finite becomes text, as in `checkpoint`."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in cast("Mapping[object, object]", value).items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in cast("Sequence[object]", value)]
    unwritable = isinstance(value, Path) or (isinstance(value, float) and not math.isfinite(value))
    return str(value) if unwritable else value
