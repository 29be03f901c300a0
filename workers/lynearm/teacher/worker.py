"""The teacher's worker: a loaded engine that turns prompts into published traces.

It runs inside a Ray actor, but knows nothing of Ray: `load` and `run` block on one thread, while `progress`
and `stop` may be called from others. A worker holds no state that matters: what is finished is what the
stream says, so that a new worker under the same producer id goes on where a killed one was.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from lynearm.client import Publisher, TraceClient
from lynearm.teacher.config import TeachConfig
from lynearm.teacher.dictionary import DictionaryKeeper
from lynearm.teacher.engine import Completion, TeacherEngine
from lynearm.teacher.prompts import BadLine, Prompt
from lynearm.teacher.publishing import BlockWriter, FinishedPrompt
from lynearm.teacher.selection import TraceSelection, verifier_of
from lynearm.teacher.shared_streams import join_stream
from lynearm.wire.errors import ConfigError, InternalError, PromptTooLongError
from lynearm.wire.specs import CodecSpec, StreamSpec
from lynearm.wire.traces import Int32Array, Trace

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerProgress:
    """How far a worker is, since it was made."""

    generated_tokens: int = 0
    """Completion tokens, those of unfinished completions included."""
    prompt_tokens: int = 0
    """Tokens of the prompts that it started on."""
    generated_prompts: int = 0
    """Prompts whose completions are all generated; they may not be durable yet."""
    running: int = 0
    """Completions in the engine."""
    empty_completions: int = 0
    """Completions in which the model said nothing before its end token; recorded like any other."""
    acked_blocks: int = 0
    """Blocks of this worker that are durable."""
    waiting_seconds: float = 0.0
    """How long blocks waited for a service that did not take them."""
    waiting_reason: str = ""
    """Why nothing can be published right now; empty while all is well."""
    encode_seconds: float = 0.0
    """Time spent on encoding blocks, beside the engine."""
    process_id: int = 0
    """Of the worker's process."""
    verdicts: Mapping[str, int] = field(default_factory=dict[str, int])
    """How many completions got each verdict; empty without a verifier."""
    left_out: int = 0
    """Completions that were judged and not published."""
    skipped: tuple[BadLine, ...] = ()
    """Prompts that the teacher cannot take."""
    stopped: bool = False
    """It was asked to stop before all prompts were finished."""


@dataclass(slots=True)
class _Pending:
    """A prompt on its way through the engine."""

    prompt: Prompt
    token_ids: Int32Array
    traces: dict[int, Trace]


class TeacherWorker:
    """Owns an engine; generates, encodes and publishes."""

    def __init__(self, config: TeachConfig) -> None:
        self._config = config
        self._engine: TeacherEngine | None = None
        self._publisher: Publisher | None = None
        self._writer: BlockWriter | None = None
        self._selection: TraceSelection | None = None
        self._stop = threading.Event()
        self._progress = WorkerProgress(process_id=os.getpid())
        self._pending: dict[str, _Pending] = {}

    def load(self) -> StreamSpec:
        """Load the model, and say what the stream is to be.

        Raises:
            ConfigError, MissingDependencyError: as for `TeacherEngine`.
        """
        verifier_of(self._config)  # what is wrong with it comes out before the model is loaded
        self._engine = TeacherEngine(self._config)
        teacher, tokenizer = self._engine.describe()
        return StreamSpec(
            name=self._config.stream,
            teacher=teacher,
            tokenizer=tokenizer,
            codec=CodecSpec(
                self._config.codec,
                self._engine.top_k,
                min_probability=self._config.min_probability,
                draws=self._config.draws,
            ),
            license=self._config.license,
            labels=dict(self._config.labels),
        )

    def run(self, spec: StreamSpec, prompts: Sequence[Prompt]) -> WorkerProgress:
        """Finish every prompt that the stream does not have yet; returns when all is durable, or stopped.

        Raises:
            StreamExistsError: if the stream exists with another spec.
            LynearmError: what ended the publishing, for example that another producer took over.
        """
        with TraceClient(self._config.service) as client:
            client.wait_until_ready()
            spec = join_stream(client, spec, self._config.route)
            client.open_stream(spec)
            with client.publisher(self._config.stream, self._config.producer_id) as publisher:
                self._publisher = publisher
                finished = client.finished_prompts(self._config.stream)
                waiting = deque(prompt for prompt in prompts if prompt.prompt_id not in finished)
                vocab_size = spec.teacher.vocab_size
                self._selection = self._selection or self._make_selection()
                keeper = DictionaryKeeper(client, self._config.stream, spec.codec, vocab_size=vocab_size)
                self._writer = BlockWriter(
                    publisher,
                    self._config,
                    codec=spec.codec,
                    dictionaries=keeper if self._config.dictionary else None,
                    vocab_size=vocab_size,
                    selection=self._selection,
                )
                self._generate(waiting, self._writer)
                self._writer.close()
        return self.progress()

    def progress(self) -> WorkerProgress:
        """How far it is; from any thread, at any time."""
        engine, publisher, writer = self._engine, self._publisher, self._writer
        selection = self._selection
        return replace(
            self._progress,
            generated_tokens=engine.generated_tokens if engine else 0,
            acked_blocks=publisher.acked_blocks if publisher else 0,
            waiting_seconds=publisher.waiting_seconds if publisher else 0.0,
            waiting_reason=publisher.waiting_reason if publisher else "",
            encode_seconds=writer.encode_seconds if writer else 0.0,
            verdicts=selection.verdicts if selection else {},
            left_out=selection.left_out if selection else 0,
        )

    def stop(self) -> None:
        """Make `run` return soon: unfinished completions are dropped, finished prompts published."""
        self._stop.set()

    @property
    def _loaded(self) -> TeacherEngine:
        if self._engine is None:
            raise InternalError("the worker was asked to run before it loaded its engine")
        return self._engine

    def _make_selection(self) -> TraceSelection:
        spans = self._loaded.tokenizer.spans
        return TraceSelection(
            verifier_of(self._config),
            self._config.keep,
            lambda trace: spans.answer_text(
                trace.completion_token_ids.tolist(), trace.spans, trace.finish_reason
            ),
        )

    def _generate(self, waiting: deque[Prompt], writer: BlockWriter) -> None:
        while not self._stop.is_set():
            self._feed(waiting)
            if not self._loaded.unfinished:
                break
            for completion in self._loaded.step():
                self._collect(completion, writer)
            writer.check()
        unfinished = list(self._pending)
        self._update(stopped=bool(unfinished or waiting), running=0)
        self._abort(unfinished)

    def _feed(self, waiting: deque[Prompt]) -> None:
        """Keep the engine full, and little more: what waits in it is lost at a stop."""
        while waiting and self._loaded.unfinished < self._config.max_batch + self._config.completions - 1:
            prompt = waiting.popleft()
            try:
                self._start(prompt)
            except (PromptTooLongError, ConfigError) as error:
                bad_line = BadLine(prompt.file, prompt.line, f"prompt {prompt.prompt_id!r}: {error.message}")
                self._update(skipped=(*self._progress.skipped, bad_line))
        self._update(running=self._loaded.unfinished)

    def _start(self, prompt: Prompt) -> None:
        engine = self._loaded
        token_ids = engine.tokenizer.encode(prompt)
        self._pending[prompt.prompt_id] = _Pending(prompt, token_ids, {})
        for sample_index in range(self._config.completions):
            sampling = engine.sampling(prompt.prompt_id, sample_index, token_ids.size)
            engine.add(f"{sample_index}:{prompt.prompt_id}", token_ids.tolist(), sampling)
        self._update(prompt_tokens=self._progress.prompt_tokens + token_ids.size)

    def _collect(self, completion: Completion, writer: BlockWriter) -> None:
        sample, _, prompt_id = completion.request_id.partition(":")
        pending = self._pending[prompt_id]
        trace = self._trace(pending, int(sample), completion)
        pending.traces[trace.sample_index] = trace
        if not trace.completion_text.strip():
            self._update(empty_completions=self._progress.empty_completions + 1)
        if len(pending.traces) == self._config.completions:
            del self._pending[prompt_id]
            in_order = tuple(trace for _, trace in sorted(pending.traces.items()))
            writer.put(FinishedPrompt(prompt_id, in_order))
            self._update(generated_prompts=self._progress.generated_prompts + 1)

    def _trace(self, pending: _Pending, sample_index: int, completion: Completion) -> Trace:
        engine = self._loaded
        token_ids = completion.token_ids.tolist()
        prompt = pending.prompt
        return Trace(
            prompt_id=prompt.prompt_id,
            prompt_token_ids=pending.token_ids,
            completion_token_ids=completion.token_ids,
            sampled_logprobs=completion.sampled_logprobs,
            top_k=completion.top_k,
            finish_reason=completion.finish_reason,
            sample_index=sample_index,
            spans=engine.tokenizer.spans.find(
                pending.token_ids.tolist(), token_ids, completion.finish_reason
            ),
            sampling=engine.sampling(prompt.prompt_id, sample_index, pending.token_ids.size),
            tags=prompt.tags,
            completion_text=engine.tokenizer.decode(token_ids, engine.eos_token_ids),
        )

    def _abort(self, prompt_ids: Sequence[str]) -> None:
        request_ids = [
            f"{sample}:{prompt_id}" for prompt_id in prompt_ids for sample in range(self._config.completions)
        ]
        if request_ids:
            self._loaded.abort(request_ids)
        self._pending.clear()

    def _update(self, **changes: object) -> None:
        # Replaced whole, so that other threads always see one consistent state.
        self._progress = replace(self._progress, **changes)  # type: ignore[arg-type]  # fields by name
