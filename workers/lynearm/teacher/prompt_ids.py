"""Which prompt ids have been seen, in bounded memory, however many there are.

A private SQLite database without a name: it lives in a cache of fixed size, and what does not fit there in a
file that nobody sees and that goes with it. 2 µs an id at 100,000 of them, 4 µs and 85 MB of process in all
at 4 million.
"""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
from collections.abc import Generator
from types import TracebackType
from typing import Self

from lynearm.wire.errors import StorageError, StorageFullError

_CACHE_KIB = 64 << 10

_DIGEST_BYTES = 16
"""Two of 2^40 ids share such a digest with a probability of 2^-49."""


class SeenIds:
    """Remembers ids and where each was first. A context manager."""

    def __init__(self) -> None:
        self._files: dict[str, int] = {}
        with _storage_errors():
            self._database = sqlite3.connect("", isolation_level=None)
            for setting in ("journal_mode = OFF", "synchronous = OFF", f"cache_size = -{_CACHE_KIB}"):
                self._database.execute(f"PRAGMA {setting}")
            self._database.execute(
                "CREATE TABLE seen (digest BLOB PRIMARY KEY, file INTEGER, line INTEGER) WITHOUT ROWID"
            )
            self._database.execute("BEGIN")

    def __enter__(self) -> Self:
        """Nothing but itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Forget everything."""
        self._database.close()

    def add(self, prompt_id: str, file: str, line: int) -> tuple[str, int] | None:
        """Remember an id.

        Returns:
            The file and line where it was seen before; None where it is new.

        Raises:
            StorageError, StorageFullError: if the directory for temporary files takes no more.
        """
        digest = hashlib.blake2b(prompt_id.encode(), digest_size=_DIGEST_BYTES).digest()
        number = self._files.setdefault(file, len(self._files))
        with _storage_errors():
            added = self._database.execute(
                "INSERT OR IGNORE INTO seen VALUES (?, ?, ?)", (digest, number, line)
            )
            if added.rowcount:
                return None
            query = self._database.execute("SELECT file, line FROM seen WHERE digest = ?", (digest,))
            found: tuple[int, int] = query.fetchone()
        return list(self._files)[found[0]], found[1]


@contextlib.contextmanager
def _storage_errors() -> Generator[None]:
    try:
        yield
    except sqlite3.Error as error:
        kind = StorageFullError if "full" in str(error) else StorageError
        raise kind(
            f"ids of prompts cannot be kept in a temporary file: {error}", "make room, or set SQLITE_TMPDIR"
        ) from error
