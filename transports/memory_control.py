"""The control channel in memory: the same contract, without sockets or threads, and with faults to order.

Made for a simulator: everything happens in callbacks of one event loop, at its times, in an order that only its calls decide. Connections
are modelled as what TCP and ZeroMQ's heartbeats make of them: what is sent arrives in order, late, or never because the connection ended.
Handlers are called in the `contextvars` context of the node that they belong to, and what is under way has the network's own.
"""

from __future__ import annotations

import asyncio
import contextvars
import itertools
from collections import deque
from collections.abc import Callable

from pccl.core.codec import MAX_MESSAGE
from pccl.core.errors import ConnectError, InvalidArgument
from pccl.transports.base import ClientHandler, ControlClient, ControlServer, Origin, ServerHandler

Delay = Callable[[str, str], float | None]
"""(source, target) -> seconds that a frame takes now; None: it is lost. Nodes are known by name, servers by their address."""

RETRY = 0.1
"""Seconds between attempts to connect, and after which what was lost is sent again."""


class MemoryControl:
    """A network of servers and clients, and what may befall them."""

    def __init__(
        self, delay: Delay = lambda source, target: 0.0, *, heartbeat_timeout: float = 3.0, heartbeat_interval: float = 0.5
    ) -> None:
        self.heartbeat_timeout = heartbeat_timeout
        self.heartbeat_interval = heartbeat_interval
        self.origins = itertools.count(1)
        self.servers: dict[str, MemoryServer] = {}
        self.context = contextvars.Context()
        self._delay = delay
        self._nodes: dict[str, _Node] = {}
        self._names = itertools.count(1)
        self._cuts: set[tuple[str, str]] = set()  # never iterated over: the order would be another in each run

    def server(self, address: str = "master:48148") -> MemoryServer:
        """A server for this address. After it has been killed or closed, another one may take its place."""
        return MemoryServer(self, address)

    def client(self, address: str, name: str = "", key: str = "") -> MemoryClient:
        """A client that connects to this address, known to the server by its name and its key."""
        return MemoryClient(self, address, name or f"client-{next(self._names)}", key)

    def kill(self, name: str) -> None:
        """End a process: it hears no more, and its connections close."""
        self._nodes[name].end()

    def freeze(self, name: str) -> None:
        """Stop a process as SIGSTOP does: after the heartbeat timeout the others take it for lost."""
        self._nodes[name].pause("frozen")

    def hold(self, name: str) -> None:
        """Hold a process's interpreter: what it sends and is sent waits, but its connections live."""
        self._nodes[name].pause("held")

    def release(self, name: str) -> None:
        """Let a frozen or held process go on."""
        self._nodes[name].pause("")

    def cut(self, source: str, target: str, *, both: bool = True) -> None:
        """Nothing gets from source to target, nor back, until it is mended."""
        self._cuts |= {(source, target), (target, source)} if both else {(source, target)}

    def mend(self, source: str, target: str) -> None:
        """Undo cuts between two nodes."""
        self._cuts -= {(source, target), (target, source)}

    def delay(self, source: str, target: str) -> float | None:
        """What a frame that leaves now will take, or None."""
        return None if (source, target) in self._cuts else self._delay(source, target)

    def add(self, node: _Node) -> None:
        """From now on the node can be named."""
        self._nodes[node.name] = node


class _Node:
    """What servers and clients are: something with a name and connections that can be paused and ended."""

    def __init__(self, network: MemoryControl, name: str) -> None:
        self.network = network
        self.name = name
        self.open = False
        self.paused = ""
        self.connections: dict[int, _Connection] = {}

    def begin(self) -> None:
        """Take part from now on."""
        self.loop = asyncio.get_running_loop()
        self.context = contextvars.copy_context()
        self.open = True
        self.network.add(self)

    def tell(self, handler: Callable[..., None], *args: object) -> None:
        """Call the node's handler, soon and in its own context."""
        self.loop.call_soon(self._told, handler, args, context=self.context)

    def _told(self, handler: Callable[..., None], args: tuple[object, ...]) -> None:
        if self.open:
            handler(*args)

    def pause(self, how: str) -> None:
        """Be "frozen", "held", or neither."""
        self.paused = how
        for connection in self.connections.values():
            connection.advance()

    def end(self) -> None:
        """Take part no more. What was sent is still delivered, unless it never left."""
        self.open = False
        for connection in list(self.connections.values()):
            if self.paused:
                connection.lane_from(self).waiting.clear()
            connection.close(self)
        self.paused = ""

    def arrived(self, connection: _Connection, data: bytes) -> None:
        """A message came."""
        raise NotImplementedError

    def lost(self, connection: _Connection) -> None:
        """A connection ended."""
        raise NotImplementedError


class _Lane:
    """One direction of a connection. None as a frame says that its sender has closed."""

    def __init__(self, connection: _Connection, source: _Node, target: _Node) -> None:
        self.source = source
        self.target = target
        self.waiting: deque[bytes | None] = deque()
        self._connection = connection
        self._flying: deque[tuple[float, bytes | None]] = deque()
        self._last = 0.0
        self._timer: asyncio.Handle | None = None

    def send(self, frame: bytes | None) -> None:
        self.waiting.append(frame)
        self.advance()

    def advance(self) -> None:
        """Look again, soon."""
        self._look_at(self.source.loop.time())

    def _look_at(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        loop, context = self.source.loop, self.source.network.context
        later = when > loop.time()
        self._timer = loop.call_at(when, self._look, context=context) if later else loop.call_soon(self._look, context=context)

    def _look(self) -> None:
        self._timer = None
        if not self._connection.is_open(self.target):
            return
        now = self.source.loop.time()
        again = [] if self._leave(now) else [now + RETRY]
        try:
            self._arrive(now)
        finally:
            if self._flying and not self.target.paused:
                again.append(self._flying[0][0])
            if again:
                self._look_at(min(again))

    def _leave(self, now: float) -> bool:
        """What can leave, leaves; False: something was lost on the way and has to be sent again."""
        network = self.source.network
        while self.waiting and not self.source.paused:
            delay = network.delay(self.source.name, self.target.name)
            if delay is None:
                return False
            self._last = max(self._last, now + delay)
            self._flying.append((self._last, self.waiting.popleft()))
        return True

    def _arrive(self, now: float) -> None:
        while self._flying and self._flying[0][0] <= now and not self.target.paused and self._connection.is_open(self.target):
            _, frame = self._flying.popleft()
            if frame is None:
                self._connection.close(self.target)
                self.target.lost(self._connection)
            else:
                self.target.arrived(self._connection, frame)


class _Connection:
    """Two lanes between a client and a server, and the heartbeats that go over them. Each end notices its end by itself."""

    def __init__(self, client: MemoryClient, server: MemoryServer) -> None:
        self.origin = Origin(next(client.network.origins), client.name, client.key)
        self.known = False
        self._network = client.network
        self._loop = client.loop
        self._lanes = (_Lane(self, client, server), _Lane(self, server, client))
        self._heard: dict[_Node, float] = {lane.target: self._loop.time() for lane in self._lanes}  # the ends that are open
        for lane in self._lanes:
            lane.source.connections[self.origin.number] = self
        self._loop.call_later(self._network.heartbeat_interval, self._beat, context=self._network.context)

    def is_open(self, node: _Node) -> bool:
        return node in self._heard

    def lane_from(self, node: _Node) -> _Lane:
        return next(lane for lane in self._lanes if lane.source is node)

    def send(self, node: _Node, data: bytes) -> None:
        if self.is_open(node):
            self.lane_from(node).send(data)

    def close(self, node: _Node) -> None:
        if self.is_open(node):
            del self._heard[node]
            del node.connections[self.origin.number]
            self.lane_from(node).send(None)

    def advance(self) -> None:
        for lane in self._lanes:
            lane.advance()

    def _beat(self) -> None:
        now = self._loop.time()
        for lane in self._lanes:
            answered = self.is_open(lane.source) and "frozen" not in (lane.source.paused, lane.target.paused)
            if answered and self.is_open(lane.target) and self._network.delay(lane.source.name, lane.target.name) is not None:
                self._heard[lane.target] = now
        for lane in self._lanes:
            node = lane.target
            if self.is_open(node) and not node.paused and now - self._heard[node] >= self._network.heartbeat_timeout:
                self.close(node)
                node.lost(self)
        if self._heard:
            self._loop.call_later(self._network.heartbeat_interval, self._beat, context=self._network.context)


class MemoryServer(_Node, ControlServer):
    """The master's end. Made by `MemoryControl.server`."""

    async def start(self, handler: ServerHandler) -> str:
        """Serve from now on; returns the address for peers."""
        if self.name in self.network.servers:
            raise ConnectError(f"cannot listen on {self.name}: it is in use")
        self._handler = handler
        self.begin()
        self.network.servers[self.name] = self
        return self.name

    def send(self, origin: Origin, data: bytes) -> None:
        """Queue a message; of a connection that is no more, dropped."""
        _check_size(data)
        connection = self.connections.get(origin.number)
        if connection is not None:
            connection.send(self, data)

    def cut(self, origin: Origin) -> None:
        """End a connection. `disconnected` follows."""
        connection = self.connections.get(origin.number)
        if connection is not None:
            connection.close(self)
            self.loop.call_soon(self.lost, connection, context=self.network.context)

    async def close(self) -> None:
        """Stop serving; what was queued gets a moment to leave."""
        self.end()

    def end(self) -> None:
        """Stop serving, at once."""
        if self.open:
            del self.network.servers[self.name]
        super().end()

    def arrived(self, connection: _Connection, data: bytes) -> None:
        """A message came."""
        connection.known = True
        self.tell(self._handler.received, connection.origin, data)

    def lost(self, connection: _Connection) -> None:
        """A connection ended."""
        if self.open and connection.known:
            self.tell(self._handler.disconnected, connection.origin)


class MemoryClient(_Node, ControlClient):
    """A peer's end. Made by `MemoryControl.client`."""

    def __init__(self, network: MemoryControl, address: str, name: str, key: str) -> None:
        super().__init__(network, name)
        self.key = key
        self._address = address

    async def start(self, handler: ClientHandler) -> None:
        """Begin to connect; returns at once."""
        self._handler = handler
        self.begin()
        self.loop.call_soon(self._connect, context=self.network.context)

    def receive(self) -> None:
        """Messages come by the loop."""

    def send(self, data: bytes) -> None:
        """Queue a message for the current connection; between connections, dropped."""
        _check_size(data)
        for connection in self.connections.values():  # at most one
            connection.send(self, data)

    async def close(self) -> None:
        """End the connection; what was queued gets a moment to leave."""
        self.end()

    def arrived(self, connection: _Connection, data: bytes) -> None:
        """A message came."""
        self.tell(self._handler.control_received, data)

    def lost(self, connection: _Connection) -> None:
        """The connection ended."""
        if self.open:
            self.loop.call_later(RETRY, self._connect, context=self.network.context)
            self.tell(self._handler.control_down)

    def _connect(self) -> None:
        server = self.network.servers.get(self._address)
        there, back = (self.network.delay(*way) for way in ((self.name, self._address), (self._address, self.name)))
        if server is None or there is None or back is None:
            self._connected(None)
        else:
            self.loop.call_later(there + back, self._connected, server, context=self.network.context)

    def _connected(self, server: MemoryServer | None) -> None:
        if not self.open:
            return
        if server is None or not server.open or server.paused or self.paused:
            self.loop.call_later(RETRY, self._connect, context=self.network.context)
        else:
            _Connection(self, server)
            self.tell(self._handler.control_up)


def _check_size(data: bytes) -> None:
    if len(data) > MAX_MESSAGE:
        raise InvalidArgument(f"a control message of {len(data)} bytes; {MAX_MESSAGE} are allowed")
