"""Generate: the teacher answers one prompt, with its text as it comes.

Whoever asks for a request that runs, or ended lately, gets all of its text from the beginning.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace

import numpy as np

from lynearm.teacher.engine import Completion, TeacherEngine
from lynearm.teacher.prompts import ChatMessage, Prompt
from lynearm.teacher.request_table import RequestContent, RequestTable
from lynearm.teacher.tokenizer import PromptTokenizer
from lynearm.v1 import teacher_service_pb2 as pb
from lynearm.wire.codec import encode_block
from lynearm.wire.errors import InternalError, InvalidInputError, PromptTooLongError
from lynearm.wire.sampling import sampling_from_proto, sampling_problem, stop_token_problem
from lynearm.wire.scoring import (
    MAX_RESULT_BYTES,
    ScoreSettings,
    TeacherInfo,
    check_request_id,
    codec_mode_from_proto,
    finish_reason_to_proto,
    result_bytes_bound,
)
from lynearm.wire.specs import check_name
from lynearm.wire.traces import Int32Array, SamplingParams, Trace

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer makes of bytes that are no whole character yet."""


class GenerateCalls:
    """Serves Generate.

    Args:
        table: Computes.
        teacher: Who answers.
        tokenizer: Its tokenizer; used on this thread alone.
    """

    def __init__(self, table: RequestTable, teacher: TeacherInfo, tokenizer: PromptTokenizer) -> None:
        self._table = table
        self._teacher = teacher
        self._tokenizer = tokenizer

    async def serve(self, request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateResponse, None]:
        """The responses to a request.

        Raises:
            InvalidInputError: if the prompt cannot be answered as it is asked for.
            RequestConflictError: if the name stands for another request.
        """
        name = (check_name(request.session, what="session"), check_request_id(request.request_id))
        prompt_ids = self._prompt_ids(request)
        sampling = self._sampling(request, prompt_ids.size)
        top_k = request.top_k if request.with_trace else 0
        self._check_trace(request, sampling.max_tokens)

        def begin(engine: TeacherEngine, key: str) -> None:
            engine.add(key, prompt_ids.tolist(), sampling, streamed=True, top_k=top_k)

        content = RequestContent(_digest(prompt_ids, sampling, top_k), begin, is_streamed=True)
        shared = await self._table.join(name, content)
        try:
            text = _TextSoFar(self._text)
            while not shared.result.done():
                more = text.take(shared.token_ids)
                if more:
                    yield pb.GenerateResponse(text=pb.GeneratedText(text=more))
                if not shared.result.done() and shared.token_ids is text.taken:
                    await shared.wait_change()
            completion = await asyncio.shield(shared.result)
            if not isinstance(completion, Completion):  # names and digests tell completions from scores
                raise InternalError(f"request {request.request_id!r} gave no completion")
            more = text.take(completion.token_ids.tolist(), is_last=True)
            if more:
                yield pb.GenerateResponse(text=pb.GeneratedText(text=more))
            yield await asyncio.to_thread(self._end, request, prompt_ids, sampling, completion)
        finally:
            self._table.leave(shared)

    def _prompt_ids(self, request: pb.GenerateRequest) -> Int32Array:
        kind = request.WhichOneof("prompt")
        if kind is None:
            raise InvalidInputError("the request has no prompt", "give a text, a chat or token ids")
        if kind == "tokens":
            return self._given_ids(request.tokens.token_ids)
        if kind == "chat":
            turns = tuple(ChatMessage(turn.role, turn.content) for turn in request.chat.turns)
            if not turns:
                raise InvalidInputError("the chat has no turns", "give at least one")
            return self._tokenizer.encode(Prompt(request.request_id, messages=turns))
        return self._tokenizer.encode(Prompt(request.request_id, text=request.text))

    def _given_ids(self, token_ids: Sequence[int]) -> Int32Array:
        spec = self._teacher.spec
        worst = max(token_ids, default=-1)
        if not 0 <= worst < spec.vocab_size:
            what = "no tokens" if worst < 0 else f"token id {worst}, the vocabulary ends at {spec.vocab_size}"
            raise InvalidInputError(f"the prompt has {what}", "use the teacher's own tokenizer")
        if len(token_ids) >= spec.max_model_len:
            raise PromptTooLongError(
                f"the prompt is {len(token_ids)} tokens, and the context of {spec.max_model_len} must also "
                "hold a completion",
                "shorten the prompt, or serve the teacher with a larger max_model_len",
            )
        return np.asarray(token_ids, np.int32)

    def _sampling(self, request: pb.GenerateRequest, prompt_tokens: int) -> SamplingParams:
        given = request.sampling
        room = self._teacher.spec.max_model_len - prompt_tokens
        if not request.HasField("sampling"):
            return SamplingParams(max_tokens=room)
        checks = {
            f"temperature {given.temperature} is outside 0..100": 0 <= given.temperature <= 100,
            f"top_p {given.top_p} is outside 0..1": 0 <= given.top_p <= 1,
            f"min_p {given.min_p} is outside 0..1": 0 <= given.min_p <= 1,
            f"top_k {given.top_k} is outside 0..{self._teacher.spec.vocab_size}": (
                0 <= given.top_k <= self._teacher.spec.vocab_size
            ),
            f"max_tokens {given.max_tokens} is negative": given.max_tokens >= 0,
        }
        for problem, holds in checks.items():
            if not holds:
                raise InvalidInputError(f"sampling: {problem}")
        asked = sampling_from_proto(given)
        problem = sampling_problem(asked) or stop_token_problem(asked, self._teacher.spec.vocab_size)
        if problem:
            raise InvalidInputError(f"sampling: {problem}")
        max_tokens = min(given.max_tokens or room, room)
        return replace(
            asked,
            top_p=given.top_p or 1.0,
            max_tokens=max_tokens,
            min_tokens=min(asked.min_tokens, max_tokens),
        )

    def _check_trace(self, request: pb.GenerateRequest, max_tokens: int) -> None:
        if not request.with_trace:
            return
        if request.top_k > self._teacher.max_top_k:
            raise InvalidInputError(
                f"top_k {request.top_k} is above the {self._teacher.max_top_k} of this teacher",
                "ask for less, or serve it with a larger --top-k",
            )
        settings = ScoreSettings(top_k=request.top_k, codec=codec_mode_from_proto(request.codec_mode))
        size_bytes = result_bytes_bound(max_tokens, settings, 0)
        if size_bytes > MAX_RESULT_BYTES:
            raise InvalidInputError(
                f"a trace of {max_tokens} tokens with top_k {request.top_k} may have {size_bytes} bytes, "
                f"a message holds {MAX_RESULT_BYTES}",
                "ask for a smaller top_k or fewer max_tokens",
            )

    def _text(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, self._teacher.tokenizer.eos_token_ids)

    def _end(
        self,
        request: pb.GenerateRequest,
        prompt_ids: Int32Array,
        sampling: SamplingParams,
        completion: Completion,
    ) -> pb.GenerateResponse:
        end = pb.GenerateEnd(
            finish_reason=finish_reason_to_proto(completion.finish_reason),
            prompt_token_count=prompt_ids.size,
            completion_token_count=completion.token_ids.size,
            stop_string=completion.stop_string,
        )
        if request.with_trace:
            trace = Trace(
                request.request_id,
                prompt_ids,
                completion.token_ids,
                completion.sampled_logprobs,
                completion.top_k,
                completion.finish_reason,
                sampling=sampling,
                stop_string=completion.stop_string,
            )
            codec = codec_mode_from_proto(request.codec_mode)
            block = encode_block([trace], codec=codec, vocab_size=self._teacher.spec.vocab_size)
            end.block.ParseFromString(block)
        return pb.GenerateResponse(end=end)


class _TextSoFar:
    """The text of a growing completion, given out in pieces that end with whole characters.

    A piece is decoded together with the one before it: tokenizers treat the beginning of a text in ways of
    their own. So each token is decoded a few times, however long the completion.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self.taken: Sequence[int] = ()
        """The tokens that were looked at last."""
        self._decode = decode
        self._before = 0
        """Where the piece before the next one begins, tokens."""
        self._done = 0
        """Where the next one begins."""

    def take(self, token_ids: Sequence[int], *, is_last: bool = False) -> str:
        """What the tokens add to the text that was taken before."""
        self.taken = token_ids
        known = self._decode(token_ids[self._before : self._done])
        text = self._decode(token_ids[self._before :])
        if len(text) <= len(known) or (text.endswith(_REPLACEMENT) and not is_last):
            return ""
        self._before, self._done = self._done, len(token_ids)
        return text[len(known) :]


def _digest(prompt_ids: Int32Array, sampling: SamplingParams, top_k: int) -> bytes:
    digest = hashlib.sha256(b"generate")
    digest.update(repr((sampling, top_k, prompt_ids.size)).encode())
    digest.update(prompt_ids.tobytes())
    return digest.digest()
