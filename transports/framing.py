"""Frames in a stream of bytes, without input or output: `FrameReader` says where the next bytes go, `FrameWriter` which go out next.

Payloads go directly from and to the memory that the handler names. Bytes are staged only as far as one read brings the end of a payload and
the headers behind it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from pccl.core.frames import HEADER_BYTES, MAX_PAYLOAD, SEAL_ABORTED, SEAL_BYTES, SEAL_GOOD, Header, Kind, pack_header, unpack_header
from pccl.transports.base import MOST_SMALL, OutFrame

STAGE_BYTES = 16 << 10
BATCH_FRAMES = 16
"""Frames that may be handed to the kernel at once."""
BATCH_BYTES = 256 << 10
FRAME_OVERHEAD = HEADER_BYTES + SEAL_BYTES
FIRST_TOLD = int(Kind.DISCARDED)
"""From this kind on, headers speak of what was sent before them."""
COPIED = 4 << 10
"""Payload bytes up to which a copy costs less than a vector of buffers."""

_DRAIN = memoryview(bytearray(256 << 10))
"""Where worthless bytes go; nobody reads it."""
_NOTHING = memoryview(bytes(MAX_PAYLOAD))
"""What the rest of a voided payload is made of."""


def _nobody(*what: object) -> None:
    return None


class FrameReader:
    """Turns bytes into frames."""

    def __init__(self) -> None:
        self.serve(None, None)
        self._stage = memoryview(bytearray(STAGE_BYTES))
        self._start = 0
        self._end = 0
        self._header: Header | None = None
        self._target: memoryview | None = None
        self._got = 0
        """Payload bytes of the present frame that have come"""

    def serve(
        self,
        begun: Callable[[Header], memoryview | None] | None,
        ended: Callable[[Header, bool], None] | None,
        told: Callable[[Header, bool], None] | None = None,
    ) -> None:
        """Say who hears of frames; without anybody they are dropped.

        Args:
            begun: gets the header of a frame with a payload, returns where that goes, or None to drop it.
            ended: gets a frame's header and whether its payload is good.
            told: in place of `ended` for DISCARDED, MARK and STRIPES.
        """
        self._begun = begun or _nobody
        self._ended = ended or _nobody
        self._told = told or self._ended

    @property
    def present(self) -> Header | None:
        """The frame whose payload is coming in."""
        return self._header

    def buffers(self) -> list[memoryview]:
        """Where to read to: the first is to be filled before the second. Never empty."""
        if self._header is None or self._got == self._header.length:
            return [self._stage[self._end :]]
        left = self._header.length - self._got
        if self._target is None:
            return [_DRAIN[:left], self._stage] if left <= len(_DRAIN) else [_DRAIN]
        return [self._target[self._got :], self._stage]

    def received(self, n: int) -> None:
        """Bytes were read into `buffers`, so many.

        Raises:
            WireError: they are not what a peer sends. The reader is of no further use.
        """
        if self._header is not None and self._got < self._header.length:
            direct = min(n, self._header.length - self._got)
            self._got += direct
            n -= direct
        self._end += n
        self._parse()

    def redirect(self) -> None:
        """The rest of the present payload is dropped; its target is no longer touched."""
        self._target = None

    def _parse(self) -> None:
        stage = self._stage
        while True:
            header = self._header
            if header is None:
                if self._end - self._start < HEADER_BYTES:
                    break
                header = unpack_header(stage[self._start : self._start + HEADER_BYTES])
                self._start += HEADER_BYTES
                if not header.length:
                    (self._ended if header.kind < FIRST_TOLD else self._told)(header, True)
                    continue
                self._header, self._got = header, 0
                self._target = self._begun(header)
            staged = min(self._end - self._start, header.length - self._got)
            if staged:
                if self._target is not None:
                    self._target[self._got : self._got + staged] = stage[self._start : self._start + staged]
                self._got += staged
                self._start += staged
            if self._got < header.length or self._end - self._start < SEAL_BYTES:
                break
            good = stage[self._start : self._start + SEAL_BYTES] == SEAL_GOOD
            self._start += SEAL_BYTES
            whole = self._target is not None
            self._header = self._target = None
            self._ended(header, good and whole)
        if self._start == self._end:
            self._start = self._end = 0
        elif self._start and len(stage) - self._end < HEADER_BYTES + SEAL_BYTES:
            rest = bytes(stage[self._start : self._end])
            stage[: len(rest)] = rest
            self._start, self._end = 0, len(rest)


class _Out:
    """A frame on its way out."""

    __slots__ = ("frame", "parts", "sent", "total", "void")

    def __init__(self, frame: OutFrame) -> None:
        header, payload = frame.header, frame.payload
        self.frame = frame
        self.parts: list[memoryview | bytes] = [pack_header(header)]
        if payload is not None and header.length:
            self.parts += (payload, SEAL_GOOD)
            if header.length <= COPIED:
                self.parts = [b"".join(self.parts)]
        self.total = HEADER_BYTES + (header.length + SEAL_BYTES if header.length else 0)
        self.sent = 0
        self.void = False

    def rest(self) -> list[memoryview | bytes]:
        """What has not been sent."""
        skip, out = self.sent, []
        for part in self.parts:
            if skip >= len(part):
                skip -= len(part)
            else:
                out.append(memoryview(part)[skip:] if skip else part)
                skip = 0
        return out


class FrameWriter:
    """Turns frames into bytes."""

    def __init__(self) -> None:
        self.serve(None, None)
        self._queue: deque[_Out] = deque()
        self._whole: deque[OutFrame] = deque()
        """Frames that are out, of which the handler has not heard"""
        self._had_all = False
        """At the last look there was nothing more to pull"""
        self.large = False
        """A large frame was pulled; for others to note"""

    def serve(self, pull: Callable[[], OutFrame | None] | None, sent: Callable[[OutFrame], None] | None) -> None:
        """Say whose frames to send; without anybody there are no more.

        Args:
            pull: gives the next frame, or None if there is none now.
            sent: hears of every frame that has gone out whole and was not aborted.
        """
        self._pull = pull or _nobody
        self._sent = sent or _nobody

    def push(self, header: Header) -> None:
        """Send this after what was pulled already. `sent` does not hear of it."""
        out = _Out(OutFrame(header, None, None))
        out.void = True
        self._queue.append(out)

    def buffers(self) -> list[memoryview | bytes]:
        """The bytes to send next, in order; empty if there are none."""
        size = 0
        if self._queue:
            size = sum([out.total - out.sent for out in self._queue])
        while len(self._queue) < BATCH_FRAMES and size < BATCH_BYTES:
            frame = self._pull()
            self._had_all = frame is None
            if frame is None:
                break
            out = _Out(frame)
            self._queue.append(out)
            size += out.total
            if out.total > MOST_SMALL + FRAME_OVERHEAD:
                self.large = True
        if len(self._queue) == 1:
            return self._queue[0].rest() if self._queue[0].sent else self._queue[0].parts
        return [part for out in self._queue for part in out.rest()]

    @property
    def empty(self) -> bool:
        """Whether everything is out that could be pulled at the last look."""
        return self._had_all and not self._queue

    def advance(self, n: int) -> None:
        """So many of these bytes have been sent."""
        if len(self._queue) == 1 and n == self._queue[0].total and not self._queue[0].void:
            self._sent(self._queue.popleft().frame)
            return
        while n:
            out = self._queue[0]
            step = min(n, out.total - out.sent)
            out.sent += step
            n -= step
            if out.sent < out.total:
                break
            self._queue.popleft()
            if not out.void:
                self._whole.append(out.frame)
        while self._whole:  # only now that the account is right: who hears of one may abort others, or close
            self._sent(self._whole.popleft())

    def abort(self, token: object) -> None:
        """Let go of the memory of frames with this token. One that has begun is completed from elsewhere and marked worthless."""
        kept: deque[_Out] = deque()
        for out in self._queue:
            if out.frame.token is token and not out.void:
                if not out.sent:
                    continue
                out.void = True
                if length := out.frame.header.length:
                    out.parts = [out.parts[0][:HEADER_BYTES], _NOTHING[:length], SEAL_ABORTED]
                    out.frame = out.frame._replace(payload=None)
            kept.append(out)
        self._queue = kept
        if self._whole:
            self._whole = deque(frame for frame in self._whole if frame.token is not token)
