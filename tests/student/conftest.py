"""One tiny teacher, its traces and one trace service for all tests of the student."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from models.service_process import ServiceProcess
from models.tiny_llama import build_tiny_llama
from student.teaching_material import write_traces

from lynearm.student.model import StudentModel, load_student
from lynearm.wire.traces import Trace


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def teacher_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llama(tmp_path_factory.mktemp("models") / "teacher", seed=1)


@pytest.fixture(scope="session")
def student_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llama(tmp_path_factory.mktemp("models") / "student", seed=2)


@pytest.fixture(scope="session")
def teacher(teacher_dir: Path) -> StudentModel:
    return load_student(teacher_dir, device="cpu")


@pytest.fixture(scope="session")
def traces(teacher: StudentModel) -> list[Trace]:
    return write_traces(teacher, 60, held_out=8)


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    with ServiceProcess(tmp_path_factory.mktemp("service") / "data") as process:
        yield process
