"""The logprobs of an OpenAI-compatible response, chat or completion, as positions with named tokens.

What vLLM does to them on the way to JSON (`entrypoints/openai/{chat_completion,completion}/serving.py`):

- -inf is written as -9999.
- The sampled token comes first among a position's entries. Where it is none of the k likeliest, a chat
  response has it in place of the k-th, a completion has it besides: k + 1 entries.
- A token is named by its text, or as "token_id:123" on request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lynearm.interchange.json_fields import JsonObject, list_of, number_of, object_of, text_of
from lynearm.interchange.tokens import TokenNames
from lynearm.wire.errors import InvalidInputError
from lynearm.wire.traces import Float32Array, Int32Array, TopK

CLAMPED_LOGPROB = -9999.0
"""What stands for -inf, or for a logprob that the server did not have."""

_EXCESS = 1e-2
"""How far rounding may put the sum of a position's probabilities above 1, as the codec allows."""

ASK_FOR_LOGPROBS = (
    'ask the server for them: "logprobs": true and "top_logprobs": 20 in a chat request, "logprobs": 20 in '
    "another"
)


@dataclass(frozen=True, slots=True)
class Position:
    """A completion position as a response has it."""

    token: str
    """Name of the sampled token."""
    logprob: float
    entries: tuple[tuple[str, float], ...]
    """Names and logprobs, as the response orders them."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What the logprobs of a choice come to."""

    token_ids: Int32Array
    sampled_logprobs: Float32Array
    top_k: TopK


def chat_positions(logprobs: JsonObject) -> list[Position]:
    """Positions of `choices[].logprobs` of a chat completion.

    Raises:
        InvalidInputError: naming the field that is missing or of another type.
    """
    positions: list[Position] = []
    for t, one in enumerate(list_of(logprobs.get("content"), "logprobs.content")):
        name = f"logprobs.content[{t}]"
        item = object_of(one, name)
        entries: list[tuple[str, float]] = []
        for i, entry in enumerate(list_of(item.get("top_logprobs", []), f"{name}.top_logprobs")):
            fields = object_of(entry, f"{name}.top_logprobs[{i}]")
            entries.append(
                (
                    text_of(fields.get("token"), f"{name}.top_logprobs[{i}].token"),
                    number_of(fields.get("logprob"), f"{name}.top_logprobs[{i}].logprob"),
                )
            )
        logprob = number_of(item.get("logprob"), f"{name}.logprob")
        if logprob <= CLAMPED_LOGPROB and not entries:
            raise InvalidInputError(f"{name} has no logprob", ASK_FOR_LOGPROBS)
        positions.append(Position(text_of(item.get("token"), f"{name}.token"), logprob, tuple(entries)))
    return positions


def completion_positions(logprobs: JsonObject) -> list[Position]:
    """Positions of `choices[].logprobs` of a completion.

    Raises:
        InvalidInputError: naming the field that is missing, of another type or another length.
    """
    names = ("tokens", "token_logprobs", "top_logprobs")
    tokens, sampled, rows = (list_of(logprobs.get(name), f"logprobs.{name}") for name in names)
    for name, values in zip(names[1:], (sampled, rows), strict=True):
        if len(values) != len(tokens):
            raise InvalidInputError(
                f"logprobs.{name} has {len(values)} positions, logprobs.tokens {len(tokens)}"
            )
    positions: list[Position] = []
    for t, (token, logprob, row) in enumerate(zip(tokens, sampled, rows, strict=True)):
        if logprob is None:
            raise InvalidInputError(
                f"logprobs.token_logprobs[{t}] is null, as where the prompt is echoed",
                'ask the server without "echo"',
            )
        entries = object_of(row if row is not None else {}, f"logprobs.top_logprobs[{t}]")
        positions.append(
            Position(
                text_of(token, f"logprobs.tokens[{t}]"),
                number_of(logprob, f"logprobs.token_logprobs[{t}]"),
                tuple(
                    (name, number_of(value, f"logprobs.top_logprobs[{t}][{name!r}]"))
                    for name, value in entries.items()
                ),
            )
        )
    return positions


def kept_entries(position: Position) -> int:
    """How many entries were asked for, as far as one position tells: not counting a sampled token besides."""
    beside = (
        len(position.entries) > 1
        and position.entries[0][0] == position.token
        and position.logprob < min(value for _, value in position.entries[1:])
    )
    return len(position.entries) - beside


def read_completion(
    positions: Sequence[Position],
    token_ids: Sequence[int] | None,
    names: TokenNames,
    *,
    top_k: int,
    cut: bool,
) -> Completion:
    """Ids, and rows that are sorted and padded.

    Args:
        positions: Of one choice.
        token_ids: The completion, where the response says it; None takes the names of the sampled tokens.
        names: Finds ids.
        top_k: Entries kept per position. A sampled token besides them is left out of the row.
        cut: Whether more entries than that are cut to the likeliest; else they are an error.

    Raises:
        InvalidInputError: if a name has no id, lengths differ, or a row is no distribution.
    """
    if token_ids is not None and len(token_ids) != len(positions):
        raise InvalidInputError(f"token_ids has {len(token_ids)} tokens, logprobs {len(positions)} positions")
    sampled: list[int] = []
    rows: list[tuple[list[int], list[float]]] = []
    for t, position in enumerate(positions):
        before = sampled[-1] if sampled else None
        try:
            sampled.append(
                _sampled_id(position, token_ids[t] if token_ids is not None else None, names, before)
            )
            row = _sorted_row(position, names, before)
            rows.append(_bounded_row(*row, sampled[-1], top_k=top_k, cut=cut))
        except InvalidInputError as error:
            raise InvalidInputError(f"position {t}: {error.message}", error.remedy) from error
    return Completion(
        np.asarray(sampled, np.int32),
        np.asarray([_unclamped(position.logprob) for position in positions], np.float32),
        _padded(rows),
    )


def _sampled_id(position: Position, known: int | None, names: TokenNames, before: int | None) -> int:
    if known is None:
        return names.token_id(position.token, before)
    if position.token.startswith("token_id:") and names.token_id(position.token, before) != known:
        raise InvalidInputError(f"token_ids says {known}, logprobs {position.token}")
    return known


def _sorted_row(position: Position, names: TokenNames, before: int | None) -> tuple[list[int], list[float]]:
    """Ids and logprobs, likeliest first, without those of no probability."""
    entries = [(name, _unclamped(value)) for name, value in position.entries]
    possible = sorted((entry for entry in entries if entry[1] > -np.inf), key=lambda entry: -entry[1])
    ids = [names.token_id(name, before) for name, _ in possible]
    if len(set(ids)) != len(ids):
        raise InvalidInputError(f"a token is there twice among {', '.join(name for name, _ in possible)}")
    return ids, [value for _, value in possible]


def _bounded_row(
    ids: list[int], logprobs: list[float], sampled: int, *, top_k: int, cut: bool
) -> tuple[list[int], list[float]]:
    beside = len(ids) == top_k + 1 and ids[-1] == sampled  # its logprob is kept as the sampled one's
    if len(ids) > top_k and not cut and not beside:
        raise InvalidInputError(
            f"{len(ids)} entries, and the stream keeps {top_k}",
            f"give --top-k {len(ids)} to keep all in a new stream, or --top-k {top_k} to keep the likeliest",
        )
    return ids[:top_k], logprobs[:top_k]


def _padded(rows: Sequence[tuple[list[int], list[float]]]) -> TopK:
    width = max((len(ids) for ids, _ in rows), default=0)
    token_ids_TK = np.zeros((len(rows), width), np.int32)
    logprobs_TK = np.full((len(rows), width), -np.inf, np.float32)
    for t, (ids, logprobs) in enumerate(rows):
        token_ids_TK[t, : len(ids)] = ids
        logprobs_TK[t, : len(ids)] = logprobs
    mass_T = np.exp(logprobs_TK.astype(np.float64)).sum(axis=1)
    if mass_T.size and mass_T.max() > 1 + _EXCESS:
        raise InvalidInputError(
            f"position {int(mass_T.argmax())}: the probabilities add up to {mass_T.max():.3f}",
            "the server must return logprobs, and not logits: see vLLM's --logprobs-mode",
        )
    tail_mass_T = np.clip(1.0 - mass_T, 0.0, 1.0).astype(np.float32)
    return TopK(token_ids_TK, logprobs_TK, tail_mass_T)


def _unclamped(logprob: float) -> float:
    return -np.inf if logprob <= CLAMPED_LOGPROB else logprob
