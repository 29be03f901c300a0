"""Questions with a number for an answer, as in GSM8K: the part that a student answers exactly.

A file holds one JSON object a line, {"question": …, "answer": …}; of an answer in GSM8K's form, the number
after "####" counts. The student writes greedily, after its chat template where it has one; the number after
"####" counts in what it writes too, and otherwise the last one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, cast

import torch

from lynearm.student.model import StudentModel, load_tokenizer
from lynearm.student.sharding import even_out
from lynearm.wire.errors import PromptFileError

BATCH_QUESTIONS = 8
"""Answered at once: their key-value cache is small beside the trainer's activations."""

_NUMBER = re.compile(r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
_MARK = "####"


@dataclass(frozen=True, slots=True)
class Question:
    """A question and its answer."""

    text: str
    answer: Decimal


def load_questions(path: Path) -> tuple[Question, ...]:
    """The questions of a file.

    Raises:
        PromptFileError: naming the line that is no question with a number for an answer.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PromptFileError(f"{path} cannot be read: {error}", "name a file of JSON lines") from error
    questions: list[Question] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = cast("dict[str, Any]", json.loads(line))
            text, answer = fields["question"], final_number(str(fields["answer"]))
        except (ValueError, TypeError, KeyError) as error:
            raise PromptFileError(
                f"line {number} of {path} is no question: {error!r}",
                'write {"question": "…", "answer": "…"} on each line',
            ) from error
        if not isinstance(text, str) or answer is None:
            raise PromptFileError(
                f"line {number} of {path}: the answer {fields['answer']!r} holds no number",
                f"end it with a number, or with {_MARK} and a number",
            )
        questions.append(Question(text, answer))
    if not questions:
        raise PromptFileError(
            f"{path} holds no question", 'write {"question": "…", "answer": "…"} on each line'
        )
    return tuple(questions)


def final_number(text: str) -> Decimal | None:
    """The number after the last "####", or else the last number; None without any."""
    _, mark, marked = text.rpartition(_MARK)
    found = _NUMBER.findall(marked if mark else text)
    if not found:
        return None
    try:
        return Decimal((found[0] if mark else found[-1]).replace(",", ""))
    except InvalidOperation:
        return None


class ExactMatch:
    """Asks a student questions.

    Args:
        student: Its tokenizer is read once.
        max_new_tokens: Of one answer.
    """

    def __init__(self, student: StudentModel, *, max_new_tokens: int) -> None:
        self._tokenizer: Any = load_tokenizer(student.directory)
        self._tokenizer.padding_side = "left"
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token_id = self._tokenizer.eos_token_id or 0
        self._max_new_tokens = max_new_tokens

    def count_correct(self, student: StudentModel, questions: Sequence[Question]) -> int:
        """How many questions the student answers with the right number; it is in training mode afterwards."""
        student.train(False)
        correct = 0
        starts = range(0, len(questions), BATCH_QUESTIONS)
        batches = [questions[start : start + BATCH_QUESTIONS] for start in starts]
        for batch in even_out(batches, student, tuple[Question]):
            # Something has to be written where there is nothing to ask.
            prompts = [self._prompt(question.text) for question in batch] or ["0"]
            answers = self._write(student, prompts)[: len(batch)]
            correct += sum(
                final_number(answer) == question.answer
                for answer, question in zip(answers, batch, strict=True)
            )
        student.train(True)
        return correct

    def _prompt(self, question: str) -> str:
        if self._tokenizer.chat_template is None:
            return f"Question: {question}\nAnswer:"
        messages = [{"role": "user", "content": question}]
        return str(self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))

    @torch.no_grad()
    def _write(self, student: StudentModel, prompts: Sequence[str]) -> list[str]:
        encoded = self._tokenizer(
            list(prompts), return_tensors="pt", padding=True, add_special_tokens=False
        ).to(student.device)
        with torch.autocast(
            student.device.type, student.compute_dtype, enabled=student.compute_dtype != torch.float32
        ):
            written = student.model.generate(
                input_ids=encoded["input_ids"],
                attention_mask=encoded["attention_mask"],
                max_new_tokens=self._max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=self._tokenizer.pad_token_id,
                # Ranks that hold parts of the student go on until all have written their answers.
                synced_gpus=student.shards is not None,
            )
        completions = written[:, encoded["input_ids"].shape[1] :]
        return cast("list[str]", self._tokenizer.batch_decode(completions, skip_special_tokens=True))
