"""Answers of mathematical problems: taken out of a text, and compared.

Two answers are equal when both are numbers of the same value, or when both are the same expression but for
blanks and notation. Values are exact fractions, never floats: 0.1 is 1/10, and 0.33 is not 1/3.
"""

from __future__ import annotations

import re
from fractions import Fraction

MAX_ANSWER_CHARACTERS = 2000
"""Longer answers are compared as they are."""

_MAX_EXPONENT = 400
"""Of ten; beyond, a number is compared as text: writing it out could take all memory."""

_MAX_DIGITS = 1000

_MAX_BOXES = 16
"""The last ones that are looked at: a model that repeats itself may write thousands that it never closes."""

_BOXES = ("\\boxed", "\\fbox")
_INTEGER = r"(?:\d{1,3}(?:(?:,|\{,\}|\\,|\\!|[\u00a0\u202f])\d{3})+|\d+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.\d+)?|\.\d+)"
_NUMBER_IN_TEXT = re.compile(rf"(?<![\w.])[-+−]?[$£€]?{_DECIMAL}(?:[eE][-+]?\d+)?(?:\s*/\s*\d+)?%?")
_PLAIN = re.compile(rf"([-+]?)({_DECIMAL})\.?(?:[eE]([-+]?\d+))?")
_RATIO = re.compile(r"([-+]?[\d.]+)/([-+]?[\d.]+)")
_MIXED = re.compile(r"([-+]?)(\d+) (\d+)/(\d+)")
_POWER_OF_TEN = re.compile(r"([-+]?[\d.]+)?\*?10\^(?:\{([-+]?\d+)\}|([-+]?\d+))")
_FRACTION = re.compile(r"\\[dtc]?frac\s*(\{[^{}]*\}|\d)\s*(\{[^{}]*\}|\d)")
_SAID = re.compile(r"answer\s*(?:is|:|=)+\s*:?\s*(?P<answer>[^\n]+)", re.IGNORECASE)
_UNIT = re.compile(
    r"(?<=[\d}])\s*(?:\\?%|°[CF]?|\^\{?\\circ\}?|\\degree|[mgshLlWVJNKCF]|"
    r"[a-zA-Z][a-zA-Z /·.]*[a-zA-Z](?:\s?\^?\{?[23]\}?)?)$"
)
_NO_UNIT = re.compile(
    r"(?:pi|sqrt|log|ln|sin|cos|tan|exp|or|and|to|mod|[a-z]?[xyz])(?![a-zA-Z])", re.IGNORECASE
)
"""Words after a number that make it part of an expression."""
_NAMED = re.compile(r"[A-Za-z][\w ]*(?:\([a-z]\))?\s*=")
_WORD = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}")
_WRAPPED = re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_NOTATION = (
    (re.compile(r"\\(?:left|right|displaystyle|big|Big)(?![a-zA-Z])"), ""),
    (re.compile(r"\\[,;:!> ]|~"), " "),
    (re.compile(r"\\(?:times|cdot)(?![a-zA-Z])|[×·]"), "*"),
    (re.compile(r"−|–"), "-"),
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\?[$£€]|\\[()\[\]]"), ""),
)


def find_answer(text: str) -> str | None:
    r"""The answer that a text gives; None when it gives none.

    What stands in the last `\boxed{…}`; else what follows the last `####`; else what follows the last "answer
    is" or "answer:"; else the last number.
    """
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed.strip() or None
    before, marker, after = text.rpartition("####")
    if marker:
        return after.strip().split("\n", 1)[0].strip() or find_answer(before)
    said = list(_SAID.finditer(text))
    if said:
        return _as_stated(said[-1]["answer"])
    numbers = _NUMBER_IN_TEXT.findall(text)
    return numbers[-1] if numbers else None


def reference_of(solution: str) -> str:
    """The answer of a reference: what it marks as one or, in several lines, ends in; else all of it."""
    is_marked = "####" in solution or _last_boxed(solution) is not None or _SAID.search(solution)
    found = find_answer(solution) if is_marked or "\n" in solution.strip() else None
    return found or solution.strip()


def is_statement(text: str) -> bool:
    """Whether a text is more than an expression: it marks its answer, or has words."""
    return "####" in text or any(box in text for box in _BOXES) or _WORD.search(text) is not None


def answers_are_equal(answer: str, reference: str) -> bool:
    """Whether two answers are the same number, or the same expression."""
    value, expected = number_of(answer), number_of(reference)
    if value is not None and expected is not None:
        return value == expected
    return _as_expression(answer) == _as_expression(reference)


def number_of(answer: str) -> Fraction | None:
    """The value of an answer that is a number: 1,234.5, 3/4, 1 1/2, 6e23, LaTeX; units and currency dropped.

    A percent sign is a unit: 50 % is 50. None for anything else, and for numbers beyond 1e400.
    """
    if len(answer) > MAX_ANSWER_CHARACTERS:
        return None
    text = _plain(answer)
    value = _value(text)
    unit = _UNIT.search(text) if value is None else None
    if unit is None or _NO_UNIT.search(unit[0]):
        return value
    return _value(text[: unit.start()].strip())


def _last_boxed(text: str) -> str | None:
    """What stands in the last box, its braces counted; None without a box that is closed."""
    places = sorted(at for box in _BOXES for at in _places(text, box))
    for start in reversed(places[-_MAX_BOXES:]):
        rest = text[start:].lstrip()
        if not rest.startswith("{"):
            stated = re.match(r"\s*([^\s$]+)", rest)
            return stated[1] if stated else None
        depth = 0
        for index, character in enumerate(rest):
            depth += (character == "{") - (character == "}")
            if depth == 0:
                return rest[1:index]
    return None


def _places(text: str, marker: str) -> list[int]:
    """Where a marker ends, each time that it stands in a text."""
    return [match.end() for match in re.finditer(re.escape(marker) + r"(?![a-zA-Z])", text)]


def _as_stated(sentence: str) -> str:
    """An answer without the sentence that it ends: no full stop, no bold, no words after the number."""
    stated = sentence.strip().strip("*").strip()
    stated = re.split(r"\.(?:\s|$)", stated, maxsplit=1)[0].strip().strip("*$").strip()
    number = _NUMBER_IN_TEXT.match(stated)
    followed = stated[number.end() :].strip() if number else ""
    # "72 apples", and not the beginning of an expression such as 2x + 1.
    return (
        number[0] if number and (not followed or number_of(stated) is None) and followed.isalpha() else stated
    )


def _plain(answer: str) -> str:
    unwrapped = _WRAPPED.sub(r" \1 ", answer.strip())
    for pattern, replacement in _NOTATION:
        unwrapped = pattern.sub(replacement, unwrapped)
    text = " ".join(unwrapped.split()).rstrip(".").strip()
    named = _NAMED.match(text) if text.count("=") == 1 else None
    return text[named.end() :].strip() if named else text


def _value(text: str) -> Fraction | None:
    text = _FRACTION.sub(lambda match: f" {_inner(match[1])}/{_inner(match[2])}", text).strip()
    text = re.sub(r"^([-+]) (?=\d)", r"\1", text)
    mixed = _MIXED.fullmatch(text)
    if mixed:
        whole, part = _decimal("", mixed[2], None), _ratio(mixed[3], mixed[4])
        sign = -1 if mixed[1] == "-" else 1
        return None if whole is None or part is None else sign * (whole + part)
    text = text.replace(" ", "")
    ratio = _RATIO.fullmatch(text)
    if ratio:
        return _ratio(ratio[1], ratio[2])
    power = _POWER_OF_TEN.fullmatch(text)
    if power:
        return _value(f"{power[1] or 1}e{power[2] or power[3]}")
    plain = _PLAIN.fullmatch(text)
    return _decimal(plain[1], plain[2], plain[3]) if plain else None


def _inner(group: str) -> str:
    return group.strip("{}").strip()


def _ratio(numerator: str, denominator: str) -> Fraction | None:
    above, below = _value(numerator), _value(denominator)
    return None if above is None or not below else above / below


def _decimal(sign: str, digits: str, exponent: str | None) -> Fraction | None:
    digits = re.sub(r"[^\d.]", "", digits)
    power = int(exponent) if exponent and len(exponent) < 6 else 0
    too_large = len(digits) > _MAX_DIGITS or abs(power) > _MAX_EXPONENT or len(exponent or "") >= 6
    if too_large or not any(character.isdigit() for character in digits):
        return None
    value = Fraction(digits) * Fraction(10) ** power
    return -value if sign == "-" else value


def _as_expression(answer: str) -> str:
    text = _FRACTION.sub(lambda match: f"\\frac{{{_inner(match[1])}}}{{{_inner(match[2])}}}", _plain(answer))
    return text.replace(" ", "").casefold()
