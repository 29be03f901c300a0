"""Tables of the SQL catalogs, in SQLAlchemy Core: one definition for every database."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    text,
)

SCHEMA_VERSION = 5
"""A new number needs a step in `migrations`."""

# SQLite makes rowid aliases, and so generated keys, of INTEGER columns only.
_Key = BigInteger().with_variant(Integer(), "sqlite")

metadata = MetaData()

schema_version = Table("schema_version", metadata, Column("version", Integer, nullable=False))

streams = Table(
    "streams",
    metadata,
    Column("id", _Key, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("spec", LargeBinary, nullable=False),  # lynearm.v1.StreamSpec
    Column("sealed", Boolean, nullable=False),
    Column("created_unix_nano", BigInteger, nullable=False),
    Column("next_offset", BigInteger, nullable=False),
    Column("trace_count", BigInteger, nullable=False),
    Column("prompt_token_count", BigInteger, nullable=False),
    Column("completion_token_count", BigInteger, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("finished_prompt_count", BigInteger, nullable=False),
    Column("dictionary_count", BigInteger, nullable=False, server_default=text("0")),
    Column("dictionary_bytes", BigInteger, nullable=False, server_default=text("0")),
    Column("max_lag_blocks", BigInteger, nullable=False, server_default=text("0")),  # 0: no bound
    Column("max_lag_traces", BigInteger, nullable=False, server_default=text("0")),
    # Of the blocks that retention has left: the offset of the first, and their bytes.
    Column("first_offset", BigInteger, nullable=False, server_default=text("0")),
    Column("retained_bytes", BigInteger, nullable=False, server_default=text("0")),
    # lynearm.v1.Retention; 0 and nothing: no bound. The consumers' names have spaces between them.
    Column("max_age_seconds", BigInteger, nullable=False, server_default=text("0")),
    Column("max_bytes", BigInteger, nullable=False, server_default=text("0")),
    Column("read_by", Text, nullable=False, server_default=text("''")),
    # Ids are never used again: memory of a deleted stream must not match its successor.
    sqlite_autoincrement=True,
)

producers = Table(
    "producers",
    metadata,
    Column("id", _Key, primary_key=True),
    Column("stream_id", _Key, ForeignKey("streams.id"), nullable=False),
    Column("producer_id", Text, nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("last_sequence", BigInteger, nullable=False),
    UniqueConstraint("stream_id", "producer_id"),
    sqlite_autoincrement=True,
)

# A row without blocks says that the object was condemned: see `expiry`.
objects = Table(
    "objects",
    metadata,
    Column("id", _Key, primary_key=True),
    Column("key", Text, nullable=False, unique=True),
    Column("created_unix_nano", BigInteger, nullable=False, server_default=text("0")),
)

blocks = Table(
    "blocks",
    metadata,
    Column("stream_id", _Key, ForeignKey("streams.id"), primary_key=True),
    Column("offset", BigInteger, primary_key=True),
    Column("object_id", _Key, ForeignKey("objects.id"), nullable=False),
    Column("position", BigInteger, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("checksum", LargeBinary, nullable=False),  # 8 bytes, big endian: SQL integers are signed
    Column("trace_count", BigInteger, nullable=False),
    Column("prompt_token_count", BigInteger, nullable=False),
    Column("completion_token_count", BigInteger, nullable=False),
    Column("producer_key", _Key, ForeignKey("producers.id"), nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("sequence", BigInteger, nullable=False),
    Column("labels", LargeBinary),  # lynearm.v1.BlockLabels; nothing where nothing is known
    UniqueConstraint("producer_key", "epoch", "sequence"),
    Index("blocks_by_object", "object_id"),
    sqlite_with_rowid=False,
)

# What a publish that is repeated is compared with, once retention has taken the block: see `expiry`.
expired_blocks = Table(
    "expired_blocks",
    metadata,
    Column("producer_key", _Key, ForeignKey("producers.id"), primary_key=True),
    Column("epoch", BigInteger, primary_key=True),
    Column("sequence", BigInteger, primary_key=True),
    Column("stream_id", _Key, ForeignKey("streams.id"), nullable=False),
    Column("offset", BigInteger, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("checksum", LargeBinary, nullable=False),  # as in blocks
    Index("expired_blocks_by_stream", "stream_id"),
    sqlite_with_rowid=False,
)

finished_prompts = Table(
    "finished_prompts",
    metadata,
    Column("position", _Key, primary_key=True),
    Column("stream_id", _Key, ForeignKey("streams.id"), nullable=False),
    Column("prompt_id", Text, nullable=False),
    Column("offset", BigInteger, nullable=False),
    UniqueConstraint("stream_id", "prompt_id"),
    Index("finished_prompts_by_position", "stream_id", "position"),
    sqlite_autoincrement=True,
)

# With rowid, unlike blocks: its index on the key then answers whether one is there without touching content.
dictionaries = Table(
    "dictionaries",
    metadata,
    Column("stream_id", _Key, ForeignKey("streams.id"), primary_key=True),
    Column("digest", LargeBinary, primary_key=True),
    Column("content", LargeBinary, nullable=False),
)

# Small things about a stream that are no traces; with rowid, as dictionaries.
attachments = Table(
    "attachments",
    metadata,
    Column("stream_id", _Key, ForeignKey("streams.id"), primary_key=True),
    Column("name", Text, primary_key=True),
    Column("size_bytes", BigInteger, nullable=False),
    Column("updated_unix_nano", BigInteger, nullable=False),
    Column("content", LargeBinary, nullable=False),
)

# One row: the store that holds the objects.
block_store = Table(
    "block_store",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("identity", Text, nullable=False),
)

# Of a prompt whose samples lie in several blocks, or are not all there: one row for each of the blocks. Of a
# prompt that one block finished whole, finished_prompts says all.
finished_samples = Table(
    "finished_samples",
    metadata,
    Column("stream_id", _Key, ForeignKey("streams.id"), primary_key=True),
    Column("prompt_id", Text, primary_key=True),
    Column("offset", BigInteger, primary_key=True),
    Column("sample_indices", LargeBinary, nullable=False),  # 4 bytes each, little endian, ascending
    sqlite_with_rowid=False,
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", _Key, primary_key=True),
    Column("stream_id", _Key, ForeignKey("streams.id"), nullable=False),
    Column("name", Text, nullable=False),
    Column("samples_per_prompt", BigInteger, nullable=False),
    Column("prompt_count", BigInteger, nullable=False),
    Column("content_sha256", LargeBinary, nullable=False),
    Column("stored_prompt_count", BigInteger, nullable=False),
    Column("stored_sha256", LargeBinary, nullable=False),  # digest of what is stored so far
    Column("created_unix_nano", BigInteger, nullable=False),
    Column("next_unit", BigInteger, nullable=False),  # units below it are done, or belong to a lease's row
    Column("done_count", BigInteger, nullable=False),
    Column("cancelled", Boolean, nullable=False),  # its prompts and leases are gone then
    Column("failed_count", BigInteger, nullable=False, server_default=text("0")),  # counted in done_count
    UniqueConstraint("stream_id", "name"),
    sqlite_autoincrement=True,
)

# Many prompts a row. With rowid: the contents are large.
job_prompts = Table(
    "job_prompts",
    metadata,
    Column("job_id", _Key, ForeignKey("jobs.id"), primary_key=True),
    Column("first_prompt", BigInteger, primary_key=True),
    Column("prompt_count", BigInteger, nullable=False),
    Column("prompt_ids", LargeBinary, nullable=False),  # packed, see `packing`
    Column("contents", LargeBinary, nullable=False),  # packed, then zstd
)

# Units that were handed out once and are not all done; a row goes when they are.
leases = Table(
    "leases",
    metadata,
    Column("id", _Key, primary_key=True),
    Column("job_id", _Key, ForeignKey("jobs.id"), nullable=False),
    Column("first_unit", BigInteger, nullable=False),
    Column("done", LargeBinary, nullable=False),  # a byte for each unit: 1 when it is done
    Column("open_count", BigInteger, nullable=False),  # units that are not done
    Column("holder", Text, nullable=False),  # empty: nobody
    Column("generation", BigInteger, nullable=False),  # how often it was handed out
    Column("news", BigInteger, nullable=False),  # how often its holder was heard of
    Index("leases_by_job", "job_id", "first_unit"),
    # Ids are never used again: what somebody once held must not match another lease.
    sqlite_autoincrement=True,
)

# Units that were given up: done, and without a trace.
failed_prompts = Table(
    "failed_prompts",
    metadata,
    Column("position", _Key, primary_key=True),
    Column("job_id", _Key, ForeignKey("jobs.id"), nullable=False),
    Column("prompt_id", Text, nullable=False),
    Column("sample_indices", LargeBinary, nullable=False),  # 4 bytes each, little endian, ascending
    Column("reason", Text, nullable=False),
    Index("failed_prompts_by_job", "job_id", "position"),
    sqlite_autoincrement=True,
)

consumers = Table(
    "consumers",
    metadata,
    Column("stream_id", _Key, ForeignKey("streams.id"), primary_key=True),
    Column("name", Text, primary_key=True),
    Column("offset", BigInteger, nullable=False),
    Column("trace_index", BigInteger, nullable=False),
    Column("updated_unix_nano", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)
