"""Links to try from both ends: handlers that write down what they hear, and strangers who have a bare connection and may send anything."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, NamedTuple

from pccl.core.frames import Header, Kind
from pccl.core.types import Epoch
from pccl.transports.base import MOST_SMALL, Link, LinkHandler, LinkTicket, OutFrame
from pccl.transports.framing import FrameReader
from pccl.transports.link import WireLink
from pccl.transports.memory import MemoryNetwork, MemoryTransport, MemoryWire
from pccl.transports.streams import StreamTransport
from pccl.transports.tcp import TcpTransport, TcpWire
from pccl.transports.wire import Wire, offer_proof
from tests.sim.loop import VirtualLoop
from tests.support.control import Log

EPOCH = Epoch(1, 2, 3)
TICKET = LinkTicket(admission=7, secret=b"s" * 32, dialer=2, acceptor=1)
PATIENCE = 20.0


def data(payload: bytes | bytearray | memoryview | None, *, call: int = 0, token: object = None, position: int = 0) -> OutFrame:
    """A slice."""
    length = len(payload) if payload is not None else 0
    header = Header(Kind.DATA, EPOCH, call, position=position, length=length)
    return OutFrame(header, memoryview(payload) if payload is not None else None, token)


class Side(Log, LinkHandler):
    """One end of a link: sends what it is given, keeps what comes."""

    def __init__(self) -> None:
        super().__init__()
        self.outbox: deque[OutFrame] = deque()
        self.place: Callable[[Header], memoryview | None] = lambda header: memoryview(bytearray(header.length))
        self.link: WireLink | None = None
        self._targets: dict[Header, memoryview | None] = {}
        self.next_instead: Callable[[Link], OutFrame | None] | None = None
        self.sent_instead: Callable[[Link, OutFrame], object] | None = None
        self.ended_instead: Callable[[Link, Header, bool], object] | None = None

    def send(self, *frames: OutFrame) -> None:
        self.outbox.extend(frames)
        assert self.link
        self.link.wake()

    @property
    def got(self) -> list[tuple[Header, bytes | None]]:
        """Frames that have come, with the payloads of the good ones."""
        return [event[1:] for event in self.named("ended")]

    @property
    def sent(self) -> list[OutFrame]:
        return [event[1] for event in self.named("sent")]

    @property
    def lost(self) -> list[Exception]:
        return [event[1] for event in self.named("lost")]

    def next_frame(self, link: Link, *, small: bool = True, large: bool = True) -> OutFrame | None:
        if self.next_instead:
            return self.next_instead(link)
        for i, frame in enumerate(self.outbox):
            if small if frame.header.length <= MOST_SMALL else large:
                del self.outbox[i]
                return frame
        return None

    def frame_sent(self, link: Link, frame: OutFrame) -> None:
        if self.sent_instead:
            self.sent_instead(link, frame)
        else:
            self.add("sent", frame)

    def frame_begun(self, link: Link, header: Header) -> memoryview | None:
        target = self._targets[header] = self.place(header)
        self.add("begun", header)
        return target

    def frame_ended(self, link: Link, header: Header, good: bool) -> None:
        if self.ended_instead:
            self.ended_instead(link, header, good)
            return
        target = self._targets.pop(header, None)
        self.add("ended", header, (bytes(target) if target is not None else b"") if good else None)

    def link_lost(self, link: Link, error: Exception) -> None:
        self.add("lost", error)


class Drip(Wire):
    """Passes on a byte at a time."""

    def __init__(self, inner: Wire) -> None:
        self._inner = inner

    def notify_readable(self, callback: Callable[[], None] | None) -> None:
        self._inner.notify_readable(callback)

    def notify_writable(self, callback: Callable[[], None] | None) -> None:
        self._inner.notify_writable(callback)

    def read(self, buffers: Sequence[memoryview]) -> int:
        return self._inner.read([next(b for b in buffers if len(b))[:1]])

    def write(self, buffers: Sequence[memoryview | bytes]) -> int:
        return self._inner.write([next(b for b in buffers if len(b))[:1]])

    def shutdown(self) -> None:
        self._inner.shutdown()

    def close(self) -> None:
        self._inner.close()

    def silent_for(self) -> float:
        return self._inner.silent_for()


class Rig(StreamTransport):
    """A transport whose wires are changed on the way, or handed over as they come in."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.wrap: Callable[[Wire], Wire] = lambda wire: wire
        self.visitors: asyncio.Queue[Wire] | None = None
        self.stripes = 0

    def _stripes_on(self, wire: Wire) -> int:
        return self.stripes

    async def _connect(self, endpoint: str) -> Wire:
        return self.wrap(await super()._connect(endpoint))  # type: ignore[safe-super]

    def _welcome_soon(self, wire: Wire, host: str) -> None:
        if self.visitors is not None:
            self.visitors.put_nowait(wire)
        else:
            super()._welcome_soon(self.wrap(wire), host)


class RigTcp(Rig, TcpTransport):
    """Over TCP."""


class RigMemory(Rig, MemoryTransport):
    """In memory."""


class Received(NamedTuple):
    """A frame as it came."""

    header: Header
    good: bool
    payload: bytes


class Stranger:
    """Whoever has a connection and no manners."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire

    async def send(self, *parts: bytes) -> None:
        """All of it, if it takes for ever."""
        rest = memoryview(b"".join(parts))
        while rest:
            try:
                rest = rest[self.wire.write([rest]) :]
            except BlockingIOError:
                await self._until(self.wire.notify_writable)

    async def receive(self, n: int) -> bytes:
        """So many bytes; fewer if that is all there is."""
        got = memoryview(bytearray(n))
        have = 0
        while have < n:
            try:
                more = self.wire.read([got[have:]])
            except BlockingIOError:
                await self._until(self.wire.notify_readable)
                continue
            except ConnectionError:
                break
            if not more:
                break
            have += more
        return bytes(got[:have])

    async def frames(self, until: Callable[[list[Received]], bool]) -> list[Received]:
        """Read until enough frames have come; returns those that have."""
        got: list[Received] = []
        payloads: list[bytearray] = []

        def begun(header: Header) -> memoryview:
            payloads.append(bytearray(header.length))
            return memoryview(payloads[-1])

        reader = FrameReader()
        reader.serve(begun, lambda h, good: got.append(Received(h, good, bytes(payloads.pop()) if h.length else b"")))
        async with asyncio.timeout(PATIENCE):
            while not until(got):
                try:
                    n = self.wire.read(reader.buffers())
                except BlockingIOError:
                    await self._until(self.wire.notify_readable)
                    continue
                if not n:
                    break
                reader.received(n)
        return got

    async def rest(self) -> bytes:
        """All bytes to the end of the connection, which has to come."""
        got = []
        async with asyncio.timeout(PATIENCE):
            while more := await self.receive(1 << 16):
                got.append(more)
        return b"".join(got)

    def reset(self) -> None:
        """Break the connection."""
        if isinstance(self.wire, MemoryWire):
            self.wire.peer.reset_soon()
        elif isinstance(self.wire, TcpWire):
            self.wire._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.wire.close()

    async def _until(self, notify: Callable[[Callable[[], None] | None], None]) -> None:
        event = asyncio.Event()
        notify(event.set)
        try:
            await event.wait()
        finally:
            notify(None)


class LinkNet:
    """Where links of one kind are made; all that was made is closed with it.

    Args:
        host: of the interface for TCP; empty for memory.
        stripes: how many each link may have.
    """

    def __init__(self, host: str, stripes: int = 0) -> None:
        self.stripes = stripes
        self.memory = MemoryNetwork()
        self.host = host
        self.asked: list[tuple[int, int, int]] = []
        """What strangers claimed"""
        self._transports: list[Rig] = []
        self._sides: list[Side] = []
        self._wires: list[Wire] = []
        self._accepted: asyncio.Queue[Side] = asyncio.Queue()

    def make(self, wrap: Callable[[Wire], Wire] | None = None) -> Rig:
        """A transport, of a node of its own."""
        made: Rig = RigTcp(self.host) if self.host else RigMemory(self.memory, f"node{len(self._transports)}")
        made.stripes = self.stripes
        if wrap:
            made.wrap = wrap
        self._transports.append(made)
        return made

    async def listen(self, at: Rig | None = None, tickets: Sequence[LinkTicket] = (TICKET,)) -> str:
        """Accept links that prove one of the tickets; returns the endpoint."""

        async def admit(admission: int, dialer: int, acceptor: int) -> LinkTicket | None:
            self.asked.append((admission, dialer, acceptor))
            return next((t for t in tickets if t[0] == admission and t[2:] == (dialer, acceptor)), None)

        (endpoint,) = await (at or self.make()).listen(admit, self._accept)
        return endpoint

    def _accept(self, link: Link) -> LinkHandler:
        side = Side()
        assert isinstance(link, WireLink)
        side.link = link
        self._sides.append(side)
        self._accepted.put_nowait(side)
        return side

    async def accepted(self) -> Side:
        async with asyncio.timeout(PATIENCE):
            return await self._accepted.get()

    @property
    def accepts(self) -> int:
        """Links that were accepted and not asked for."""
        return self._accepted.qsize()

    async def dial(self, endpoint: str, ticket: LinkTicket = TICKET, at: Rig | None = None, timeout: float = PATIENCE) -> Side:
        side = Side()
        link = await (at or self.make()).dial((endpoint,), ticket, side, timeout)
        assert isinstance(link, WireLink)
        side.link = link
        self._sides.append(side)
        return side

    async def pair(self, wrap: Callable[[Wire], Wire] | None = None) -> tuple[Side, Side]:
        """Both ends of a link; the first has dialled."""
        endpoint = await self.listen(self.make(wrap))
        return await self.dial(endpoint, at=self.make(wrap)), await self.accepted()

    async def stranger(self, endpoint: str) -> Stranger:
        """A bare connection."""
        wire = await self.make()._connect(endpoint)
        self._wires.append(wire)
        return Stranger(wire)

    async def insider(self) -> tuple[Side, Stranger]:
        """A link, and at its other end somebody who knew the secret and now has only the bare connection."""
        stranger = await self.stranger(await self.listen())
        await offer_proof(stranger.wire, TICKET)
        return await self.accepted(), stranger

    async def open_house(self) -> tuple[str, Callable[[], Any]]:
        """An endpoint that proves nothing: where it is, and how to get the next one who comes."""
        at = self.make()
        at.visitors = asyncio.Queue()
        visitors = at.visitors
        endpoint = await self.listen(at)

        async def next_visitor() -> Stranger:
            async with asyncio.timeout(PATIENCE):
                wire = await visitors.get()
            self._wires.append(wire)
            return Stranger(wire)

        return endpoint, next_visitor

    async def close(self) -> None:
        for side in self._sides:
            if side.link:
                side.link.close()
        for wire in self._wires:
            wire.close()
        for transport in self._transports:
            await transport.close()


def in_virtual_time(main: Coroutine[Any, Any, None]) -> None:
    """Run something that uses memory only; seconds pass as soon as nothing else happens."""
    loop = VirtualLoop()
    try:
        loop.run_until_complete(main)
        assert not loop.errors, loop.errors
    finally:
        loop.close()


async def until_true(condition: Callable[[], Any]) -> None:
    """Poll until something is true that no event tells of."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + PATIENCE
    while not condition():
        assert loop.time() < deadline
        await asyncio.sleep(0)


NETS = {"memory": "", "tcp": "127.0.0.1", "tcp6": "::1"}


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True
