"""A tiny real teacher in a real vLLM engine, once per session, and a real trace service."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from models.service_process import ServiceProcess
from models.teaching import teach_config
from models.tiny_llama import build_tiny_llama

from lynearm.teacher.engine import TeacherEngine

END_TOKENS = [0, 2, *range(300, 384)]
"""A fifth of the vocabulary ends a completion, so that empty and short ones come by themselves."""


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = build_tiny_llama(tmp_path_factory.mktemp("teacher") / "tiny")
    path = directory / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": END_TOKENS}))
    return directory


@pytest.fixture(scope="session")
def engine(tiny_model: Path) -> Iterator[TeacherEngine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        made = TeacherEngine(teach_config(tiny_model))
        yield made
        made.close()


@pytest.fixture(scope="module")
def shared_engine(engine: TeacherEngine) -> Iterator[TeacherEngine]:
    """The engine for a server, which closes its engine at its end: other tests go on with this one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "close", lambda: None)
        yield engine


@pytest.fixture
def service(tmp_path: Path) -> Iterator[ServiceProcess]:
    with ServiceProcess(tmp_path / "data") as process:
        yield process
