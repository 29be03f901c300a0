"""Tokens and TLS as a person uses them: from making a token to a command that shows it."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from traces.certificates import CertificateFiles
from traces.serving import ServeCommand
from typer.testing import CliRunner

from lynearm.cli.main import app
from lynearm.client import Credentials, TlsConfig, TraceClient
from lynearm.traces.tokens import find_entry, parse_tokens


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags are written to the environment: nothing of it comes into a test, or outlives it."""
    for name in ("TLS_CA", "TLS_CERT", "TLS_KEY", "TLS_SERVER_NAME", "TOKEN", "TOKEN_FILE"):
        monkeypatch.setenv(f"LYNEARM_{name}", "")


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(one) for one in arguments])


def make_token(file: Path, name: str, *scopes: str, more: tuple[str, ...] = ()) -> str:
    flags = [flag for scope in scopes for flag in ("--scope", scope)]
    result = run("tokens", "new", name, "--file", file, *flags, *more)
    assert result.exit_code == 0, result.output
    return str(result.stdout.strip())


def test_a_new_token_is_printed_once_and_known_by_its_hash(tmp_path: Path) -> None:
    file = tmp_path / "tokens.toml"
    first = make_token(file, "teacher", "publish:math-*")
    second = make_token(file, "student", "consume:*", "publish:own", more=("--days", "30"))
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert first not in file.read_text()
    entries = parse_tokens(file.read_text(), "f")
    assert [entry.name for entry in entries] == ["teacher", "student"]
    found = find_entry(entries, second)
    assert found is not None
    assert found.name == "student"
    listed = run("tokens", "list", "--file", file)
    assert listed.output.splitlines()[0] == "teacher: publish:math-*"
    assert listed.output.splitlines()[1].startswith("student: consume:*, publish:own, until 2")
    as_json = json.loads(run("tokens", "list", "--file", file, "--json").output)
    assert as_json[0] == {"name": "teacher", "scopes": ["publish:math-*"], "expires": ""}
    assert not list(tmp_path.glob(".*")), "nothing is left beside the file"


def test_a_file_keeps_what_people_wrote_and_its_mode(tmp_path: Path) -> None:
    file = tmp_path / "tokens.toml"
    file.write_text("# of the maths team\n")
    file.chmod(0o640)
    make_token(file, "a", "consume:*")
    assert file.read_text().startswith("# of the maths team\n")
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("new", "a", "--scope", "read:*"), "scope 'read:*' is not known"),
        (("new", "../a", "--scope", "consume:*"), "is not allowed"),
        (("new", "taken", "--scope", "consume:*"), "same name"),
    ],
)
def test_what_is_wrong_is_said_and_changes_nothing(
    tmp_path: Path, arguments: tuple[str, ...], problem: str
) -> None:
    file = tmp_path / "tokens.toml"
    make_token(file, "taken", "consume:*")
    before = file.read_text()
    result = run("tokens", *arguments, "--file", file)
    assert result.exit_code == 2
    assert problem in result.stderr
    assert file.read_text() == before


def test_a_command_shows_its_token_over_tls(tmp_path: Path) -> None:
    files, tokens = CertificateFiles(tmp_path / "tls"), tmp_path / "tokens.toml"
    token_file = tmp_path / "token"
    token_file.write_text(make_token(tokens, "reader", "consume:*"))
    tls = ("--tls-cert", str(files.cert), "--tls-key", str(files.key), "--tls-client-ca", str(files.ca))
    client_tls = ("--tls-ca", files.ca, "--tls-cert", files.client_cert, "--tls-key", files.client_key)
    credentials = Credentials(TlsConfig(files.ca, files.client_cert, files.client_key), token_file=token_file)
    with ServeCommand(tmp_path / "data", "--tokens", str(tokens), *tls, credentials=credentials) as server:
        list_streams = ("streams", "list", "--service", server.address)
        assert run(*client_tls, "--token-file", token_file, *list_streams).exit_code == 0
        # The flags of the command before are in the environment, as those of a shell would be.
        with TraceClient(server.address) as client:
            assert client.list_streams() == []
        os.environ["LYNEARM_TOKEN_FILE"] = ""
        os.environ["LYNEARM_TOKEN"] = "lyn_wrong"
        refused = run(*list_streams)
        assert refused.exit_code == 1
        assert "not known here" in refused.stderr
        assert run("--token-file", token_file, *list_streams).exit_code == 0, "a flag comes first"


def test_a_server_beyond_loopback_is_refused_without_tls_and_tokens(tmp_path: Path) -> None:
    result = run("serve", "--host", "0.0.0.0", "--data-dir", tmp_path / "data")
    assert result.exit_code == 2
    assert "no TLS (tls_cert, tls_key) and no tokens" in result.stderr
    assert not (tmp_path / "data").exists()
