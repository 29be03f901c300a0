"""What a person reads of the streams that went into a checkpoint."""

from __future__ import annotations

import pytest
from rich.console import Console

from lynearm.cli.lineage_views import lineage_views


@pytest.mark.parametrize(
    ("codec", "shown"),
    [
        ({"mode": "standard", "top_k": 64}, "standard, k=64"),
        ({"mode": "standard", "top_k": 64, "tail_draws": 1}, "standard, k=64, 1 tail draws"),
        (
            {"mode": "compact", "top_k": 64, "min_probability": 1e-3, "draws": 0, "tail_draws": 2},
            "compact, k=64, p≥0.001, 2 tail draws",
        ),
        ({"mode": "sampled", "top_k": 50, "draws": 50, "tail_draws": 0}, "sampled, k=50, 50 draws"),
    ],
)
def test_the_codec_of_a_stream_is_shown_in_a_line(codec: dict[str, object], shown: str) -> None:
    console = Console(width=200)
    with console.capture() as captured:
        for view in lineage_views({"streams": [{"stream": "math", "codec": codec}]}):
            console.print(view)
    line = next(line for line in captured.get().splitlines() if line.startswith("math"))
    assert f" {shown} " in line
