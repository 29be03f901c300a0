import errno
import fcntl
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from models.limits import files_up_to

from lynearm.traces.direct_writes import DIRECT_BYTES, DirectWriter

PAGE = 4096
BUFFER = 4 << 20

direct = pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="direct I/O is Linux's")


def write(path: Path, blocks: Sequence[bytes | memoryview], writer: DirectWriter | None = None) -> None:
    writer = writer or DirectWriter()
    descriptor = writer.create(path, sum(map(len, blocks)))
    try:
        writer.write(descriptor, blocks)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize(
    "sizes",
    [
        (1,),
        (PAGE,),
        (DIRECT_BYTES - 1,),
        (DIRECT_BYTES,),
        (DIRECT_BYTES + 1,),
        (BUFFER,),
        (BUFFER - 1, 1),
        (BUFFER - 1, 2),
        (3 * PAGE - 7, BUFFER, 7, 1),
        (2 * BUFFER + PAGE + 5,),
        tuple(range(1000, 3500)),  # more buffers than one writev takes, and a part of a page at the end
    ],
    ids=lambda sizes: f"{len(sizes)} blocks, {sum(sizes)} bytes",
)
def test_a_file_holds_its_blocks_one_behind_the_other(tmp_path: Path, sizes: Sequence[int]) -> None:
    blocks = [os.urandom(size) for size in sizes]
    write(tmp_path / "file", [memoryview(block) for block in blocks])
    assert (tmp_path / "file").read_bytes() == b"".join(blocks)


def test_a_writer_that_is_kept_mixes_no_files(tmp_path: Path) -> None:
    writer = DirectWriter()
    contents = [os.urandom(size) for size in (BUFFER + PAGE, DIRECT_BYTES, 10, DIRECT_BYTES + 10)]
    for number, content in enumerate(contents):
        write(tmp_path / str(number), [content], writer)
    assert [(tmp_path / str(number)).read_bytes() for number in range(4)] == contents


@direct
def test_only_what_is_large_passes_by_the_page_cache(tmp_path: Path) -> None:
    for name, size_bytes in (("large", DIRECT_BYTES), ("small", DIRECT_BYTES - 1)):
        try:
            descriptor = DirectWriter().create(tmp_path / name, size_bytes)
            flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        finally:
            os.close(descriptor)
        if name == "large" and not flags & os.O_DIRECT:
            pytest.skip("the file system of temporary files knows no direct I/O")
        assert bool(flags & os.O_DIRECT) == (name == "large")


@direct
def test_a_file_system_without_direct_io_is_written_to_as_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_file = os.open

    def refuse(path: Path, flags: int, mode: int = 0o777) -> int:
        descriptor = open_file(path, flags & ~os.O_DIRECT, mode)
        if flags & os.O_DIRECT:
            os.close(descriptor)
            raise OSError(errno.EINVAL, "Invalid argument")
        return descriptor

    monkeypatch.setattr(os, "open", refuse)
    content = os.urandom(DIRECT_BYTES + 1)
    write(tmp_path / "file", [content])
    assert (tmp_path / "file").read_bytes() == content


@direct
def test_a_disk_that_wants_coarser_pages_gets_all_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_file = os.write

    def refuse(descriptor: int, data: memoryview) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return write_file(descriptor, data)

    monkeypatch.setattr(os, "write", refuse)
    content = os.urandom(2 * BUFFER + PAGE + 1)
    write(tmp_path / "file", [content])
    assert (tmp_path / "file").read_bytes() == content


@pytest.mark.parametrize("limit", [PAGE, DIRECT_BYTES + 1, BUFFER, BUFFER + PAGE + 1])
@pytest.mark.parametrize("size", [DIRECT_BYTES - 1, DIRECT_BYTES + 2, 2 * BUFFER])
def test_what_does_not_fit_raises(tmp_path: Path, limit: int, size: int) -> None:
    with files_up_to(limit):
        if size <= limit:
            write(tmp_path / "file", [bytes(size)])
        else:
            with pytest.raises(OSError) as caught:  # noqa: PT011 - the number is what counts
                write(tmp_path / "file", [bytes(size)])
            assert caught.value.errno in (errno.ENOSPC, errno.EFBIG)
    assert (tmp_path / "file").stat().st_size <= limit


def test_a_file_that_is_there_already_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"there")
    with pytest.raises(FileExistsError):
        write(tmp_path / "file", [bytes(DIRECT_BYTES)])
    assert (tmp_path / "file").read_bytes() == b"there"
