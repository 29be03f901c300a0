"""Says whether an answer is right: against a reference, a pattern, a JSON schema, or by code of the user's.

A verifier never stops a job: what it raises, and what takes it too long, makes a verdict "unverifiable" with
the reason.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, get_args

from lynearm.teacher.maths_answers import answers_are_equal, find_answer, is_statement, reference_of
from lynearm.teacher.span_finder import PATTERN_SECONDS, compile_pattern
from lynearm.wire.errors import ConfigError, MissingDependencyError
from lynearm.wire.traces import Trace

logger = logging.getLogger(__name__)

Outcome: TypeAlias = Literal["correct", "incorrect", "unverifiable"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)

VERDICT_TAGS = ("verdict", "verdict_reason")
"""Tags of a judged trace. A prompt's own tags of these names give way."""

Untyped: TypeAlias = Any
"""A compiled pattern of `regex`, or a validator of `jsonschema`: neither is typed."""

MAX_HANGS = 3
"""Calls of a Python verifier that may not come back; it is not called again after that many."""

_MAX_REASON_CHARACTERS = 200


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a verifier says of one answer."""

    outcome: Outcome
    reason: str = ""
    """Why it is not correct; empty where there is nothing to say."""


class Verifier(Protocol):
    """Judges one answer."""

    def __call__(self, answer: str, trace: Trace) -> Verdict:
        """The verdict.

        Args:
            answer: What the completion answers; empty when it gives no answer.
            trace: The whole of it, with the prompt's tags.
        """
        ...


class MathsVerifier:
    """Compares an answer with the prompt's reference answer; see `lynearm.teacher.maths_answers`.

    Args:
        reference_tag: The tag that holds the reference: an answer, or a solution that ends in one.
    """

    def __init__(self, reference_tag: str) -> None:
        self._reference_tag = reference_tag

    def __call__(self, answer: str, trace: Trace) -> Verdict:
        """Correct if both are the same number or the same expression."""
        solution = trace.tags.get(self._reference_tag, "")
        if not solution.strip():
            return Verdict("unverifiable", f"the prompt has no tag {self._reference_tag!r}")
        if not answer.strip():
            return Verdict("incorrect", "no answer")
        reference = reference_of(solution)
        if answers_are_equal(answer, reference):
            return Verdict("correct")
        found = find_answer(answer) if is_statement(answer) else None
        if found is not None and answers_are_equal(found, reference):
            return Verdict("correct")
        return Verdict("incorrect", f"answer {found or answer.strip()}, reference {reference}")


class RegexVerifier:
    """Looks for a pattern in the answer.

    Args:
        pattern: An expression for `regex`; `^` and `$` tie it to the beginning and the end of the answer.

    Raises:
        ConfigError: for an expression that cannot be compiled.
    """

    def __init__(self, pattern: str) -> None:
        self._compiled = compile_pattern(pattern, what="pattern to verify")

    def __call__(self, answer: str, trace: Trace) -> Verdict:
        """Correct if it is there."""
        try:
            found = self._compiled.search(answer, timeout=PATTERN_SECONDS)
        except TimeoutError:
            return Verdict("unverifiable", f"the pattern took longer than {PATTERN_SECONDS:g} s")
        return Verdict("correct") if found else Verdict("incorrect", "the pattern is not in the answer")


class JsonSchemaVerifier:
    """Checks that the answer is JSON that a schema describes.

    The answer may be fenced as code is in Markdown.

    Args:
        path: File that holds the schema.

    Raises:
        ConfigError: if it cannot be read, or is no schema.
        MissingDependencyError: without the package `jsonschema`.
    """

    def __init__(self, path: Path) -> None:
        try:
            jsonschema: Untyped = import_module("jsonschema")
            referencing: Untyped = import_module("referencing")
        except ImportError as error:
            raise MissingDependencyError(
                "verifying JSON needs the package jsonschema", "pip install jsonschema"
            ) from error
        try:
            schema: object = json.loads(path.read_bytes())
        except OSError as error:
            raise ConfigError(f"cannot read JSON schema {path}: {error.strerror}") from error
        except ValueError as error:
            raise ConfigError(f"JSON schema {path} is not JSON: {error}") from error
        validator: Untyped = jsonschema.validators.validator_for(schema)
        try:
            validator.check_schema(schema)
        except jsonschema.exceptions.SchemaError as error:
            raise ConfigError(f"{path} is no JSON schema: {error.message}") from error
        # An empty registry: what a schema refers to elsewhere is not fetched.
        self._validator = validator(schema, registry=referencing.Registry())
        self._best_match = jsonschema.exceptions.best_match

    def __call__(self, answer: str, trace: Trace) -> Verdict:
        """Correct if it is such JSON."""
        try:
            parsed: object = json.loads(_unfenced(answer))
        except (ValueError, RecursionError) as error:
            return Verdict("incorrect", f"not JSON: {error}")
        problem = self._best_match(self._validator.iter_errors(parsed))
        return Verdict("correct") if problem is None else Verdict("incorrect", str(problem.message))


class CallableVerifier:
    """Asks a function of the user's, `function(answer: str, trace: Trace)`.

    It says True, False, None for "cannot be verified", or a `Verdict`. It is called on a thread of its own,
    one answer at a time. A thread cannot be ended: one that does not come back in time is left alone.

    Args:
        function: The function.
        timeout_seconds: How long a call may take.
    """

    def __init__(self, function: Callable[[str, Trace], object], *, timeout_seconds: float) -> None:
        self._function = function
        self._timeout_seconds = timeout_seconds
        self._hangs = 0

    def __call__(self, answer: str, trace: Trace) -> Verdict:
        """What the function says; "unverifiable" for what it raises, and if it does not come back."""
        if self._hangs >= MAX_HANGS:
            return Verdict("unverifiable", f"the verifier hung {MAX_HANGS} times and is not called any more")
        said: queue.SimpleQueue[Verdict] = queue.SimpleQueue()
        threading.Thread(
            target=lambda: said.put(self._ask(answer, trace)), name="verify", daemon=True
        ).start()
        try:
            return said.get(timeout=self._timeout_seconds)
        except queue.Empty:
            self._hangs += 1
            logger.warning("prompt %s: the verifier takes too long", trace.prompt_id)
            return Verdict("unverifiable", f"the verifier took longer than {self._timeout_seconds:g} s")

    def _ask(self, answer: str, trace: Trace) -> Verdict:
        try:
            said = self._function(answer, trace)
        # Whatever a user's function raises, a job goes on; on this thread nothing else can be interrupted.
        except BaseException as error:
            logger.debug("prompt %s: the verifier failed", trace.prompt_id, exc_info=True)
            return Verdict("unverifiable", f"the verifier failed: {type(error).__name__}: {error}")
        if isinstance(said, Verdict):
            known = said.outcome in OUTCOMES
            return said if known else Verdict("unverifiable", f"the verifier says {said.outcome!r}")
        if said is None:
            return Verdict("unverifiable")
        if isinstance(said, bool):
            return Verdict("correct" if said else "incorrect")
        return Verdict("unverifiable", f"the verifier returned {type(said).__name__}, expected a bool")


def make_verifier(description: str, *, answer_tag: str, timeout_seconds: float) -> Verifier:
    """The verifier that a configuration names.

    Args:
        description: "maths", "regex:PATTERN", "json-schema:FILE" or "python:MODULE:FUNCTION".
        answer_tag: Where "maths" finds the reference answer.
        timeout_seconds: For a Python function.

    Raises:
        ConfigError: for anything else, or a part of it that is not there.
        MissingDependencyError: if it needs a package that is not installed.
    """
    kind, _, detail = description.partition(":")
    makers: Mapping[str, Callable[[], Verifier]] = {
        "maths": lambda: MathsVerifier(answer_tag),
        "regex": lambda: RegexVerifier(detail),
        "json-schema": lambda: JsonSchemaVerifier(Path(detail)),
        "python": lambda: CallableVerifier(_import_function(detail), timeout_seconds=timeout_seconds),
    }
    if kind not in makers or bool(detail) == (kind == "maths"):
        raise ConfigError(
            f"verify {description!r} is no verifier",
            "use maths, regex:PATTERN, json-schema:FILE or python:MODULE:FUNCTION",
        )
    return makers[kind]()


def verdict_tags(verdict: Verdict) -> dict[str, str]:
    """The tags that carry a verdict: `verdict`, and `verdict_reason` where there is one to give."""
    tags = {"verdict": str(verdict.outcome)}
    # One line, and short: tags travel with every trace.
    reason = " ".join(verdict.reason.encode("utf-8", "replace").decode().split())
    if reason and verdict.outcome != "correct":
        tags["verdict_reason"] = reason[:_MAX_REASON_CHARACTERS]
    return tags


def _unfenced(answer: str) -> str:
    text = answer.strip()
    if text.startswith("```") and text.endswith("```") and "\n" in text:
        text = text.partition("\n")[2].removesuffix("```")
    return text


def _import_function(name: str) -> Callable[[str, Trace], object]:
    module_name, _, function_name = name.rpartition(":")
    if not module_name or not function_name:
        raise ConfigError(
            f"python verifier {name!r} is not MODULE:FUNCTION", "for example python:checks:check"
        )
    try:
        function: object = getattr(import_module(module_name), function_name)
    # A module of the user's may raise anything when it is imported.
    except Exception as error:
        raise ConfigError(
            f"cannot import verifier {name!r}: {type(error).__name__}: {error}",
            "put its directory on PYTHONPATH where the workers run",
        ) from error
    if not callable(function):
        raise ConfigError(f"verifier {name!r} is {type(function).__name__}, expected a function")
    return function
