"""Questions with a number for an answer."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path

import pytest
import torch

from lynearm.student.exact_match import ExactMatch, Question, final_number, load_questions
from lynearm.student.model import StudentModel, load_student
from lynearm.wire.errors import PromptFileError


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 14 + 9 = 23 marbles.", "23"),
        ("14 and 9, so\n#### 23\nor 24?", "23"),
        ("#### 1 is wrong, #### 1,250.50", "1250.5"),
        ("-7", "-7"),
        ("costs $1,000.00", "1000"),
        ("half: .5", "0.5"),
        ("no number", None),
        ("23 #### none", None),
    ],
)
def test_the_number_that_counts(text: str, number: str | None) -> None:
    assert final_number(text) == (None if number is None else Decimal(number))


def test_questions_are_read_and_bad_ones_named(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    lines = [{"question": "2 + 2?", "answer": "4"}, {"question": "3 * 3?", "answer": "3 * 3 = 9\n#### 9"}]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n", encoding="utf-8")
    assert load_questions(path) == (Question("2 + 2?", Decimal(4)), Question("3 * 3?", Decimal(9)))
    for bad, match in (
        ('{"question": "2 + 2?"}', "line 1"),
        ("nonsense", "line 1"),
        ("[]", "line 1"),
        ('{"question": "2 + 2?", "answer": "four"}', "holds no number"),
        ("", "holds no question"),
    ):
        path.write_text(bad, encoding="utf-8")
        with pytest.raises(PromptFileError, match=match):
            load_questions(path)
    with pytest.raises(PromptFileError, match="cannot be read"):
        load_questions(tmp_path / "none.jsonl")


def test_answers_are_those_that_the_student_writes_alone(student_dir: Path) -> None:
    student = load_student(student_dir, device="cpu")
    exact_match = ExactMatch(student, max_new_tokens=24)
    texts = [f"What is {number} and {'a lot of ' * (number % 5)}{number}?" for number in range(11)]
    # What it writes by itself, token by token, is the reference: padding and batches change nothing.
    wanted = [final_number(_write(student, exact_match, text)) for text in texts]
    questions = [
        Question(text, number if number is not None else Decimal(-1))
        for text, number in zip(texts, wanted, strict=True)
    ]
    expected = sum(number is not None for number in wanted)
    assert expected > 0
    assert exact_match.count_correct(student, questions) == expected
    assert student.model.training
    wrong = [Question(question.text, question.answer + Decimal("0.5")) for question in questions]
    assert exact_match.count_correct(student, wrong) == 0


def _write(student: StudentModel, exact_match: ExactMatch, text: str) -> str:
    tokenizer, prompt = exact_match._tokenizer, exact_match._prompt(text)  # pyright: ignore[reportPrivateUsage]
    token_ids = tokenizer.encode(prompt, add_special_tokens=False)
    start = len(token_ids)
    student.train(False)
    with torch.no_grad():
        while len(token_ids) < start + 24:
            token_ids.append(int(student.model(torch.tensor([token_ids])).logits[0, -1].argmax()))
            if token_ids[-1] in student.tokenizer.eos_token_ids:
                break
    return str(tokenizer.decode(token_ids[start:], skip_special_tokens=True))
