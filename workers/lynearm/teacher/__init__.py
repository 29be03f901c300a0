"""The teacher: a vLLM engine in a Ray actor that answers prompts and publishes its traces."""

from lynearm.teacher.config import TeachConfig
from lynearm.teacher.job import run_teach
from lynearm.teacher.progress import FailedPrompt, TeachProgress, TeachReport, WorkerStatus
from lynearm.teacher.prompt_sources import PromptFile, load_prompts
from lynearm.teacher.prompts import BadLine, Prompt
from lynearm.teacher.worker import TeacherWorker
from lynearm.teacher.worker_progress import WorkerProgress

__all__ = [
    "BadLine",
    "FailedPrompt",
    "Prompt",
    "PromptFile",
    "TeachConfig",
    "TeachProgress",
    "TeachReport",
    "TeacherWorker",
    "WorkerProgress",
    "WorkerStatus",
    "load_prompts",
    "run_teach",
]
