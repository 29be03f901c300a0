"""Traces in the formats of others: Parquet in and out, and the JSONL of OpenAI-compatible servers in.

Files and streams are passed through in batches of bounded size. pyarrow and transformers are imported when a
file needs them.
"""

from lynearm.interchange.config import FileFormat, ImportConfig
from lynearm.interchange.progress import ExportProgress, ExportReport, ImportProgress, ImportReport

__all__ = [
    "ExportProgress",
    "ExportReport",
    "FileFormat",
    "ImportConfig",
    "ImportProgress",
    "ImportReport",
]
