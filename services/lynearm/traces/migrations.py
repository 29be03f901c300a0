"""Brings a catalog's database to the schema known here: from nothing, or from what an earlier version left.

Steps run inside one transaction with the new version number: a database is at one version or at the next,
never between. There is no way back; an earlier lynearm refuses what this one has opened.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from sqlalchemy import Connection, insert, inspect, select, text, update

from lynearm.traces.schema import (
    SCHEMA_VERSION,
    blocks,
    consumers,
    dictionaries,
    finished_samples,
    job_prompts,
    jobs,
    leases,
    metadata,
    schema_version,
)
from lynearm.wire.errors import ConfigError

logger = logging.getLogger(__name__)


def prepare_schema(connection: Connection, where: str) -> None:
    """Create the tables in an empty database; else bring those of an earlier version up to date.

    Args:
        connection: A connection in a transaction.
        where: The database, for people.

    Raises:
        ConfigError: a later version wrote them.
    """
    if not inspect(connection).has_table(schema_version.name):
        metadata.create_all(connection)
        connection.execute(insert(schema_version).values(version=SCHEMA_VERSION))
        return
    found = connection.scalar(select(schema_version.c.version))
    if found == SCHEMA_VERSION:
        return
    if found is None or found not in _STEPS:
        raise ConfigError(
            f"catalog {where} has schema version {found}, expected {SCHEMA_VERSION}",
            "use the lynearm that wrote it, or another data directory",
        )
    for version in range(found, SCHEMA_VERSION):
        _STEPS[version](connection)
    connection.execute(update(schema_version).values(version=SCHEMA_VERSION))
    logger.info("catalog %s: brought from schema version %d to %d", where, found, SCHEMA_VERSION)


def _add_dictionaries(connection: Connection) -> None:
    dictionaries.create(connection)
    for column in ("dictionary_count", "dictionary_bytes"):
        connection.execute(text(f"ALTER TABLE streams ADD COLUMN {column} BIGINT DEFAULT 0 NOT NULL"))


def _add_jobs_and_consumers(connection: Connection) -> None:
    for table in (finished_samples, jobs, job_prompts, leases, consumers):
        table.create(connection)
    for column in ("max_lag_blocks", "max_lag_traces"):
        connection.execute(text(f"ALTER TABLE streams ADD COLUMN {column} BIGINT DEFAULT 0 NOT NULL"))
    binary = blocks.c.labels.type.compile(connection.dialect)
    connection.execute(text(f"ALTER TABLE blocks ADD COLUMN labels {binary}"))


_STEPS: Mapping[int, Callable[[Connection], None]] = {1: _add_dictionaries, 2: _add_jobs_and_consumers}
"""By the version that a step starts from; it leads to the next."""
