"""The tokens file: what it may say, what it must never show, and what happens when it changes."""

from __future__ import annotations

import hmac
import logging
import os
import time
import traceback
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from traces.certificates import TokenFile
from traces.harness import LoopThread

from lynearm.traces import tokens as tokens_module
from lynearm.traces.callers import AnonymousCallers, TokenCallers, bearer_token, peer_host
from lynearm.traces.limits import CallerQuota
from lynearm.traces.tokens import (
    MAX_TOKENS,
    Scope,
    find_entry,
    format_entry,
    new_token,
    parse_tokens,
    token_sha256,
)
from lynearm.wire.errors import AuthenticationError, ConfigError

QUOTA = CallerQuota(10, 100.0, 1e6)
GOOD = f'name = "a"\nsha256 = "{"0" * 64}"\nscopes = ["publish:*"]\n'


def shown(token: str) -> list[tuple[str, str | bytes]]:
    return [("user-agent", "test"), ("authorization", f"Bearer {token}")]


def changed(path: Path, text: str) -> None:
    """Write a file so that even a clock of whole seconds tells it from the one before."""
    path.write_text(text)
    stamp = time.time_ns() + 10**10
    os.utime(path, ns=(stamp, stamp))


@pytest.mark.parametrize(
    ("scope", "permission", "stream", "covered"),
    [
        ("publish:math", "publish", "math", True),
        ("publish:math", "publish", "math-2", False),
        ("publish:math", "consume", "math", False),
        ("publish:math-*", "publish", "math-2", True),
        ("publish:math-*", "publish", "math", False),
        ("consume:*", "consume", "anything", True),
        ("consume:*", "publish", "anything", False),
        ("consume:*", "admin", "anything", False),
        ("admin:a*", "publish", "ab", True),
        ("admin:a*", "consume", "ab", True),
        ("admin:a*", "admin", "ab", True),
        ("admin:a*", "admin", "b", False),
        ("publish:math", "publish", None, True),
        ("publish:math", "admin", None, False),
    ],
)
def test_a_scope_covers_its_permission_on_its_streams(
    scope: str, permission: tokens_module.Permission, stream: str | None, covered: bool
) -> None:
    assert Scope.parse(scope).covers(permission, stream) is covered


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "publish",
            "publish:",
            "publish:a b",
            "publish:A",
            "publish:**",
            "publish:*a",
            "write:*",
            "*:*",
        ),
        *("publish:../x", "publish:a/b", "Publish:*", "publish:" + "a" * 129, "publish:a\n"),
    ],
)
def test_a_scope_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="for example publish:math"):
        Scope.parse(text)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[[tokens]", "not TOML"),
        ("tokens = " + "[" * 100_000, "not TOML"),
        ("[other]\n", "something besides"),
        ("tokens = 1", "something besides"),
        ("tokens = [1]", "token 1 is not a table"),
        (f"[[tokens]]\n{GOOD}scope = 1", "no key 'scope'"),
        ('[[tokens]]\nsha256 = "00"', "has no name"),
        (f"[[tokens]]\n{GOOD.replace('0', 'g')}", "64 hexadecimal"),
        ('[[tokens]]\nname = "a"', "64 hexadecimal"),
        ("[[tokens]]\n" + GOOD.replace('"a"', '"../a"'), "token name '../a'"),
        (f"[[tokens]]\n{GOOD.replace('publish:*', 'all')}", "scope 'all'"),
        (f"[[tokens]]\n{GOOD.split('scopes')[0]}", "scopes is not a list"),
        (f"[[tokens]]\n{GOOD.split('scopes')[0]}scopes = []", "scopes is not a list"),
        (f"[[tokens]]\n{GOOD}expires = 2030-01-01", "time with its zone"),
        (f"[[tokens]]\n{GOOD}expires = 2030-01-01T00:00:00", "time with its zone"),
        (f"[[tokens]]\n{GOOD}max_calls = 0", "max_calls is 0"),
        (f"[[tokens]]\n{GOOD}max_calls = true", "max_calls is True"),
        (f"[[tokens]]\n{GOOD}requests_per_second = inf", "requests_per_second is inf"),
        (f"[[tokens]]\n{GOOD}publish_bytes_per_second = nan", "publish_bytes_per_second is nan"),
        (f"[[tokens]]\n{GOOD}[[tokens]]\n{GOOD}", "same name"),
        (f"[[tokens]]\n{GOOD}[[tokens]]\n" + GOOD.replace('"a"', '"b"'), "same sha256"),
    ],
)
def test_a_wrong_file_is_refused_and_named(text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        parse_tokens(text, "/etc/tokens.toml")
    assert "/etc/tokens.toml" in str(caught.value)


@pytest.mark.parametrize("line", ['sha256 = "{}"', 'name = "{}"', '{} = "a"', 'scopes = ["{}"]', "{}"])
def test_a_token_in_a_wrong_place_is_not_repeated(line: str) -> None:
    token = new_token()
    lines = [one for one in GOOD.splitlines() if one.split()[0] != line.split()[0]]
    with pytest.raises(ConfigError) as caught:
        parse_tokens("\n".join(["[[tokens]]", *lines, line.format(token)]), "f")
    assert token not in "".join(traceback.format_exception(caught.value))


def test_too_many_tokens_are_refused() -> None:
    lines = [
        f'[[tokens]]\nname = "t{number}"\nsha256 = "{number:064x}"\nscopes = ["consume:*"]\n'
        for number in range(MAX_TOKENS + 1)
    ]
    assert len(parse_tokens("".join(lines[:-1]), "f")) == MAX_TOKENS
    with pytest.raises(ConfigError, match="at most"):
        parse_tokens("".join(lines), "f")


def test_new_tokens_are_long_unlike_and_known_by_their_hash_only() -> None:
    first, second = new_token(), new_token()
    assert first != second
    assert first.startswith("lyn_")
    assert len(first) >= 4 + 43
    entry = format_entry("a", first, [Scope("publish", "math-*"), Scope("consume", "*")])
    assert first not in entry
    (parsed,) = parse_tokens(entry, "f")
    assert (parsed.name, parsed.sha256) == ("a", token_sha256(first))
    assert [str(scope) for scope in parsed.scopes] == ["publish:math-*", "consume:*"]


def test_every_hash_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = [new_token() for _ in range(5)]
    text = "".join(format_entry(f"t{n}", token, [Scope("admin", "*")]) for n, token in enumerate(tokens))
    entries = parse_tokens(text, "f")
    compared: list[bytes] = []
    real = hmac.compare_digest

    def counting(a: bytes, b: bytes) -> bool:
        compared.append(a)
        return real(a, b)

    monkeypatch.setattr(tokens_module.hmac, "compare_digest", counting)
    for token in (*tokens, "lyn_unknown"):
        compared.clear()
        found = find_entry(entries, token)
        assert (found.name if found else None) == (f"t{tokens.index(token)}" if token in tokens else None)
        # A look-up in a dictionary, or an end at the first match, would compare fewer.
        assert compared == [entry.sha256 for entry in entries]


@given(st.text(max_size=600))
def test_any_text_is_a_token_that_nobody_has(text: str) -> None:
    entries = parse_tokens(format_entry("a", new_token(), [Scope("admin", "*")]), "f")
    assert find_entry(entries, text) is None


VALUES = st.text() | st.binary() | st.text().map("bearer {}".format)


@given(st.lists(st.tuples(st.sampled_from(["authorization", "x"]), VALUES), max_size=3))
def test_any_metadata_shows_one_token_or_is_refused(metadata: list[tuple[str, str | bytes]]) -> None:
    try:
        token = bearer_token(metadata)
    except AuthenticationError:
        return
    (value,) = [value for key, value in metadata if key == "authorization"]
    assert isinstance(value, str)
    assert value.lower() == f"bearer {token}".lower()


def test_a_changed_file_is_taken_over_and_a_broken_one_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = TokenFile(tmp_path / "tokens.toml")
    first = file.add("first", "admin:*")
    reloads: list[bool] = []
    callers = TokenCallers(file.path, QUOTA, reloads.append)
    before = callers.identify(shown(first), "ipv4:127.0.0.1:1")
    good = file.path.read_text()
    second = format_entry("second", new_token(), [Scope("consume", "*")])
    with caplog.at_level(logging.INFO, "lynearm"):
        for text in ("[[tokens]", "[[tokens]]\nname = 1\n"):
            changed(file.path, text)
            callers.check_file()
            callers.check_file()
            assert callers.identify(shown(first), "") is before
        file.path.unlink()
        callers.check_file()
        callers.check_file()
        assert [record.levelname for record in caplog.records] == ["ERROR"] * 3, "once for each change"
        assert callers.identify(shown(first), "") is before
        changed(file.path, good + second)
        callers.check_file()
    assert reloads == [False, False, False, True]
    assert callers.identify(shown(first), "") is before, "an unchanged entry keeps its calls and limits"
    changed(file.path, second)
    callers.check_file()
    assert not before.is_valid
    with pytest.raises(AuthenticationError):
        callers.identify(shown(first), "")


def test_new_scopes_of_a_token_end_what_the_old_ones_allowed(tmp_path: Path) -> None:
    file = TokenFile(tmp_path / "tokens.toml")
    token = file.add("a", "admin:*")
    callers = TokenCallers(file.path, QUOTA)
    before = callers.identify(shown(token), "")
    changed(file.path, file.path.read_text().replace("admin:*", "consume:b"))
    callers.check_file()
    after = callers.identify(shown(token), "")
    assert not before.is_valid
    assert (after.may("consume", "b"), after.may("consume", "c"), after.may("publish", "b")) == (
        True,
        False,
        False,
    )


def test_an_expired_token_is_none(tmp_path: Path) -> None:
    file = TokenFile(tmp_path / "tokens.toml")
    old = file.add("old", "admin:*", more="expires = 2020-01-01T00:00:00Z\n")
    new = file.add("new", "admin:*", more="expires = 2120-01-01T00:00:00+02:00\n")
    callers = TokenCallers(file.path, QUOTA)
    assert callers.identify(shown(new), "").name == "new"
    with pytest.raises(AuthenticationError, match="expired"):
        callers.identify(shown(old), "")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokens\.toml.*No such file"):
        TokenCallers(tmp_path / "tokens.toml", QUOTA)
    (tmp_path / "tokens.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="UTF-8"):
        TokenCallers(tmp_path / "tokens.toml", QUOTA)
    with (tmp_path / "tokens.toml").open("wb") as sparse:
        sparse.truncate(1 << 30)
    with pytest.raises(ConfigError, match="more than"):
        TokenCallers(tmp_path / "tokens.toml", QUOTA)


def test_without_tokens_everybody_may_and_an_address_shares_its_limits() -> None:
    callers = AnonymousCallers(QUOTA)
    first = callers.identify((), "ipv4:10.0.0.1:5000")
    assert first is callers.identify((), "ipv4:10.0.0.1:6000")
    with first.limits.call("a"):
        assert first is not callers.identify((), "ipv4:10.0.0.2:5000")
        for number in range(1000):
            callers.identify((), f"ipv4:10.1.{number % 250}.{number // 250}:1")
        assert first is callers.identify((), "ipv4:10.0.0.1:7000"), "it has a call"
    assert first.may("admin", "anything")


def test_an_address_that_took_too_much_does_not_start_afresh(loop: LoopThread) -> None:
    callers = AnonymousCallers(CallerQuota(10, publish_bytes_per_second=1.0))
    first = callers.identify((), "ipv4:10.0.0.1:5000")
    loop.run(first.limits.pay_for_publish("a", 1000))
    callers.identify((), "ipv4:10.0.0.2:5000")
    assert first is callers.identify((), "ipv4:10.0.0.1:6000")


@pytest.mark.parametrize(
    ("peer", "host"),
    [
        ("ipv4:127.0.0.1:50000", "127.0.0.1"),
        ("ipv6:%5B::1%5D:50000", "%5B::1%5D"),
        ("ipv6:[::1]:50000", "[::1]"),
        ("unix:", "unix:"),
        ("", ""),
    ],
)
def test_peers_of_one_host_count_as_one(peer: str, host: str) -> None:
    assert peer_host(peer) == host
