"""Lets an exported MLX package speak, with nothing but stock mlx_lm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from lynearm.wire.errors import MissingDependencyError

REPETITION_PENALTY = 1.1
"""Without one, small models that decode greedily fall into loops, teachers of this size too."""

_PENALISED_TOKENS = 64


def generate_texts_mlx(
    package: Path,
    prompts: Sequence[str],
    *,
    max_tokens: int = 128,
    repetition_penalty: float = REPETITION_PENALTY,
) -> list[str]:
    """What a package answers to user messages, each in a conversation of its own, greedily.

    Args:
        package: Directory that `export_mlx` wrote, or any other that `mlx_lm.load` reads.
        prompts: The user's messages; the package's chat template is applied where it has one.
        max_tokens: Bound on each answer.
        repetition_penalty: What divides the logits of recent tokens (Keskar et al., arXiv 1909.05858, section
            4.1); 1 changes nothing.

    Raises:
        MissingDependencyError: if mlx_lm is not installed.
    """
    try:
        import mlx_lm
        from mlx_lm.sample_utils import make_logits_processors
    except ImportError as error:
        raise MissingDependencyError("mlx_lm is not installed", "pip install 'lynearm[mlx]'") from error
    from lynearm.export.mlx_run import load_package

    untyped = cast(Any, mlx_lm)  # it ships no types
    model, tokenizer = load_package(package)
    processors = make_logits_processors(
        repetition_penalty=repetition_penalty, repetition_context_size=_PENALISED_TOKENS
    )
    answers: list[str] = []
    for prompt in prompts:
        if tokenizer.chat_template:
            message = {"role": "user", "content": prompt}
            tokens = tokenizer.apply_chat_template([message], add_generation_prompt=True)
        else:
            tokens = tokenizer.encode(prompt)
        answer = untyped.generate(
            model, tokenizer, prompt=tokens, max_tokens=max_tokens, logits_processors=processors
        )
        answers.append(str(answer).strip())
    return answers
