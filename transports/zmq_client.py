"""A peer's end of the control channel: one DEALER per connection.

libzmq would reconnect a socket by itself, and mix what belongs to the old connection with the new one's. So a socket here lives for
one connection only: nothing of it is delivered later, and no message leaves on a later one.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from enum import Enum

import zmq

from pccl.core.address import Address, join, key_text
from pccl.core.errors import AuthenticationError, ConnectError
from pccl.transports import fork
from pccl.transports.base import ClientHandler, ControlClient
from pccl.transports.keys import KeyPair, new_keypair
from pccl.transports.zmq_common import (
    HANDSHAKE,
    LINGER_MS,
    NOBLOCK,
    Context,
    Pump,
    Socket,
    check_size,
    close_monitored,
    configure,
    has_message,
    is_literal,
    next_event,
    open_monitor,
    terminate,
)

RETRY_MIN = 0.05
RETRY_MAX = 0.25
"""Seconds between attempts to connect: a master that is back is found within 0.3 s."""
CONNECT = 2.0
"""Seconds that a host may take to answer at all."""
NEVER = 3600.0

EVENTS = (
    zmq.EVENT_CONNECTED,
    zmq.EVENT_CONNECT_RETRIED,
    zmq.EVENT_HANDSHAKE_SUCCEEDED,
    zmq.EVENT_HANDSHAKE_FAILED_AUTH,
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL,
    zmq.EVENT_DISCONNECTED,
)


class End(Enum):
    """How a connection ended."""

    LOST = "it was up"
    UNREACHED = "nobody listens, or the name is not known"
    DENIED = "the master does not allow the key"
    MISMATCH = "one side has a key and the other has not"
    HUNG_UP = "the other side ended it at once, in the middle of the handshake"
    FAILED = "anything else, in the handshake"


ADVICE = "Take the address that the master prints"
NO_KEY = f"the address lacks the master's key. {ADVICE}, pccl://host:port?key=..."
WRONG_KEY = f"the key in the address is not the master's. {ADVICE}"
NEEDLESS_KEY = f"the address has a key, but the master runs without. {ADVICE}, or start it with its key"


class ZmqClient(ControlClient):
    """Connects to a master over TCP, encrypted if the address has its key, and again whenever the connection ends.

    Args:
        address: the master's.
        keypair: by which the master knows this peer; without it, a new one.
        heartbeat_timeout: seconds of silence after which a connection is over. It is noticed at most heartbeat_interval later.
        heartbeat_interval: seconds between ZeroMQ's own heartbeats.
    """

    def __init__(
        self,
        address: Address,
        *,
        keypair: KeyPair | None = None,
        heartbeat_timeout: float = 3.0,
        heartbeat_interval: float = 0.5,
    ) -> None:
        self._address = address
        self._keypair = keypair or new_keypair()
        self._heartbeat = heartbeat_timeout, heartbeat_interval
        self._open = False
        self._connection: _Connection | None = None
        self._timer: asyncio.Handle | None = None
        self._question: asyncio.Task[None] | None = None
        self._attempts = 0
        self._failures = 0
        self._hung_up = 0

    async def start(self, handler: ClientHandler) -> None:
        """Begin to connect; returns at once."""
        self._handler = handler
        self._loop = asyncio.get_running_loop()
        self._open = True
        self._context: Context = zmq.Context()
        fork.on_fork(self._forked)
        self._timer = self._loop.call_soon(self._connect)

    def fileno(self) -> int:
        """The present connection's."""
        return self._connection.messages.fileno() if self._connection is not None else -1

    def receive(self) -> None:
        """Read."""
        if self._connection is not None:
            self._connection.messages.drain()

    def send(self, data: bytes) -> None:
        """Queue a message for the current connection; between connections, dropped.

        Raises:
            InvalidArgument: it is longer than MAX_MESSAGE.
        """
        check_size(data)
        if self._connection is not None and self._connection.up:
            self._connection.send(data)

    async def close(self) -> None:
        """End the connection; what was queued gets a moment to leave."""
        if not self._open:
            return
        self._open = False
        for pending in (self._timer, self._question):
            if pending is not None:
                pending.cancel()
        if self._connection is not None:
            self._connection.close(linger_ms=LINGER_MS)
        if self._question is not None:
            await asyncio.wait([self._question])
        await terminate(self._context)

    def _forked(self) -> None:
        self._open = False
        if self._connection is not None:
            self._connection.up = False

    def _connect(self) -> None:
        self._attempts += 1
        host, port, key = self._address
        socket = self._context.socket(zmq.DEALER)
        configure(socket, *self._heartbeat)
        # A name may have IPv4 and IPv6 addresses, of which libzmq tries one: ask for either kind in turn.
        socket.IPV6 = int(":" in host if is_literal(host) else self._attempts % 2 == 0)
        # Not IMMEDIATE: at a disconnect it would drop what has come and is not read yet. It is not needed: nothing is sent before it is up.
        socket.RECONNECT_IVL = round(NEVER * 1000)  # that is, tell of a failure, and leave it at that
        socket.CONNECT_TIMEOUT = round(CONNECT * 1000)
        if key is not None:
            socket.CURVE_SERVERKEY = key
            socket.CURVE_PUBLICKEY, socket.CURVE_SECRETKEY = self._keypair
        self._connection = _Connection(socket, self._up, self._handler.control_received, self._over)
        try:
            socket.connect(f"tcp://{join(host, port)}")
        except zmq.ZMQError as e:
            self._drop()
            self._handler.control_refused(ConnectError(f"{join(host, port)} is not an address to connect to ({e})"))

    def _up(self) -> None:
        self._failures = self._hung_up = 0
        self._handler.control_up()

    def _over(self, end: End) -> None:
        self._drop()
        if end is End.DENIED:
            mine = key_text(self._keypair.public)
            self._refuse(f"its key is not allowed. Add this line to the master's list of allowed keys, which it then reads again: {mine}")
        elif end is End.MISMATCH:
            self._refuse(NO_KEY if self._address.key is None else NEEDLESS_KEY)
        elif end is End.HUNG_UP:
            self._question = self._loop.create_task(self._ask_why())
        else:
            self._hung_up = 0
            self._connect_later()
            if end is End.LOST:
                self._handler.control_down()

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _connect_later(self) -> None:
        self._timer = self._loop.call_later(min(RETRY_MIN * 2 ** min(self._failures, 10), RETRY_MAX), self._connect)
        self._failures += 1

    def _refuse(self, reason: str) -> None:
        where = join(self._address.host, self._address.port)
        self._handler.control_refused(AuthenticationError(f"the master at {where} refused this peer: {reason}"))

    async def _ask_why(self) -> None:
        """Find out why the other side hung up.

        A master does so if the keys do not fit, with or without a word, as it happens; but so does one that dies, and whatever else may
        listen there. Its greeting tells. If that leaves only a wrong key as a reason, a second time is no accident.
        """
        offered = await _mechanism(self._address.host, self._address.port)
        has_key = self._address.key is not None
        self._hung_up = self._hung_up + 1 if offered == "CURVE" and has_key else 0
        if offered == "CURVE" and not has_key:
            self._refuse(NO_KEY)
        elif offered == "NULL" and has_key:
            self._refuse(NEEDLESS_KEY)
        elif self._hung_up == 2:
            self._refuse(WRONG_KEY)
        else:
            self._connect_later()


async def _mechanism(host: str, port: int) -> str:
    """Which security mechanism (NULL, CURVE) the greeting of a ZeroMQ socket offers; empty if there is none.

    A ZMTP 3 greeting is 10 bytes of signature, 2 of version and 20 for the mechanism's name. The other side sends all of it once it has
    our major version, and cannot take offence at our mechanism while we name none.
    """
    try:
        async with asyncio.timeout(HANDSHAKE):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(b"\xff" + bytes(8) + b"\x7f" + b"\x03")
                greeting = await reader.readexactly(32)
            finally:
                writer.close()
    except (OSError, EOFError, TimeoutError):
        return ""
    return greeting[12:].rstrip(b"\0").decode("ascii", "replace") if greeting[0] == 0xFF else ""


class _Connection:
    """One attempt to connect, and what comes of it: on_up if it succeeds, then messages, then on_end. on_end closes it."""

    def __init__(
        self, socket: Socket, on_up: Callable[[], None], on_message: Callable[[bytes], None], on_end: Callable[[End], None]
    ) -> None:
        self.up = False
        self._socket = socket
        self._on_up, self._on_message, self._on_end = on_up, on_message, on_end
        self._waiting: deque[bytes] = deque()
        self._end = End.UNREACHED
        self._since = 0.0
        self._monitor = open_monitor(socket, EVENTS)
        self._fd: int | None = None
        self._loop = asyncio.get_running_loop()
        self._events = Pump(self._monitor, self._read_event)
        self.messages = Pump(socket, self._read_message)

    def send(self, data: bytes) -> None:
        """Send, now or when there is room."""
        self._waiting.append(data)
        if len(self._waiting) == 1:
            self._send_next()
        self.messages.wake()

    def close(self, *, linger_ms: int = 0) -> None:
        """Nothing is called any more."""
        self.up = False
        for pump in (self._events, self.messages):
            pump.close()
        if self._fd is not None:
            fork.unguard(self._fd)
        close_monitored(self._socket, self._monitor, linger_ms)

    def _send_next(self) -> None:
        try:
            self._socket.send(self._waiting[0], NOBLOCK)
        except zmq.Again:
            return
        self._waiting.popleft()

    def _read_message(self) -> bool:
        if not has_message(self._socket):
            before = len(self._waiting)
            if before:
                self._send_next()
            return len(self._waiting) < before or (before > 0 and has_message(self._socket))  # the send may have taken its wake-up
        data = self._socket.recv(NOBLOCK)
        if self.up:  # else it is from no master: that speaks when it has been spoken to
            self._on_message(data)
        return True

    def _read_event(self) -> bool:
        found = next_event(self._monitor)
        if found is None:
            return False
        event, value = found
        if event == zmq.EVENT_CONNECTED:
            self._fd = value
            fork.guard(value, libzmq=True)
            self._end = End.FAILED
            self._since = self._loop.time()
        elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._end = End.LOST
            self.up = True
            self._on_up()
        elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH and value == 400:
            self._end = End.DENIED
        elif event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL and value == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH:
            self._end = End.MISMATCH
        elif event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL and self._loop.time() - self._since < HANDSHAKE / 2:
            self._end = End.HUNG_UP
        elif event in (zmq.EVENT_DISCONNECTED, zmq.EVENT_CONNECT_RETRIED):
            try:
                while self.up and self._read_message():  # what it brought before it ended
                    pass
            finally:
                self._on_end(self._end)
        return True
