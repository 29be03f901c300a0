"""Streams of traces as torch datasets, cut into the same batches for any number of ranks and workers.

Importing it needs torch, and raises `MissingDependencyError` without.
"""

from lynearm.datasets.batch_sequence import StreamPosition
from lynearm.wire.errors import MissingDependencyError
from lynearm.wire.sharding import Shard, ShardPlan

try:
    from lynearm.datasets.trace_dataset import TraceBatch, TraceDataset
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "torch":
        raise
    raise MissingDependencyError(
        "lynearm.datasets needs torch", "pip install torch, or 'lynearm[student]'"
    ) from error

__all__ = ["Shard", "ShardPlan", "StreamPosition", "TraceBatch", "TraceDataset"]
