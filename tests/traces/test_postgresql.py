"""A catalog in PostgreSQL: what is said when it cannot be used, and what a commit promises."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import psycopg
import pytest
from sqlalchemy import Connection, text
from traces.clusters import PASSWORD, Cluster
from traces.harness import LoopThread, StartServer
from traces.storages import catalog_rows, on_cluster

from lynearm.traces import postgresql
from lynearm.traces.config import ServeConfig
from lynearm.traces.postgresql import PostgresDatabase
from lynearm.traces.sql_catalog import SqlCatalog
from lynearm.wire.errors import CatalogUnavailableError, ConfigError, LynearmError, StorageError

WRONG_PASSWORD = "horse-battery-staple"

DIE_IN_COMMIT = """
CREATE FUNCTION die() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NULL; END $$;
CREATE CONSTRAINT TRIGGER last AFTER INSERT ON t DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION die()
"""
"""The database ends the session when it is asked to commit."""


def make_table(connection: Connection) -> None:
    connection.execute(text("CREATE TABLE t (id int UNIQUE)"))


def open_catalog(loop: LoopThread, url: str) -> None:
    async def run() -> None:
        catalog = await SqlCatalog.open(PostgresDatabase(url))
        await catalog.close()

    loop.run(run())


@pytest.mark.parametrize(
    ("change", "kind", "told"),
    [
        ((PASSWORD, WRONG_PASSWORD), CatalogUnavailableError, "check the user, and the password"),
        (("/postgres?", "/nothing?"), CatalogUnavailableError, "createdb"),
        (("@/postgres?host=", "@127.0.0.1:9/postgres?x_host="), ConfigError, "libpq's manual"),
        ((r"@/postgres?host=.*", "@127.0.0.1:9/postgres"), CatalogUnavailableError, "start PostgreSQL there"),
        ((r"@/postgres?host=.*", "@nowhere.invalid/postgres"), CatalogUnavailableError, "correct the host"),
        ((r"@/postgres?host=.*", "@host:port/postgres"), ConfigError, "cannot be understood"),
    ],
)
def test_a_database_that_cannot_be_used_is_named_without_its_password(
    cluster: Cluster, loop: LoopThread, change: tuple[str, str], kind: type[LynearmError], told: str
) -> None:
    old, new = change
    url = re.sub(old.replace("?", r"\?"), new, cluster.database)
    assert url != cluster.database
    with pytest.raises(kind) as caught:
        open_catalog(loop, url)
    assert told in str(caught.value)
    chain: list[str] = []
    error: BaseException | None = caught.value
    while error is not None:
        chain.append(str(error))
        error = error.__cause__
    assert PASSWORD not in "".join(chain)
    assert WRONG_PASSWORD not in "".join(chain)


def test_a_user_that_may_not_make_tables_is_told(cluster: Cluster, loop: LoopThread) -> None:
    with psycopg.connect(cluster.database, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE reader LOGIN PASSWORD '{PASSWORD}'")
    with pytest.raises(StorageError, match="let the user create"):
        open_catalog(loop, cluster.database.replace("//postgres:", "//reader:"))


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1"])
def test_a_database_that_cannot_hold_any_text_is_refused(
    cluster: Cluster, loop: LoopThread, encoding: str
) -> None:
    name = f"in_{encoding.lower()}"
    with psycopg.connect(cluster.database, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE template0 LOCALE 'C' ENCODING '{encoding}'")
    with pytest.raises(ConfigError, match=f"encoding is {encoding}, expected UTF8: .*--encoding=UTF8"):
        open_catalog(loop, cluster.database.replace("/postgres?", f"/{name}?"))


def test_the_url_of_a_catalog_is_in_no_repr() -> None:
    config = ServeConfig(catalog=f"postgresql://user:{PASSWORD}@host/traces?sslmode=verify-full")
    assert PASSWORD not in repr(config)
    assert config.places.startswith("postgresql://user@host/traces and ")


@on_cluster
def test_a_later_version_of_the_catalog_is_refused(
    storage: dict[str, Any], start_server: StartServer
) -> None:
    server = start_server()
    server.stop()
    catalog_rows(server.config, "UPDATE schema_version SET version = 99")
    with pytest.raises(ConfigError, match="schema version 99"):
        start_server()


@on_cluster
def test_a_transaction_that_lost_a_race_is_run_again(storage: dict[str, Any], loop: LoopThread) -> None:
    async def run() -> None:
        database = PostgresDatabase(storage["catalog"])
        await database.write(make_table)
        attempts: list[int] = []

        def insert(connection: Connection) -> int:
            attempts.append(connection.scalar(text("SELECT count(*) FROM t")) or 0)
            taken = {row.id for row in connection.execute(text("SELECT id FROM t"))}
            free = min(set(range(100)) - taken)
            connection.execute(text("SELECT pg_sleep(0.02)"))
            connection.execute(text("INSERT INTO t VALUES (:id)"), {"id": free})
            return free

        made = await asyncio.gather(*(database.write(insert) for _ in range(4)))
        assert sorted(made) == [0, 1, 2, 3]
        assert len(attempts) > 4
        await database.close()

    loop.run(run())


@on_cluster
def test_a_commit_whose_answer_is_lost_is_not_repeated(storage: dict[str, Any], loop: LoopThread) -> None:
    async def run() -> None:
        database = PostgresDatabase(storage["catalog"])
        await database.write(make_table)
        attempts: list[int] = []

        def insert(connection: Connection) -> None:
            attempts.append(1)
            connection.execute(text("INSERT INTO t VALUES (1)"))
            connection.execute(text(DIE_IN_COMMIT))
            connection.execute(text("INSERT INTO t VALUES (2)"))

        with pytest.raises(CatalogUnavailableError, match=r"whether .* was committed is not known"):
            await database.write(insert)
        assert attempts == [1]
        await database.close()

    loop.run(run())


@on_cluster
def test_commits_are_synchronous_whatever_the_database_prefers(
    storage: dict[str, Any], loop: LoopThread
) -> None:
    async def run() -> None:
        for option, found in (("off", "on"), ("remote_apply", "remote_apply")):
            url = f"{storage['catalog']}%20-csynchronous_commit%3D{option}"
            database = PostgresDatabase(url)
            setting = await database.write(
                lambda connection: connection.scalar(text("SELECT current_setting('synchronous_commit')"))
            )
            assert setting == found
            await database.close()

    loop.run(run())


def test_waits_end_in_the_order_that_frees_locks() -> None:
    idle, lock, statement = (
        int(postgresql._SESSION_SETTINGS[name].removesuffix("s"))  # pyright: ignore[reportPrivateUsage]
        for name in ("idle_in_transaction_session_timeout", "lock_timeout", "statement_timeout")
    )
    assert idle < lock < statement
