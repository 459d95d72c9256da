"""One wire of a link: frames in, frames out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from pccl.core.frames import Header
from pccl.transports.base import OutFrame
from pccl.transports.framing import STAGE_BYTES, FrameReader, FrameWriter
from pccl.transports.wire import Wire

TURN_BYTES = 1 << 20
"""What one wire reads, or writes, before others get their turn; a read or write begun before is finished."""
TURN_READS = 8
TURN_WRITES = 16
"""Likewise in calls, for frames that are small."""


class LaneHost(Protocol):
    """The link."""

    watching: bool
    """Whether it knows already that there are large frames to send."""

    def large(self) -> None:
        """There are."""

    def turned(self, track: Track) -> None:
        """A whole turn was read: something more urgent may have come meanwhile."""

    def lane_ended(self, track: Track) -> None:
        """The other side writes no more."""

    def lane_failed(self, error: Exception) -> None:
        """The wire is broken, or what came is not what peers send, or a handler raised."""


class Track:
    """Reads and writes one wire from `open` to `stop`."""

    def __init__(self, host: LaneHost, wire: Wire) -> None:
        self.wire = wire
        self.reader = FrameReader()
        self.writer = FrameWriter()
        self.came = 0
        """Times that something did"""
        self.ended = False
        """The other side writes no more"""
        self._host = host
        self._loop = asyncio.get_running_loop()
        self._stopped = True
        self._writing = False
        self._woken = False
        """While it was writing"""
        self._blocked = False

    def open(
        self,
        begun: Callable[[Header], memoryview | None],
        ended: Callable[[Header, bool], None],
        told: Callable[[Header, bool], None],
        pull: Callable[[], OutFrame | None],
        sent: Callable[[OutFrame], None],
    ) -> None:
        """Begin to read and to send; who hears of it is as for `FrameReader.serve` and `FrameWriter.serve`."""
        self._stopped = False
        self.reader.serve(begun, ended, told)
        self.writer.serve(pull, sent)
        self.wire.notify_readable(self.receive)

    def forget(self) -> None:
        """Nobody is told of anything any more."""
        self.reader.serve(None, None)
        self.writer.serve(None, None)

    def fileno(self) -> int:
        """The wire's."""
        return self.wire.fileno()

    # --- reading ----------------------------------------------------------------------------------------------------

    def receive(self) -> None:
        """Read what is there, or part of it."""
        reader, wire = self.reader, self.wire
        turn = 0
        for _ in range(TURN_READS):
            if self._stopped or self.ended:
                return
            buffers = reader.buffers()
            try:
                n = wire.read(buffers)
                if n:
                    self.came += 1
                    reader.received(n)
            except BlockingIOError:
                return
            except Exception as e:
                self._host.lane_failed(e)
                return
            if not n:
                self.ended = True
                wire.notify_readable(None)
                self._host.lane_ended(self)
                return
            turn += n
            if turn >= TURN_BYTES:
                self._host.turned(self)
                return
            if n < sum(map(len, buffers)):
                return

    # --- writing ----------------------------------------------------------------------------------------------------

    def wake(self) -> None:
        """There may be frames to send."""
        self._woken = True
        if not self._writing and not self._blocked and not self._stopped:
            self._write()

    def _writable(self) -> None:
        self._blocked = False
        if not self._stopped:
            self._write()
            if not self._blocked:
                self.wire.notify_writable(None)

    def _write(self) -> None:
        self._writing = True
        turn = 0
        try:
            for _ in range(TURN_WRITES):
                buffers = None if self._stopped else self.writer.buffers()
                if not buffers:
                    return
                self._woken = False
                n = self.wire.write(buffers)
                if self.writer.large:
                    self.writer.large = False
                    if not self._host.watching:
                        self._host.large()
                self.writer.advance(n)
                if self.writer.empty and not self._woken:
                    return
                turn += n
                if turn >= TURN_BYTES:
                    break
            if not self._stopped:
                self._blocked = True
                self.wire.notify_writable(self._writable)
        except BlockingIOError:
            self._blocked = True
            self.wire.notify_writable(self._writable)
        except Exception as e:
            self._loop.call_soon(self._host.lane_failed, e)
        finally:
            self._writing = False

    # --- the end ----------------------------------------------------------------------------------------------------

    def mute(self) -> None:
        """Write no more."""
        self._blocked = True
        self.wire.notify_writable(None)

    def stop(self) -> None:
        """Neither read nor write any more."""
        self._stopped = True
        self.wire.notify_writable(None)
        self.wire.notify_readable(None)

    def finish(self, drained: Callable[[], None]) -> None:
        """Send what fits of the frames that were handed over, whose memory is not touched after that, and wait for the other side's end.

        Raises:
            OSError: the wire is broken; `drained` is not called.
        """
        self.stop()
        buffers = self.writer.buffers()
        try:
            if buffers:
                self.wire.write(buffers)
        except BlockingIOError:  # then what is under way is all
            pass
        self.wire.shutdown()
        self.wire.notify_readable(lambda: self._drain(drained))

    def _drain(self, drained: Callable[[], None]) -> None:
        """Read to the end, for nothing."""
        scratch = memoryview(bytearray(STAGE_BYTES))
        try:
            for _ in range(TURN_READS):
                if not self.wire.read([scratch]):
                    break
            else:
                return
        except BlockingIOError:
            return
        except OSError:
            pass
        self.wire.notify_readable(None)
        drained()
