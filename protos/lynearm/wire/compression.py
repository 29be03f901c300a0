"""zstd frames from strangers: nothing is allocated before the size that a frame declares is checked."""

from __future__ import annotations

import zstandard

from lynearm.wire.errors import CorruptBlockError, UnsupportedFormatError


def decompress(data: bytes | memoryview, *, limit: int) -> bytes:
    """The content of exactly one frame.

    `zstandard` ignores `max_output_size` when a frame declares its own size, so that is read first.

    Args:
        data: The frame.
        limit: Largest content accepted, bytes.

    Raises:
        CorruptBlockError: if it is no frame, declares no size, too large a one, or does not hold.
        UnsupportedFormatError: if it needs a zstd dictionary.
    """
    try:
        frame = zstandard.get_frame_parameters(data)
    except zstandard.ZstdError as error:
        raise CorruptBlockError(f"not a zstd frame: {error}") from error
    # A frame without a size declares 2^64 − 1.
    if frame.content_size > limit:
        raise CorruptBlockError(
            f"a zstd frame declares {frame.content_size} bytes, at most {limit} are allowed"
        )
    if frame.dict_id:
        raise UnsupportedFormatError(f"a zstd frame needs zstd dictionary {frame.dict_id}", "upgrade lynearm")
    try:
        content = zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CorruptBlockError(f"a zstd frame does not decompress: {error}") from error
    if len(content) != frame.content_size:
        raise CorruptBlockError(f"a zstd frame of {len(content)} bytes declares {frame.content_size}")
    return content
