"""How a request is to be drawn, in vLLM's own terms.

Logprobs that vLLM records are those of the logits before penalties, filters and temperature; what is here
changes which token is drawn, never what is recorded of it.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from lynearm.teacher.vllm_internals import say_slower
from lynearm.wire.traces import SamplingParams

Untyped: TypeAlias = Any
"""An object of vLLM, which ships no types that a strict checker accepts."""


def engine_sampling(sampling: SamplingParams, logprobs: int, *, streamed: bool) -> Untyped:
    """Sampling parameters of vLLM.

    Args:
        sampling: How to draw.
        logprobs: Entries of a row besides the sampled token.
        streamed: Give out tokens as they come.
    """
    from vllm import SamplingParams as EngineSampling
    from vllm.sampling_params import RequestOutputKind

    return EngineSampling(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        max_tokens=sampling.max_tokens,
        seed=sampling.seed,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        min_tokens=sampling.min_tokens,
        stop=list(sampling.stop),
        stop_token_ids=list(sampling.stop_token_ids),
        logprobs=logprobs,
        flat_logprobs=True,
        # Only where a text is to be looked for: see `leave_candidates_as_ids`.
        detokenize=bool(sampling.stop),
        # The text that is searched is that of the trace, special tokens and stop string included.
        skip_special_tokens=False,
        include_stop_str_in_output=True,
        output_kind=RequestOutputKind.CUMULATIVE if streamed else RequestOutputKind.FINAL_ONLY,
    )


def leave_candidates_as_ids(engine: Untyped, internal_id: str) -> None:
    """Have vLLM make text of a request's tokens, but of none of the candidates beside them.

    To do so for every candidate would cost four times what collecting them does.

    Args:
        engine: LLMEngine.
        internal_id: What `add_request` returned.
    """
    states: Untyped = getattr(getattr(engine, "output_processor", None), "request_states", {})
    processor: Untyped = getattr(states.get(internal_id), "logprobs_processor", None)
    if hasattr(processor, "tokenizer"):
        processor.tokenizer = None
    else:
        say_slower("with stop strings, it makes text of every candidate")
