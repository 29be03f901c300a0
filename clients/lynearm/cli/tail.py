"""Prints the traces of a stream as they arrive."""

from __future__ import annotations

import sys
import time
from typing import Literal

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from lynearm.cli.failures import Interrupted
from lynearm.cli.progress import count, duration
from lynearm.cli.stream_views import print_json
from lynearm.cli.text import printable
from lynearm.client import ReceivedBlock, TraceClient, stop_on_interrupt
from lynearm.wire.codec import decode_block
from lynearm.wire.errors import ConfigError
from lynearm.wire.traces import Trace

_SHOWN_TOKEN_IDS = 16


def parse_start(text: str) -> int | Literal["live"]:
    """The value of --from.

    Raises:
        ConfigError: if it is neither an offset nor one of the two words.
    """
    if text == "live":
        return "live"
    if text == "start":
        return 0
    if text.isascii() and text.isdigit():
        return int(text)
    raise ConfigError(f"--from is {text!r}", "give the offset of a block, `start` or `live`")


class Tail:
    """One reading of a stream.

    Args:
        client: Of the service.
        stream: Name of the stream.
        as_json: Print one object a line instead of text.
    """

    def __init__(self, client: TraceClient, stream: str, *, as_json: bool) -> None:
        self._client = client
        self._stream = stream
        self._as_json = as_json
        self._dictionaries = client.dictionaries(stream, wait=True)
        self._console = Console(highlight=False, soft_wrap=False)
        self._next_offset = 0
        self._traces = 0
        self._tokens = 0
        self._sealed_and_live = False
        self._started = time.monotonic()

    def run(self, start: int | Literal["live"], *, follow: bool, limit: float) -> None:
        """Print until the stream ends, `limit` traces are printed, or Ctrl-C.

        Raises:
            StreamNotFoundError: if there is no such stream.
            Interrupted: after Ctrl-C, with the command that goes on.
        """
        info = self._client.get_stream(self._stream)
        self._next_offset = info.next_offset if start == "live" else start
        self._sealed_and_live = info.sealed and start == "live"
        # From the offset, and not "live", so that nothing committed since is passed over.
        with (
            self._client.subscribe(self._stream, start=self._next_offset, follow=follow) as subscription,
            stop_on_interrupt(wake=subscription.close) as interrupted,
        ):
            for received in subscription:
                if self._print_block(received, limit) or interrupted.is_set():
                    break
        if interrupted.is_set():
            print(self.summary(), file=sys.stderr)
            raise Interrupted(
                f"go on with `lynearm streams tail {self._stream} --from {self._next_offset} "
                f"--service {self._client.target}`"
            )

    def summary(self) -> str:
        """What was printed, and how fast it came."""
        if not self._traces:
            hint = "; it is sealed, and --from start prints what it holds" if self._sealed_and_live else ""
            return f"no trace came from stream {self._stream}{hint}"
        seconds = time.monotonic() - self._started
        return (
            f"{count(self._traces)} traces, {count(self._tokens)} tokens in {duration(seconds)}, "
            f"{count(self._tokens / max(seconds, 1e-9))} tokens/s; next offset {self._next_offset}"
        )

    def _print_block(self, received: ReceivedBlock, limit: float) -> bool:
        """Print a block's traces; whether the limit is reached."""
        for index, trace in enumerate(decode_block(received.block, dictionaries=self._dictionaries)):
            if self._as_json:
                print_json({"offset": received.offset, "trace_index": index, **_fields(trace)})
            else:
                self._print_trace(received.offset, trace)
            self._traces += 1
            self._tokens += trace.completion_token_ids.size
            if self._traces >= limit:
                return True
        self._next_offset = received.offset + 1
        return False

    def _print_trace(self, offset: int, trace: Trace) -> None:
        mean_logprob = _mean_logprob(trace)
        facts = [f"block {offset}", f"{trace.completion_token_ids.size} tokens", trace.finish_reason]
        if mean_logprob is not None:
            facts.insert(2, f"mean logprob {mean_logprob:.2f}")
        facts += [f"{key}={value}" for key, value in trace.tags.items()]
        name = f"{trace.prompt_id}#{trace.sample_index}" if trace.sample_index else trace.prompt_id
        title = Text.assemble((printable(name), "bold"), (f"  {printable(', '.join(facts))}", "dim"))
        self._console.print(title, overflow="fold")
        self._console.print(Padding(Text(_text(trace)), (0, 0, 0, 2), expand=False), overflow="fold")


def _text(trace: Trace) -> str:
    if trace.completion_text:
        return printable(trace.completion_text)
    token_ids = trace.completion_token_ids[:_SHOWN_TOKEN_IDS].tolist()
    more = " …" if trace.completion_token_ids.size > _SHOWN_TOKEN_IDS else ""
    return f"(no text; tokens {' '.join(map(str, token_ids))}{more})" if token_ids else "(empty)"


def _mean_logprob(trace: Trace) -> float | None:
    """Of the sampled tokens, nats; None for an empty completion."""
    return float(trace.sampled_logprobs.mean()) if trace.sampled_logprobs.size else None


def _fields(trace: Trace) -> dict[str, object]:
    mean_logprob = _mean_logprob(trace)
    # A token of probability 0 makes the mean infinite, which JSON cannot say.
    finite = mean_logprob is not None and mean_logprob > float("-inf")
    return {
        "prompt_id": trace.prompt_id,
        "sample_index": trace.sample_index,
        "prompt_tokens": trace.prompt_token_ids.size,
        "completion_tokens": trace.completion_token_ids.size,
        "mean_logprob": mean_logprob if finite else None,
        "finish_reason": trace.finish_reason,
        "spans": [{"kind": span.kind, "start": span.start, "end": span.end} for span in trace.spans],
        "tags": dict(trace.tags),
        "text": trace.completion_text,
    }
