"""Compilation of the codec's inner loops, in one place: numba, with its gaps in typing kept in here.

Compiled code is cached beside the module, or in the user's cache directory where that is not writable, so
that one process in a fleet's image pays for the compilation and the others load it.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeAlias, TypeVar, cast

import numba as untyped_numba  # type: ignore[import-untyped]  # numba ships no types
import numpy as np
from llvmlite import ir as untyped_ir  # type: ignore[import-untyped]  # nor does llvmlite
from numba.core import types as untyped_types  # type: ignore[import-untyped]

if sys.byteorder != "little":
    raise ImportError("lynearm's codec needs a little-endian machine: blocks are little-endian on every wire")

numba: Any = untyped_numba
ir: Any = untyped_ir
types: Any = untyped_types
intrinsic: Any = importlib.import_module("numba.extending").intrinsic

Scalar: TypeAlias = Any
"""A number inside compiled code: numba infers its type from the caller's."""

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


def compiled(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """The function as machine code: no bounds checks, and other threads run beside it.

    Everything that such a function reads from a block must have been checked, or be checked by it. It is
    compiled anew when any module of this package has changed.
    """
    return _compile(function)


def vectorised(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """As `compiled`, where sums may be taken in any order, so that vectors can take them."""
    return _compile(function, fastmath={"reassoc", "nsz", "contract"})


def _compile(function: Callable[_Parameters, _Result], **more: Any) -> Callable[_Parameters, _Result]:
    options = {"nogil": True, "boundscheck": False, "error_model": "numpy", **more}
    try:
        jitted: Any = numba.njit(cache=True, **options)(function)
        _stamp_cache(jitted)
    except RuntimeError:
        # Neither the package's directory nor the user's is writable: every process compiles for itself.
        jitted = numba.njit(**options)(function)
    return cast("Callable[_Parameters, _Result]", jitted)


def _stamp_cache(jitted: Any) -> None:
    """Have a function's cache count for what all modules say that it may have in it.

    numba looks at the time of the function's own file. But compiled code holds other modules' constants and
    inlined functions, and a cache that outlived a change of those would read and write another format.
    """
    # Without compilation (NUMBA_DISABLE_JIT) there is none.
    index: Any = getattr(getattr(jitted, "_cache", None), "_cache_file", None)
    if index is not None:
        index._source_stamp = (index._source_stamp, digest_of_sources())


@functools.cache
def digest_of_sources() -> str:
    """Names the source of this package's modules."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def inlined(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """The function as a piece of the compiled functions that call it."""
    jitted: object = numba.njit(inline="always")(function)
    return cast("Callable[_Parameters, _Result]", jitted)


def _load(bits: int) -> Any:
    @intrinsic  # type: ignore[untyped-decorator]
    def load(_context: Any, address: Any) -> Any:  # pyright: ignore  # numba calls it untyped
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            del context, signature
            loaded = builder.load(builder.inttoptr(arguments[0], ir.IntType(bits).as_pointer()))
            loaded.align = 1
            return builder.zext(loaded, ir.IntType(64)) if bits < 64 else loaded

        return types.uint64(types.uint64), generate

    return load


def _store(bits: int) -> Any:
    @intrinsic  # type: ignore[untyped-decorator]
    def store(_context: Any, address: Any, value: Any) -> Any:  # pyright: ignore  # as above
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            del signature
            narrow = ir.IntType(bits)
            value = builder.trunc(arguments[1], narrow) if bits < 64 else arguments[1]
            stored = builder.store(value, builder.inttoptr(arguments[0], narrow.as_pointer()))
            stored.align = 1
            return context.get_dummy_value()

        return types.void(types.uint64, types.uint64), generate

    return store


@intrinsic  # type: ignore[untyped-decorator]
def _highest_bit(_context: Any, value: Any) -> Any:  # pyright: ignore  # as above
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del context, signature
        leading = builder.ctlz(arguments[0], ir.Constant(ir.IntType(1), 1))
        return builder.sub(ir.Constant(ir.IntType(64), 63), leading)

    return types.int64(types.int64), generate


highest_bit = cast("Callable[[Any], Any]", _highest_bit)
"""floor(log2) of a positive integer."""

# Inlined functions get addresses in place of arrays: an array that is handed to one is reference-counted
# there for every entry, which takes ten times as long as the entry itself. Callers hold the arrays.
load8 = cast("Callable[[Any], Any]", _load(8))
load32 = cast("Callable[[Any], Any]", _load(32))
load64 = cast("Callable[[Any], Any]", _load(64))
"""The little-endian unsigned integer at an address, as uint64, at any alignment; the caller checks bounds."""

store32 = cast("Callable[[Any, Any], None]", _store(32))
store64 = cast("Callable[[Any, Any], None]", _store(64))
"""Puts the low bits of a uint64 at an address, at any alignment; the caller checks bounds."""


@inlined
def address_of(array: Any) -> Any:
    """Where an array's data begins, as uint64."""
    return np.uint64(array.ctypes.data)
