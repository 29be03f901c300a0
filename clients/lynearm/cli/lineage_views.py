"""How a checkpoint's manifest looks in a terminal; what streams say is shown without control characters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from rich.table import Table
from rich.text import Text

from lynearm.cli.progress import count
from lynearm.cli.text import printable
from lynearm.student.lineage import cut_widths, list_changes

_SHOWN_REVISION = 15
"""Characters of a revision: "sha256:" and eight digits."""


def lineage_views(manifest: Mapping[str, Any]) -> Iterator[Table | Text]:
    """Tables of a manifest, from the origin to the last run."""
    yield _origin(manifest)
    streams = cast("Sequence[Mapping[str, Any]]", manifest.get("streams", []))
    if not streams:
        yield Text("no stream went into it")
        return
    yield _streams(streams)
    yield from _notes(streams)
    for number, run in enumerate(cast("Sequence[Mapping[str, Any]]", manifest.get("runs", [])), 1):
        yield _run(number, run)


def _origin(manifest: Mapping[str, Any]) -> Table:
    table = _facts()
    table.add_row("began as", _text(manifest.get("name", "-")))
    if cut := _part(manifest, "cut_from"):
        layers = ", ".join(str(layer) for layer in cast("Sequence[int]", cut.get("layers", [])))
        table.add_row("cut from", _text(f"{cut.get('name', '-')}, {_short(cut.get('revision', ''))}"))
        table.add_row("  layers", _text(layers))
        for unit, kept, available in cut_widths(cut):
            table.add_row(f"  {unit}", _text(f"{kept} of {available}"))
    if adapter := _part(manifest, "adapter"):
        base = _part(adapter, "base")
        merged = ", merged" if adapter.get("merged") else ""
        table.add_row("adapter", _text(f"LoRA r={adapter.get('r')}, alpha={adapter.get('alpha')}{merged}"))
        table.add_row("  on", _text(f"{base.get('name', '-')}, {_short(base.get('revision', ''))}"))
    return table


def _streams(streams: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("stream", "teacher", "revision", "licence", "prompts", "codec"):
        table.add_column(heading, overflow="fold")
    for heading in ("to offset", "passes", "tokens"):
        table.add_column(heading, justify="right", no_wrap=True)
    for stream in streams:
        teacher, end = _part(stream, "teacher"), _part(stream, "end")
        table.add_row(
            _text(stream.get("stream", "-")),
            _text(teacher.get("model", "-")),
            _text(_short(teacher.get("revision", "-"))),
            _text(stream.get("license", "-")),
            _text(stream.get("prompts", "unknown")),
            _text(_codec(_part(stream, "codec"))),
            f"{end.get('offset', 0)}.{end.get('trace_index', 0)}",
            str(stream.get("complete_passes", 0)),
            count(float(stream.get("completion_tokens", 0))),
        )
    return table


def _codec(codec: Mapping[str, Any]) -> str:
    facts = [str(codec.get("mode", "-")), f"k={codec.get('top_k', '-')}"]
    if codec.get("min_probability"):
        facts.append(f"p≥{codec['min_probability']:g}")
    if codec.get("draws"):
        facts.append(f"{codec['draws']} draws")
    if codec.get("tail_draws"):
        facts.append(f"{codec['tail_draws']} tail draws")
    return ", ".join(facts)


def _notes(streams: Sequence[Mapping[str, Any]]) -> Iterator[Text]:
    for stream in streams:
        if isinstance(loss := stream.get("loss"), list) and loss:
            terms_of_loss = " + ".join(map(str, cast("list[object]", loss)))
            yield _text(f"loss on {stream.get('stream')}: {terms_of_loss}")
        if isinstance(damaged := stream.get("damaged_blocks"), list) and damaged:
            offsets = ", ".join(map(str, cast("list[object]", damaged)))
            yield _text(f"left out of {stream.get('stream')}, being damaged: blocks {offsets}")
        terms = _part(stream, "distillation")
        if terms.get("verdict", "allowed") != "allowed":
            yield _text(f"terms of {stream.get('stream')}: {terms['verdict']}: {terms.get('reason', '')}")


def _run(number: int, run: Mapping[str, Any]) -> Table:
    table = _facts()
    table.add_row(f"run {number}", _text(", ".join(f"{k} {v}" for k, v in _part(run, "code").items())))
    for flag, why in _part(run, "overrides").items():
        reasons = cast("Sequence[object]", why) if isinstance(why, list) else [why]
        table.add_row("  overridden", _text(f"{flag}: {'; '.join(map(str, reasons))}"))
    if own := _part(run, "on_policy"):
        share, tokens = float(own.get("share_of_tokens", 0)), float(own.get("completion_tokens", 0))
        table.add_row("  on-policy", _text(f"{share:.0%} of the tokens, {count(tokens)}, were its own text"))
    held_out = _part(run, "held_out")
    before, after = _part(held_out, "before"), _part(held_out, "last")
    for name in ("kl", "perplexity", "agreement", "calibration_error", "exact_match"):
        if isinstance(value := after.get(name), int | float):
            old = before.get(name)
            change = f"{old:.4g} → " if isinstance(old, int | float) else ""
            table.add_row(f"  held-out {name.replace('_', ' ')}", _text(f"{change}{value:.4g}"))
    settings = ", ".join(f"{name}={value}" for name, value in _part(run, "settings").items())
    table.add_row("  settings", _text(settings))
    for until, values in list_changes(run):
        table.add_row(f"  until step {until:,}", _text(values))
    return table


def _facts() -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _part(fields: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = fields.get(name)
    return cast("Mapping[str, Any]", found) if isinstance(found, dict) else {}


def _short(revision: object) -> str:
    return str(revision)[:_SHOWN_REVISION]


def _text(value: object) -> Text:
    return Text(printable(str(value)))
