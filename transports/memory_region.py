"""Regions of nodes in one process, for those of a `MemoryNetwork` that are on one host: the twin of `pccl.transports.region`.

A node's own memory is the process's, so another one reads it as it would in reality, by address. A node that was killed cannot be read any
more; its region can.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import errno
import mmap
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from pccl.transports.region import OtherShared, OwnShared

_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
"""Linux's own number; Python names it since 3.13"""


class MemoryHost:
    """What nodes that share memory have in common.

    Attributes:
        delay: -> seconds until who is rung hears it.
        look: called before any word is read or written: others may act in between, and whoever was about to may end instead, by an
            exception.
    """

    def __init__(self, delay: Callable[[], float] = lambda: 0.0, look: Callable[[], None] = lambda: None) -> None:
        self.delay = delay
        self.look = look
        self.context = contextvars.Context()


class _Words:
    """Words of a region, as somebody sees them."""

    def __init__(self, words: memoryview, look: Callable[[], None]) -> None:
        self._words = words
        self._look = look

    def __getitem__(self, at: int) -> int:
        self._look()
        return int(self._words[at])

    def __setitem__(self, at: int, value: int) -> None:
        self._look()
        self._words[at] = value

    def release(self) -> None:
        self._words.release()


class MemoryRegion(OwnShared):
    """One node's own.

    Args:
        size: bytes; pages that are never touched cost nothing.
        open: the others may read the node's own memory.
    """

    def __init__(self, host: MemoryHost, size: int, *, open: bool = True) -> None:
        self.host = host
        self.open = open
        self.alive = True
        """The node has not been killed."""
        self.map = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
        self.memory = np.frombuffer(self.map, np.uint8)
        self.words: _Words = _Words(memoryview(self.map).cast("Q"), host.look)
        self._bell: tuple[Callable[[], None], contextvars.Context] | None = None

    def fileno(self) -> int:
        """There is none."""
        return -1

    def notify(self, callback: Callable[[], None] | None) -> None:
        """Have the callback run in the present context."""
        self._bell = (callback, contextvars.copy_context()) if callback else None

    def receive(self) -> None:
        """Nothing is left to do."""

    def ring(self) -> None:
        """Somebody rings; it is heard a little later."""
        asyncio.get_running_loop().call_later(self.host.delay(), self._rung, context=self.host.context)

    def _rung(self) -> None:
        if self._bell:
            asyncio.get_running_loop().call_soon(self._hear, context=self._bell[1])

    def _hear(self) -> None:
        if self._bell:
            self._bell[0]()

    def release(self, offset: int, nbytes: int) -> None:
        """Give memory back."""
        low, high = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE, (offset + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if high > low:
            self.map.madvise(mmap.MADV_DONTNEED, low, high - low)

    def meet(self, other: MemoryRegion) -> MemoryNeighbour | None:
        """Another node's region as this one sees it; None if they are on different hosts."""
        return MemoryNeighbour(other, self.open and other.open) if self.host is other.host else None

    def close(self) -> None:
        """The end. Neighbours keep what they have mapped."""
        self._bell = None
        self.memory = np.empty(0, np.uint8)
        self.words.release()
        with contextlib.suppress(BufferError):  # neighbours have views of it
            self.map.close()


class MemoryNeighbour(OtherShared):
    """Another node of this one's host."""

    def __init__(self, region: MemoryRegion, readable: bool) -> None:
        self.readable = readable
        self._region = region
        self.memory = np.frombuffer(region.map, np.uint8)
        self.memory.flags.writeable = False
        self.words: _Words = _Words(memoryview(region.map).cast("Q").toreadonly(), region.host.look)

    def read(self, address: int, into: npt.NDArray[Any]) -> None:
        """Copy from this process's memory, by a way that bears addresses of no memory."""
        if not self._region.alive:
            raise OSError(errno.ESRCH, "the node was killed")
        if not self._region.open:
            raise OSError(errno.EPERM, "the node's memory may not be read")
        with open("/proc/self/mem", "rb", buffering=0) as memory:
            try:
                got = os.preadv(memory.fileno(), [into.view(np.uint8).data], address)
            except OSError:
                got = 0
        if got < into.nbytes:
            raise OSError(errno.EFAULT, "there is no such memory")

    def is_alive(self) -> bool:
        """Whether it was not killed."""
        return self._region.alive

    def ring(self) -> None:
        """Have it look."""
        self._region.ring()

    def close(self) -> None:
        """Let go of it."""
        self.memory = np.empty(0, np.uint8)
        self.words.release()
