"""What a client shows a service: from the environment, in its representation, over which channels."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from lynearm.client import Credentials, TlsConfig, TraceClient
from lynearm.wire.errors import ConfigError

TOKEN = "lyn_" + "x" * 43


def test_an_empty_environment_asks_for_plain_text_and_no_token() -> None:
    credentials = Credentials.from_environment({})
    assert credentials == Credentials()
    assert credentials.channel_credentials() is None
    assert credentials.call_metadata() == ()


def test_the_environment_names_every_part() -> None:
    environment = {
        "LYNEARM_TLS_CA": "/etc/ca.pem",
        "LYNEARM_TLS_CERT": "/etc/me.pem",
        "LYNEARM_TLS_KEY": "/etc/me.key",
        "LYNEARM_TLS_SERVER_NAME": "traces.example",
        "LYNEARM_TOKEN_FILE": "/run/token",
    }
    tls = TlsConfig(Path("/etc/ca.pem"), Path("/etc/me.pem"), Path("/etc/me.key"), "traces.example")
    assert Credentials.from_environment(environment) == Credentials(tls, token_file=Path("/run/token"))
    assert Credentials.from_environment({"LYNEARM_TLS_CA": "system"}) == Credentials(TlsConfig())
    assert Credentials.from_environment({"LYNEARM_TOKEN": TOKEN}) == Credentials(token=TOKEN)


@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        ({"LYNEARM_TLS_CERT": "a", "LYNEARM_TLS_KEY": "b"}, "LYNEARM_TLS_CA"),
        ({"LYNEARM_TLS_SERVER_NAME": "a"}, "LYNEARM_TLS_CA"),
        ({"LYNEARM_TLS_CA": "system", "LYNEARM_TLS_CERT": "a"}, "needs its key"),
        ({"LYNEARM_TOKEN": TOKEN, "LYNEARM_TOKEN_FILE": "a"}, "choose one"),
    ],
)
def test_an_environment_that_contradicts_itself_is_refused(environment: dict[str, str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        Credentials.from_environment(environment)


def test_a_token_goes_to_this_machine_or_over_tls_only() -> None:
    for target in ("10.0.0.1:7411", "example.org:7411", "[2001:db8::1]:7411"):
        with pytest.raises(ConfigError, match="plain text"):
            TraceClient(target, credentials=Credentials(token=TOKEN))
        with pytest.raises(ConfigError, match="plain text"):
            TraceClient(target, credentials=Credentials(token_file=Path("absent")))
        TraceClient(target, credentials=Credentials(TlsConfig(), token=TOKEN)).close()
    for target in ("127.0.0.1:7411", "[::1]:7411", "localhost:7411"):
        TraceClient(target, credentials=Credentials(token=TOKEN)).close()


def test_a_token_is_never_shown() -> None:
    credentials = Credentials(token=TOKEN)
    assert TOKEN not in repr(credentials)
    assert TOKEN not in str(credentials)
    bad = TOKEN + " with a space"
    with pytest.raises(ConfigError) as caught:
        Credentials(token=bad)
    assert TOKEN not in str(caught.value)


def test_a_token_file_is_read_anew_and_no_pickle_holds_it(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(TOKEN + "\n")
    credentials = Credentials(token_file=file)
    assert credentials.call_metadata() == (("authorization", f"Bearer {TOKEN}"),)
    assert TOKEN.encode() not in pickle.dumps(credentials)
    file.write_text("lyn_other\nsecond line")
    assert pickle.loads(pickle.dumps(credentials)).call_metadata() == (("authorization", "Bearer lyn_other"),)


@pytest.mark.parametrize("content", ["", "\n" + TOKEN, "two words", "höher"])
def test_a_token_file_without_a_token_is_named(tmp_path: Path, content: str) -> None:
    file = tmp_path / "token"
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"first line of .*token"):
        Credentials(token_file=file).call_metadata()


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.token.*No such file"):
        Credentials(token_file=tmp_path / "absent.token").call_metadata()
    with pytest.raises(ConfigError, match=r"absent\.pem.*No such file"):
        Credentials(TlsConfig(tmp_path / "absent.pem")).channel_credentials()
