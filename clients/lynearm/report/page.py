"""The frame of a page and the parts that pages share: one HTML file, for light and dark screens.

Every text that enters a page passes through `html.escape`, and the page forbids scripts and requests by a
content security policy, since what models and streams say is shown in it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from lynearm.report.charts import Chart, draw_chart
from lynearm.wire.errors import StorageError

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def render_page(title: str, sections: Iterable[str]) -> str:
    """A whole page.

    Args:
        title: As text.
        sections: As HTML, in order; empty ones are left out.
    """
    style = files("lynearm.report").joinpath("page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )


def write_page(path: Path, page: str) -> None:
    """Writes a page; a reader sees the old file or the new one, never a part.

    Args:
        path: The HTML file; its folder is made if absent.
        page: What `render_page` gave.

    Raises:
        StorageError: if the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Models may write half of a surrogate pair, which no encoding holds.
        partial.write_bytes(page.encode("utf-8", "replace"))
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise StorageError(
            f"the report {path} cannot be written: {error}", "choose a writable folder"
        ) from error


def tiles(figures: Mapping[str, tuple[str, str]]) -> str:
    """The figures that matter most: name to value and what it means."""
    drawn = (
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(meaning)}</small></dd></div>"
        for name, (value, meaning) in figures.items()
    )
    return f'<dl class="tiles">{"".join(drawn)}</dl>'


def chart_cards(charts: Sequence[Chart]) -> str:
    """Charts under their titles, side by side where there is room."""
    cards = (f'<div class="card"><h3>{escape(one.title)}</h3>{draw_chart(one)}</div>' for one in charts)
    return f'<div class="pair">{"".join(cards)}</div>'


def facts_card(facts: Mapping[str, str]) -> str:
    """Names and values, one under the other."""
    items = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in facts.items())
    return f'<div class="card"><dl class="versions">{items}</dl></div>'
