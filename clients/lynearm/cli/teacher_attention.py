"""`lynearm teacher attention`: where a teacher looks while it reads a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lynearm.cli.failures import reported
from lynearm.cli.options import Debug


@reported()
def attention(
    model: Annotated[str, typer.Option(help="Directory in the transformers layout, or a model's name.")],
    prompt: Annotated[str, typer.Option(help="Text to look at; a completion may be part of it.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="A page (.html), or arrays (.npz).")] = Path(
        "attention.html"
    ),
    chat: Annotated[
        bool, typer.Option("--chat/--no-chat", help="Put the prompt through the chat template.")
    ] = True,
    max_tokens: Annotated[int, typer.Option(min=1, max=1024, help="Refuse a longer prompt.")] = 256,
    debug: Debug = False,
) -> None:
    """Write the attention maps of all heads of a prompt, for inspection.

    Through transformers and its eager attention, since vLLM keeps no attention weights.
    """
    from lynearm.teacher.attention_maps import compute_attention, write_attention

    maps = compute_attention(model, prompt, chat=chat, max_tokens=max_tokens)
    write_attention(maps, out)
    layers, heads, tokens, _ = maps.weights.shape
    typer.echo(f"{out}: {layers} layers of {heads} heads over {tokens} tokens", err=True)
