"""Text that came over the wire, made safe for a terminal."""

from __future__ import annotations

import unicodedata


def printable(text: str) -> str:
    """The text with control characters shown as what they are: a trace must not steer the terminal.

    Line feeds and tabs stay.
    """
    return "".join(
        repr(character)[1:-1]
        if unicodedata.category(character) in ("Cc", "Cf", "Cs") and character not in "\n\t\u200d"
        else character
        for character in text
    )
