"""Links over TCP."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import socket
import struct
import sys
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NoReturn

from pccl.core.address import is_loopback, join
from pccl.core.errors import ConnectError
from pccl.transports import fork
from pccl.transports.streams import StreamTransport
from pccl.transports.wire import Account, Wire

logger = logging.getLogger("pccl.link")

ACCEPTS_AT_ONCE = 64
ACCEPT_PAUSE = 1.0
"""Seconds without accepting after the descriptors have run out."""
IOV_MAX = 1024

UNSENT = 512 << 10
"""Bytes that the kernel takes beyond what the path does: enough to keep it busy between two turns of the loop."""
STRIPES = 16
"""Connections for large frames that a link to another host may have; within a host one is as fast as many."""
KEEPALIVE = 60
"""Seconds of silence after which the kernel asks whether the path is still there: firewalls forget what is idle for minutes."""
_CONGESTION = "bbr"
_TCP_NOTSENT_LOWAT = getattr(socket, "TCP_NOTSENT_LOWAT", 25)

_INFO_BYTES = 192
_UINT, _ULONG = struct.Struct("=I"), struct.Struct("=Q")
_PROBES_AT, _UNACKED_AT, _LAST_ACK_AT = 3, 24, 56
"""Offsets in Linux's tcp_info of tcpi_probes (of a closed window, unanswered), tcpi_unacked (segments) and tcpi_last_ack_recv (ms)."""
_RTT_AT, _ACKED_AT, _BUSY_AT, _HELD_BACK_AT = 68, 120, 168, 176
"""Likewise of tcpi_rtt (us), tcpi_bytes_acked, tcpi_busy_time and tcpi_rwnd_limited (us)."""


class TcpWire(Wire):
    """A connected TCP socket.

    Buffers are left to the kernel, which makes them as large as the path needs; setting them would end that.

    Args:
        user_timeout: seconds after which the kernel gives up what it cannot deliver; 0 leaves that to the system. It does so, too, where a
            receiver does not read, however well its host acknowledges.
    """

    _without: ClassVar[bool] = False
    """That congestion control cannot be had was logged."""

    def __init__(self, sock: socket.socket, *, user_timeout: float = 0.0) -> None:
        sock.setblocking(False)
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._near = is_near(sock)
        if not self._near:
            self._tune(sock, user_timeout)
        fork.guard(sock.fileno())
        self._sock: socket.socket | None = sock
        self._fd = sock.fileno()
        self._loop = asyncio.get_running_loop()
        self._unacked_since: float | None = None

    def _tune(self, sock: socket.socket, user_timeout: float) -> None:
        """Ask for what helps on a path that is long, lossy or shared. None of it is needed."""
        if not sys.platform.startswith("linux"):
            return
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, _CONGESTION.encode())
        except OSError as e:
            if not TcpWire._without:
                TcpWire._without = True
                logger.info(
                    "links do without %s congestion control (%s): on long or lossy paths they are faster with it "
                    "(sysctl net.ipv4.tcp_allowed_congestion_control)",
                    _CONGESTION.upper(),
                    e.strerror,
                )
        for level, option, value in (
            (socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, UNSENT),
            (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(min(user_timeout * 1000, 0x7FFFFFFF))),
            (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
            (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE),
            (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE // 4),
        ):
            with contextlib.suppress(OSError):
                sock.setsockopt(level, option, value)

    @property
    def connection(self) -> socket.socket:
        """The socket; OSError once it is closed."""
        return self._sock or self._closed()

    def fileno(self) -> int:
        """The socket's."""
        return self._fd if self._sock is not None else -1

    def notify_readable(self, callback: Callable[[], None] | None) -> None:
        """Have the loop watch for bytes."""
        if callback:
            self._loop.add_reader(self._fd, callback)
        else:
            self._loop.remove_reader(self._fd)

    def notify_writable(self, callback: Callable[[], None] | None) -> None:
        """Have the loop watch for room."""
        if callback:
            self._loop.add_writer(self._fd, callback)
        else:
            self._loop.remove_writer(self._fd)

    def read(self, buffers: Sequence[memoryview]) -> int:
        """Read what is there."""
        sock = self.connection
        if len(buffers) == 1:
            return sock.recv_into(buffers[0])
        return sock.recvmsg_into(buffers)[0]

    def write(self, buffers: Sequence[memoryview | bytes]) -> int:
        """Hand the kernel what it takes."""
        sock = self.connection
        if len(buffers) == 1:
            return sock.send(buffers[0])
        return sock.sendmsg(buffers[:IOV_MAX])

    def shutdown(self) -> None:
        """End this direction."""
        self.connection.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """End both."""
        if self._sock is not None:
            self._loop.remove_reader(self._fd)
            self._loop.remove_writer(self._fd)
            fork.unguard(self._fd)
            self._sock.close()
            self._sock = None

    @property
    def stripes(self) -> int:
        """One within a host, so that small frames do not wait behind large ones."""
        return 1 if self._near else STRIPES

    def account(self) -> Account | None:
        """The kernel's own; None where there is none (not Linux, or an old one)."""
        if self._sock is None or not sys.platform.startswith("linux"):
            return None
        info = self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
        if len(info) < _INFO_BYTES:
            return None
        acked, busy, held_back = (_ULONG.unpack_from(info, at)[0] for at in (_ACKED_AT, _BUSY_AT, _HELD_BACK_AT))
        return Account(acked, busy / 1e6, held_back / 1e6, _UINT.unpack_from(info, _RTT_AT)[0] / 1e6)

    def silent_for(self) -> float:
        """How long TCP has waited for an acknowledgement, from the kernel's own account; always 0 where there is none (not Linux).

        A closed window is acknowledged, too, and so is a probe whether it is open again: a peer that does not read is not silent.
        """
        if self._sock is None or not sys.platform.startswith("linux"):
            return 0.0
        info = self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
        outstanding = _UINT.unpack_from(info, _UNACKED_AT)[0] or info[_PROBES_AT]
        last_ack: float = _UINT.unpack_from(info, _LAST_ACK_AT)[0] / 1000
        now = self._loop.time()
        if not outstanding:
            self._unacked_since = None
            return 0.0
        if self._unacked_since is None:
            self._unacked_since = now
        return min(last_ack, now - self._unacked_since)  # the last acknowledgement may be older than the data

    def _closed(self) -> NoReturn:
        raise ConnectionAbortedError("the link is closed")


class TcpTransport(StreamTransport):
    """Dials and accepts TCP links.

    Args:
        host: where to listen: an address or name; "" for every interface, IPv6 and IPv4.
        port: 0 for any.
        advertise: ``host`` or ``host:port`` that others are to dial, where that differs (a NAT, a container).
        user_timeout: as for TcpWire; not below the time that a peer's interpreter may be held.
    """

    def __init__(
        self, host: str = "127.0.0.1", port: int = 0, *, advertise: tuple[str, int | None] | None = None, user_timeout: float = 0.0
    ) -> None:
        super().__init__()
        self._user_timeout = user_timeout
        self._host = host
        self._port = port
        self._advertise = advertise
        self._listeners: list[socket.socket] = []
        self._warned = False

    async def _serve(self) -> tuple[str, ...]:
        loop = asyncio.get_running_loop()
        everywhere = "::" if socket.has_dualstack_ipv6() else "0.0.0.0"
        try:
            addresses = [everywhere] if self._host == "" else await resolve(self._host, self._port)
        except OSError as e:
            raise ConnectError(f"cannot listen for links on {self._host}: the name is not known here ({e}); give another one") from None
        port = self._port
        for address in addresses[:1]:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            sock = socket.socket(family, socket.SOCK_STREAM)
            try:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if address == "::":
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
                sock.setblocking(False)
                sock.bind((address, port))
                sock.listen(512)
            except OSError as e:
                sock.close()
                raise ConnectError(f"cannot listen for links on {join(address, port)}: {e.strerror}; give another listen address") from e
            port = sock.getsockname()[1]
            fork.guard(sock.fileno())
            self._listeners.append(sock)
            loop.add_reader(sock.fileno(), self._accept, sock)
        if self._advertise:
            return (join(self._advertise[0], self._advertise[1] or port),)
        return (join(addresses[0], port),)

    def _stop_serving(self) -> None:
        loop = asyncio.get_running_loop()
        for sock in self._listeners:
            loop.remove_reader(sock.fileno())
            fork.unguard(sock.fileno())
            sock.close()
        self._listeners.clear()

    async def _connect(self, endpoint: str) -> Wire:
        host, _, port = endpoint.rpartition(":")
        address = (await resolve(host.strip("[]"), int(port)))[0]
        sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
        sock.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(sock, (address, int(port)))
        except BaseException:
            sock.close()
            raise
        self._warn(address)
        return TcpWire(sock, user_timeout=self._user_timeout)

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(ACCEPTS_AT_ONCE):
            try:
                sock, peer = listener.accept()
            except BlockingIOError:
                return
            except OSError as e:
                if e.errno in (errno.EMFILE, errno.ENFILE):
                    logger.error("cannot accept a link: %s; raise the limit of open files (ulimit -n)", e.strerror)
                    loop = asyncio.get_running_loop()
                    loop.remove_reader(listener.fileno())  # who waits there would keep the loop busy
                    loop.call_later(ACCEPT_PAUSE, self._listen_again, listener)
                return
            self._welcome_soon(*self._taken(sock, peer))

    def _taken(self, sock: socket.socket, peer: Any) -> tuple[Wire, str]:
        """The wire of a connection that came in, and the host that it came from."""
        host = peer[0].removeprefix("::ffff:")
        self._warn(host)
        return TcpWire(sock, user_timeout=self._user_timeout), host

    def _listen_again(self, listener: socket.socket) -> None:
        if listener in self._listeners:
            asyncio.get_running_loop().add_reader(listener.fileno(), self._accept, listener)

    def _warn(self, host: str) -> None:
        """Say once that payloads are readable on the way."""
        if not self._warned and not is_loopback(host):
            self._warned = True
            logger.warning("payloads to and from %s are not encrypted: use a private network or a VPN", host)


def is_near(sock: socket.socket) -> bool:
    """Whether a connected socket's other end is on this host."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return True
    try:
        return bool(sock.getsockname()[:1] == sock.getpeername()[:1])
    except OSError:  # it is no longer connected
        return True


async def resolve(host: str, port: int) -> list[str]:
    """The addresses of a name, or the address itself without asking anybody.

    Raises:
        OSError: there is no such name.
    """
    try:
        return [str(ipaddress.ip_address(host))]
    except ValueError:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return list(dict.fromkeys(str(info[4][0]) for info in found))
