"""What both ends of the ZeroMQ control channel share: reading a socket from an event loop, its options, its events, and its end."""

from __future__ import annotations

import asyncio
import ipaddress
import itertools
import struct
import threading
from collections.abc import Callable, Iterable

import zmq

from pccl.core.codec import MAX_MESSAGE
from pccl.core.errors import InvalidArgument
from pccl.transports import fork

Socket = zmq.Socket[bytes]
Context = zmq.Context[Socket]

NOBLOCK = int(zmq.NOBLOCK)
"""Not an enum, like what follows: those take longer than the call."""
_EVENTS = int(zmq.EVENTS)
_POLLIN = int(zmq.POLLIN)
BUDGET = 100
"""Messages that are handled before the loop gets to its timers again."""
HIGH_WATER = 16_384
"""Messages that may wait in a connection, each way."""
HANDSHAKE = 3.0
"""Seconds that a connection may take to prove itself."""
LINGER_MS = 200
"""How long queued messages may take to leave at a close."""
CURVE_OVERHEAD = 64
"""More than encryption adds to a message."""

_monitors = itertools.count()


class Pump:
    """Reads a ZeroMQ socket from an event loop, and loses no wake-up.

    libzmq's descriptor becomes readable when something has happened since libzmq last looked, and libzmq looks in every call on the
    socket: a send, too, takes the wake-up for a message that came meanwhile. So there is one rule: whatever touched the socket, it is then
    read until it has nothing more. A read that finds nothing is libzmq's word that the next message will make the descriptor readable.
    Hence `wake` after every send, and again when a handler raises or the budget ends a round early.
    """

    def __init__(self, socket: Socket, read: Callable[[], bool]) -> None:
        """`read` takes and handles one message; False says that there was none."""
        self._loop = asyncio.get_running_loop()
        self._read = read
        self._open = True
        self._woken = False
        self._fd = socket.FD
        self._loop.add_reader(self._fd, self.drain)
        fork.guard(self._fd)
        fork.on_fork(self._forked)
        self.wake()

    def fileno(self) -> int:
        """libzmq's descriptor."""
        return self._fd

    def wake(self) -> None:
        """Read soon, whatever the descriptor says."""
        if not self._woken and self._open:
            self._woken = True
            self._loop.call_soon(self._on_wake)

    def close(self) -> None:
        """Read no more. To be called before the socket is closed."""
        if self._open:
            self._open = False
            self._loop.remove_reader(self._fd)
            fork.unguard(self._fd)

    def _forked(self) -> None:
        # In a child neither the socket nor the loop, whose poller is the parent's, may be touched.
        self._open = False

    def _on_wake(self) -> None:
        self._woken = False
        self.drain()

    def drain(self) -> None:
        """Read what is there."""
        try:
            for _ in range(BUDGET):
                if not self._open or not self._read():
                    return
        except BaseException:
            self.wake()
            raise
        self.wake()


def has_message(socket: Socket) -> bool:
    """Whether there is something to read. To ask costs less than the exception of a read in vain."""
    return bool(int(socket.getsockopt(_EVENTS)) & _POLLIN)


def configure(socket: Socket, heartbeat_timeout: float, heartbeat_interval: float) -> None:
    """Set the options that both ends have in common."""
    timeout, interval = round(heartbeat_timeout * 1000), round(min(heartbeat_interval, heartbeat_timeout / 2) * 1000)
    socket.IPV6 = 1
    socket.LINGER = 0
    socket.SNDHWM = socket.RCVHWM = HIGH_WATER
    socket.MAXMSGSIZE = MAX_MESSAGE + CURVE_OVERHEAD
    socket.HANDSHAKE_IVL = round(HANDSHAKE * 1000)
    # A ping goes out every interval and must be answered, by anything, within the timeout: whoever falls silent is noticed between the
    # timeout and the timeout plus the interval. TTL has the other end count from our pings, too. A ping cannot get out while the connection
    # is stuffed, so that then neither counts: there the kernel (MAXRT) ends a connection whose data or window probes get nowhere.
    socket.HEARTBEAT_IVL = interval
    socket.HEARTBEAT_TIMEOUT = timeout
    socket.HEARTBEAT_TTL = min(-(-timeout // 100) * 100, 65_500)
    socket.TCP_MAXRT = timeout


def open_monitor(socket: Socket, events: Iterable[zmq.Event]) -> Socket:
    """A socket on which libzmq tells of another socket's events, without bound: its I/O thread would wait for a reader that is behind."""
    address = f"inproc://pccl-monitor-{next(_monitors)}"
    mask = 0
    for event in events:
        mask |= event
    socket.monitor(address, mask)
    monitor: Socket = socket.context.socket(zmq.PAIR)
    monitor.LINGER = 0
    monitor.RCVHWM = 0
    monitor.connect(address)
    return monitor


def close_monitored(socket: Socket, monitor: Socket, linger_ms: int = 0) -> None:
    """Close a socket and its monitor."""
    socket.monitor(None, 0)  # first of all: an event that found nobody to read it would stop libzmq's I/O thread for good
    socket.close(linger=linger_ms)
    monitor.close()


def next_event(monitor: Socket) -> tuple[int, int] | None:
    """An event and its value (a descriptor, an errno or a code), if there is one."""
    try:
        parts = monitor.recv_multipart(zmq.NOBLOCK)
    except zmq.Again:
        return None
    event, value = struct.unpack("=Hi", parts[0])
    return event, value


def is_literal(host: str) -> bool:
    """Whether a host is an IP address, which needs no resolving."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def check_size(data: bytes) -> None:
    """Refuse what the other end would take for an attack."""
    if len(data) > MAX_MESSAGE:
        raise InvalidArgument(f"a control message of {len(data)} bytes; {MAX_MESSAGE} are allowed")


async def terminate(context: Context) -> None:
    """End a context whose sockets are closed. Takes until the last message has left or its linger time is over."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()

    def wait() -> None:
        context.term()
        try:
            loop.call_soon_threadsafe(ended.set)
        except RuntimeError:  # the loop is closed: whoever waited has been cancelled
            pass

    thread = threading.Thread(target=wait, name="pccl-zmq-end", daemon=True)
    thread.start()
    await ended.wait()
    thread.join()
