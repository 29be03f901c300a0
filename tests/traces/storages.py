"""What a server keeps, seen from outside of it: rows of its catalog, objects of its block store."""

from __future__ import annotations

import time
from typing import Any

import obstore
import psycopg
import pytest
from obstore.store import LocalStore, from_url
from sqlalchemy import Row, create_engine, make_url, text

from lynearm.traces.config import ServeConfig

on_local_disk = pytest.mark.parametrize("storage", ["local"], indirect=True)
"""For tests of what only the pair of SQLite and a directory does."""

on_cluster = pytest.mark.parametrize("storage", ["cluster"], indirect=True)
"""For tests of what only the pair of PostgreSQL and S3 does."""


on_shared_storage = pytest.mark.parametrize("storage", ["shared", "cluster"], indirect=True)
"""For tests of several servers: on a SQLite file and a directory of one machine, and on a cluster."""


def wait_until_blocked(catalog: str) -> None:
    """Until a transaction on the catalog waits for a lock."""
    with psycopg.connect(catalog, autocommit=True) as looking:
        while not looking.execute("SELECT 1 FROM pg_locks WHERE NOT granted").fetchone():
            time.sleep(0.01)


def catalog_rows(config: ServeConfig, statement: str, **values: object) -> list[Row[Any]]:
    """Run a statement on a server's catalog; rows, where it gives any."""
    if config.catalog:
        url = make_url(config.catalog).set(drivername="postgresql+psycopg")
    else:
        url = make_url(f"sqlite:///{config.data_dir / 'catalog.sqlite3'}")
    engine = create_engine(url)
    try:
        with engine.begin() as connection:
            result = connection.execute(text(statement), values)
            return list(result.all()) if result.returns_rows else []
    finally:
        engine.dispose()


class StoredObjects:
    """The objects of a server's block store, by key."""

    def __init__(self, config: ServeConfig) -> None:
        # Any: obstore's stores are a union.
        self._store: Any = _open(config)

    def list_keys(self) -> list[str]:
        """The key of every object, ascending."""
        paths = sorted(one["path"] for batch in self._store.list() for one in batch)
        return [path.split("/")[1] for path in paths if "/" in path]

    def read(self) -> dict[str, bytes]:
        """Every object."""
        return {key: bytes(obstore.get(self._store, f"{key[:2]}/{key}").bytes()) for key in self.list_keys()}

    def write(self, key: str, data: bytes) -> None:
        """Put an object there, or another in its place."""
        obstore.put(self._store, f"{key[:2]}/{key}", data)

    def delete(self, key: str) -> None:
        """Take an object away."""
        obstore.delete(self._store, f"{key[:2]}/{key}")


def _open(config: ServeConfig) -> Any:
    if config.blocks:
        return from_url(config.blocks, client_options={"allow_http": True})
    return LocalStore(config.data_dir / "blocks")
