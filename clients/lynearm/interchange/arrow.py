"""The columns of a trace in Arrow, and pyarrow itself, which is imported when it is needed.

One row a trace; lists have their own lengths, so that padding is not written. Tags are a list of structs and
not a map, which polars and Hugging Face datasets do not have.
"""

from __future__ import annotations

import importlib
from typing import Any, TypeAlias

from lynearm.wire.errors import MissingDependencyError

Untyped: TypeAlias = Any
"""Something of pyarrow's: it ships no types that a strict checker accepts."""

SPEC_METADATA_KEY = b"lynearm.stream_spec"
"""Key of the schema's metadata under which the stream's spec stands, as protobuf's JSON."""

VERSION_METADATA_KEY = b"lynearm.parquet_version"
PARQUET_VERSION = 1
"""Of the columns. A reader refuses versions above its own; columns may be added without a new one."""

REQUIRED_COLUMNS = (
    "prompt_id",
    "prompt_token_ids",
    "completion_token_ids",
    "sampled_logprobs",
    "top_k_token_ids",
    "top_k_logprobs",
    "tail_mass",
    "finish_reason",
)
"""What an import cannot do without; the other columns have defaults."""


def load_arrow() -> Untyped:
    """The module pyarrow, with `pyarrow.parquet` loaded.

    Raises:
        MissingDependencyError: without it.
    """
    try:
        importlib.import_module("pyarrow.parquet")
        return importlib.import_module("pyarrow")
    except ImportError as error:
        raise MissingDependencyError(
            f"Parquet needs pyarrow: {error}", "pip install 'lynearm[parquet]'"
        ) from error


def trace_schema(pa: Untyped, *, tail_draws: bool = True) -> Untyped:
    """The columns of a trace.

    Args:
        pa: The module pyarrow.
        tail_draws: With the column of draws from the tails, which only some streams have.
    """
    ids = pa.list_(pa.int32())
    floats = pa.list_(pa.float32())
    span = pa.struct([("kind", pa.string()), ("start", pa.int32()), ("end", pa.int32())])
    sampling = pa.struct(
        [
            ("temperature", pa.float64()),
            ("top_p", pa.float64()),
            ("top_k", pa.int64()),
            ("min_p", pa.float64()),
            ("max_tokens", pa.int64()),
            ("seed", pa.int64()),
            ("presence_penalty", pa.float64()),
            ("frequency_penalty", pa.float64()),
            ("repetition_penalty", pa.float64()),
            ("min_tokens", pa.int64()),
            ("stop", pa.list_(pa.string())),
            ("stop_token_ids", ids),
        ]
    )
    tag = pa.struct([("key", pa.string()), ("value", pa.string())])
    drawn = [("tail_draws", pa.list_(ids))] if tail_draws else []
    return pa.schema(
        [
            ("prompt_id", pa.string()),
            ("sample_index", pa.int64()),
            ("prompt_token_ids", ids),
            ("completion_token_ids", ids),
            ("completion_text", pa.string()),
            ("finish_reason", pa.string()),
            ("stop_string", pa.string()),
            ("sampled_logprobs", floats),
            ("top_k", pa.int32()),
            ("top_k_token_ids", pa.list_(ids)),
            ("top_k_logprobs", pa.list_(floats)),
            ("tail_mass", floats),
            ("spans", pa.list_(span)),
            ("sampling", sampling),
            ("tags", pa.list_(tag)),
            *drawn,
        ]
    )
