"""How a cut looks in a terminal: every layer of the teacher with its influence, and what was kept of it."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from lynearm.cli.progress import count
from lynearm.student.cutting.progress import CutReport, LayerRow

_BAR_WIDTH = 20


def cut_table(made: CutReport) -> Table:
    """One row for each layer of the teacher."""
    title = f"measured on {made.measured_on}"
    table = Table(box=None, pad_edge=False, header_style="bold", title=Text(title), title_justify="left")
    table.add_column("layer", justify="right", no_wrap=True)
    table.add_column("block influence", no_wrap=True)
    table.add_column("becomes", justify="right", no_wrap=True)
    table.add_column("heads")
    table.add_column("neurons", justify="right", no_wrap=True)
    largest = max(row.influence for row in made.rows)
    numbers = {layer: str(number) for number, layer in enumerate(made.layers)}
    for row in made.rows:
        bar = "█" * round(_BAR_WIDTH * row.influence / largest) if largest > 0 else ""
        table.add_row(
            str(row.layer),
            f"{row.influence:.4f} {bar}",
            numbers.get(row.layer, "-"),
            _heads(row),
            f"{row.neurons:,}{_share(row.neuron_share)}" if row.kept and row.neurons else "",
            style=None if row.kept else "dim",
        )
    return table


def cut_summary(made: CutReport) -> str:
    """What was kept, in words."""
    kept, dropped = (", ".join(map(str, layers)) or "none" for layers in (made.layers, made.dropped))
    share = made.parameters / made.teacher_parameters
    return (
        f"{made.directory}: {len(made.layers)} of {len(made.rows)} layers, {count(made.parameters)} "
        f"parameters ({share:.0%} of the teacher's)\n"
        f"kept: {kept}\nleft out: {dropped}\n"
        f"KL to the teacher on the calibration text, before training: {made.kl:.3f} nats a position"
    )


def _heads(row: LayerRow) -> str:
    if not row.kept:
        return ""
    return f"{_ranges(row.heads)}{_share(row.head_share)}"


def _share(part: float) -> str:
    """Of what the layer's units put out together; nothing where all of them stay."""
    return f" ({part:.0%})" if part < 1 else ""


def _ranges(numbers: tuple[int, ...]) -> str:
    """Ascending numbers, those in a row as first-last."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
