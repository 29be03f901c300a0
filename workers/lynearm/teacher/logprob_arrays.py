"""Logprobs out of vLLM as arrays, without a Python object per candidate.

vLLM collects the logprobs of a request in lists, number by number. `collect_as_arrays` makes it keep the
rows of each step as the arrays that they are: at batch 64 and k = 64 that saves 4 ms of CPU a step over
vLLM's flat lists, and 46 ms over its dictionaries. It replaces one private method, and only where that
looks as expected; elsewhere the flat lists are read, with the same result.

Shape legend: T = completion positions, K = kept entries. A row has K + 1 columns: the sampled token, then the
top K, descending.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt

from lynearm.teacher.vllm_internals import say_slower, version_problem
from lynearm.wire.errors import TeacherError
from lynearm.wire.traces import Float32Array, Int32Array, TopK

Untyped: TypeAlias = Any
"""An object of vLLM, which ships no types that a strict checker accepts."""


RowArrays: TypeAlias = "tuple[npt.NDArray[np.generic], npt.NDArray[np.generic]]"
ReduceRows: TypeAlias = "Callable[[npt.NDArray[np.generic], npt.NDArray[np.generic]], RowArrays]"
"""Token ids and logprobs of some rows to those that are kept."""


class LogprobRows:
    """The rows of one request, as arrays; takes the place of vLLM's list container."""

    __slots__ = ("logprobs", "token_ids")

    rows_seen: ClassVar[int] = 0
    """Rows collected in this process: the tokens generated so far, those of unfinished requests included."""

    reduce: ClassVar[ReduceRows | None] = None
    """What becomes of rows as they come, so that whole distributions need not be kept; None keeps them."""

    def __init__(self) -> None:
        self.token_ids: list[npt.NDArray[np.generic]] = []
        self.logprobs: list[npt.NDArray[np.generic]] = []

    def __len__(self) -> int:
        """Positions, T."""
        return sum(rows.shape[0] for rows in self.token_ids)

    def append(self, token_ids: npt.NDArray[np.generic], logprobs: npt.NDArray[np.generic]) -> None:
        """Copy rows in, shape [rows, K + 1] each: the originals are views of a whole batch."""
        reduce = LogprobRows.reduce
        if reduce is not None:
            token_ids, logprobs = reduce(token_ids, logprobs)
        self.token_ids.append(np.array(token_ids))
        self.logprobs.append(np.array(logprobs))
        LogprobRows.rows_seen += token_ids.shape[0]


def collect_as_arrays(reduce: ReduceRows | None = None) -> Callable[[], None] | None:
    """Make vLLM keep logprobs as `LogprobRows`, for the whole process.

    Args:
        reduce: Applied to rows as they come, shape [rows, columns] each, the sampled token first.

    Returns:
        What undoes it; None when this vLLM does not look as expected, and nothing was changed.
    """
    from vllm.logprobs import FlatLogprobs
    from vllm.v1.engine.logprobs import LogprobsProcessor

    problem = version_problem() or _processor_problem()
    if problem:
        say_slower(problem)
        return None
    processor: Untyped = LogprobsProcessor
    original: Untyped = processor._update_sample_logprobs

    def update(self: Untyped, logprobs_lists: Untyped) -> None:
        rows = self.logprobs
        if not isinstance(rows, LogprobRows):
            if not isinstance(rows, FlatLogprobs) or len(rows) or self.tokenizer is not None:
                # A request that wants vLLM's own containers, or one that has begun in them.
                original(self, logprobs_lists)
                return
            if not _are_rows(logprobs_lists[0], logprobs_lists[1], self.num_logprobs):
                say_slower("its logprobs come in unknown shapes")
                original(self, logprobs_lists)
                return
            rows = self.logprobs = LogprobRows()
        columns = self.num_logprobs + 1
        token_ids, logprobs = logprobs_lists[0], logprobs_lists[1]
        rows.append(token_ids[:, :columns], logprobs[:, :columns])
        self.cumulative_logprob += float(logprobs[0, 0] if len(logprobs) == 1 else logprobs[:, 0].sum())

    def restore() -> None:
        LogprobRows.reduce = None
        processor._update_sample_logprobs = original

    LogprobRows.reduce = reduce
    processor._update_sample_logprobs = update
    return restore


def top_k_from_rows(
    container: Untyped, completion_token_ids: Sequence[int], k: int, *, tail_draws: int = 0
) -> tuple[Float32Array, TopK]:
    """What vLLM collected for a completion, as the arrays of a trace.

    Args:
        container: `LogprobRows`, or vLLM's FlatLogprobs.
        completion_token_ids: The T tokens of the completion.
        k: Entries asked for.
        tail_draws: Draws from the tail that come behind them; one at −inf is none.

    Returns:
        The sampled tokens' logprobs, shape [T], and the top K. The tail mass is 1 less the kept mass,
        summed in float64 and clamped to [0, 1]: float32 log-softmax leaves sums of up to 1 + 1.2e-4.

    Raises:
        TeacherError: if rows are missing, malformed, or not about the completion's tokens.
    """
    positions = len(completion_token_ids)
    ids, logprobs = rows_of(container, positions, k + tail_draws)
    if not np.array_equal(ids[:, 0], np.asarray(completion_token_ids, np.int32)):
        raise TeacherError("vLLM returned logprobs for other tokens than it generated")
    # Compared, not subtracted: −inf − −inf is NaN.
    kept_ids, kept = np.ascontiguousarray(ids[:, 1 : k + 1]), np.ascontiguousarray(logprobs[:, 1 : k + 1])
    if np.isnan(logprobs).any() or (k > 1 and bool((kept[:, 1:] > kept[:, :-1]).any())):
        raise TeacherError("vLLM returned logprobs that are NaN or not in descending order")
    kept_mass = np.exp(kept.astype(np.float64)).sum(axis=1)
    tail_mass = np.clip(1.0 - kept_mass, 0.0, 1.0).astype(np.float32)
    drawn = np.where(logprobs[:, k + 1 :] > -np.inf, ids[:, k + 1 :], np.int32(-1)) if tail_draws else None
    top_k = TopK(kept_ids, kept, tail_mass, drawn)
    return np.ascontiguousarray(logprobs[:, 0]), top_k


def rows_of(container: Untyped, positions: int, k: int) -> tuple[Int32Array, Float32Array]:
    """What vLLM collected for a completion: the sampled token, then k others, in each row.

    Raises:
        TeacherError: if there are not that many.
    """
    shape = (positions, k + 1)
    if positions == 0:
        return np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    if isinstance(container, LogprobRows):
        ids = np.concatenate(container.token_ids, dtype=np.int32, casting="same_kind")
        logprobs = np.concatenate(container.logprobs, dtype=np.float32, casting="same_kind")
    else:
        ids = np.asarray(container.token_ids, np.int32)
        logprobs = np.asarray(container.logprobs, np.float32)
    if ids.size != positions * (k + 1) or logprobs.size != ids.size:
        raise TeacherError(f"vLLM returned {ids.size} logprobs for {positions} tokens, expected {k + 1} each")
    return ids.reshape(shape), logprobs.reshape(shape)


def _processor_problem() -> str:
    """What about vLLM's collecting is not as expected; empty when all is."""
    from vllm.v1.engine.logprobs import LogprobsProcessor
    from vllm.v1.outputs import LogprobsLists

    original: Untyped = getattr(LogprobsProcessor, "_update_sample_logprobs", None)
    if not callable(original) or list(inspect.signature(original).parameters) != ["self", "logprobs_lists"]:
        return "it collects logprobs in an unknown way"
    needed = {"logprobs", "num_logprobs", "cumulative_logprob", "tokenizer"}
    missing = needed - set(getattr(LogprobsProcessor, "__dataclass_fields__", {}))
    if missing:
        return f"its collector of logprobs has no {', '.join(sorted(missing))}"
    if tuple(getattr(LogprobsLists, "_fields", ()))[:2] != ("logprob_token_ids", "logprobs"):
        return "its logprobs have other names"
    return ""


def _are_rows(token_ids: Untyped, logprobs: Untyped, k: int) -> bool:
    shapes: list[tuple[int, ...]] = [getattr(array, "shape", ()) for array in (token_ids, logprobs)]
    return k >= 0 and len(shapes[0]) == 2 and shapes[0] == shapes[1] and shapes[0][1] > k
