"""Streams of traces as torch datasets, cut into the same batches for any number of ranks and workers.

Importing it needs torch, and raises `MissingDependencyError` without.
"""

from lynearm.datasets.shards import Shard
from lynearm.wire.errors import MissingDependencyError

try:
    from lynearm.datasets.trace_dataset import StreamRange, TraceBatch, TraceDataset
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "torch":
        raise
    raise MissingDependencyError(
        "lynearm.datasets needs torch", "pip install torch, or 'lynearm[student]'"
    ) from error

__all__ = ["Shard", "StreamRange", "TraceBatch", "TraceDataset"]
