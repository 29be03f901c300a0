"""Inside vLLM's worker: what its sampler records of each distribution, made cheap, and at any temperature.

vLLM's sampler takes scores of the whole vocabulary before it samples, and from these, once a token is sampled,
the rows that a request gets. `install` replaces those two steps of the sampler, for the engine that it is called
in: the scores are the logits at the stream's temperature, and rows are taken from them as
`lynearm.teacher.distributions` says. Which token is sampled stays vLLM's affair.

On a GPU with Triton vLLM's newer model runner takes rows in kernels of its own, which are as lean: there the
logits are divided by the temperature on their way in, and nothing else is changed.

Everything is replaced only where it looks as expected. Elsewhere vLLM's own steps stay, and serve temperature 1.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from lynearm.teacher.distributions import log_normalisers, logprobs_at, temper, top_entries

if TYPE_CHECKING:
    from torch import Tensor

Untyped: TypeAlias = Any
"""An object of vLLM, which ships no types that a strict checker accepts."""

_TRITON_MODULES = ("vllm.v1.worker.gpu.sample.sampler", "vllm.v1.worker.gpu.sample.prompt_logprob")
"""Where the newer runner calls `compute_topk_scores`, for generated tokens and for prompts."""


@dataclass(frozen=True, slots=True)
class CaptureReport:
    """What a worker does since it was told how to capture."""

    is_cheap: bool
    """Rows are taken as this package takes them, or by a runner that is as lean."""
    has_temperature: bool
    """Distributions are at the temperature that was asked for."""
    reason: str = ""
    """Why not."""


class CaptureWorker:
    """Base class of `WorkerExtension`: capturing."""

    # vLLM's own, in the class that this one is mixed into.
    model_runner: Untyped

    def lynearm_capture(self, temperature: float) -> CaptureReport:
        """Capture at a temperature from now on."""
        self.lynearm_capture_as_vllm()
        sampler = getattr(self.model_runner, "sampler", None)
        unexpected = _sampler_problem(sampler)
        if not unexpected:
            _install(sampler, temperature)
            return CaptureReport(is_cheap=True, has_temperature=True)
        if _has_triton_sampler(sampler):
            _temper_triton(temperature)
            return CaptureReport(is_cheap=True, has_temperature=True)
        return CaptureReport(is_cheap=False, has_temperature=temperature == 1, reason=unexpected)

    def lynearm_capture_as_vllm(self) -> None:
        """Undo `lynearm_capture`."""
        sampler = getattr(self.model_runner, "sampler", None)
        for name in ("compute_logprobs", "gather_logprobs", "gather_specific_token_logprobs"):
            getattr(sampler, "__dict__", {}).pop(name, None)
        _temper_triton(1.0)


class _Rows:
    """The two steps of vLLM's sampler, and the third that also uses what the first returns."""

    def __init__(self, sampler: Untyped, temperature: float) -> None:
        self._temperature = temperature
        self._gather_specific = sampler.gather_specific_token_logprobs
        self._kept: Tensor | None = None

    def compute_logprobs(self, logits_NV: Tensor) -> Tensor:
        """Logits at the temperature, in float32 and out of the reach of sampling, which changes logits in place.

        They are valid until the next call.
        """
        import torch

        kept = self._kept
        if kept is None or kept.shape[1] != logits_NV.shape[1] or kept.device != logits_NV.device:
            kept = None
        if kept is None or kept.shape[0] < logits_NV.shape[0]:
            # Made once for the largest batch: fresh memory costs four times what copying does.
            kept = torch.empty(logits_NV.shape, dtype=torch.float32, device=logits_NV.device)
            self._kept = kept
        return temper(logits_NV, self._temperature, out=kept[: logits_NV.shape[0]])

    def gather_logprobs(self, logprobs: Tensor, num_logprobs: int, token_ids: Tensor) -> Untyped:
        """The token of each row, then the likeliest; named as vLLM names them, though these are logits.

        Ranks are not counted: nobody here reads them.
        """
        import torch
        from vllm.v1.outputs import LogprobsTensors

        values_NK, ids_NK = top_entries(logprobs, num_logprobs)
        normalisers_N1 = log_normalisers(logprobs)
        token_ids_N1 = token_ids.unsqueeze(-1)
        given_N1 = logprobs_at(logprobs, token_ids_N1, normalisers_N1)
        return LogprobsTensors(
            torch.cat((token_ids_N1, ids_NK), dim=1).to(torch.int32),
            torch.cat((given_N1, values_NK - normalisers_N1), dim=1),
            torch.zeros_like(token_ids, dtype=torch.int32),
        )

    def gather_specific_token_logprobs(self, logprobs: Tensor, *arguments: Untyped) -> Untyped:
        """As vLLM's, which expects logprobs."""
        return self._gather_specific(logprobs - log_normalisers(logprobs), *arguments)


def _install(sampler: Untyped, temperature: float) -> None:
    rows = _Rows(sampler, temperature)
    sampler.compute_logprobs = rows.compute_logprobs
    sampler.gather_logprobs = rows.gather_logprobs
    sampler.gather_specific_token_logprobs = rows.gather_specific_token_logprobs


def _sampler_problem(sampler: Untyped) -> str:
    """What about a sampler is not as expected; empty when all is."""
    expected = {
        "compute_logprobs": ["logits"],
        "gather_logprobs": ["logprobs", "num_logprobs", "token_ids"],
        "gather_specific_token_logprobs": ["logprobs", "logprob_token_ids", "sampled"],
    }
    for name, parameters in expected.items():
        method = getattr(sampler, name, None)
        if not callable(method) or list(inspect.signature(method).parameters) != parameters:
            return f"its sampler has no {name}({', '.join(parameters)})"
    if getattr(sampler, "logprobs_mode", None) != "raw_logprobs":
        return "it records processed logprobs"
    fields = ["logprob_token_ids", "logprobs", "selected_token_ranks"]
    from vllm.v1.outputs import LogprobsTensors

    if list(getattr(LogprobsTensors, "_fields", ()))[:3] != fields:
        return f"its rows are not made of {', '.join(fields)}"
    return ""


def _triton_module(name: str) -> Untyped:
    """A module of the newer runner; None where this vLLM has none that looks as expected."""
    import importlib

    try:
        module: Untyped = importlib.import_module(name)
    except ImportError:
        return None
    scores: Untyped = getattr(module, "compute_topk_scores", None)
    if not callable(scores) or list(inspect.signature(scores).parameters)[:1] != ["logits"]:
        return None
    return module


def _has_triton_sampler(sampler: Untyped) -> bool:
    modules = [_triton_module(name) for name in _TRITON_MODULES]
    return all(modules) and type(sampler).__module__ == _TRITON_MODULES[0]


def _temper_triton(temperature: float) -> None:
    for name in _TRITON_MODULES:
        module = _triton_module(name)
        if module is None:
            continue
        original: Callable[..., Untyped] = inspect.unwrap(module.compute_topk_scores)
        module.compute_topk_scores = original if temperature == 1 else _tempered(original, temperature)


def _tempered(original: Callable[..., Untyped], temperature: float) -> Callable[..., Untyped]:
    @functools.wraps(original)
    def compute_topk_scores(logits: Tensor, *arguments: Untyped, **keywords: Untyped) -> Untyped:
        return original(temper(logits, temperature), *arguments, **keywords)

    return compute_topk_scores
