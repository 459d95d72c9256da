"""Links within one process and one event loop: for tests and for the simulator, which sets the delays and breaks things.

A `MemoryNetwork` has named nodes. Each callback runs in the `contextvars` context of the node that asked for it, and what is under way
belongs to the network's own, so that a simulator can stop a node and nothing else.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections import deque
from collections.abc import Callable, Sequence

from pccl.transports.memory_region import MemoryNeighbour, MemoryRegion
from pccl.transports.streams import StreamTransport
from pccl.transports.wire import Wire

CAPACITY = 256 << 10
"""Bytes that a direction holds unread, like a socket buffer."""
RETRANSMIT = 0.2
"""Seconds after which something that was lost on the way is sent again."""


class MemoryNetwork:
    """Nodes, and the streams between them.

    Attributes:
        delay: (source, target) -> seconds that something takes from node to node, or None while it would be lost.
        piece: -> the most bytes that travel together next.
        stripes: how many a link may have.
    """

    def __init__(
        self, delay: Callable[[str, str], float | None] = lambda source, target: 0.0, piece: Callable[[], int] = lambda: CAPACITY
    ) -> None:
        self.delay = delay
        self.piece = piece
        self.stripes = 0
        self._listeners: dict[str, MemoryTransport] = {}
        self._wires: dict[str, list[MemoryWire]] = {}
        self.regions: dict[str, MemoryRegion] = {}
        """Of the nodes that live and share memory with others of their host"""
        self._context = contextvars.Context()

    def later(self, delay: float, callback: Callable[..., None], *args: object) -> None:
        """Call back in the network's own context."""
        loop = asyncio.get_running_loop()
        if delay:
            loop.call_later(delay, callback, *args, context=self._context)
        else:
            loop.call_soon(callback, *args, context=self._context)

    def kill(self, node: str) -> None:
        """The node's process has died: its system resets all connections."""
        self._listeners.pop(node, None)
        if node in self.regions:
            self.regions.pop(node).alive = False
        for wire in self._wires.pop(node, []):
            wire.peer.reset_soon()

    def reset(self, a: str, b: str, choose: Callable[[list[MemoryWire]], MemoryWire] | None = None) -> None:
        """Break the streams between two nodes, or the one that is chosen of them; both notice."""
        wires = [w for w in self._wires.get(a, []) if w.peer.node == b]
        for wire in [choose(wires)] if choose and wires else wires:
            wire.reset_soon()
            wire.peer.reset_soon()

    def connect(self, source: str, target: str) -> MemoryWire:
        """A stream from a node to a listening one.

        Raises:
            ConnectionRefusedError: nobody listens there.
        """
        listener = self._listeners.get(target)
        if listener is None:
            raise ConnectionRefusedError(f"nobody listens at {target}")
        near, far = MemoryWire(self, source), MemoryWire(self, target)
        near.peer, far.peer = far, near
        self._wires.setdefault(source, []).append(near)
        self._wires.setdefault(target, []).append(far)
        listener.accept_soon(far)
        return near

    def forget(self, wire: MemoryWire) -> None:
        """The wire is closed."""
        if wire in self._wires.get(wire.node, []):
            self._wires[wire.node].remove(wire)


class MemoryWire(Wire):
    """One end of a stream; `peer` is the other."""

    peer: MemoryWire

    def __init__(self, network: MemoryNetwork, node: str) -> None:
        self.node = node
        self._network = network
        self._loop = asyncio.get_running_loop()
        self._inbox: deque[memoryview] = deque()
        self._unread = 0
        self._ended = False
        """The other side has written its last byte, and it is in the inbox."""
        self._error: OSError | None = None
        self._closed = False
        self._readable: tuple[Callable[[], None], contextvars.Context] | None = None
        self._writable: tuple[Callable[[], None], contextvars.Context] | None = None
        self._way: deque[tuple[float, memoryview | None]] = deque()
        """When something set out for the peer, and what; None for the end"""
        self._on_way = 0
        self._moving = False
        self._unacked = 0
        self._acked_at = 0.0

    @property
    def stripes(self) -> int:
        """What the network says."""
        return self._network.stripes

    def notify_readable(self, callback: Callable[[], None] | None) -> None:
        """Have the callback run in the present context."""
        self._readable = (callback, contextvars.copy_context()) if callback else None
        self._poke_reader()

    def notify_writable(self, callback: Callable[[], None] | None) -> None:
        """Likewise."""
        self._writable = (callback, contextvars.copy_context()) if callback else None
        self._poke_writer()

    def read(self, buffers: Sequence[memoryview]) -> int:
        """Copy what has come."""
        if self._closed:
            raise ConnectionAbortedError("the link is closed")
        got = 0
        for buffer in buffers:
            filled = 0
            while filled < len(buffer) and self._inbox:
                chunk = self._inbox.popleft()
                n = min(len(chunk), len(buffer) - filled)
                buffer[filled : filled + n] = chunk[:n]
                filled += n
                if n < len(chunk):
                    self._inbox.appendleft(chunk[n:])
            got += filled
        self._unread -= got
        if got:
            self._poke_reader()
            self.peer._poke_writer()
            return got
        if self._error:
            raise self._error
        if self._ended:
            return 0
        raise BlockingIOError

    def write(self, buffers: Sequence[memoryview | bytes]) -> int:
        """Take a copy of what fits, and send it on its way."""
        if self._closed:
            raise ConnectionAbortedError("the link is closed")
        if self._error:
            raise self._error
        room = CAPACITY - self._on_way - self.peer._unread
        if room <= 0:
            raise BlockingIOError
        data = bytearray()
        for buffer in buffers:
            data += memoryview(buffer)[: room - len(data)]
            if len(data) >= room:
                break
        if not self._unacked:
            self._acked_at = self._loop.time()
        self._unacked += len(data)
        self._on_way += len(data)
        rest = memoryview(data)
        while rest:
            n = self._network.piece()
            self._send(rest[:n])
            rest = rest[n:]
        return len(data)

    def shutdown(self) -> None:
        """Send the end of the stream."""
        self._send(None)

    def close(self) -> None:
        """The end; what is on its way still arrives."""
        if not self._closed:
            self._closed = True
            self._readable = self._writable = None
            self._network.forget(self)
            self._send(None)

    def silent_for(self) -> float:
        """How long written bytes have waited for any acknowledgement."""
        return self._loop.time() - self._acked_at if self._unacked else 0.0

    def reset_soon(self) -> None:
        """Fail at this end, after what is on its way to it."""
        delay = self._network.delay(self.peer.node, self.node)
        if delay is None:
            self._network.later(RETRANSMIT, self.reset_soon)
        else:
            self._network.later(delay, self._break)

    # --- on the way -------------------------------------------------------------------------------------------------

    def _send(self, chunk: memoryview | None) -> None:
        self._way.append((self._loop.time(), chunk))
        if not self._moving:
            self._moving = True
            self._move()

    def _move(self) -> None:
        """Give the first of what is on its way its time; while the way is cut, try again."""
        delay = self._network.delay(self.node, self.peer.node)
        if delay is None:
            self._network.later(RETRANSMIT, self._move)
        else:
            self._network.later(max(0.0, self._way[0][0] + delay - self._loop.time()), self._arrive)

    def _arrive(self) -> None:
        _, chunk = self._way.popleft()
        peer = self.peer
        if chunk is None:
            peer._ended = True
        else:
            self._on_way -= len(chunk)
            if not peer._closed and peer._error is None:
                peer._inbox.append(chunk)
                peer._unread += len(chunk)
            self._acknowledge(len(chunk))
        peer._poke_reader()
        if self._way:
            self._move()
        else:
            self._moving = False

    def _acknowledge(self, n: int) -> None:
        delay = self._network.delay(self.peer.node, self.node)
        if delay is None:
            self._network.later(RETRANSMIT, self._acknowledge, n)
        else:
            self._network.later(delay, self._acknowledged, n)

    def _acknowledged(self, n: int) -> None:
        self._unacked -= n
        self._acked_at = self._loop.time()

    def _break(self) -> None:
        self._error = ConnectionResetError("the connection was reset")
        self._poke_reader()
        self._poke_writer()

    def _poke_reader(self) -> None:
        if self._readable and (self._inbox or self._ended or self._error):
            self._loop.call_soon(self._run_readable, context=self._readable[1])

    def _run_readable(self) -> None:
        if self._readable and (self._inbox or self._ended or self._error):
            self._readable[0]()

    def _poke_writer(self) -> None:
        if self._writable:
            self._loop.call_soon(self._run_writable, context=self._writable[1])

    def _run_writable(self) -> None:
        if self._writable and (self._error or self._on_way + self.peer._unread < CAPACITY):
            self._writable[0]()


class MemoryTransport(StreamTransport):
    """Dials and accepts links as one node of a network.

    Args:
        region: what nodes of its host see of it.
    """

    def __init__(self, network: MemoryNetwork, node: str, *, region: MemoryRegion | None = None) -> None:
        super().__init__()
        self._network = network
        self._node = node
        self._context = contextvars.copy_context()
        if region:
            network.regions[node] = region

    async def _connect(self, endpoint: str) -> Wire:
        return self._network.connect(self._node, endpoint)

    async def _meet(self, wire: Wire, *, dialled: bool) -> MemoryNeighbour | None:
        regions = self._network.regions
        mine, other = regions.get(self._node), regions.get(wire.peer.node) if isinstance(wire, MemoryWire) else None
        return mine.meet(other) if mine and other else None

    async def _serve(self) -> tuple[str, ...]:
        self._context = contextvars.copy_context()
        self._network._listeners[self._node] = self
        return (self._node,)

    def _stop_serving(self) -> None:
        if self._network._listeners.get(self._node) is self:
            del self._network._listeners[self._node]

    def accept_soon(self, wire: MemoryWire) -> None:
        """A node has dialled: let it prove itself, in this node's context."""
        asyncio.get_running_loop().call_soon(self._welcome_soon, wire, wire.peer.node, context=self._context)
