"""Lets an exported MLX package speak, with nothing but stock mlx_lm."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from lynearm.wire.errors import MissingDependencyError


def generate_text_mlx(package: Path, prompt: str, *, max_tokens: int = 128) -> str:
    """What a package answers to one user message, greedily.

    Args:
        package: Directory that `export_mlx` wrote, or any other that `mlx_lm.load` reads.
        prompt: The user's message; the package's chat template is applied where it has one.
        max_tokens: Bound on the answer.

    Raises:
        MissingDependencyError: if mlx_lm is not installed.
    """
    try:
        import mlx_lm
    except ImportError as error:
        raise MissingDependencyError("mlx_lm is not installed", "pip install 'lynearm[mlx]'") from error
    from lynearm.export.mlx_run import load_package

    untyped = cast(Any, mlx_lm)  # it ships no types
    model, tokenizer = load_package(package)
    if tokenizer.chat_template:
        tokens = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True
        )
    else:
        tokens = tokenizer.encode(prompt)
    return str(untyped.generate(model, tokenizer, prompt=tokens, max_tokens=max_tokens)).strip()
