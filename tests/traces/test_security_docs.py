"""What the documents about security and monitoring say is what the service does."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from traces.certificates import TokenFile
from traces.harness import StartServer
from typer.main import get_command

from lynearm.cli.main import app
from lynearm.client import Credentials, TlsConfig, TraceClient
from lynearm.traces.config import ServeConfig
from lynearm.traces.metrics import ServerMetrics
from lynearm.traces.tokens import PERMISSIONS, parse_tokens

ROOT = Path(__file__).parents[2]
SECURITY = (ROOT / "docs" / "security.md").read_text()
MONITORING = (ROOT / "docs" / "monitoring.md").read_text()


def fenced(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_metrics_are_those_of_the_document() -> None:
    metrics = ServerMetrics()
    names = {
        f"{one.name}_total" if one.type == "counter" else one.name for one in metrics.registry.collect()
    } | {"lynearm_queued_bytes", "lynearm_cache_bytes"}  # of the backend
    documented = set(re.findall(r"`(lynearm_[a-z_]+)`", MONITORING))
    assert documented == {name for name in names if name.startswith("lynearm_")}


def test_the_entry_of_the_document_is_one() -> None:
    (entry,) = [block for block in fenced(SECURITY, "toml") if "[[tokens]]" in block]
    (parsed,) = parse_tokens(entry, "docs/security.md")
    assert parsed.quota.publish_bytes_per_second == 50e6


def test_every_permission_is_described() -> None:
    assert set(re.findall(r"`([a-z]+):STREAMS`", SECURITY)) == set(PERMISSIONS)


def test_every_flag_in_the_documents_exists() -> None:
    root: Any = get_command(app)
    serve, tokens = root.commands["serve"], root.commands["tokens"]
    commands = [root, serve, *tokens.commands.values(), root.commands["streams"].commands["list"]]
    known = {option for command in commands for parameter in command.params for option in parameter.opts}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", SECURITY + MONITORING)) <= known


def test_the_defaults_in_the_document_are_those_of_the_configuration() -> None:
    (seconds,) = re.findall(r"`--drain-seconds` \((\d+)\)", MONITORING)
    assert float(seconds) == ServeConfig().drain_seconds


@pytest.mark.skipif(
    subprocess.run(["which", "openssl"], capture_output=True, check=False).returncode != 0,
    reason="needs openssl on the path",
)
def test_the_certificates_of_the_document_serve(start_server: StartServer, tmp_path: Path) -> None:
    (commands,) = [block for block in fenced(SECURITY, "sh") if "openssl" in block]
    subprocess.run(["bash", "-euc", commands], cwd=tmp_path, check=True, capture_output=True)
    tokens = TokenFile(tmp_path / "tokens.toml")
    token = tokens.add("somebody", "consume:*")
    server = start_server(
        tls_cert=tmp_path / "server.pem", tls_key=tmp_path / "server.key", tokens=tokens.path
    )
    credentials = Credentials(TlsConfig(tmp_path / "ca.pem"), token=token)
    with TraceClient(server.server.address, credentials=credentials) as client:
        assert client.list_streams() == []
