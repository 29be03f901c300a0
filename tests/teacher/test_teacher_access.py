"""Who may use a served teacher, and what its configuration refuses."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models.teacher_thread import TeacherThread
from traces.certificates import CertificateFiles

from lynearm.client import Credentials, ScoreSettings, StudentCompletion, TeacherClient, TlsConfig
from lynearm.teacher.engine import TeacherEngine
from lynearm.teacher.serving_config import ServeTeacherConfig
from lynearm.teacher.teacher_access import TokenInterceptor
from lynearm.teacher.teacher_server import TeacherServer
from lynearm.wire.errors import (
    AuthenticationError,
    ConfigError,
    PreconditionError,
    ServiceUnavailableError,
)

# torch and vLLM warn about each other's old names while they are imported.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

TOKEN = "lyn_0123456789abcdef"
COMPLETION = StudentCompletion("one", np.asarray([5, 6], np.int32), np.asarray([7, 8, 9], np.int32))


def test_a_teacher_with_tokens_and_tls_serves_who_has_both(
    shared_engine: TeacherEngine, tmp_path: Path
) -> None:
    files = CertificateFiles(tmp_path)
    tokens = tmp_path / "tokens"
    tokens.write_text(f"# of trainer 1\n{TOKEN}\n\n")
    tls = TlsConfig(files.ca)
    with TeacherThread(shared_engine, tls_cert=files.cert, tls_key=files.key, token_file=tokens) as teacher:

        def score(credentials: Credentials) -> int:
            with TeacherClient(teacher.target, patience_seconds=0, credentials=credentials) as client:
                return len(list(client.score([COMPLETION], ScoreSettings(top_k=4))))

        assert score(Credentials(tls, TOKEN)) == 1
        for wrong in (Credentials(tls, TOKEN + "0"), Credentials(tls)):
            with pytest.raises(AuthenticationError, match="no token that this teacher knows"):
                score(wrong)
        with pytest.raises(AuthenticationError):
            TeacherClient(teacher.target, credentials=Credentials(tls)).describe()
        with pytest.raises(AuthenticationError):
            next(TeacherClient(teacher.target, credentials=Credentials(tls)).generate("Hi"))
        with TeacherClient(teacher.target, credentials=Credentials(tls)) as stranger:
            assert stranger.is_serving()  # health checks have no token
        with pytest.raises(ServiceUnavailableError):
            score(Credentials(token=TOKEN))


@pytest.mark.parametrize("text", ["", "# nothing\n", "short\n", 'sha256 = "0123456789abcdef"\n'])
def test_a_file_without_proper_tokens_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tokens"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"not a token|0 tokens") as refusal:
        TokenInterceptor(path)
    assert "0123456789" not in str(refusal.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bind": "0.0.0.0:7412"}, "needs TLS and a token"),
        ({"bind": "0.0.0.0:7412", "tls_cert": Path("c"), "tls_key": Path("k")}, "needs TLS and a token"),
        ({"bind": "0.0.0.0:7412", "token_file": Path("t")}, "needs TLS and a token"),
        ({"bind": "7412"}, "not host:port"),
        ({"bind": "localhost:99999"}, "not host:port"),
        ({"model": ""}, "model is empty"),
        ({"tls_cert": Path("c")}, "needs its key"),
        ({"tls_client_ca": Path("c")}, "need a TLS certificate"),
        ({"top_k": 2000}, "top_k 2000"),
        ({"max_batch": 0}, "max_batch 0"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ServeTeacherConfig(**({"model": "m"} | settings))


def test_what_is_open_to_other_machines_has_to_be_said() -> None:
    config = ServeTeacherConfig("m", bind="0.0.0.0:7412", insecure=True)
    assert config.requests_in_flight == 4 * config.max_batch
    proper = {"tls_cert": Path("c"), "tls_key": Path("k")}
    assert ServeTeacherConfig("m", bind="[::]:7412", token_file=Path("t"), **proper).top_k == 256
    assert ServeTeacherConfig("m", bind="[::]:7412", tls_client_ca=Path("a"), **proper).top_k == 256


def test_a_port_in_use_is_said_before_the_model_is_loaded() -> None:
    def load() -> TeacherEngine:
        raise AssertionError("the model was loaded")

    async def serve(port: int) -> None:
        async with TeacherServer(ServeTeacherConfig("m", bind=f"127.0.0.1:{port}"), load):
            pass

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(PreconditionError, match="cannot listen on"):
            asyncio.run(serve(taken.getsockname()[1]))


def test_a_model_that_cannot_be_loaded_ends_the_server() -> None:
    def load() -> TeacherEngine:
        raise ConfigError("cannot load teacher 'm': no such directory")

    async def serve() -> None:
        async with TeacherServer(ServeTeacherConfig("m", bind="127.0.0.1:0"), load):
            pass

    with pytest.raises(ConfigError, match="no such directory"):
        asyncio.run(serve())
