"""Inside vLLM's worker: what its sampler records of each distribution, made cheap, and at any temperature.

The sampler takes scores of the whole vocabulary before it samples, and from these, once a token is sampled,
the rows that a request gets. Both steps are replaced, in the engine of one worker: the scores are the logits
at the stream's temperature, and rows are taken from them as `lynearm.teacher.distributions` says, or drawn.
Which token is sampled stays vLLM's affair.

On a GPU with Triton the newer model runner of vLLM takes rows in kernels of its own, which are as lean: there
the logits are divided by the temperature on their way in, and nothing else is changed.

All this only where vLLM looks as expected. Elsewhere its own steps stay, which know temperature 1 alone.

Shape legend: N = rows, V = vocabulary, K = kept entries.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from lynearm.teacher.distributions import TopLogprobs, logprobs_at, temper, top_logprobs
from lynearm.teacher.draws import draw_from_logits
from lynearm.teacher.vllm_internals import version_problem

if TYPE_CHECKING:
    from torch import Tensor

Untyped: TypeAlias = Any
"""An object of vLLM, which ships no types that a strict checker accepts."""

_STEPS = {
    "forward": ["logits", "sampling_metadata", "predict_bonus_token", "logprobs_mode_override"],
    "compute_logprobs": ["logits"],
    "gather_logprobs": ["logprobs", "num_logprobs", "token_ids"],
    "gather_specific_token_logprobs": ["logprobs", "logprob_token_ids", "sampled"],
}
"""The sampler's methods that are replaced, with their parameters."""

_ROW_FIELDS = ("logprob_token_ids", "logprobs", "selected_token_ranks")

_TRITON_MODULES = ("vllm.v1.worker.gpu.sample.sampler", "vllm.v1.worker.gpu.sample.prompt_logprob")
"""Where the newer runner calls `compute_topk_scores`, for generated tokens and for prompts."""


@dataclass(frozen=True, slots=True)
class CaptureWish:
    """What is to be recorded of each distribution."""

    temperature: float = 1.0
    """Divides the logits."""
    draws: int = 0
    """Draws from the whole distribution in place of its likeliest entries; 0 for none."""
    tail_draws: int = 0
    """Draws from what is not kept, behind the likeliest entries; 0 for none, as with `draws`."""
    seed: int = 0
    """Of the draws."""


@dataclass(frozen=True, slots=True)
class CaptureReport:
    """What a worker does since it was told how to capture."""

    has_temperature: bool
    """Distributions are at the temperature that was asked for."""
    has_draws: bool = False
    """A request gets draws, in as many columns as it asks logprobs for; or those of the tail in the last ones
    of them."""
    problem: str = ""
    """Why vLLM's own steps stayed; empty where they were replaced, or are as lean."""


class CaptureWorker:
    """Base class of `WorkerExtension`: capturing."""

    # vLLM's own, in the class that this one is mixed into.
    model_runner: Untyped

    def lynearm_capture(self, wish: CaptureWish) -> CaptureReport:
        """Capture in this way from now on."""
        self.lynearm_capture_as_vllm()
        sampler = getattr(self.model_runner, "sampler", None)
        problem = version_problem()
        if not problem and _is_triton_sampler(sampler):
            _temper_triton(wish.temperature)
            return CaptureReport(has_temperature=True)
        problem = problem or _sampler_problem(sampler)
        if problem:
            return CaptureReport(has_temperature=wish.temperature == 1, problem=problem)
        rows = _Rows(sampler, wish)
        for name in _STEPS:
            setattr(sampler, name, getattr(rows, name))
        return CaptureReport(has_temperature=True, has_draws=max(wish.draws, wish.tail_draws) > 0)

    def lynearm_capture_as_vllm(self) -> None:
        """Undo `lynearm_capture`."""
        sampler = getattr(self.model_runner, "sampler", None)
        for name in _STEPS:
            getattr(sampler, "__dict__", {}).pop(name, None)
        _temper_triton(1.0)


class _Rows:
    """The replaced steps of one sampler, under vLLM's names for them and for what they are given."""

    def __init__(self, sampler: Untyped, wish: CaptureWish) -> None:
        self._wish = wish
        self._forward = sampler.forward
        self._gather_specific = sampler.gather_specific_token_logprobs
        self._kept: Tensor | None = None
        self._generator: Untyped = None
        self._sampled_k: int | None = None
        """Entries of rows of generated tokens while these are sampled; None at other times."""
        self._top: TopLogprobs | None = None
        """Of the rows that are sampled."""

    def forward(
        self, logits: Tensor, sampling_metadata: Untyped, *others: Untyped, **named: Untyped
    ) -> Untyped:
        """As vLLM's; tells rows of generated tokens from those of prompts, which are never drawn."""
        self._sampled_k = max(0, sampling_metadata.max_num_logprobs or 0)
        try:
            return self._forward(logits, sampling_metadata, *others, **named)
        finally:
            self._sampled_k = self._top = None

    def compute_logprobs(self, logits: Tensor) -> Tensor:
        """Logits at the temperature, in float32, out of the reach of sampling, which changes logits in place.

        They are valid until the next call. What is kept of generated tokens' rows is taken here, before
        sampling, while the logits are in the caches.
        """
        temperature = self._wish.temperature
        if self._sampled_k is None:
            return temper(logits, temperature)
        k = 0 if self._wish.draws else self._sampled_k
        chances = None
        if self._wish.tail_draws and k >= self._wish.tail_draws:
            k -= self._wish.tail_draws
            chances = self._chances(logits)
        kept = self._room_for(logits)
        if temperature == 1 and logits.dtype == kept.dtype:
            self._top = top_logprobs(logits, k, copy_NV=kept, chances_ND=chances)
        else:
            self._top = top_logprobs(temper(logits, temperature, out=kept), k, chances_ND=chances)
        return kept

    def gather_logprobs(self, logprobs: Tensor, num_logprobs: int, token_ids: Tensor) -> Untyped:
        """The given token of each row, then the likeliest, or drawn ones.

        Of what `compute_logprobs` returned. Ranks are not counted: nobody here reads them. Where a row has no
        tail to draw from, the draw is token 0 at −inf.
        """
        import torch
        from vllm.v1.outputs import LogprobsTensors

        top = top_logprobs(logprobs, num_logprobs) if self._top is None else self._top
        kept_NK, ids_NK, normalisers_N1, drawn_ND = top
        if self._wish.draws and self._sampled_k is not None:
            ids_NK, kept_NK = draw_from_logits(logprobs, num_logprobs, self._chance(logprobs))
        if drawn_ND.shape[1]:
            of_drawn_ND = logprobs_at(logprobs, drawn_ND.clamp(min=0).long(), normalisers_N1)
            ids_NK = torch.cat((ids_NK, drawn_ND.clamp(min=0)), dim=1)
            kept_NK = torch.cat((kept_NK, of_drawn_ND.masked_fill_(drawn_ND < 0, -torch.inf)), dim=1)
        given_N1 = token_ids.unsqueeze(-1)
        return LogprobsTensors(
            torch.cat((given_N1, ids_NK), dim=1).to(torch.int32),
            torch.cat((logprobs_at(logprobs, given_N1, normalisers_N1), kept_NK), dim=1),
            torch.zeros_like(token_ids, dtype=torch.int32),
        )

    def gather_specific_token_logprobs(
        self, logprobs: Tensor, logprob_token_ids: Untyped, sampled: Tensor
    ) -> Untyped:
        """As vLLM's, which is given logprobs."""
        top = top_logprobs(logprobs, 0) if self._top is None else self._top
        return self._gather_specific(logprobs - top.normalisers_N1, logprob_token_ids, sampled)

    def _room_for(self, logits: Tensor) -> Tensor:
        """Float32, in the logits' shape."""
        kept = self._kept
        if kept is None or kept.device != logits.device or kept.shape[1] != logits.shape[1]:
            kept = self._kept = None
        if kept is None or kept.shape[0] < logits.shape[0]:
            import torch

            # Made once for the largest batch: fresh memory costs more than what is copied into it.
            kept = self._kept = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
        return kept[: logits.shape[0]]

    def _chances(self, logits: Tensor) -> Tensor:
        """One for each draw from the tails of these logits, [N, D]."""
        import torch

        shape = (logits.shape[0], self._wish.tail_draws)
        generator = self._chance(logits)
        return torch.rand(shape, dtype=torch.float64, device=logits.device, generator=generator)

    def _chance(self, beside: Tensor) -> Untyped:
        if self._generator is None:
            import torch

            self._generator = torch.Generator(beside.device)
            self._generator.manual_seed(self._wish.seed)
        return self._generator


def _sampler_problem(sampler: Untyped) -> str:
    """What about a sampler is not as expected; empty when all is."""
    from vllm.v1.outputs import LogprobsTensors

    for name, parameters in _STEPS.items():
        method = getattr(sampler, name, None)
        if not callable(method) or list(inspect.signature(method).parameters) != parameters:
            return f"its sampler has no {name}({', '.join(parameters)})"
    if getattr(sampler, "logprobs_mode", None) != "raw_logprobs":
        return "its sampler does not record raw logprobs"
    if tuple(getattr(LogprobsTensors, "_fields", ()))[:3] != _ROW_FIELDS:
        return f"its rows are not made of {', '.join(_ROW_FIELDS)}"
    return ""


def _triton_module(name: str) -> Untyped:
    """A module of the newer runner; None where that does not run, or does not look as expected."""
    module: Untyped = sys.modules.get(name)
    scores: Untyped = getattr(module, "compute_topk_scores", None)
    if not callable(scores) or next(iter(inspect.signature(scores).parameters), "") != "logits":
        return None
    return module


def _is_triton_sampler(sampler: Untyped) -> bool:
    return type(sampler).__module__ == _TRITON_MODULES[0] and all(map(_triton_module, _TRITON_MODULES))


def _temper_triton(temperature: float) -> None:
    for module in filter(None, map(_triton_module, _TRITON_MODULES)):
        original: Callable[..., Untyped] = inspect.unwrap(module.compute_topk_scores)
        module.compute_topk_scores = original if temperature == 1 else _tempered(original, temperature)


def _tempered(original: Callable[..., Untyped], temperature: float) -> Callable[..., Untyped]:
    @functools.wraps(original)
    def compute_topk_scores(logits: Tensor, *arguments: Untyped, **keywords: Untyped) -> Untyped:
        return original(temper(logits, temperature), *arguments, **keywords)

    return compute_topk_scores
