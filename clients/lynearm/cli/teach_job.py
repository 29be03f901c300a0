"""`lynearm teach --teachers FILE`: several teachers, each for its part of the prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lynearm.wire.errors import ConfigError

if TYPE_CHECKING:
    from lynearm.teacher.config import TeachConfig

_OF_ONE_TEACHER = ("model", "stream", "license", "producer_id")
"""Flags that would make all teachers the same."""


def load_job(path: Path, flags: Mapping[str, object], assignments: Sequence[str]) -> tuple[TeachConfig, ...]:
    """The configurations of a job file's teachers, checked as far as that goes without a model.

    Args:
        path: The job file.
        flags: Values by name, as on the command line: they override the file for every teacher.
        assignments: "key=value", likewise.

    Raises:
        ConfigError: naming what is wrong and where.
        PromptFileError, MisalignmentError: as for `prepare_teachers`.
    """
    from lynearm.cli.settings import load_settings
    from lynearm.teacher.config import TeachConfig
    from lynearm.teacher.job_file import load_job_file

    given = [name for name in _OF_ONE_TEACHER if flags.get(name) is not None]
    if flags.get("config") is not None:
        given.append("config")
    if given:
        raise ConfigError(
            f"--{given[0].replace('_', '-')} goes with one teacher, and --teachers names several",
            f"write it into {path}",
        )
    job = load_job_file(path)
    configs = [
        load_settings(
            TeachConfig, "teach", tables=job.settings_of(teacher), flags=flags, assignments=assignments
        )
        for teacher in job.teachers
    ]
    from lynearm.teacher.several import assign_teachers, prepare_teachers

    return prepare_teachers(assign_teachers(job.table, configs))
