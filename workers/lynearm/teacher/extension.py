"""What we add to vLLM's own worker, in this process or in one of a tensor-parallel group.

vLLM mixes this class into its worker by name. Its methods are called with `collective_rpc`; each feature
brings a base class of its own, whose names begin with `lynearm_`, so that none hides one of vLLM's.
"""

from __future__ import annotations

from lynearm.teacher.capture import CaptureWorker
from lynearm.teacher.inside_worker import InsideWorker
from lynearm.teacher.scoring_rows import ScoringWorker
from lynearm.teacher.weight_refresh import RefreshWorker


class WorkerExtension(CaptureWorker, ScoringWorker, InsideWorker, RefreshWorker):
    """All of our features of a vLLM worker, as one class."""


EXTENSION = f"{WorkerExtension.__module__}.{WorkerExtension.__qualname__}"
"""What vLLM is told."""
