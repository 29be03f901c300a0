"""Arrow columns to traces: checks types, nulls and lengths, and puts the padding back.

Shape legend: T = completion positions, K = entries kept per position, D = draws from the tail of each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import numpy.typing as npt

from lynearm.interchange.arrow import REQUIRED_COLUMNS, Untyped
from lynearm.wire.errors import CodecError, InvalidInputError
from lynearm.wire.specs import MAX_TOP_K
from lynearm.wire.traces import FINISH_REASONS, SPAN_KINDS, SamplingParams, TokenSpan, TopK, Trace


class RowError(Exception):
    """What is wrong with a row of a batch; whoever knows the file makes a typed error of it.

    Args:
        row: From 0 in the batch; None where only the batch is known.
        message: As in `LynearmError`.
        remedy: As in `LynearmError`.
    """

    def __init__(self, row: int | None, message: str, remedy: str = "") -> None:
        super().__init__(row, message, remedy)
        self.row = row
        self.message = message
        self.remedy = remedy


@dataclass(frozen=True, slots=True)
class _Lists:
    """A column of lists: row r has `values[ends[r - 1]:ends[r]]`."""

    offsets: npt.NDArray[np.int64]
    values: npt.NDArray[np.generic]

    def row(self, index: int) -> npt.NDArray[np.generic]:
        return self.values[self.offsets[index] : self.offsets[index + 1]]


def check_columns(pa: Untyped, found: Untyped, wanted: Untyped, where: str) -> None:
    """Refuse a schema that lacks columns, or has some of another kind.

    Integers may have any width, and so may floats, strings and lists: what pandas, polars and datasets write
    back is taken.

    Args:
        pa: The module pyarrow.
        found: Schema of a file.
        wanted: As `lynearm.interchange.arrow.trace_schema` makes it.
        where: The file, for messages.

    Raises:
        InvalidInputError: naming the columns.
    """
    missing = [name for name in REQUIRED_COLUMNS if name not in found.names]
    if missing:
        raise InvalidInputError(
            f"{where} has no column {', '.join(missing)}; it has {', '.join(found.names) or 'none'}",
            "docs/interchange.md lists the columns of a trace",
        )
    for field in wanted:
        if field.name not in found.names:
            continue
        if found.names.count(field.name) > 1:
            raise InvalidInputError(f"{where} has column {field.name} twice")
        kind = found.field(field.name).type
        if not _is_like(pa, kind, field.type):
            raise InvalidInputError(
                f"{where}: column {field.name} is {kind}, expected {field.type}",
                "docs/interchange.md lists the columns of a trace",
            )


def batch_to_traces(pa: Untyped, batch: Untyped, schema: Untyped) -> Iterator[Trace]:
    """The trace of each row, in order.

    Args:
        pa: The module pyarrow.
        batch: A record batch whose schema `check_columns` accepted.
        schema: As `lynearm.interchange.arrow.trace_schema` makes it.

    Raises:
        RowError: saying what is wrong with which row.
    """
    columns: dict[str, Untyped] = {
        field.name: _converted(pa, batch.column(field.name), field)
        for field in schema
        if field.name in batch.schema.names
    }
    lists = {
        name: _lists(columns[name], name)
        for name in ("prompt_token_ids", "completion_token_ids", "sampled_logprobs", "tail_mass")
    }
    entries = {name: _nested(columns[name], name) for name in ("top_k_token_ids", "top_k_logprobs")}
    draws = _nested(columns["tail_draws"], "tail_draws") if "tail_draws" in columns else None
    rows = _plain_rows(columns, batch.num_rows)
    for index, row in enumerate(rows):
        try:
            trace = _trace(row, {name: column.row(index) for name, column in lists.items()}, entries, index)
            yield trace if draws is None else _with_tail_draws(trace, *draws, index)
        except (InvalidInputError, CodecError) as error:
            raise RowError(index, error.message, error.remedy) from error


def _trace(
    row: Mapping[str, Untyped],
    lists: Mapping[str, npt.NDArray[np.generic]],
    entries: Mapping[str, tuple[_Lists, _Lists]],
    index: int,
) -> Trace:
    positions = lists["completion_token_ids"].size
    if row["finish_reason"] not in FINISH_REASONS:
        raise InvalidInputError(
            f"finish_reason is {row['finish_reason']!r}, expected {', '.join(FINISH_REASONS)}"
        )
    for name in ("sampled_logprobs", "tail_mass"):
        _check_length(name, lists[name].size, positions)
    return Trace(
        prompt_id=row["prompt_id"],
        prompt_token_ids=cast("npt.NDArray[np.int32]", lists["prompt_token_ids"]),
        completion_token_ids=cast("npt.NDArray[np.int32]", lists["completion_token_ids"]),
        sampled_logprobs=cast("npt.NDArray[np.float32]", lists["sampled_logprobs"]),
        top_k=_top_k(row.get("top_k"), entries, index, lists["tail_mass"]),
        finish_reason=row["finish_reason"],
        sample_index=row["sample_index"] or 0,
        spans=_spans(row["spans"] or ()),
        sampling=_sampling(row["sampling"]),
        tags=_tags(row["tags"] or ()),
        completion_text=row["completion_text"] or "",
        stop_string=row["stop_string"] or "",
    )


def _top_k(
    width: int | None,
    entries: Mapping[str, tuple[_Lists, _Lists]],
    index: int,
    tail_mass: npt.NDArray[np.generic],
) -> TopK:
    """The padded rows of one trace; K is `width`, or the longest list where that is not said."""
    counts = {name: np.diff(_row_offsets(outer, inner, index)) for name, (outer, inner) in entries.items()}
    ids_T, logprobs_T = counts["top_k_token_ids"], counts["top_k_logprobs"]
    for name, count_T in counts.items():
        _check_length(name, count_T.size, tail_mass.size)
    if (ids_T != logprobs_T).any():
        at = int(np.flatnonzero(ids_T != logprobs_T)[0])
        raise InvalidInputError(
            f"position {at} has {ids_T[at]} ids in top_k_token_ids and {logprobs_T[at]} in top_k_logprobs"
        )
    longest = int(ids_T.max(initial=0))
    k = longest if width is None else width
    if not longest <= k <= MAX_TOP_K:
        raise InvalidInputError(
            f"top_k is {k}, and a position has {longest} entries; at most {MAX_TOP_K} fit"
        )
    kept_TK = np.arange(k) < ids_T[:, None]
    token_ids_TK = np.zeros(kept_TK.shape, np.int32)
    logprobs_TK = np.full(kept_TK.shape, -np.inf, np.float32)
    for padded, name in ((token_ids_TK, "top_k_token_ids"), (logprobs_TK, "top_k_logprobs")):
        offsets = _row_offsets(*entries[name], index)
        padded[kept_TK] = entries[name][1].values[offsets[0] : offsets[-1]]
    return TopK(token_ids_TK, logprobs_TK, cast("npt.NDArray[np.float32]", tail_mass))


def _with_tail_draws(trace: Trace, outer: _Lists, inner: _Lists, index: int) -> Trace:
    """The trace with what was drawn from its tails; unchanged where its lists are empty."""
    offsets = _row_offsets(outer, inner, index)
    count_T = np.diff(offsets)
    _check_length("tail_draws", count_T.size, trace.completion_token_ids.size)
    draws = int(count_T.max(initial=0))
    if (count_T != draws).any():
        raise InvalidInputError(
            f"tail_draws has positions of {count_T.min()} and of {draws} draws",
            "give every position as many, -1 where nothing was drawn",
        )
    if draws == 0:
        return trace
    draws_TD = inner.values[offsets[0] : offsets[-1]].reshape(-1, draws).astype(np.int32)
    return replace(trace, top_k=replace(trace.top_k, tail_draws=draws_TD))


def _row_offsets(outer: _Lists, inner: _Lists, index: int) -> npt.NDArray[np.int64]:
    """Bounds of the inner lists of a row; always at least one."""
    return inner.offsets[outer.offsets[index] : outer.offsets[index + 1] + 1]


def _check_length(name: str, found: int, expected: int) -> None:
    if found != expected:
        raise InvalidInputError(f"{name} has {found} positions, completion_token_ids {expected}")


def _spans(spans: Sequence[Mapping[str, Untyped] | None]) -> tuple[TokenSpan, ...]:
    found: list[TokenSpan] = []
    for span in spans:
        if span is None or span["kind"] not in SPAN_KINDS or span["start"] is None or span["end"] is None:
            raise InvalidInputError(
                f"span {span} is none: expected kind ({', '.join(SPAN_KINDS)}), start, end"
            )
        found.append(TokenSpan(span["kind"], span["start"], span["end"]))
    return tuple(found)


def _sampling(values: Mapping[str, Untyped] | None) -> SamplingParams:
    given: dict[str, Untyped] = {name: value for name, value in (values or {}).items() if value is not None}
    for name in ("stop", "stop_token_ids"):
        if name in given:
            given[name] = tuple(given[name])
    return SamplingParams(**given)


def _tags(tags: Sequence[Mapping[str, str | None] | None]) -> dict[str, str]:
    found: dict[str, str] = {}
    for tag in tags:
        key, value = (tag or {}).get("key"), (tag or {}).get("value")
        if key is None or value is None or key in found:
            raise InvalidInputError(f"tag {tag} is incomplete or there twice")
        found[key] = value
    return found


def _plain_rows(columns: Mapping[str, Untyped], count: int) -> Iterator[dict[str, Untyped]]:
    """Everything but the arrays, as Python's own values."""
    names = (
        *("prompt_id", "finish_reason"),
        *("sample_index", "top_k", "completion_text", "spans", "sampling", "tags"),
        "stop_string",
    )
    values = {name: columns[name].to_pylist() if name in columns else [None] * count for name in names}
    for index in range(count):
        row = {name: column[index] for name, column in values.items()}
        if row["prompt_id"] is None:
            raise RowError(index, "prompt_id is null")
        yield row


def _lists(column: Untyped, name: str) -> _Lists:
    _refuse_nulls(column, name)
    values = column.flatten()
    _refuse_nulls(values, name)
    return _Lists(_offsets_of(column), values.to_numpy(zero_copy_only=False))


def _nested(column: Untyped, name: str) -> tuple[_Lists, _Lists]:
    _refuse_nulls(column, name)
    inner = column.flatten()
    values = _lists(inner, name)
    return _Lists(_offsets_of(column), values.values), values


def _offsets_of(column: Untyped) -> npt.NDArray[np.int64]:
    offsets = column.offsets.to_numpy().astype(np.int64)
    return cast("npt.NDArray[np.int64]", offsets - offsets[0])


def _refuse_nulls(column: Untyped, name: str) -> None:
    if column.null_count:
        raise RowError(None, f"{name} holds {column.null_count} nulls", "give every position a value")


def _converted(pa: Untyped, column: Untyped, field: Untyped) -> Untyped:
    """The column in the type of the schema; `RowError` if a value does not fit it."""
    if column.type == field.type:
        return column
    try:
        return column.cast(field.type)
    except pa.ArrowException as error:
        raise RowError(None, f"column {field.name}: {error}") from error


def _is_like(pa: Untyped, found: Untyped, wanted: Untyped) -> bool:
    """Whether a cast keeps what values mean: pyarrow itself would read numbers out of strings."""
    types = pa.types
    if types.is_null(found):
        return True
    if types.is_dictionary(found):
        return _is_like(pa, found.value_type, wanted)
    if types.is_list(wanted):
        listed = any(
            is_list(found)
            for is_list in (
                types.is_list,
                types.is_large_list,
                types.is_list_view,
                types.is_large_list_view,
                types.is_fixed_size_list,
            )
        )
        return listed and _is_like(pa, found.value_type, wanted.value_type)
    if types.is_struct(wanted):
        # Of a struct, too, fields may be missing: those of `sampling` have defaults.
        if not types.is_struct(found):
            return False
        shared = [field for field in wanted if found.get_field_index(field.name) >= 0]
        return bool(shared) and all(
            _is_like(pa, found.field(field.name).type, field.type) for field in shared
        )
    if types.is_string(wanted):
        return bool(types.is_string(found) or types.is_large_string(found) or types.is_string_view(found))
    if types.is_integer(wanted):
        # pandas makes floats of integers beside nulls; the cast refuses fractions.
        return bool(types.is_integer(found) or types.is_floating(found))
    return bool(types.is_floating(found))
