"""A checkpoint's model card, written from its manifest: README.md with the front matter that hubs read.

What comes from streams is text of others: it is quoted, and cannot become markup or front matter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from lynearm.student.lineage import LINEAGE_FILE, JsonObject, cut_widths, list_changes

CARD_FILE = "README.md"

_HUB_NAME = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")
_SPDX = re.compile(r"[a-z0-9][a-z0-9.+-]{0,40}")
_NO_LICENSE = frozenset({"unknown", "other", "none", "noassertion"})


def write_card(directory: Path, lineage: Mapping[str, Any]) -> None:
    """Write the card into a model's directory."""
    (directory / CARD_FILE).write_text(render_card(lineage), encoding="utf-8")


def render_card(lineage: Mapping[str, Any]) -> str:
    """The card as Markdown.

    Args:
        lineage: A manifest, as `lineage.extend_lineage` makes them; parts that are not there are left out.
    """
    streams = cast("Sequence[JsonObject]", lineage.get("streams", []))
    runs = cast("Sequence[JsonObject]", lineage.get("runs", []))
    sections = [
        _front_matter(lineage, streams),
        _introduction(lineage, streams),
        _teachers(streams),
        _measurements(runs),
        _terms(streams, runs),
        _training(runs),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(lineage: Mapping[str, Any], streams: Sequence[JsonObject]) -> str:
    licenses = _distinct(streams, "license")
    lowered = licenses[0].lower() if len(licenses) == 1 else ""
    simple = _SPDX.fullmatch(lowered) is not None and lowered not in _NO_LICENSE
    adapter = _is_adapter(lineage)
    front: dict[str, object] = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "license": lowered if simple else "other",
        "tags": ["lynearm", "distillation", "knowledge-distillation"],
    }
    origin = _part(lineage, "cut_from").get("name") or lineage.get("name", "")
    base = str(_part(_part(lineage, "adapter"), "base").get("name", "") if adapter else origin)
    if _HUB_NAME.fullmatch(base):
        front["base_model"] = [base]
    if adapter:
        front["base_model_relation"] = "adapter"
    datasets = [one for one in _distinct(streams, "prompts") if one != "unknown" and _HUB_NAME.fullmatch(one)]
    if datasets:
        front["datasets"] = datasets
    # JSON is YAML: nothing that a name holds can end its value.
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items()]
    return "\n".join(["---", *lines, "---"])


def _introduction(lineage: Mapping[str, Any], streams: Sequence[JsonObject]) -> str:
    teachers = list(dict.fromkeys(str(_part(stream, "teacher").get("model", "")) for stream in streams))
    cut = cast("JsonObject | None", lineage.get("cut_from"))
    origin = f"It began as {_quote(lineage.get('name', 'a model'))}"
    if cut:
        layers = cast("Sequence[int]", cut.get("layers", []))
        origin += (
            f", which is {len(layers)} layers of {_quote(cut.get('name', ''))} "
            f"({', '.join(str(layer) for layer in layers)})"
        )
        for unit, kept, available in cut_widths(cut):
            origin += f", {kept} of {available} {unit}"
    if adapter := _part(lineage, "adapter"):
        origin += f". {_adapter(adapter)}"
    return "\n".join(
        [
            f"# A student of {', '.join(map(_quote, teachers)) or 'no teacher yet'}",
            "",
            "Trained with lynearm on the distributions that its teacher wrote. "
            f"{origin}. `{LINEAGE_FILE}` beside this file is the account for programs.",
        ]
    )


def _is_adapter(lineage: Mapping[str, Any]) -> bool:
    adapter = _part(lineage, "adapter")
    return bool(adapter) and not adapter.get("merged")


def _adapter(adapter: Mapping[str, Any]) -> str:
    base = _part(adapter, "base")
    form = f"LoRA adapter (r={adapter.get('r')}, alpha={adapter.get('alpha')})"
    on = f"{_quote(base.get('name', ''))} at {_quote(str(base.get('revision', ''))[:24])}"
    return f"It is a {form} merged into {on}" if adapter.get("merged") else f"It is a {form} on {on}"


def _teachers(streams: Sequence[JsonObject]) -> str:
    if not streams:
        return ""
    rows = ["| stream | teacher | revision | licence | prompts | completion tokens | codec | loss |",
            "|---|---|---|---|---|---:|---|---|"]  # fmt: skip
    for stream in streams:
        teacher, codec = _part(stream, "teacher"), _part(stream, "codec")
        cells = [
            _quote(stream.get("stream", "")),
            _quote(teacher.get("model", "")),
            _quote(str(teacher.get("revision", ""))[:24]),
            _quote(stream.get("license", "")),
            _quote(stream.get("prompts", "unknown")),
            f"{int(stream.get('completion_tokens', 0)):,}",
            _quote(f"{codec.get('mode', '')}, k={codec.get('top_k', '')}"),
            _quote(" + ".join(_listed(stream.get("loss", [])))),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    missing = [
        f"\nDamaged blocks left out of {_quote(stream.get('stream', ''))}: {len(damaged)}."
        for stream in streams
        if (damaged := _listed(stream.get("damaged_blocks", [])))
    ]
    return "## What it learnt from\n\n" + "\n".join([*rows, *missing])


def _measurements(runs: Sequence[JsonObject]) -> str:
    measured = [_part(run, "held_out") for run in runs if _part(run, "held_out")]
    if not measured:
        return ""
    before, after = _part(measured[-1], "before"), _part(measured[-1], "last")
    names = {
        "kl": "KL to the teacher, nats per token",
        "perplexity": "perplexity on the teacher's tokens",
        "agreement": "same most likely token as the teacher",
        "calibration_error": "expected calibration error",
        "exact_match": "questions answered with the right number",
    }
    rows = [
        f"| {said} | {_figure(before.get(name))} | {_figure(after.get(name))} |"
        for name, said in names.items()
        if after.get(name) is not None
    ]
    tasks = _part(after, "tasks")
    rows += [
        f"| {_quote(name)} | {_figure(_part(before, 'tasks').get(name))} | {_figure(value)} |"
        for name, value in tasks.items()
    ]
    head = ["| on held-out prompts | before | after |", "|---|---:|---:|"]
    return "## How close it is\n\n" + "\n".join([*head, *rows])


def _terms(streams: Sequence[JsonObject], runs: Sequence[JsonObject]) -> str:
    judged = [(stream.get("stream", ""), _part(stream, "distillation")) for stream in streams]
    said = [
        f"- {_quote(name)}: {_plain(terms['verdict'])}, {_plain(terms.get('reason', ''))}"
        for name, terms in judged
        if terms.get("verdict", "allowed") != "allowed"
    ]
    overridden = [
        f"- overridden by `{name}`: {_plain('; '.join(_listed(value)))}"
        for run in runs
        for name, value in _part(run, "overrides").items()
    ]
    return "## Terms\n\n" + "\n".join([*said, *overridden]) if said or overridden else ""


def _training(runs: Sequence[JsonObject]) -> str:
    blocks: list[str] = []
    for number, run in enumerate(runs, 1):
        settings, code = _part(run, "settings"), _part(run, "code")
        lines = [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in settings.items()]
        versions = ", ".join(f"{name} {version}" for name, version in code.items())
        title = f"Run {number}, with {_plain(versions)}:" if versions else f"Run {number}:"
        blocks.append(f"{title}\n\n```\n" + "\n".join(line.replace("`", "'") for line in lines) + "\n```")
        blocks += [f"Until step {until}: {_quote(values)}" for until, values in list_changes(run)]
    return "## How it was trained\n\n" + "\n\n".join(blocks) if blocks else ""


def _part(fields: Mapping[str, Any], name: str) -> JsonObject:
    found = fields.get(name)
    return cast(JsonObject, found) if isinstance(found, dict) else {}


def _distinct(streams: Sequence[JsonObject], name: str) -> list[str]:
    return list(dict.fromkeys(str(stream[name]) for stream in streams if name in stream))


def _listed(value: object) -> list[str]:
    return [str(one) for one in cast("list[object]", value)] if isinstance(value, list) else [str(value)]


def _figure(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "-"


def _quote(text: object) -> str:
    """As code, on one line, in a table too."""
    flat = " ".join(str(text).split()).replace("`", "'").replace("|", "/")
    return f"`{flat}`" if flat else "-"


def _plain(text: object) -> str:
    """As text, without what Markdown or HTML would take for markup."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(str(text).split()))
