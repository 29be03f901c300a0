"""A prompt as the bytes that the prompt queue keeps for it: a line of a prompt file, without id.

Where a prompt came from is left out, so that a job is the same wherever its file lies, and so are defaults.
The same prompts always give the same bytes: the queue recognises a job by their digest.
"""

from __future__ import annotations

import json
from dataclasses import replace

from lynearm.teacher.prompts import Prompt, parse_prompt
from lynearm.wire.errors import PromptFileError
from lynearm.wire.work import JobPrompt

MAX_CONTENT_BYTES = 1 << 20
"""What the queue keeps of one prompt at most."""


def encode_prompt(prompt: Prompt) -> JobPrompt:
    """A prompt as the queue takes it.

    Raises:
        PromptFileError: if it is larger than the queue takes.
    """
    fields: dict[str, object] = {}
    if prompt.messages:
        fields["messages"] = [
            {"role": message.role, "content": message.content} for message in prompt.messages
        ]
    else:
        fields["prompt"] = prompt.text
    if prompt.tags:
        fields["tags"] = dict(prompt.tags)
    content = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
    if len(content) > MAX_CONTENT_BYTES:
        raise PromptFileError(
            f"prompt {prompt.prompt_id!r} takes {len(content)} bytes, expected at most {MAX_CONTENT_BYTES}",
            "shorten it",
        )
    return JobPrompt(prompt.prompt_id, content)


def decode_prompt(prompt_id: str, content: bytes) -> Prompt:
    """The prompt that `encode_prompt` was given, or that another program wrote into a job as such a line.

    Raises:
        PromptFileError: if the content is no prompt.
    """
    return replace(parse_prompt(content), prompt_id=prompt_id)
