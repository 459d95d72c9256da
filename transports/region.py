"""Memory that processes of one host share, and how one reads another's own.

Each process has one `Region`: a memfd that it alone writes and that its neighbours map read-only. A memfd has no name and nothing to
leak: it is gone with the last process that maps it, so what a killed member has written there outlives it, for those who still need it.
A `Neighbour` is another process's region as it is seen here, with the process itself: a descriptor that tells whether it is alive, and,
where the kernel permits it, its whole memory (process_vm_readv(2)).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import platform
import select
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pccl.transports import fork

Bytes = npt.NDArray[np.uint8]

ASLEEP = 0
"""Index of the word by which the owner asks to be rung"""
FIRST = 4096
"""Offset of what is free for use"""

_SEALS = getattr(fcntl, "F_SEAL_SHRINK", 2) | getattr(fcntl, "F_SEAL_GROW", 4) | getattr(fcntl, "F_SEAL_SEAL", 1)
_orphans: list[mmap.mmap] = []
"""Of a forked child: maps that it does not have; to unmap them would unmap what has come there since"""
_PR_SET_PTRACER = 0x59616D61
_PR_SET_PTRACER_ANY = ctypes.c_ulong(-1)
_YAMA = "/proc/sys/kernel/yama/ptrace_scope"


def supported() -> bool:
    """Whether regions work here: Linux, on a processor that keeps the order of stores and of loads (x86-64), since Python has no fences."""
    return sys.platform == "linux" and platform.machine() in ("x86_64", "AMD64") and hasattr(os, "memfd_create")


class Words(Protocol):
    """64-bit words in a row."""

    def __getitem__(self, at: int, /) -> int: ...
    def __setitem__(self, at: int, value: int, /) -> None: ...


class Shared(ABC):
    """A process's region, one's own or a neighbour's."""

    memory: Bytes
    """All of it"""
    words: Words
    """It as 64-bit words. A store is seen by others after all stores before it."""

    def view(self, offset: int, nbytes: int) -> Bytes:
        """A part of it."""
        return self.memory[offset : offset + nbytes]


class OwnShared(Shared):
    """One's own: written here and read by the others."""

    def sleeping(self, asleep: bool) -> None:
        """Say whether neighbours have to ring. After True, look once more for what they have written: they may not have seen it."""
        self.words[ASLEEP] = asleep
        if asleep:
            full_fence()

    @abstractmethod
    def fileno(self) -> int:
        """What becomes readable when a neighbour rings; -1 if there is nothing."""

    @abstractmethod
    def notify(self, callback: Callable[[], None] | None) -> None:
        """Call this from the loop whenever a neighbour rings (again and again until `receive`); None to stop."""

    @abstractmethod
    def receive(self) -> None:
        """Hear the bell."""

    @abstractmethod
    def release(self, offset: int, nbytes: int) -> None:
        """Give the memory of a part back to the system; its content is lost."""

    @abstractmethod
    def close(self) -> None:
        """The end. Neighbours keep what they have mapped."""


class OtherShared(Shared):
    """A neighbour's."""

    kept = False
    """Somebody will close it, whatever becomes of the link that brought it."""
    readable: bool
    """Whether its own memory can be read, and its process can read this one's"""

    @abstractmethod
    def read(self, address: int, into: npt.NDArray[Any]) -> None:
        """Copy from the process's own memory.

        Raises:
            OSError: ESRCH: it is no more; EFAULT: there is no such memory; EPERM: the kernel does not permit it any more.
        """

    @abstractmethod
    def is_alive(self) -> bool:
        """Whether the process runs, and is the one that was met."""

    @abstractmethod
    def ring(self) -> None:
        """Wake it, if it sleeps."""

    @abstractmethod
    def close(self) -> None:
        """Let go of it."""


def full_fence() -> None:
    """No load after it is done before a store in front of it: locks are taken by a locked instruction. A new one cannot stay locked."""
    threading.Lock().acquire()


class Region(OwnShared):
    """One's own region. Pages that are never touched cost nothing.

    Args:
        room: bytes for small things.
        size: of all; what is behind the room may lie in huge pages.

    Raises:
        OSError: there can be none.
    """

    def __init__(self, room: int, size: int) -> None:
        self.fd = os.memfd_create("pccl", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, size)
            fcntl.fcntl(self.fd, getattr(fcntl, "F_ADD_SEALS", 1033), _SEALS)  # nobody can cut pages off under a reader
            self._map = mmap.mmap(self.fd, size)
            self._map.madvise(mmap.MADV_DONTFORK)
            self._map.madvise(mmap.MADV_HUGEPAGE, -(-room // mmap.PAGESIZE) * mmap.PAGESIZE)
            self.bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except BaseException:
            os.close(self.fd)
            raise
        fork.guard(self.fd)
        fork.guard(self.bell)
        self.memory = np.frombuffer(self._map, np.uint8)
        self.words: memoryview[int] = memoryview(self._map).cast("Q")
        self.nonce = ctypes.create_string_buffer(os.urandom(16), 16)
        """What a neighbour reads to see whether it can"""
        fork.on_fork(self._in_child)

    def _in_child(self) -> None:
        _orphans.append(self._map)

    def fileno(self) -> int:
        """What becomes readable when a neighbour rings."""
        return self.bell

    def notify(self, callback: Callable[[], None] | None) -> None:
        """By the loop that runs."""
        loop = asyncio.get_running_loop()
        if callback:
            loop.add_reader(self.bell, callback)
        else:
            loop.remove_reader(self.bell)

    def receive(self) -> None:
        """Hear the bell."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.bell)

    def release(self, offset: int, nbytes: int) -> None:
        """Give memory back."""
        low, high = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE, (offset + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if high > low:
            self._map.madvise(mmap.MADV_REMOVE, low, high - low)

    def offered(self) -> int:
        """A descriptor of it for a neighbour, which is for reading. To be closed."""
        return os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """The end. Neighbours keep what they have mapped."""
        self.memory = np.empty(0, np.uint8)
        self.words.release()
        for fd in (self.fd, self.bell):
            fork.unguard(fd)
            os.close(fd)
        with contextlib.suppress(BufferError):  # a caller's thread may still have a view of it
            self._map.close()


class Neighbour(OtherShared):
    """Another process of this host.

    Args:
        pid: as the kernel names it here; 0 if it cannot.
        fd, bell: its region and its bell; they belong to this object from now on.

    Raises:
        OSError: it cannot be mapped.
    """

    def __init__(self, pid: int, fd: int, bell: int) -> None:
        self.readable = False
        self.pid = pid
        self._bell = bell
        self._pidfd = -1
        try:
            self._map = mmap.mmap(fd, os.fstat(fd).st_size, prot=mmap.PROT_READ)
            self._map.madvise(mmap.MADV_DONTFORK)
            if pid > 0:
                with contextlib.suppress(OSError):  # it has ended just now
                    self._pidfd = os.pidfd_open(pid)
        except BaseException:
            os.close(bell)
            raise
        finally:
            os.close(fd)
        fork.guard(bell)
        fork.on_fork(self._in_child)
        self._poll = select.poll()
        if self._pidfd >= 0:
            fork.guard(self._pidfd)
            self._poll.register(self._pidfd, select.POLLIN)
        self.memory = np.frombuffer(self._map, np.uint8)
        self.words: memoryview[int] = memoryview(self._map).cast("Q")
        self._here, self._there = _Piece(), _Piece()
        self._arguments = (pid, ctypes.byref(self._here), 1, ctypes.byref(self._there), 1, 0)

    def _in_child(self) -> None:
        _orphans.append(self._map)

    def read(self, address: int, into: npt.NDArray[Any]) -> None:
        """Copy from its memory."""
        here, there, n = self._here, self._there, into.nbytes
        here.address, there.address = into.__array_interface__["data"][0], address
        done = 0
        while done < n:
            here.length = there.length = n - done
            got = _readv(*self._arguments)
            if got <= 0:
                number = ctypes.get_errno() if got < 0 else errno.EFAULT
                raise OSError(number, os.strerror(number))
            done += got
            here.address += got
            there.address += got

    def is_alive(self) -> bool:
        """Whether its pidfd says so."""
        return self._pidfd >= 0 and not self._poll.poll(0)

    def ring(self) -> None:
        """Add to its eventfd."""
        with contextlib.suppress(BlockingIOError):  # it has been rung often enough
            os.eventfd_write(self._bell, 1)

    def close(self) -> None:
        """Unmap it."""
        self.memory = np.empty(0, np.uint8)
        self.words.release()
        for fd in (self._bell, self._pidfd):
            if fd >= 0:
                fork.unguard(fd)
                os.close(fd)
        self._bell = self._pidfd = -1
        with contextlib.suppress(BufferError):
            self._map.close()


class _Piece(ctypes.Structure):
    """struct iovec"""

    _fields_ = (("address", ctypes.c_size_t), ("length", ctypes.c_size_t))


def _load() -> tuple[Any, Any]:
    libc = ctypes.CDLL(None, use_errno=True)
    readv = getattr(libc, "process_vm_readv", None)
    if readv is not None:
        readv.restype = ctypes.c_ssize_t
        readv.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong]
    return readv or _no_readv, getattr(libc, "prctl", None)


def _no_readv(*args: object) -> int:
    ctypes.set_errno(errno.ENOSYS)
    return -1


_readv, _prctl = _load()


def permit_reading() -> None:
    """Where the Yama module lets only a process's parents read its memory, let processes of its user do so, as they could without Yama."""
    try:
        with open(_YAMA) as file:
            restricted = file.read().strip() == "1"
    except OSError:
        return
    if restricted and _prctl is not None:
        _prctl(_PR_SET_PTRACER, _PR_SET_PTRACER_ANY, 0, 0, 0)
