"""What a person and a program read of a stream's codec."""

from __future__ import annotations

import json
from dataclasses import replace

from models.trace_blocks import make_spec
from rich.console import Console

from lynearm.cli.stream_views import stream_details, stream_fields
from lynearm.wire.hidden import HiddenStatesSpec
from lynearm.wire.protobuf import StreamInfo
from lynearm.wire.specs import CodecSpec


def show(info: StreamInfo) -> str:
    console = Console(width=120)
    with console.capture() as captured:
        console.print(stream_details(info))
    return captured.get()


def test_a_stream_shows_which_hidden_states_it_carries() -> None:
    bare = StreamInfo(make_spec("s"), sealed=False, created_unix_nano=0, next_offset=0)
    assert "hidden states" not in show(bare)
    hidden = HiddenStatesSpec((4, 8, "norm"), "fp8", 576)
    info = replace(bare, spec=replace(bare.spec, codec=CodecSpec("standard", 8, hidden=hidden)))
    assert "layers 4, 8, norm, 576 wide, fp8" in show(info)
    fields = json.loads(json.dumps(stream_fields(info)))
    assert fields["codec"]["hidden"] == {"layers": [4, 8, "norm"], "dtype": "fp8", "hidden_size": 576}


def test_a_stream_shows_how_many_tokens_are_drawn_from_each_tail() -> None:
    bare = StreamInfo(make_spec("s"), sealed=False, created_unix_nano=0, next_offset=0)
    assert "tail draws" not in show(bare)
    info = replace(bare, spec=replace(bare.spec, codec=CodecSpec("standard", 8, tail_draws=2)))
    assert "standard, top-k 8, 2 tail draws" in show(info)
    assert json.loads(json.dumps(stream_fields(info)))["codec"]["tail_draws"] == 2
