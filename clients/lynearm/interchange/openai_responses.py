"""A response of an OpenAI-compatible server as traces: one for each of its choices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from lynearm.interchange.json_fields import JsonObject, integer_of, list_of, object_of, text_of, token_ids_of
from lynearm.interchange.openai_logprobs import (
    ASK_FOR_LOGPROBS,
    Position,
    chat_positions,
    completion_positions,
    kept_entries,
    read_completion,
)
from lynearm.interchange.tokens import TokenNames
from lynearm.wire.errors import InvalidInputError
from lynearm.wire.traces import FinishReason, SamplingParams, Trace

_FINISH_REASONS: dict[str, FinishReason] = {
    "stop": "stop",
    "tool_calls": "stop",
    "function_call": "stop",
    "length": "length",
    "abort": "abort",
    "content_filter": "abort",
    "repetition": "abort",
}
"""By what servers say; a call of a tool ends with the model's own end token."""

_ASK_FOR_IDS = 'ask the server for them: "return_token_ids": true in the request'


@dataclass(frozen=True, slots=True)
class ResponseFacts:
    """What a response says about the stream that it could be in."""

    model: str
    """As the server names it; empty where it does not."""
    engine: str
    """The server's fingerprint; empty where it has none."""
    top_k: int
    """Entries of the position that has the most."""


@dataclass(frozen=True, slots=True)
class _Choice:
    name: str
    index: int
    is_chat: bool
    fields: JsonObject
    prompt_token_ids: tuple[int, ...]


class ResponseReader:
    """Makes traces of responses.

    Args:
        names: Finds token ids.
        sampling: How the completions were drawn, which responses do not say.
        end_token_ids: What ends a completion.
        top_k: Entries that the stream keeps per position.
        cut: Whether more entries are cut to the likeliest; else they are an error.
        model: Whom every response must be by, as the server names it; None for anyone.
    """

    def __init__(
        self,
        names: TokenNames,
        *,
        sampling: SamplingParams,
        end_token_ids: Sequence[int],
        top_k: int,
        cut: bool,
        model: str | None,
    ) -> None:
        self._names = names
        self._sampling = sampling
        self._end_token_ids = tuple(end_token_ids)
        self._top_k = top_k
        self._cut = cut
        self._model = model

    def read(self, prompt_id: str, body: JsonObject) -> list[tuple[str, tuple[Trace, ...]]]:
        """The prompts of a response, each with its traces.

        A completion request may have several prompts: their ids are the response's with "/0", "/1", … behind.

        Args:
            prompt_id: Of the request.
            body: The response.

        Raises:
            InvalidInputError: naming the choice and the field.
        """
        if self._model is not None and body.get("model", self._model) != self._model:
            raise InvalidInputError(
                f"the response is by {body.get('model')!r}, those before it by {self._model!r}",
                "import the responses of each teacher into a stream of its own, or say with --teacher-model "
                "who wrote all of them",
            )
        choices = [self._choice(body, number) for number in range(len(_choices(body)))]
        groups = [list(group) for _, group in groupby(choices, key=lambda choice: choice.prompt_token_ids)]
        made: list[tuple[str, tuple[Trace, ...]]] = []
        for number, group in enumerate(groups):
            name = f"{prompt_id}/{number}" if len(groups) > 1 else prompt_id
            first = min(choice.index for choice in group)
            made.append((name, tuple(self._trace(name, choice, choice.index - first) for choice in group)))
        return made

    def _choice(self, body: JsonObject, number: int) -> _Choice:
        name = f"choices[{number}]"
        fields = object_of(_choices(body)[number], name)
        return _Choice(
            name=name,
            index=integer_of(fields.get("index", number), f"{name}.index"),
            is_chat="message" in fields,
            fields=fields,
            prompt_token_ids=tuple(self._prompt_token_ids(body, fields, name)),
        )

    def _prompt_token_ids(self, body: JsonObject, choice: JsonObject, name: str) -> list[int]:
        """From a chat response, from a choice of a completion, or from the rendered prompt."""
        for fields, where in ((choice, f"{name}."), (body, "")):
            if fields.get("prompt_token_ids") is not None:
                return token_ids_of(fields["prompt_token_ids"], f"{where}prompt_token_ids")
        prompt = body.get("prompt_text")
        encoded = self._names.encode(text_of(prompt, "prompt_text")) if prompt is not None else None
        if encoded is None:
            raise InvalidInputError("the response has no prompt_token_ids", _ASK_FOR_IDS)
        return encoded

    def _trace(self, prompt_id: str, choice: _Choice, sample_index: int) -> Trace:
        try:
            known = choice.fields.get("token_ids")
            token_ids = token_ids_of(known, "token_ids") if known is not None else None
            completion = read_completion(
                _positions(choice.fields, is_chat=choice.is_chat),
                token_ids,
                self._names,
                top_k=self._top_k,
                cut=self._cut,
            )
            ids: list[int] = completion.token_ids.tolist()
            text = self._names.text(ids, self._end_token_ids)
            return Trace(
                prompt_id=prompt_id,
                prompt_token_ids=np.asarray(choice.prompt_token_ids, np.int32),
                completion_token_ids=completion.token_ids,
                sampled_logprobs=completion.sampled_logprobs,
                top_k=completion.top_k,
                finish_reason=_finish_reason(choice.fields.get("finish_reason")),
                sample_index=sample_index,
                sampling=self._sampling,
                completion_text=text if text is not None else _text(choice),
            )
        except InvalidInputError as error:
            raise InvalidInputError(f"{choice.name}: {error.message}", error.remedy) from error


def response_facts(body: JsonObject) -> ResponseFacts:
    """What a response says about its stream.

    Raises:
        InvalidInputError: naming the choice and the field.
    """
    top_k = 0
    for number, choice in enumerate(_choices(body)):
        fields = object_of(choice, f"choices[{number}]")
        is_chat = "message" in fields
        for position in _positions(fields, is_chat=is_chat):
            top_k = max(top_k, len(position.entries) if is_chat else kept_entries(position))
    model, engine = body.get("model"), body.get("system_fingerprint")
    return ResponseFacts(
        model=model if isinstance(model, str) else "",
        engine=engine if isinstance(engine, str) else "",
        top_k=top_k,
    )


def _choices(body: JsonObject) -> list[object]:
    if str(body.get("object", "")).endswith(".chunk"):
        raise InvalidInputError(
            "the line is a piece of a streamed response", 'ask the server without "stream"'
        )
    choices = list_of(body.get("choices"), "choices")
    if not choices:
        raise InvalidInputError("the response has no choices")
    return choices


def _positions(choice: JsonObject, *, is_chat: bool) -> list[Position]:
    if choice.get("logprobs") is None:
        raise InvalidInputError("logprobs is missing", ASK_FOR_LOGPROBS)
    logprobs = object_of(choice["logprobs"], "logprobs")
    return chat_positions(logprobs) if is_chat else completion_positions(logprobs)


def _finish_reason(value: object) -> FinishReason:
    reason = _FINISH_REASONS.get(value) if isinstance(value, str) else None
    if reason is None:
        raise InvalidInputError(f"finish_reason is {value!r}, expected one of {', '.join(_FINISH_REASONS)}")
    return reason


def _text(choice: _Choice) -> str:
    """What the server says that the completion is, without a tokenizer to know better."""
    if not choice.is_chat:
        return text_of(choice.fields.get("text") or "", "text")
    return "".join(_parts(object_of(choice.fields.get("message"), "message")))


def _parts(message: JsonObject) -> Iterator[str]:
    """Reasoning, under the name of new and old servers, and content."""
    for name in ("reasoning", "content"):
        value = message.get(name) or (message.get("reasoning_content") if name == "reasoning" else None)
        if value is not None:
            yield text_of(value, f"message.{name}")
