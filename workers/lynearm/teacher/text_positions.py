"""Which token holds which character of a completion, exactly, whatever the tokenizer.

A character of several bytes may be spread over tokens, and a token may hold the end of one thing and the
beginning of the next. Tokenizers say nothing of this for ids that a model wrote, so it is read off the texts
of the completion's beginnings: the text of the first n tokens agrees with the whole text up to what those
tokens hold completely, and what it has beyond that is a character begun.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import takewhile


class TokenPositions:
    """Positions of the characters of one completion; decodes a beginning of it about log2(T) times for each.

    Args:
        token_ids: The completion, T tokens.
        decode: Text of token ids. Must turn bytes that are no character into U+FFFD, keep blanks as they
            are, and write special tokens out.
    """

    def __init__(self, token_ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> None:
        self._ids = tuple(token_ids)
        self._decode = decode
        self._beginnings: dict[int, str] = {}
        self.text = self._beginning(len(self._ids))
        """The whole completion."""

    def first(self, character: int) -> int:
        """Position of the token in which a character begins; T for one past the end of the text."""
        if character <= 0:
            return 0
        before = self.last(character - 1)
        if before >= len(self._ids):
            return before
        return before if len(self._beginning(before + 1)) > character else before + 1

    def last(self, character: int) -> int:
        """Position of the token with which a character is complete; T for one past the end of the text."""
        found = bisect_left(range(len(self._ids)), character + 1, key=lambda token: self._complete(token + 1))
        if character >= len(self.text):
            return found
        # Where bytes are tokens, a run of them is text only as a whole: what one more token completes, the
        # next may take back. So look back to where the text is settled, and the character is not in it.
        token = found
        while token > 0 and not self._is_settled_before(token, character):
            token -= 1
            if self._complete(token + 1) > character:
                found = token
        return found

    def _is_settled_before(self, tokens: int, character: int) -> bool:
        """Whether the first tokens are text that stays as it is, and end before a character."""
        beginning = self._beginning(tokens)
        return len(beginning) <= character and self.text.startswith(beginning)

    def _complete(self, tokens: int) -> int:
        """Characters of the text that the first tokens hold completely."""
        beginning = self._beginning(tokens)
        if self.text.startswith(beginning):
            return len(beginning)
        return sum(
            1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(beginning, self.text, strict=False))
        )

    def _beginning(self, tokens: int) -> str:
        if tokens not in self._beginnings:
            self._beginnings[tokens] = self._decode(self._ids[:tokens])
        return self._beginnings[tokens]
