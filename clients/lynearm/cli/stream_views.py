"""How streams look: as a table, in full, and as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from rich.table import Table
from rich.text import Text

from lynearm.cli.progress import count, duration, plain_value, size
from lynearm.cli.text import printable
from lynearm.wire.hidden import HiddenStatesSpec
from lynearm.wire.protobuf import StreamInfo
from lynearm.wire.retention import Retention
from lynearm.wire.specs import CodecSpec, TokenizerSpec

_SPACIOUS_COLUMNS = 80


def bits_per_token(info: StreamInfo) -> float | None:
    """Encoded bits for each completion token, everything included; None without a token."""
    return info.size_bytes * 8 / info.completion_token_count if info.completion_token_count else None


def stream_table(streams: Sequence[StreamInfo], width: int) -> Table:
    """One row for each stream; without teacher and licence where `width` columns have no room for them."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("stream", overflow="fold")
    for heading in ("traces", "tokens", "size", "bits/token"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    spacious = width >= _SPACIOUS_COLUMNS
    if spacious:
        table.add_column("teacher", overflow="fold")
        table.add_column("licence", overflow="fold")
    for info in streams:
        bits = bits_per_token(info)
        teacher_and_license = (Text(printable(one)) for one in (info.spec.teacher.model, info.spec.license))
        table.add_row(
            Text(info.spec.name),
            count(info.trace_count),
            count(info.completion_token_count),
            size(info.size_bytes),
            f"{bits:.0f}" if bits is not None else "-",
            "sealed" if info.sealed else "open",
            *(teacher_and_license if spacious else ()),
        )
    return table


def stream_details(info: StreamInfo) -> Table:
    """Everything about one stream, a line for each fact."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _details(info).items():
        table.add_row(name, Text(printable(value)))
    return table


def stream_fields(info: StreamInfo) -> dict[str, object]:
    """Everything about one stream in the types of JSON; digests are hexadecimal."""
    spec = dataclasses.asdict(info.spec)
    name = spec.pop("name")
    counts = {
        field.name: getattr(info, field.name)
        for field in dataclasses.fields(info)
        if field.name not in ("spec", "retention")
    }
    counts["retention"] = dataclasses.asdict(info.retention)
    fields = {"name": name, **counts, "bits_per_token": bits_per_token(info), **spec}
    return {key: plain_value(value) for key, value in fields.items()}


def print_json(fields: Mapping[str, object]) -> None:
    """Print one object on one line of standard output."""
    print(json.dumps(fields, ensure_ascii=False, allow_nan=False), flush=True)


def describe_retention(retention: Retention) -> str:
    """When the blocks of a stream go."""
    bounds: list[str] = []
    if retention.max_age_seconds:
        bounds.append(f"older than {duration(retention.max_age_seconds)}")
    if retention.max_bytes:
        bounds.append(f"beyond {size(retention.max_bytes)}")
    if retention.consumers:
        bounds.append(f"read by {', '.join(retention.consumers)}")
    return f"blocks go when {' or '.join(bounds)}" if bounds else "blocks never go"


def _details(info: StreamInfo) -> dict[str, str]:
    teacher, bits = info.spec.teacher, bits_per_token(info)
    created = datetime.fromtimestamp(info.created_unix_nano / 1e9, UTC)
    conventions = f"{teacher.logprobs_mode}, temperature {teacher.logprobs_temperature:g}"
    details = {
        "stream": info.spec.name,
        "state": "sealed: takes no more blocks" if info.sealed else "open",
        "created": f"{created:%Y-%m-%d %H:%M:%S} UTC",
        "blocks": f"{info.next_offset:,}",
        "traces": f"{info.trace_count:,}",
        "finished prompts": f"{info.finished_prompt_count:,}",
        "prompt tokens": f"{info.prompt_token_count:,}",
        "completion tokens": f"{info.completion_token_count:,}",
        "size": f"{size(info.size_bytes)} ({info.size_bytes:,} bytes)",
        "kept": f"from offset {info.first_offset:,}, {size(info.retained_bytes)}",
        "retention": describe_retention(info.retention),
        "bits per token": f"{bits:.1f}" if bits is not None else "-",
        "codec": _codec(info.spec.codec),
        **_hidden_details(info.spec.codec.hidden),
        "licence": info.spec.license,
        "teacher": teacher.model,
        "  revision": teacher.revision,
        "  engine": f"{teacher.engine}, {teacher.dtype}",
        "  logits": f"{teacher.vocab_size:,} wide, context of {teacher.max_model_len:,} tokens",
        "  logprobs": conventions,
        **_tokenizer_details(info.spec.tokenizer),
    }
    return details | {f"label {key}": value for key, value in sorted(info.spec.labels.items())}


def _codec(codec: CodecSpec) -> str:
    draws = f", {codec.tail_draws} tail draws" if codec.tail_draws else ""
    return f"{codec.mode}, top-k {codec.top_k}{draws}"


def _hidden_details(hidden: HiddenStatesSpec | None) -> dict[str, str]:
    if hidden is None:
        return {}
    layers = ", ".join(map(str, hidden.layers))
    return {"hidden states": f"layers {layers}, {hidden.hidden_size} wide, {hidden.dtype}"}


def _tokenizer_details(tokenizer: TokenizerSpec) -> dict[str, str]:
    return {
        "tokenizer": tokenizer.name,
        "  vocabulary": f"{tokenizer.vocab_size:,} tokens, sha256 {tokenizer.vocab_sha256.hex()}",
        "  chat template": f"sha256 {tokenizer.chat_template_sha256.hex()}"
        if tokenizer.chat_template_sha256
        else "none",
        "  end tokens": ", ".join(map(str, tokenizer.eos_token_ids)) or "none",
    }
