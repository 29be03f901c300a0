"""How a teacher profile looks: as a table, as JSON, and as a drawing."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np
from rich.table import Table
from rich.text import Text

from lynearm.cli.progress import count
from lynearm.cli.text import printable
from lynearm.report.charts import HEIGHT, WIDTH, Chart, Point, Series, draw_chart
from lynearm.wire.profiles import Float64Array, LayerStatistics, TeacherProfile

QUIET_SHARE = 0.1
"""A neuron is quiet whose mean absolute activation is below this share of its layer's mean."""

_BAR_WIDTH = 20
_CELL_LEFT, _CELL_TOP, _CELL_HEIGHT = 50, 34, 14
_STYLE = (
    "svg{background:#fff;color:#1d2329;font:12px system-ui,sans-serif}text{fill:#1d2329}"
    ".title{font-size:15px;font-weight:600}.tick,.label{fill:#5b6670}.grid{stroke:#e3e6e9}"
    ".axis{stroke:#9aa5b0}.line{fill:none;stroke-width:2}circle.line{stroke:none}"
    ".series-0{stroke:#1f6fb2}.series-1{stroke:#c2711f}.series-2{stroke:#6a4fb3}circle.series-0{fill:#1f6fb2}"
    ".value{font-size:11px}"
)


def profile_table(profile: TeacherProfile) -> Table:
    """One row for each layer, under who the teacher is."""
    title = f"{printable(profile.model)}: {count(profile.positions)} completion positions"
    table = Table(box=None, pad_edge=False, header_style="bold", title=Text(title), title_justify="left")
    table.add_column("layer", justify="right", no_wrap=True)
    table.add_column("block influence", no_wrap=True)
    table.add_column("heads add", justify="right", no_wrap=True)
    table.add_column("neurons", justify="right", no_wrap=True)
    table.add_column("quiet", justify="right", no_wrap=True)
    largest = max((layer.influence for layer in profile.layers.values()), default=0.0)
    for number, layer in profile.layers.items():
        bar = "█" * round(_BAR_WIDTH * layer.influence / largest) if largest > 0 else ""
        table.add_row(
            str(number),
            f"{layer.influence:.4f} {bar}",
            _range_of(layer.head_contributions),
            count(layer.neuron_sums.size) if layer.neuron_sums.size else "-",
            f"{_quiet_share(layer):.1%}" if layer.neuron_sums.size else "-",
        )
    return table


def profile_fields(profile: TeacherProfile) -> dict[str, object]:
    """Everything, for programs: means, and the positions that they are over."""
    return {
        "model": profile.model,
        "revision": profile.revision,
        "positions": profile.positions,
        "layers": [
            {
                "layer": number,
                "positions": layer.positions,
                "block_influence": layer.influence,
                "head_norms": layer.head_norms.tolist(),
                "head_contributions": layer.head_contributions.tolist(),
                "neuron_activations": layer.neuron_activations.tolist(),
            }
            for number, layer in profile.layers.items()
        ],
    }


def draw_profile(profile: TeacherProfile) -> str:
    """A drawing as SVG, complete in itself: influence by layer, heads as a map, neurons by quantile."""
    layers = profile.layers
    influence = [(float(number), layer.influence) for number, layer in layers.items()]
    panels = [
        draw_chart(Chart("Block influence", "layer", "block influence", (_series("influence", influence),)))
    ]
    heights = [HEIGHT]
    heads = {
        number: layer.head_contributions for number, layer in layers.items() if layer.head_norm_sums.size
    }
    if heads:
        panels.append(_draw_heads(heads))
        heights.append(_CELL_TOP + _CELL_HEIGHT * max(map(len, heads.values())) + 40)
    measured = {number: layer for number, layer in layers.items() if layer.neuron_sums.size}
    if measured:
        panels.append(draw_chart(_neuron_chart(measured)))
        heights.append(HEIGHT)
    top = 52
    parts = [
        f'<text class="title" x="2" y="20">{escape(profile.model)}</text>',
        f'<text class="label" x="2" y="37">{profile.positions:,} completion positions</text>',
    ]
    for panel, height in zip(panels, heights, strict=True):
        placed = f'<svg x="0" y="{top}" width="{WIDTH}" height="{height}"'
        parts.append(panel.replace("<svg", placed, 1) if panel.startswith("<svg") else "")
        top += height + 12
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}" width="{2 * WIDTH}" '
        f'height="{2 * top}"><style>{_STYLE}</style><rect width="100%" height="100%" fill="#fff"/>'
        f"{''.join(parts)}</svg>\n"
    )


def _neuron_chart(layers: dict[int, LayerStatistics]) -> Chart:
    quantiles = {"p90": 0.9, "p50": 0.5, "p10": 0.1}
    series = [
        _series(
            label,
            [
                (float(number), float(np.quantile(layer.neuron_activations, share)))
                for number, layer in layers.items()
            ],
            dotted=False,
        )
        for label, share in quantiles.items()
    ]
    return Chart("Neurons", "layer", "neurons' |activation|", tuple(series))


def _series(label: str, points: Sequence[Point], *, dotted: bool = True) -> Series:
    return Series(label, tuple(points), "dotted_line" if dotted else "line")


def _draw_heads(heads: dict[int, Float64Array]) -> str:
    """Layers to the right, heads downwards; the darker, the nearer to the most of its layer."""
    rows = max(map(len, heads.values()))
    width = (WIDTH - _CELL_LEFT - 14) / len(heads)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {_CELL_TOP + _CELL_HEIGHT * rows + 40}">',
        '<text class="label" x="2" y="14">what each head adds, of the most in its layer</text>',
    ]
    for column, (number, sizes) in enumerate(heads.items()):
        x = _CELL_LEFT + column * width
        largest = float(sizes.max()) or 1.0
        for head, value in enumerate(sizes.tolist()):
            y = _CELL_TOP + head * _CELL_HEIGHT
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{width - 0.6:.1f}" height="{_CELL_HEIGHT - 1}" '
                f'fill="#1f6fb2" fill-opacity="{0.06 + 0.94 * value / largest:.2f}"><title>layer {number}, '
                f"head {head}: {value:.4g}</title></rect>"
            )
        if column % max(1, len(heads) // 10) == 0:
            y = _CELL_TOP + rows * _CELL_HEIGHT + 13
            parts.append(_tick(x + width / 2, y, str(number), "middle"))
    for head in range(0, rows, max(1, rows // 8)):
        parts.append(_tick(_CELL_LEFT - 6, _CELL_TOP + head * _CELL_HEIGHT + 11, str(head), "end"))
    middle = (_CELL_LEFT + WIDTH - 14) / 2
    bottom = _CELL_TOP + rows * _CELL_HEIGHT + 30
    parts.append(f'<text class="label" x="{middle:.0f}" y="{bottom}" text-anchor="middle">layer</text></svg>')
    return "".join(parts)


def _tick(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text class="tick" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def _range_of(sizes: Float64Array) -> str:
    return f"{sizes.min():.3g} to {sizes.max():.3g}" if sizes.size else "-"


def _quiet_share(layer: LayerStatistics) -> float:
    return float((layer.neuron_sums < QUIET_SHARE * layer.neuron_sums.mean()).mean())
