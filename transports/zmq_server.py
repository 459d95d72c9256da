"""The master's end of the control channel: a ROUTER that knows its connections.

A ROUTER says where a message comes from, but not when its sender is gone. Its monitor says that some descriptor's connection ended, and
a message can be asked which descriptor it came over. Put together that is one `Origin` per connection, from its first message to its end.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import logging
import os
import socket as sockets
from collections import deque
from collections.abc import Iterable

import zmq

from pccl.core.address import Address, is_loopback, join
from pccl.core.errors import ConnectError, InvalidArgument
from pccl.transports import fork
from pccl.transports.base import ControlServer, Origin, ServerHandler
from pccl.transports.keys import AllowList, KeyPair, PathLike
from pccl.transports.zap import Gate, protect
from pccl.transports.zmq_common import (
    HIGH_WATER,
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

log = logging.getLogger(__name__)

WILDCARDS = ("*", "0.0.0.0", "::")
SNDMORE = int(zmq.SNDMORE) | NOBLOCK
RCVMORE = int(zmq.RCVMORE)
GRACE = 0.5
"""Seconds within which the last messages of an ended connection are read, however much others send."""
REMEMBERED = 1024
"""Ended connections that are remembered, so that a message that comes too late is not taken for a new connection's."""

EVENTS = (
    zmq.EVENT_LISTENING,
    zmq.EVENT_ACCEPTED,
    zmq.EVENT_ACCEPT_FAILED,
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL,
    zmq.EVENT_DISCONNECTED,
)


_numbers = itertools.count(1)  # of all servers of this process: an origin of an earlier one must not be known to the next


class _Peer:
    """A connection that has sent something."""

    __slots__ = ("cut", "ended", "fd", "known", "origin", "route")

    def __init__(self, origin: Origin, route: bytes, fd: int) -> None:
        self.origin = origin
        self.route = route
        self.fd = fd
        self.known = False
        """The handler has heard of it."""
        self.cut = False
        self.ended = False


class ZmqServer(ControlServer):
    """Serves peers over TCP, encrypted if it has a key.

    Args:
        address: where to listen. Port 0 takes a free one; the hosts ``*``, ``0.0.0.0`` and ``::`` listen everywhere. Its key is ignored.
        keypair: the master's. Without it only loopback is served, in plaintext.
        allowed: public keys that may connect, or the path of a list of them, which is read again when it changes; None lets in whoever
            knows the address.
        insecure: serve other machines without a key all the same.
        advertise: the host, and the port if that differs, too, that peers are told; needed where they cannot be guessed (behind a NAT).
        heartbeat_timeout: seconds of silence after which a connection is over. It is noticed at most heartbeat_interval later.
        heartbeat_interval: seconds between ZeroMQ's own heartbeats.
    """

    def __init__(
        self,
        address: Address,
        *,
        keypair: KeyPair | None = None,
        allowed: PathLike | Iterable[bytes] | None = None,
        insecure: bool = False,
        advertise: tuple[str, int | None] | None = None,
        heartbeat_timeout: float = 3.0,
        heartbeat_interval: float = 0.5,
    ) -> None:
        if allowed is not None and keypair is None:
            raise InvalidArgument("allowed: without a key of its own a master cannot tell peers apart; give it one, too")
        self._address = address
        self._keypair = keypair
        self._allowed = None if allowed is None else AllowList(allowed)
        self._insecure = insecure
        self._advertise = advertise
        self._heartbeat = heartbeat_timeout, heartbeat_interval
        self._by_number: dict[int, _Peer] = {}
        self._by_route: dict[bytes, _Peer] = {}
        self._by_fd: dict[int, _Peer | None] = {}  # connections that live; None: has sent nothing yet
        self._listeners: list[int] = []
        self._ending: deque[_Peer] = deque()
        self._ended: deque[bytes] = deque()
        self._open = False

    async def start(self, handler: ServerHandler) -> str:
        """Serve from now on; returns the address for peers.

        Raises:
            ConnectError: the address cannot be listened on, or not without a key.
        """
        hosts = await _resolve(self._address.host)
        self._check_exposure(hosts)
        self._loop = asyncio.get_running_loop()
        self._handler = handler
        self._open = True
        self._context: Context = zmq.Context()
        fork.on_fork(self._forked)
        self._gate = Gate(self._context, curve=self._keypair is not None, allowed=self._allowed)
        self._socket = self._make_socket(self._context)
        self._monitor = open_monitor(self._socket, EVENTS)
        self._events = Pump(self._monitor, self._read_event)
        self._messages = Pump(self._socket, self._read_message)
        try:
            bound = self._bind(hosts)
        except ConnectError:
            await self.close()
            raise
        while self._read_event():  # guards what it listens on
            pass
        port = int(self._socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])
        host, told = self._advertise or (_own_host() if bound in WILDCARDS else bound, None)
        return str(Address(host, told or port, self._keypair.public if self._keypair else None))

    def send(self, origin: Origin, data: bytes) -> None:
        """Queue a message; of a connection that is no more, dropped. A connection that takes nothing any more is cut.

        Raises:
            InvalidArgument: it is longer than MAX_MESSAGE.
        """
        check_size(data)
        peer = self._by_number.get(origin.number)
        if peer is None or peer.cut:
            return
        try:
            self._socket.send(peer.route, SNDMORE)
            self._socket.send(data, NOBLOCK)
        except zmq.Again:
            log.warning("cut the connection of a peer at %s: %s messages wait, and it reads none", origin.host, HIGH_WATER)
            self._cut(peer)
        except zmq.ZMQError as e:
            if e.errno != errno.EHOSTUNREACH:  # it ended; the event is on its way
                raise
        self._messages.wake()

    def cut(self, origin: Origin) -> None:
        """End a connection. `disconnected` follows."""
        peer = self._by_number.get(origin.number)
        if peer is not None:
            self._cut(peer)

    async def close(self) -> None:
        """Stop serving; what was queued gets a moment to leave."""
        if not self._open:
            return
        self._open = False
        self._by_number.clear()
        for pump in (self._events, self._messages):
            pump.close()
        for fd in (*self._listeners, *self._by_fd):
            fork.unguard(fd)
        close_monitored(self._socket, self._monitor, LINGER_MS)
        self._gate.close()
        await terminate(self._context)

    def _forked(self) -> None:
        self._open = False
        self._by_number.clear()

    # --- starting

    def _check_exposure(self, hosts: list[str]) -> None:
        where = join(self._address.host, self._address.port)
        if self._keypair is None and not all(is_loopback(host) for host in hosts):
            if not self._insecure:
                raise ConnectError(
                    f"{where} can be reached from other machines, and there is no key: anyone could join and listen in. Make a key with "
                    "`pccl keys new` and give it with --key; or, if you trust everyone on that network, say --insecure"
                )
            log.warning("serving %s in plaintext: anyone who can reach it can join and listen in", where)

    def _make_socket(self, context: Context) -> Socket:
        socket = context.socket(zmq.ROUTER)
        configure(socket, *self._heartbeat)
        socket.BACKLOG = 1024
        socket.ROUTER_MANDATORY = 1
        protect(socket)
        if self._keypair is not None:
            socket.CURVE_SERVER = 1
            socket.CURVE_SECRETKEY = self._keypair.secret
        return socket

    def _bind(self, hosts: list[str]) -> str:
        """Listen on the first host that can be listened on."""
        problem = f"{self._address.host} has no address"
        for host in hosts:
            try:
                self._socket.bind(f"tcp://{join('*' if host == '::' else host, self._address.port)}")
            except zmq.ZMQError as e:
                problem = _why_not(e, self._address.port)
            else:
                return host
        raise ConnectError(f"cannot listen on {join(self._address.host, self._address.port)}: {problem}")

    # --- messages

    def _read_message(self) -> bool:
        if not has_message(self._socket):
            self._report_ended()
            return False
        route = self._socket.recv(NOBLOCK)
        peer = self._by_route.get(route)
        if peer is None:
            frame = self._socket.recv(NOBLOCK, copy=False)
            peer, data = self._admit(route, frame), frame.bytes
        else:
            data = self._socket.recv(NOBLOCK)
        if self._socket.getsockopt(RCVMORE):  # no client of ours sends parts
            while self._socket.getsockopt(RCVMORE):
                self._socket.recv(NOBLOCK)
            self._cut(peer)
        if not peer.ended and not peer.cut:
            peer.known = True
            self._handler.received(peer.origin, data)
        return True

    def _admit(self, route: bytes, frame: zmq.Frame) -> _Peer:
        """A connection's first message."""
        fd = int(frame.get(zmq.SRCFD))
        # The end of whoever had this descriptor before was told before the descriptor could be had again: so hear that first.
        while self._read_event():
            pass
        key = str(frame.get("User-Id")) if self._keypair else ""
        host = str(frame.get("Peer-Address")).removeprefix("::ffff:")
        peer = self._by_route[route] = _Peer(Origin(next(_numbers), host, key), route, fd)
        self._by_number[peer.origin.number] = peer
        rival = self._by_fd.get(fd)
        if fd not in self._by_fd or (rival is not None and _is_older(route, rival.route)):
            self._end(peer)  # it ended before its first message was read
        else:
            if rival is not None:
                self._end(rival)
            self._by_fd[fd] = peer
            if _chosen(frame):
                self._cut(peer)
        return peer

    def _cut(self, peer: _Peer) -> None:
        # libzmq cannot end one connection of a ROUTER, but its descriptor can be shut down: through a copy, which surely is of this
        # connection if its end has not been told by the time that the copy is made.
        peer.cut = True
        try:
            copy = sockets.socket(fileno=os.dup(peer.fd))
        except OSError:  # out of descriptors
            self._end(peer)
            return
        with copy:
            while self._read_event():
                pass
            if self._by_fd.get(peer.fd) is peer:
                try:
                    copy.shutdown(sockets.SHUT_RDWR)
                except OSError:
                    pass

    # --- events

    def _read_event(self) -> bool:
        found = next_event(self._monitor)
        if found is None:
            return False
        event, value = found
        if event in (zmq.EVENT_ACCEPTED, zmq.EVENT_LISTENING):
            fork.guard(value, libzmq=True)
            if event == zmq.EVENT_ACCEPTED:
                self._by_fd[value] = None
            else:
                self._listeners.append(value)
        elif event == zmq.EVENT_DISCONNECTED:
            fork.unguard(value)
            peer = self._by_fd.pop(value, None)
            if peer is not None:
                self._end(peer)
        elif event == zmq.EVENT_ACCEPT_FAILED:
            log.error("cannot accept a connection: %s; see `ulimit -n`", os.strerror(value))
        elif event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
            log.warning("refused a connection: %s", _PROTOCOL_ERRORS.get(value, f"it does not speak the protocol ({value:#x})"))
        elif event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
            log.info("a connection ended before it had proved itself")
        return True

    def _end(self, peer: _Peer) -> None:
        if not self._ending:
            self._loop.call_later(GRACE, self._report_ended)
        self._ending.append(peer)
        self._messages.wake()

    def _report_ended(self) -> None:
        """All that ended connections had sent is handled, or has waited long enough: say that they ended."""
        while self._ending and self._open:
            peer = self._ending.popleft()
            if peer.ended:
                continue
            peer.ended = True
            del self._by_number[peer.origin.number]
            self._ended.append(peer.route)
            if len(self._ended) > REMEMBERED:
                del self._by_route[self._ended.popleft()]
            if peer.known:
                self._handler.disconnected(peer.origin)


_PROTOCOL_ERRORS: dict[int, str] = {
    zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH: "one of the two has a key and the other has not",
    zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC: "it used another key than this master's",
}


def _is_older(route: bytes, other: bytes) -> bool:
    """ROUTERs count connections; the count may wrap."""
    distance = int.from_bytes(other[1:]) - int.from_bytes(route[1:])
    return distance % (1 << 32) < 1 << 31


def _chosen(frame: zmq.Frame) -> bool:
    """Whether the peer claims a routing id of its own, which no client of ours does."""
    try:
        return bool(frame.get("Identity"))
    except zmq.ZMQError:
        return False


def _why_not(error: zmq.ZMQError, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} is in use. Stop what listens there (`ss -tlnp` shows it), or choose another port; 0 takes a free one"
    if error.errno in (errno.EADDRNOTAVAIL, errno.ENODEV):
        return "this machine does not have that address. `ip addr` shows those it has; 0.0.0.0 listens on all"
    if error.errno == errno.EACCES:
        return "ports below 1024 are for root. Choose a higher one"
    return str(error)


async def _resolve(host: str) -> list[str]:
    if host in WILDCARDS or is_literal(host):
        return [host]
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, None, type=sockets.SOCK_STREAM)
    except OSError as e:
        raise ConnectError(f"cannot listen on {host}: the name is not known here ({e})") from None
    addresses = dict.fromkeys(str(info[4][0]) for info in found)
    return sorted(addresses, key=lambda text: ":" in text)  # IPv4 first: more peers can reach it


def _own_host() -> str:
    """How others may reach this machine: the address from which it would call them. No packet is sent."""
    for family, far in ((sockets.AF_INET, "192.0.2.1"), (sockets.AF_INET6, "2001:db8::1")):
        try:
            with sockets.socket(family, sockets.SOCK_DGRAM) as probe:
                probe.connect((far, 9))
                return str(probe.getsockname()[0])
        except OSError:
            continue
    return sockets.gethostname()
