"""A link over one or more streams of bytes: frames in, frames out, and its end.

A link has one wire to begin with. Once there is much to send, whoever has dialled it adds stripes: from then on the first wire carries
control frames and small ones only, in order and behind nothing, and large frames leave on whichever stripe has room. Each goes whole on
one wire. What speaks of everything that was sent before it (DISCARDED, MARK) goes on all wires, and counts when it has come on all of them.

A link dies with any of its wires: frames that were handed to the kernel cannot be sent again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from pccl.core.codec import WireError
from pccl.core.frames import Header, Kind
from pccl.core.types import Epoch
from pccl.transports.base import Link, LinkHandler, OutFrame
from pccl.transports.region import OtherShared
from pccl.transports.stripes import Growth
from pccl.transports.track import Track
from pccl.transports.wire import Wire

LINGER = 1.0
"""Seconds that a closed link waits for the other side to read what is under way, and one whose other side is closed for more to come."""
LOOK = 0.25
"""Seconds between two looks at how well stripes do."""


class WireLink(Link):
    """A proved connection to the peer `uid`. It reads from the moment that `open` gives it a handler.

    Args:
        near: what the other side shares with this one.
        closed: is told when the link is gone.
        stripes: the most that it may have.
        dial: makes so many more stripes, and gives each to `add`; None where that is the other side's to do.
    """

    def __init__(
        self,
        wire: Wire,
        uid: int,
        *,
        near: OtherShared | None = None,
        closed: Callable[[WireLink], None] | None = None,
        stripes: int = 0,
        dial: Callable[[WireLink, int], None] | None = None,
    ) -> None:
        self.uid = uid
        self.near = near
        self._first = Track(self, wire)
        self._stripes: list[Track] = []
        self._closed = closed
        self._dial = dial
        self._loop = asyncio.get_running_loop()
        self._handler: LinkHandler | None = None
        self._ending = False
        self._gone = asyncio.Event()
        self._linger: asyncio.TimerHandle | None = None
        self._draining = 0
        self._most = stripes
        self.watching = not stripes
        self._growth = Growth(stripes)
        self._look: asyncio.TimerHandle | None = None
        self._wanted = 0
        self._dialling = 0
        self._acked = 0
        self._barrier = 0
        self._told: dict[Header, int] = {}
        """What speaks of everything before it -> how many wires it has come on, not yet all"""

    def open(self, handler: LinkHandler) -> None:
        """Begin to read and to send."""
        self._handler = handler
        self._open(self._first, partial(handler.next_frame, self))

    def _open(self, track: Track, pull: Callable[[], OutFrame | None]) -> None:
        assert self._handler
        h = self._handler
        track.open(partial(h.frame_begun, self), partial(h.frame_ended, self), self._tell, pull, partial(h.frame_sent, self))

    @property
    def _tracks(self) -> list[Track]:
        return [self._first, *self._stripes]

    def fileno(self) -> int:
        """The first wire's."""
        return self._first.fileno()

    def receive(self) -> None:
        """Read from the first wire what is there, or part of it."""
        self._first.receive()

    def sources(self) -> list[Track]:
        """All wires that bring something."""
        return [track for track in self._tracks if not track.ended]

    def wake(self) -> None:
        """There may be frames to send."""
        if not self._ending:
            self._first.wake()
            for track in self._stripes:
                track.wake()

    def abort(self, token: object) -> None:
        """Let go of the memory of frames with this token."""
        for track in self._tracks:
            track.writer.abort(token)

    def redirect(self, header: Header) -> None:
        """Let go of the memory that a frame was to go to."""
        for track in self._tracks:
            if track.reader.present == header:
                track.reader.redirect()

    def silent_for(self) -> float:
        """Seconds that sent data has waited for any acknowledgement, on any wire."""
        return max([track.wire.silent_for() for track in self._tracks])

    def turned(self, track: Track) -> None:
        """Large frames have kept the loop for a while: see whether small ones have come."""
        if track is not self._first:
            self._first.receive()

    # --- stripes ----------------------------------------------------------------------------------------------------

    def large(self) -> None:
        """There are large frames to send: have a stripe for them, and see whether more are better."""
        self.watching = True
        if not self._stripes:
            self._want(self._growth.begin(self._first.wire.account()))
        self._look = self._loop.call_later(LOOK, self._watch)

    def _watch(self) -> None:
        self._look = None
        if len(self._stripes) == self._most:
            return
        accounts = [track.wire.account() for track in self._stripes]
        if accounts:
            self._want(self._growth.look(accounts))
        acked = sum(account.acked for account in accounts if account)
        if acked == self._acked:
            self.watching = False  # until there are large frames again
        else:
            self._acked = acked
            self._look = self._loop.call_later(LOOK, self._watch)

    def _want(self, count: int) -> None:
        """So many stripes are to be."""
        count = min(count, self._most)
        if self._dial:
            more = count - len(self._stripes) - self._dialling
            if more > 0:
                self._dialling += more
                self._loop.call_soon(self._dial, self, more)  # it may stand still now
        elif count > len(self._stripes) and (count > self._wanted or not self._stripes):
            self._wanted = count
            self._first.writer.push(Header(Kind.STRIPES, Epoch(0, 0, 0), position=count))
            self._loop.call_soon(self._first.wake)

    def add(self, wire: Wire | None) -> None:
        """A stripe has proved itself, or (None) could not be made."""
        self._dialling = max(0, self._dialling - 1)
        if wire is None:
            return
        if self._ending or self._handler is None or any(track.ended for track in self._tracks):
            wire.close()
            return
        if not self._stripes:
            self._first.writer.serve(self._next_small, partial(self._handler.frame_sent, self))
        track = Track(self, wire)
        self._stripes.append(track)
        self._open(track, partial(self._handler.next_frame, self, small=False))
        self._handler.link_changed(self)
        self.wake()

    def _next_small(self) -> OutFrame | None:
        """For the first wire, where there are stripes."""
        assert self._handler
        frame = self._handler.next_frame(self, large=False)
        if frame is None or frame.header.kind not in (Kind.DISCARDED, Kind.MARK):
            return frame
        self._barrier = (self._barrier + 1) & 0xFFFF
        header = frame.header._replace(channel=self._barrier, position=1 + len(self._stripes))
        for track in self._stripes:
            track.writer.push(header)
        self._loop.call_soon(self.wake)
        return frame._replace(header=header)

    def _tell(self, header: Header, good: bool) -> None:
        """A header has come that speaks of what was sent before it."""
        if header.kind == Kind.STRIPES:
            if self._dial:
                self._want(header.position)
            return
        if header.position > 1:
            came = self._told.pop(header, 0) + 1
            if came < header.position:
                self._told[header] = came
                return
            header = header._replace(channel=0, position=0)
        if self._handler:
            self._handler.frame_ended(self, header, good)

    # --- the end ----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Send what is under way, wait a moment for the other side's end, and go."""
        self._forget_handler()
        if not self._ending:
            self._end()
            self._draining = len(self._tracks)
            try:
                for track in self._tracks:
                    track.finish(self._drained)
            except OSError:
                self._finish()
                return
            self._linger = self._loop.call_later(LINGER, self._finish)

    def _drained(self) -> None:
        self._draining -= 1
        if not self._draining:
            self._finish()

    async def wait_closed(self) -> None:
        """Until a closed link is gone; an open one is not waited for."""
        if self._ending:
            await self._gone.wait()

    def lane_ended(self, track: Track) -> None:
        """The other side has closed a wire: the link is lost as soon as nothing is under way on the others."""
        if all(track.ended for track in self._tracks):
            self._lose(ConnectionResetError("the peer closed the link"))
            return
        for other in self._tracks:
            other.mute()
        if self._handler:
            self._handler.link_changed(self)
        if self._linger is None:
            self._linger = self._loop.call_later(LINGER, self._wait_for_rest, sum(track.came for track in self._tracks))

    def _wait_for_rest(self, came: int) -> None:
        now = sum(track.came for track in self._tracks)
        if now == came:
            self._lose(ConnectionResetError("the peer closed a stripe of the link"))
        else:
            self._linger = self._loop.call_later(LINGER, self._wait_for_rest, now)

    def lane_failed(self, error: Exception) -> None:
        """A wire is of no use any more; so the link is not, either. Complain of what is no fault of the peer's."""
        if not isinstance(error, (OSError, WireError)):
            self._loop.call_exception_handler({"message": f"the link to peer {self.uid} is given up", "exception": error})
        self._lose(error)

    def _forget_handler(self) -> LinkHandler | None:
        handler, self._handler = self._handler, None
        near, self.near = self.near, None
        if near and not near.kept:
            near.close()
        for track in self._tracks:
            track.forget()
        return handler

    def _end(self) -> None:
        self._ending = True
        for timer in (self._linger, self._look):
            if timer:
                timer.cancel()
        for track in self._tracks:
            track.stop()

    def _lose(self, error: Exception) -> None:
        if self._ending:
            return
        self._end()
        handler = self._forget_handler()
        self._finish()
        if handler:
            handler.link_lost(self, error)

    def _finish(self) -> None:
        if self._linger:
            self._linger.cancel()
        for track in self._tracks:
            track.wire.close()
        self._gone.set()
        closed, self._closed = self._closed, None
        if closed:
            closed(self)
