"""Which scale a block's levels are on, as the rows' part says it; docs/format.md specifies the bytes."""

from __future__ import annotations

from lynearm.wire.dictionaries import Dictionary
from lynearm.wire.errors import CorruptBlockError, UnsupportedFormatError
from lynearm.wire.fields import ByteReader, varint
from lynearm.wire.grids import GRID_LAWS, Bits, Counts, Grid, LogitGrid, Scale
from lynearm.wire.row_layout import ORDER_OF_DICTIONARY, OWN_TABLES, SCALE_OF_DICTIONARY
from lynearm.wire.specs import MAX_VOCAB_SIZE, CodecMode

_GRID, _BITS, _BF16, _FP16, _COUNTS = range(5)


def write_scale(scale: Scale) -> bytes:
    """Kind and parameters; V stands before them."""
    if isinstance(scale, Grid):
        head = bytes((_GRID,))
        return head + varint(scale.scale_millionths) + varint(scale.cap_hundred_thousandths)
    if isinstance(scale, Bits):
        return bytes((_BITS,))
    if isinstance(scale, Counts):
        return bytes((_COUNTS,)) + varint(scale.draws)
    return bytes((_BF16 if scale.mantissa_bits == 7 else _FP16,))


def read_scale(
    head: ByteReader, flags: int, mode: CodecMode, dictionary: Dictionary | None
) -> tuple[int, Scale]:
    """V and the scale.

    Raises:
        CorruptBlockError: if V is out of bounds or not the dictionary's, or the scale does not suit the mode.
        UnsupportedFormatError: if the kind is not known.
    """
    if flags & SCALE_OF_DICTIONARY and dictionary is not None:
        if dictionary.grid is None or mode not in GRID_LAWS:
            raise CorruptBlockError(f"a block in mode {mode!r} has the scale of a dictionary without one")
        return dictionary.vocab_size, dictionary.grid
    vocab_size = head.varint()
    if not 0 < vocab_size <= MAX_VOCAB_SIZE:
        raise CorruptBlockError(f"a vocabulary of {vocab_size}, expected 1 to {MAX_VOCAB_SIZE}")
    uses_dictionary = flags & ORDER_OF_DICTIONARY or not flags & OWN_TABLES
    if dictionary is not None and uses_dictionary and dictionary.vocab_size != vocab_size:
        raise CorruptBlockError(
            f"a payload over {vocab_size} tokens, a dictionary over {dictionary.vocab_size}"
        )
    kind = head.byte()
    scale: Scale
    if kind == _GRID:
        scale = Grid(head.varint(), head.varint())
    elif kind == _BITS:
        scale = Bits()
    elif kind in (_BF16, _FP16):
        scale = LogitGrid(7 if kind == _BF16 else 10)
    elif kind == _COUNTS:
        scale = Counts(head.varint())
    else:
        raise UnsupportedFormatError(f"scale {kind} is not known to this reader", "upgrade lynearm")
    suiting: dict[CodecMode, tuple[int, ...]] = {
        "exact": (_BITS, _BF16, _FP16),
        "sampled": (_COUNTS,),
    }
    if kind not in suiting.get(mode, (_GRID,)):
        raise CorruptBlockError(f"a block in mode {mode!r} has scale {kind}")
    return vocab_size, scale
