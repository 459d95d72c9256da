"""Tensors on a GPU: the pinned host memory that a call moves instead, and the copies to and from it.

A thread waits for the device, so that the engine's loop never does: first for what the caller's stream was given before the call,
then for one piece of the input after the other, which the transfer may use as they come. What of the result is final is copied back at
once where the tensors may be overwritten before the verdict; else all of it in the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import mmap
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from pccl.collectives.cuda import Bytes, Event, Gpu, Piece, pieces
from pccl.collectives.pull import Pull
from pccl.collectives.supply import Supply
from pccl.collectives.tensors import DeviceMemory
from pccl.collectives.transfer import Transfer
from pccl.core.errors import CollectiveAborted, InternalError, PcclError

if TYPE_CHECKING:
    from pccl.engine import Engine
    from pccl.operations import Operation

logger = logging.getLogger("pccl")

PIECE = 2 << 20
"""Bytes that are copied as one: few enough to begin early, enough to keep a bus busy while Python thinks."""
AHEAD = 2
"""Pieces that are being fetched at a time."""
KEPT = 10.0
"""Seconds of idleness after which pinned memory is given back to the system: to pin it takes ten times as long as to copy."""
SHORT, LONG = 20e-6, 1e-3
"""Seconds between looks at a caller's stream: at first, and after a while."""


class Pinned:
    """A stretch of host memory, pinned when it is first used."""

    def __init__(self, nbytes: int) -> None:
        self.bytes: Bytes = np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)  # whole pages, shared with no child
        self._gpu: Gpu | None = None

    def pin(self, gpu: Gpu) -> None:
        """Pin it, if it is not. Any thread may do so."""
        if self._gpu is None:
            gpu.pin(self.bytes)
            self._gpu = gpu

    def unpin(self) -> None:
        """It is no longer used."""
        gpu, self._gpu = self._gpu, None
        if gpu:
            with contextlib.suppress(RuntimeError):  # of a device that has failed
                gpu.unpin(self.bytes)


class Pool:
    """The pinned memory of an engine: never more than was in use at one time, and nothing after some seconds of idleness."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._free: list[Pinned] = []
        self._used = 0
        self._most = 0
        self._release: asyncio.TimerHandle | None = None

    def take(self, nbytes: int) -> Pinned:
        """At least so many bytes; hand them back with `give`."""
        fitting = [one for one in self._free if len(one.bytes) >= nbytes]
        if fitting:
            found = min(fitting, key=lambda one: len(one.bytes))
            self._free.remove(found)
        else:
            found = Pinned(-(-max(nbytes, 1) // mmap.PAGESIZE) * mmap.PAGESIZE)
        self._used += len(found.bytes)
        self._most = max(self._most, self._used)
        while self._free and self._used + sum(len(one.bytes) for one in self._free) > self._most:
            self._free.pop(0).unpin()
        return found

    def give(self, pinned: Pinned) -> None:
        """It is not needed any more, and no copy is under way."""
        self._used -= len(pinned.bytes)
        self._free.append(pinned)
        if self._release:
            self._release.cancel()
        self._release = self._loop.call_later(KEPT, self.drop)

    def drop(self) -> None:
        """Give back what is not in use."""
        if self._release:
            self._release.cancel()
        self._release = None
        self._most = self._used
        while self._free:
            self._free.pop().unpin()


class Side:
    """A call's input or output on a GPU, and the host memory that stands for it.

    Args:
        pinned: as large as it at least.
        count: of how many elements.
        adapt: makes what was fetched (from, to element) what the call wants, or its result what is to be stored.
    """

    def __init__(self, memory: DeviceMemory, pinned: Pinned, count: int, adapt: Callable[[int, int], None]) -> None:
        self.mark = memory.mark
        self.gpu = memory.gpu
        self.pinned = pinned
        self.adapt = adapt
        self.pieces = pieces(memory.tensors, PIECE // memory.dtype.itemsize, count)
        self._item = memory.dtype.itemsize

    def host(self, piece: Piece) -> Bytes:
        """Where it lies."""
        return self.pinned.bytes[piece.start * self._item : piece.stop * self._item]


class Staging:
    """The copies of one attempt.

    Args:
        given: the input, if it is on a GPU.
        got: the output, if it is on a GPU.
        early: the output may be overwritten before the call is committed.
    """

    def __init__(self, engine: Engine, given: Side | None, got: Side | None, *, early: bool) -> None:
        self.supply = Supply([0, *(piece.stop for piece in given.pieces)]) if given else None
        """Of the transfer's source"""
        self.final = self._final if got and early else None
        """Hears of what is final of the transfer's target"""
        self._engine = engine
        self._given = given
        self._got = got
        self._early = early
        self._open = [piece.stop - piece.start for piece in got.pieces] if got else []
        """How many elements of each piece of the output are not final"""
        self._unstored = set(range(len(self._open)))
        self._order: list[int] = []
        self._ready = False
        """What the caller's stream had been given is done: the output may be overwritten"""
        self._moved = False
        """The transfer is complete"""
        self._ended = False
        """Nothing is left to be copied before the commit, or it cannot be"""
        self._lock = threading.Lock()
        """Held by whoever begins copies, and by whoever says that there are to be no more"""
        self._stopped = threading.Event()
        self._fetched: Event | None = None
        self._stored: Event | None = None
        """The ends of the copies that were begun"""

    # --- on the engine's loop ----------------------------------------------------------------------------------------

    def start(self, op: Operation, transfer: Transfer | Pull, done: Callable[[], None]) -> None:
        """Begin to copy.

        Args:
            transfer: has been started.
            done: called when it is complete, and what may be stored before the commit is stored.
        """
        self._op, self._transfer, self._done = op, transfer, done
        if self.supply and isinstance(transfer, Transfer):
            self._order = self.supply.order(transfer.program, transfer.layout)
        elif self.supply and self._given:
            self._order = list(range(len(self._given.pieces)))  # which all have to be there before a member shows its input
        self._engine.in_thread(self._fetch)

    def moved(self) -> None:
        """The transfer is complete."""
        self._moved = True
        self._heard(self._go_on)

    def commit(self) -> None:
        """Store the result, if that had to wait.

        Raises:
            InternalError: it cannot be.
        """
        try:
            self._store_all()
            if self._stored:
                self._stored.synchronize()
        except RuntimeError as e:
            raise InternalError(f"{self._op.description} is committed, but {self._fault(e)}") from e

    def stop(self) -> None:
        """Copy nothing any more; no copy is under way when this returns."""
        with self._lock:
            self._stopped.set()
        for event in (self._fetched, self._stored):
            with contextlib.suppress(RuntimeError):  # of a device that has failed, and copies nothing
                if event:
                    event.synchronize()

    def _heard(self, step: Callable[..., None], *args: Any) -> None:
        """Take a step."""
        if not self._stopped.is_set():
            try:
                step(*args)
            except Exception as e:
                self._failed(e)

    def _may_store(self) -> None:
        self._ready = True
        for i in [i for i in self._unstored if self._early and not self._open[i]]:
            self._store(i)
        self._go_on()

    def _came(self, i: int) -> None:
        """A piece of the input is here."""
        assert self._given
        assert self.supply
        start, stop, _ = self._given.pieces[i]
        self._given.adapt(start, stop)
        self.supply.come(i)
        self._transfer.supplied(start, stop)
        self._engine.executor.flush()
        self._go_on()

    def _final(self, start: int, stop: int) -> None:
        """These elements of the output will not change any more."""
        assert self._got
        found = self._got.pieces
        i = bisect_right(found, start, key=lambda piece: piece.stop)
        while i < len(found) and found[i].start < stop:
            self._open[i] -= min(stop, found[i].stop) - max(start, found[i].start)
            if self._ready and not self._open[i]:
                try:
                    self._store(i)
                except Exception as e:
                    self._ended = True
                    self._tell(self._failed, e)  # later: the transfer has yet to finish its step
            i += 1

    def _go_on(self) -> None:
        """Once everything is here: the rest of the result, and the end."""
        if self._ended or not (self._ready and self._moved) or (self.supply and not self.supply.complete):
            return
        self._ended = True
        if self._early:
            self._store_all()
        if self._early and self._stored:
            self._engine.in_thread(self._outlast)
        else:
            self._done()

    def _store_all(self) -> None:
        for i in sorted(self._unstored):
            self._store(i)

    def _store(self, i: int) -> None:
        assert self._got
        piece = self._got.pieces[i]
        self._unstored.discard(i)
        self._got.adapt(piece.start, piece.stop)
        self._stored = self._got.gpu.store(self._got.host(piece), piece.views)

    def _failed(self, error: Exception) -> None:
        if isinstance(error, RuntimeError) and not isinstance(error, PcclError):
            what, survivors = self._fault(error), tuple(m.name for m in self._engine.membership(self._op.comm).view.members)
            error = CollectiveAborted(f"{self._op.description}: {what}", call=self._op.description, reason=what, survivors=survivors)
        self._engine.failed(self._op, error)

    def _fault(self, error: Exception) -> str:
        some = self._given or self._got
        return f"its tensors on {some.gpu.device if some else 'a GPU'} could not be copied ({error})"

    # --- in a thread -------------------------------------------------------------------------------------------------

    def _tell(self, step: Callable[..., None], *args: Any) -> None:
        self._engine.from_thread(self._heard, step, *args)

    def _fetch(self) -> None:
        """Wait for the caller's stream, then copy the input."""
        try:
            sides = [side for side in (self._given, self._got) if side]
            if self._prepare(sides):
                self._tell(self._may_store)
                self._copy()
        except Exception as e:
            self._tell(self._failed, e)

    def _prepare(self, sides: list[Side]) -> bool:
        """Pin memory, and let pass what callers' streams had been given; False if it was stopped."""
        for side in sides:
            with self._lock:
                if self._stopped.is_set():
                    return False
                side.pinned.pin(side.gpu)
        for side in sides:
            delay = SHORT
            while not side.mark.event.query():
                if self._stopped.wait(delay):
                    return False
                delay = min(2 * delay, LONG)
        return True

    def _copy(self) -> None:
        under_way: deque[tuple[int, Event]] = deque()
        for i in self._order:
            assert self._given
            piece = self._given.pieces[i]
            with self._lock:
                if self._stopped.is_set():
                    return
                self._fetched = event = self._given.gpu.fetch(piece.views, self._given.host(piece))
            under_way.append((i, event))
            if len(under_way) == AHEAD:
                self._arrive(*under_way.popleft())
        while under_way:
            self._arrive(*under_way.popleft())

    def _arrive(self, i: int, event: Event) -> None:
        event.synchronize()
        self._tell(self._came, i)

    def _outlast(self) -> None:
        """Wait until the result is on the device."""
        try:
            assert self._stored
            self._stored.synchronize()
            self._tell(self._done)
        except Exception as e:
            self._tell(self._failed, e)
