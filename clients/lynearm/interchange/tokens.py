"""Token ids out of what a server calls tokens: `token_id:123`, or text that a tokenizer has to explain.

A text stands for an id only where no other id could have been written like that. vLLM decodes each token
alone, so that parts of a character become nothing, or borrow the bytes of the token before; versions and
tokenizers differ in whether a leading space is kept. All that is ambiguous, and refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property

from lynearm.interchange.teacher_files import Untyped
from lynearm.wire.errors import InvalidInputError
from lynearm.wire.specs import MAX_VOCAB_SIZE

_PLACEHOLDER = re.compile(r"token_id:(\d{1,10})")
_REPLACEMENT = "\ufffd"
"""What a decoder writes for bytes that are no character."""
_SPACE_MARKER = "▁"
"""What SentencePiece writes for a space; decoders drop it at the beginning of a text."""

_ASK_FOR_IDS = 'ask the server for ids: "return_tokens_as_token_ids": true in the request'


class TokenNames:
    """Finds the id of a token by the name that a server gives it.

    Args:
        tokenizer: Of transformers; None where names are placeholders only.
    """

    def __init__(self, tokenizer: Untyped | None) -> None:
        self._tokenizer = tokenizer

    def token_id(self, name: str, before: int | None) -> int:
        """The id of a token.

        Args:
            name: A placeholder, or text.
            before: Id of the completion's token before this position; None at its beginning.

        Raises:
            InvalidInputError: if no id, or not exactly one, has that name.
        """
        placeholder = _PLACEHOLDER.fullmatch(name)
        if placeholder is not None and int(placeholder[1]) < MAX_VOCAB_SIZE:
            return int(placeholder[1])
        if self._tokenizer is None:
            raise InvalidInputError(
                f"token {name!r} is a text, and no tokenizer was named",
                f"{_ASK_FOR_IDS}, or give --tokenizer",
            )
        if not name:
            raise InvalidInputError("a token has no text, as parts of a character have none", _ASK_FOR_IDS)
        ids = self._ids_by_text.get(name, ())
        if len(ids) != 1:
            found = f"{len(ids)} tokens ({', '.join(map(str, ids[:4]))})" if ids else "no token"
            raise InvalidInputError(f"token {name!r} is the text of {found} of the tokenizer", _ASK_FOR_IDS)
        if before is not None and not name.isascii() and self._is_partial(before):
            raise InvalidInputError(
                f"token {name!r} may be the rest of a character that the token before it began", _ASK_FOR_IDS
            )
        return ids[0]

    def text(self, token_ids: Sequence[int], end_token_ids: Sequence[int]) -> str | None:
        """A completion as text, with special tokens but a final end token; None without a tokenizer."""
        if self._tokenizer is None:
            return None
        ids = list(token_ids)
        if ids and ids[-1] in end_token_ids:
            ids.pop()
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))

    def encode(self, text: str) -> list[int] | None:
        """Ids of a rendered prompt, which has its special tokens already; None without a tokenizer."""
        if self._tokenizer is None:
            return None
        return [int(token_id) for token_id in self._tokenizer.encode(text, add_special_tokens=False)]

    def _is_partial(self, token_id: int) -> bool:
        return self._decode(token_id).endswith(_REPLACEMENT)

    def _decode(self, token_id: int) -> str:
        assert self._tokenizer is not None
        return str(self._tokenizer.decode([token_id]))

    @cached_property
    def _ids_by_text(self) -> dict[str, tuple[int, ...]]:
        """Which ids a text may stand for, in any version of vLLM; a second or two for a large vocabulary."""
        assert self._tokenizer is not None
        found: dict[str, tuple[int, ...]] = {}
        pieces: list[str] = self._tokenizer.convert_ids_to_tokens(list(range(len(self._tokenizer))))
        for token_id, piece in enumerate(pieces):
            text = self._decode(token_id)
            if text.endswith(_REPLACEMENT):
                continue
            spaces = len(piece or "") - len((piece or "").lstrip(_SPACE_MARKER))
            for one in {text, " " * spaces + text.lstrip(" ") if spaces else text}:
                found[one] = (*found.get(one, ()), token_id)
        found.pop("", None)
        return found
