"""Brings a catalog's database to the schema known here: from nothing, or from what an earlier version left.

Steps run inside one transaction with the new version number: a database is at one version or at the next,
never between. There is no way back; an earlier lynearm refuses what this one has opened.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping

from sqlalchemy import Connection, insert, inspect, select, text, update

from lynearm.traces.schema import (
    SCHEMA_VERSION,
    attachments,
    block_store,
    blocks,
    consumers,
    dictionaries,
    expired_blocks,
    failed_prompts,
    finished_samples,
    job_prompts,
    jobs,
    leases,
    metadata,
    objects,
    schema_version,
    streams,
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
            "use the lynearm that wrote it, or another catalog",
        )
    for version in range(found, SCHEMA_VERSION):
        _STEPS[version](connection)
    connection.execute(update(schema_version).values(version=SCHEMA_VERSION))
    logger.info("catalog %s: brought from schema version %d to %d", where, found, SCHEMA_VERSION)


def _add_dictionaries(connection: Connection) -> None:
    dictionaries.create(connection)
    _add_counters(connection, "streams", "dictionary_count", "dictionary_bytes")


def _add_jobs_and_consumers(connection: Connection) -> None:
    for table in (finished_samples, jobs, job_prompts, leases, consumers):
        table.create(connection)
    _add_counters(connection, "streams", "max_lag_blocks", "max_lag_traces")
    binary = blocks.c.labels.type.compile(connection.dialect)
    connection.execute(text(f"ALTER TABLE blocks ADD COLUMN labels {binary}"))


def _add_retention(connection: Connection) -> None:
    for table in (block_store, expired_blocks):
        table.create(connection)
    _add_counters(connection, "streams", "first_offset", "retained_bytes", "max_age_seconds", "max_bytes")
    connection.execute(text("ALTER TABLE streams ADD COLUMN read_by TEXT DEFAULT '' NOT NULL"))
    connection.execute(update(streams).values(retained_bytes=streams.c.size_bytes))
    _add_counters(connection, "objects", "created_unix_nano")
    # Their age is not known; to keep them for too long is the safe side.
    connection.execute(update(objects).values(created_unix_nano=time.time_ns()))


def _add_failures_and_attachments(connection: Connection) -> None:
    for table in (failed_prompts, attachments):
        table.create(connection)
    # A step before has made the table as it is now, where it was missing.
    if all(column["name"] != "failed_count" for column in inspect(connection).get_columns("jobs")):
        _add_counters(connection, "jobs", "failed_count")


def _add_counters(connection: Connection, table: str, *columns: str) -> None:
    for column in columns:
        connection.execute(text(f"ALTER TABLE {table} ADD COLUMN {column} BIGINT DEFAULT 0 NOT NULL"))


_STEPS: Mapping[int, Callable[[Connection], None]] = {
    1: _add_dictionaries,
    2: _add_jobs_and_consumers,
    3: _add_retention,
    4: _add_failures_and_attachments,
}
"""By the version that a step starts from; it leads to the next."""
