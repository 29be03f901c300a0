"""Keeps the codec dictionaries that a reader of blocks uses, so that each is fetched once."""

from __future__ import annotations

import threading
from collections import OrderedDict

from lynearm.client.trace_client import TraceClient
from lynearm.wire.errors import InvalidInputError, ServiceUnavailableError

DEFAULT_CAPACITY = 4
"""A stream's blocks name one for long stretches; at most 3 MiB each."""


class DictionaryCache:
    """Finds the dictionaries of one stream by digest; what `decode_block` is given as `dictionaries`.

    Threads may share it; of several that miss the same dictionary, one fetches it. A dictionary that is
    remembered stays right whatever becomes of the stream, since its digest says what it is.

    Args:
        client: Of the service that keeps the stream; must stay open.
        stream: Name of the stream.
        capacity: Dictionaries to remember; those used last stay.
        wait: For a service that is away, as long as it takes; otherwise say so.

    Raises:
        InvalidInputError: if `capacity` is below 1.
    """

    def __init__(
        self, client: TraceClient, stream: str, *, capacity: int = DEFAULT_CAPACITY, wait: bool = False
    ) -> None:
        if capacity < 1:
            raise InvalidInputError(f"capacity is {capacity}, expected at least 1")
        self._client = client
        self._stream = stream
        self._capacity = capacity
        self._wait = wait
        # Held while the service answers; those who find what they need pass by.
        self._fetching = threading.Lock()
        self._guard = threading.Lock()
        self._remembered: OrderedDict[bytes, bytes] = OrderedDict()

    def __call__(self, digest: bytes) -> bytes:
        """The dictionary of that digest.

        Raises:
            LynearmError: as for `TraceClient.get_dictionary`, unless it is remembered.
        """
        dictionary = self._recall(digest)
        if dictionary is not None:
            return dictionary
        with self._fetching:
            dictionary = self._recall(digest)
            if dictionary is None:
                dictionary = self._fetch(digest)
                self._remember(digest, dictionary)
            return dictionary

    def _fetch(self, digest: bytes) -> bytes:
        while True:
            try:
                return self._client.get_dictionary(self._stream, digest)
            except ServiceUnavailableError:
                if not self._wait:
                    raise
            self._client.wait_until_ready()

    def _recall(self, digest: bytes) -> bytes | None:
        with self._guard:
            dictionary = self._remembered.get(digest)
            if dictionary is not None:
                self._remembered.move_to_end(digest)
            return dictionary

    def _remember(self, digest: bytes, dictionary: bytes) -> None:
        with self._guard:
            self._remembered[digest] = dictionary
            if len(self._remembered) > self._capacity:
                self._remembered.popitem(last=False)
