"""coremltools, imported without its complaints about hardware and versions that we do not use.

coremltools ships no types: its names enter here as Any, once.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Generator
from typing import Any

from lynearm.wire.errors import MissingDependencyError


@contextlib.contextmanager
def quiet() -> Generator[None]:
    """Keeps coremltools' log, warnings and progress bars off the terminal; errors are raised as ever.

    On Linux it logs once for each part of Apple's runtime that is not there, and warns of any newer torch.
    """
    library_log = logging.getLogger("coremltools")
    level = library_log.level
    library_log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        library_log.setLevel(level)


def _load() -> tuple[Any, Any]:
    try:
        with quiet():
            return importlib.import_module("coremltools"), importlib.import_module(
                "coremltools.converters.mil.mil"
            )
    except ImportError as error:
        raise MissingDependencyError(
            f"{error.name or 'coremltools'} is not installed", "pip install 'lynearm[coreml]'"
        ) from error


ct, mil = _load()
mb: Any = mil.Builder
"""Makes operations inside a `mb.program`."""
types: Any = mil.types
get_new_symbol: Any = mil.get_new_symbol
"""A length that is known when the program runs."""
MIL_pb2: Any = ct.proto.MIL_pb2
Model_pb2: Any = ct.proto.Model_pb2
