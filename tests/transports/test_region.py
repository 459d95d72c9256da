"""Memory shared by processes of one host: who may do what with it, and what is left of it."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import select
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from pccl.transports.region import ASLEEP, FIRST, Neighbour, Region, supported

pytestmark = [pytest.mark.process, pytest.mark.skipif(not supported(), reason="regions need Linux on x86-64")]

SIZE = 1 << 20


@pytest.fixture
def region() -> Iterator[Region]:
    made = Region(1 << 16, SIZE)
    yield made
    made.close()


@contextmanager
def met(region: Region, pid: int) -> Iterator[Neighbour]:
    """A region as a neighbour has it; its process is the one of this number."""
    other = Neighbour(pid, region.offered(), os.dup(region.bell))
    try:
        yield other
    finally:
        other.close()


class Child:
    """A forked process that does one thing, says so, and waits to be killed."""

    def __init__(self, work: Callable[[], object]) -> None:
        said, say = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            try:
                os.write(say, repr(work()).encode())
                signal.pause()
            finally:
                os._exit(1)
        os.close(say)
        with open(said, "rb", buffering=0) as file:
            self.said = file.read(1000).decode()

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.pid:
            self.kill()


def raises(work: Callable[[], Any]) -> str:
    try:
        return f"no error: {work()!r}"
    except (OSError, TypeError, ValueError) as e:
        return type(e).__name__


def test_what_the_owner_writes_its_neighbours_read_and_cannot_write(region: Region) -> None:
    with met(region, os.getpid()) as other:
        region.words[FIRST // 8] = 1 << 63 | 5
        region.view(FIRST + 64, 3)[:] = (1, 2, 3)
        assert other.words[FIRST // 8] == 1 << 63 | 5
        assert other.view(FIRST + 64, 3).tolist() == [1, 2, 3]
        with pytest.raises(TypeError):
            other.words[FIRST // 8] = 0
        with pytest.raises(ValueError, match="read-only"):
            other.view(FIRST, 8)[:] = 0
        assert region.words[FIRST // 8] == 1 << 63 | 5


def test_a_neighbour_cannot_map_it_for_writing_nor_write_through_its_descriptor(region: Region) -> None:
    fd = region.offered()
    try:
        for attempt in (
            lambda: mmap.mmap(fd, SIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE),
            lambda: os.pwrite(fd, b"x", FIRST),
            lambda: os.ftruncate(fd, 0),
            lambda: fcntl.fcntl(fd, 1033, 8),  # F_ADD_SEALS, F_SEAL_WRITE
        ):
            with pytest.raises(OSError):  # noqa: PT011
                attempt()
    finally:
        os.close(fd)


def test_nobody_can_cut_it_off_under_a_reader_not_even_its_owner(region: Region) -> None:
    for size in (0, SIZE - 4096, SIZE + 4096):
        with pytest.raises(PermissionError):
            os.ftruncate(region.fd, size)
    with met(region, os.getpid()) as other:
        region.view(SIZE - 1, 1)[:] = 7
        assert other.view(SIZE - 1, 1)[0] == 7


def test_it_outlives_its_owner() -> None:
    """What a killed process has written can be read; it is known to be dead."""
    region = Region(1 << 16, SIZE)
    fd = os.dup(region.fd)  # the region's own is closed in a child
    try:

        def write() -> str:
            own = mmap.mmap(fd, SIZE)
            own[FIRST : FIRST + 5] = b"hello"
            return "written"

        with Child(write) as child, met(region, child.pid) as other:
            assert child.said == "'written'"
            assert other.is_alive()
            child.kill()
            child.pid = 0
            assert not other.is_alive()
            region.close()
            assert other.view(FIRST, 5).tobytes() == b"hello"
    finally:
        os.close(fd)
        if region.memory.size:
            region.close()


def test_released_memory_reads_as_zeros(region: Region) -> None:
    region.view(FIRST, 3 * 4096)[:] = 9
    with met(region, os.getpid()) as other:
        assert other.view(FIRST, 3 * 4096).all()
        region.release(FIRST + 1, 3 * 4096 - 2)  # whole pages only
        assert [bool(other.view(FIRST + k * 4096, 4096).any()) for k in range(3)] == [True, False, True]


def test_the_bell(region: Region) -> None:
    with met(region, os.getpid()) as other:
        region.sleeping(True)
        assert other.words[ASLEEP]
        other.ring()
        other.ring()
        assert select.select([region.fileno()], [], [], 0)[0]
        region.receive()
        region.receive()
        assert not select.select([region.fileno()], [], [], 0)[0]
        region.sleeping(False)
        assert not other.words[ASLEEP]


# --- the memory of another process ------------------------------------------------------------------------------------


def test_reading_another_process(region: Region) -> None:
    there = np.arange(10_000, dtype=np.float64)  # a forked child has it at the same address
    address = there.ctypes.data

    def change() -> int:
        there[:] += 1
        return os.getpid()

    with Child(change) as child, met(region, child.pid) as other:
        into = np.zeros(10_000)
        other.read(address, into)
        assert into.tolist() == (np.arange(10_000) + 1).tolist()
        with pytest.raises(OSError) as caught:  # noqa: PT011
            other.read(8, into)
        assert caught.value.errno == errno.EFAULT
        assert other.is_alive()
        child.kill()
        child.pid = 0
        with pytest.raises(ProcessLookupError):
            other.read(address, into)
        assert not other.is_alive()


def test_memory_that_ends_in_the_middle(region: Region) -> None:
    """What can be read of it does not count."""
    page = mmap.PAGESIZE
    libc = ctypes.CDLL(None, use_errno=True)
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    hole = mmap.mmap(-1, 2 * page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(hole))
    with Child(lambda: libc.munmap(address + page, page)) as child, met(region, child.pid) as other:
        assert child.said == "0"
        other.read(address, np.zeros(page, np.uint8))
        with pytest.raises(OSError) as caught:  # noqa: PT011
            other.read(address, np.zeros(page + 1, np.uint8))
        assert caught.value.errno == errno.EFAULT


@pytest.mark.parametrize("stale", [True, False], ids=["that has ended", "that cannot be named here"])
def test_a_process(region: Region, stale: bool) -> None:
    """There is nothing to read, and it is dead; its region can be read."""
    pid = 0
    if stale:
        with Child(lambda: 0) as child:
            pid = child.pid
    with met(region, pid) as other:
        assert not other.is_alive()
        with pytest.raises(OSError):  # noqa: PT011
            other.read(np.zeros(8).ctypes.data, np.zeros(8))
        region.words[FIRST // 8] = 3
        assert other.words[FIRST // 8] == 3


def test_a_number_that_another_process_has_now(region: Region) -> None:
    """It can be read, under the number of the dead one; whether the dead one lives is no matter of its number."""
    there = np.full(10, 5.0)
    with Child(lambda: 0) as first, Child(lambda: there.fill(6)) as second, met(region, first.pid) as other:
        first.kill()
        first.pid = 0
        other._arguments = (second.pid, *other._arguments[1:])  # as if the kernel had given it again
        into = np.zeros(10)
        other.read(there.ctypes.data, into)
        assert into.tolist() == [6.0] * 10
        assert not other.is_alive()


def test_nothing_is_left_open() -> None:
    before = set(os.listdir("/proc/self/fd"))
    region = Region(1 << 16, SIZE)
    with met(region, os.getpid()), met(region, 0):
        pass
    region.close()
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_child_has_none_of_it(region: Region) -> None:
    """Neither the mapping nor the descriptors."""
    with met(region, os.getpid()) as other:
        fds = [region.fd, region.bell, other._bell, other._pidfd]
        targets = [os.readlink(f"/proc/self/fd/{fd}") for fd in fds]
        start = region.memory.ctypes.data

        def look() -> tuple[bool, list[bool]]:
            with open("/proc/self/maps") as maps:
                mapped = any(int(line.split("-")[0], 16) <= start < int(line.split("-")[1].split()[0], 16) for line in maps)
            return mapped, [os.readlink(f"/proc/self/fd/{fd}") == target for fd, target in zip(fds, targets, strict=True)]

        with Child(look) as child:
            assert child.said == repr((False, [False] * 4))
