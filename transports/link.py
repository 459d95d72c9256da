"""A link over a stream of bytes: frames in, frames out, and its end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from pccl.core.codec import WireError
from pccl.transports.base import Link, LinkHandler
from pccl.transports.framing import STAGE_BYTES, FrameReader, FrameWriter
from pccl.transports.region import OtherShared
from pccl.transports.wire import Wire

READS_AT_ONCE = 8
"""Reads of one link before others get their turn."""
WRITES_AT_ONCE = 16
"""Writes, likewise: where the other side keeps up, there is always room."""
LINGER = 1.0
"""Seconds that a closed link waits for the other side to read what is under way."""


class WireLink(Link):
    """A proved connection to the peer `uid`. It reads from the moment that `open` gives it a handler."""

    def __init__(self, wire: Wire, uid: int, *, near: OtherShared | None = None, closed: Callable[[WireLink], None] | None = None) -> None:
        self.uid = uid
        self.near = near
        self._wire = wire
        self._closed = closed
        self._loop = asyncio.get_running_loop()
        self._handler: LinkHandler | None = None
        self._reader = FrameReader()
        self._writer = FrameWriter()
        self._writing = False
        self._woken = False
        """While it was writing"""
        self._blocked = False
        self._ending = False
        self._gone = asyncio.Event()
        self._linger: asyncio.TimerHandle | None = None

    def open(self, handler: LinkHandler) -> None:
        """Begin to read and to send."""
        self._handler = handler
        self._reader.serve(partial(handler.frame_begun, self), partial(handler.frame_ended, self))
        self._writer.serve(partial(handler.next_frame, self), partial(handler.frame_sent, self))
        self._wire.notify_readable(self.receive)

    def fileno(self) -> int:
        """The wire's."""
        return self._wire.fileno()

    def wake(self) -> None:
        """There may be frames to send."""
        self._woken = True
        if not self._writing and not self._blocked and not self._ending:
            self._write()

    def abort(self, token: object) -> None:
        """Let go of the memory of frames with this token."""
        self._writer.abort(token)

    def redirect(self) -> None:
        """Let go of the memory that the frame now coming in was to go to."""
        self._reader.redirect()

    def silent_for(self) -> float:
        """Seconds that sent data has waited for any acknowledgement."""
        return self._wire.silent_for()

    def close(self) -> None:
        """Send what is under way, wait a moment for the other side's end, and go."""
        self._forget_handler()
        if not self._ending:
            self._ending = True
            self._wire.notify_writable(None)
            self._wire.notify_readable(None)
            try:
                self._write_last()
                self._wire.shutdown()
            except OSError:
                self._finish()
                return
            self._wire.notify_readable(self._drain)
            self._linger = self._loop.call_later(LINGER, self._finish)

    def _write_last(self) -> None:
        """Send what fits of the frames that were handed over; their memory is not touched after that."""
        buffers = self._writer.buffers()
        try:
            if buffers:
                self._wire.write(buffers)
        except BlockingIOError:  # then what is under way is all
            pass

    async def wait_closed(self) -> None:
        """Until a closed link is gone; an open one is not waited for."""
        if self._ending:
            await self._gone.wait()

    # --- reading ----------------------------------------------------------------------------------------------------

    def receive(self) -> None:
        """Read what is there, or part of it."""
        reader, wire = self._reader, self._wire
        for _ in range(READS_AT_ONCE):
            if self._ending:
                return
            buffers = reader.buffers()
            try:
                n = wire.read(buffers)
                if n:
                    reader.received(n)
            except BlockingIOError:
                return
            except Exception as e:
                self._report(e)
                self._lose(e)
                return
            if not n:
                self._lose(ConnectionResetError("the peer closed the link"))
                return
            if n < sum(map(len, buffers)):
                return

    def _drain(self) -> None:
        """Read to the end, for nothing."""
        scratch = memoryview(bytearray(STAGE_BYTES))
        try:
            for _ in range(READS_AT_ONCE):
                if not self._wire.read([scratch]):
                    break
            else:
                return
        except BlockingIOError:
            return
        except OSError:
            pass
        self._finish()

    # --- writing ----------------------------------------------------------------------------------------------------

    def _writable(self) -> None:
        self._blocked = False
        if not self._ending:
            self._write()
            if not self._blocked:
                self._wire.notify_writable(None)

    def _write(self) -> None:
        self._writing = True
        try:
            for _ in range(WRITES_AT_ONCE):
                buffers = None if self._ending else self._writer.buffers()
                if not buffers:
                    return
                self._woken = False
                self._writer.advance(self._wire.write(buffers))
                if self._writer.empty and not self._woken:
                    return
            if not self._ending:
                self._blocked = True
                self._wire.notify_writable(self._writable)
        except BlockingIOError:
            self._blocked = True
            self._wire.notify_writable(self._writable)
        except Exception as e:
            self._report(e)
            self._loop.call_soon(self._lose, e)
        finally:
            self._writing = False

    def _report(self, error: Exception) -> None:
        """Complain of what is no fault of the peer's. The link is of no use then: a frame was handled by half."""
        if not isinstance(error, (OSError, WireError)):
            self._loop.call_exception_handler({"message": f"the link to peer {self.uid} is given up", "exception": error})

    # --- the end ----------------------------------------------------------------------------------------------------

    def _forget_handler(self) -> LinkHandler | None:
        handler, self._handler = self._handler, None
        self.near = None
        self._reader.serve(None, None)
        self._writer.serve(None, None)
        return handler

    def _lose(self, error: Exception) -> None:
        if self._ending:
            return
        self._ending = True
        handler = self._forget_handler()
        self._finish()
        if handler:
            handler.link_lost(self, error)

    def _finish(self) -> None:
        if self._linger:
            self._linger.cancel()
        self._wire.close()
        self._gone.set()
        closed, self._closed = self._closed, None
        if closed:
            closed(self)
