"""Mathematical answers: found in texts, and compared."""

from __future__ import annotations

import json
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lynearm.teacher.maths_answers import answers_are_equal, find_answer, number_of, reference_of

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k_test.jsonl"

FRACTIONS = st.fractions(min_value=-(10**9), max_value=10**9, max_denominator=10**6)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("72", 72),
        ("-3", -3),
        ("−3", -3),
        ("+5", 5),
        ("007", 7),
        ("5.", 5),
        (".5", Fraction(1, 2)),
        ("1,234", 1234),
        ("1,234,567.5", Fraction(2469135, 2)),
        ("10{,}000", 10000),
        (r"10\,000", 10000),
        ("$1,234.50", Fraction(2469, 2)),
        (r"\$10", 10),
        ("50%", 50),
        (r"50\%", 50),
        ("3/4", Fraction(3, 4)),
        ("1 1/2", Fraction(3, 2)),
        ("-1 1/2", Fraction(-3, 2)),
        (r"\frac{1}{2}", Fraction(1, 2)),
        (r"\dfrac12", Fraction(1, 2)),
        (r"-\frac{3}{4}", Fraction(-3, 4)),
        (r"1\frac{1}{2}", Fraction(3, 2)),
        (r"6\times 10^{3}", 6000),
        ("2e-2", Fraction(1, 50)),
        ("x = 5", 5),
        ("Total cost = 5", 5),
        ("72 apples", 72),
        ("5 km/h", 5),
        ("12 cm^2", 12),
        (r"\text{72 apples}", 72),
        (r"90^\circ", 90),
        ("**72**", None),
        ("2x", None),
        (r"2\pi", None),
        ("2 pi", None),
        ("5^2", None),
        ("3 or 4", None),
        ("x = 1, y = 2", None),
        ("(1, 2)", None),
        ("3.14.15", None),
        ("1/0", None),
        ("1e999999", None),
        ("9" * 1500, None),
        ("", None),
    ],
)
def test_numbers_are_read_exactly_whatever_their_notation(text: str, value: Fraction | int | None) -> None:
    assert number_of(text) == value


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("4 + 3 = 7\n#### 7", "7"),
        ("#### 1,000\nAnd that is it: 5.", "1,000"),
        (r"so \boxed{\frac{1}{2}}, since 3 > 2.", r"\frac{1}{2}"),
        (r"\boxed{1} and \boxed{2}", "2"),
        (r"\boxed{1} and \boxed{2", "1"),
        (r"\boxed 7", "7"),
        ("The answer is 72 apples. She has 3 left.", "72 apples"),
        ("The answer is $1,200.50.", "1,200.50"),
        ("Final answer: **x+1**", "x+1"),
        ("The answer is 2x + 1.", "2x + 1"),
        ("She had 3 and then 72.", "72"),
        ("10-5", "5"),
        ("it fell to -5", "-5"),
        ("nothing at all", None),
        ("", None),
        (r"\boxed{}", None),
    ],
)
def test_the_answer_is_found_where_the_text_states_it(text: str, answer: str | None) -> None:
    assert find_answer(text) == answer


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("1,000", "1000.00"),
        ("0.5", r"\frac{1}{2}"),
        ("x + 1", "x+1"),
        (r"\left( 1, 2 \right)", "(1,2)"),
        (r"\dfrac{x}{2}", r"\frac{x}{2}"),
        ("Paris.", "paris"),
        (r"\text{(B)}", "(B)"),
    ],
)
def test_equal_answers_may_be_written_differently(answer: str, reference: str) -> None:
    assert answers_are_equal(answer, reference)
    assert answers_are_equal(reference, answer)


@pytest.mark.parametrize(
    ("answer", "reference"),
    [("0.33", "1/3"), ("x+1", "1"), ("(1,2)", "(2,1)"), ("12", "(1,2)"), (r"2\pi", "2"), ("1,23", "123")],
)
def test_other_answers_are_not_equal(answer: str, reference: str) -> None:
    assert not answers_are_equal(answer, reference)


@settings(deadline=None)
@given(FRACTIONS)
def test_a_fraction_is_the_same_in_every_notation(value: Fraction) -> None:
    sign, above, below = "-" if value < 0 else "", abs(value.numerator), value.denominator
    whole, rest = divmod(above, below)
    notations = [f"{sign}{above}/{below}", rf"{sign}\frac{{{above}}}{{{below}}}", rf"\boxed{{{value}}}"]
    if rest and whole:
        notations.append(f"{sign}{whole} {rest}/{below}")
    for notation in notations:
        assert number_of(reference_of(notation)) == value


@settings(deadline=None)
@given(st.integers(-(10**12), 10**12), st.sampled_from(["", "$", "€"]), st.sampled_from(["", " apples", "%"]))
def test_thousands_currency_and_units_change_no_number(number: int, currency: str, unit: str) -> None:
    sign = "-" if number < 0 else ""
    written = f"{sign}{currency}{abs(number):,}{unit}"
    assert number_of(written) == number
    assert answers_are_equal(find_answer(f"It said: {written}") or "", str(number))


@settings(deadline=None)
@given(st.text(st.sampled_from("0123456789.,-+/ ${}()\\boxedfracanswer#=^%\n"), max_size=80), st.text())
def test_no_text_breaks_it_and_every_answer_equals_itself(text: str, other: str) -> None:
    for one in (text, other):
        found = find_answer(one)
        assert answers_are_equal(one, one)
        assert found is None or answers_are_equal(found, found)


@pytest.mark.parametrize(
    "text",
    [
        "1" + "a" * 50_000,
        "1" + " a" * 20_000,
        "1," * 20_000,
        r"\boxed{" * 5_000,
        r"\frac{1}" * 5_000,
        "answer is " * 5_000,
        "1 " * 20_000 + "/",
        "(" * 50_000,
        "1" * 50_000,
        "-$" * 20_000,
    ],
    ids=lambda text: repr(text[:12]),
)
def test_long_texts_take_no_time(text: str) -> None:
    started = time.process_time()
    find_answer(text)
    answers_are_equal(text, "1")
    assert time.process_time() - started < 1


@pytest.mark.skipif(not GSM8K.is_file(), reason="GSM8K is not on this machine")
def test_every_reference_of_gsm8k_is_a_number_and_its_own_answer() -> None:
    solutions = [json.loads(line)["answer"] for line in GSM8K.read_text().splitlines()]
    for solution in solutions:
        assert number_of(reference_of(solution)) is not None, solution
        assert answers_are_equal(find_answer(solution) or "", solution.rpartition("####")[2])
