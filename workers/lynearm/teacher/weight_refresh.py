"""Other weights for a loaded model, in place: what a student that is being trained needs for its rollouts.

vLLM reloads a checkpoint's tensors layer by layer. Where the output head is tied to the embedding, the
checkpoint has no head of its own, and on a CPU vLLM 0.32 leaves the head at the weights that it was loaded
with: its matrix product works on a copy that was packed then. The head is tied, and packed, again. Nothing
shows whether all of it worked but the distributions: whoever refreshes compares them (`rollouts.probe`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from lynearm.wire.errors import PreconditionError, TeacherError

Untyped: TypeAlias = Any
"""An object of vLLM or torch, which ship no types that a strict checker accepts."""


class RefreshWorker:
    """Base class of `WorkerExtension`: weights in place."""

    # vLLM's own, in the class that this one is mixed into.
    model_runner: Untyped
    reload_weights: Callable[..., None]

    def lynearm_refresh(self, directory: str) -> None:
        """Take the weights of a checkpoint."""
        self.reload_weights(weights_path=directory)
        retie_heads(self.model_runner.get_model())


def retie_heads(model: Untyped) -> None:
    """Give a head that is tied the embedding's weights, as they are now.

    Args:
        model: vLLM's module.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    if not getattr(model.config, "tie_word_embeddings", False):
        return
    layers: list[Untyped] = [one for one in model.modules() if isinstance(one, VocabParallelEmbedding)]
    embeddings = [one for one in layers if not isinstance(one, ParallelLMHead)]
    for head in (one for one in layers if isinstance(one, ParallelLMHead)):
        head.weight = embeddings[0].weight
        head.quant_method.process_weights_after_loading(head)


def refresh_weights(engine: Untyped, directory: Path) -> None:
    """Give an engine the weights of another checkpoint of the same model.

    Args:
        engine: vLLM's, without requests: a completion is drawn by one student.
        directory: Of the checkpoint, in the transformers layout.

    Raises:
        PreconditionError: if requests are unfinished.
        TeacherError: if vLLM cannot load it; its weights are then neither the old nor the new ones.
    """
    if engine.has_unfinished_requests():
        raise PreconditionError(
            "weights cannot change under unfinished requests", "refresh between the requests, or abort them"
        )
    try:
        engine.collective_rpc("lynearm_refresh", args=(str(directory),))
    # Whatever vLLM, safetensors or torch raise: all of it says that the weights are not usable.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0][:300] or type(error).__name__
        raise TeacherError(f"vLLM cannot take the weights in {directory}: {reason}") from error
    # Keys and values of earlier weights are no prefix of anything now.
    if not engine.reset_prefix_cache():
        raise TeacherError("vLLM does not let go of the prefixes that earlier weights have computed")
