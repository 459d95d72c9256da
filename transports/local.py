"""Links within one host: over UNIX sockets, by which the peers also get each other's regions (see `pccl.transports.region`).

The sockets are abstract: they have no file, and belong to a network namespace. Peers of two namespaces do not find each other's, and are
different hosts.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import socket
import struct
from typing import Any

import numpy as np
import xxhash

from pccl.transports import fork
from pccl.transports.base import Refusal
from pccl.transports.region import Neighbour, Region, permit_reading
from pccl.transports.tcp import TcpTransport, TcpWire
from pccl.transports.wire import Wire, read_exactly, until, write_all

logger = logging.getLogger("pccl.link")

SCHEME = "unix:"
_CARD = struct.Struct("!B16sQ")
"""Whether there is a region; bytes, and where in its memory they are"""
_CREDENTIALS = struct.Struct("3i")


class UnixWire(TcpWire):
    """A connected UNIX socket: nothing gets lost on the way."""

    def account(self) -> None:
        """Nobody keeps one."""

    def silent_for(self) -> float:
        """Never silent: the other side's system is this one."""
        return 0.0

    async def meet(self, region: Region | None, *, dialled: bool) -> Neighbour | None:
        """Exchange regions with the other side, and find out whether each can read the other's memory. None if one has none to offer.

        The last word is the acceptor's: when the dialer has a link, both have.
        """
        sock = self.connection
        pid, uid, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        offer = region if uid == os.geteuid() else None
        if offer:
            permit_reading()
        if dialled:
            await self._present(sock, offer)
        said, fds = await self._hear(sock)
        there, nonce, address = _CARD.unpack(said)
        try:
            if not dialled:
                await self._present(sock, offer)
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        if offer is None or not there or len(fds) != 2:
            for fd in fds:
                os.close(fd)
            if offer and there:  # the other side takes it that they have come
                raise Refusal("no descriptors came along: is the limit of open files (ulimit -n) reached?")
            return None
        other = Neighbour(pid, *fds)
        try:
            can = _try(other, nonce, address)
            if dialled:
                await write_all(self, bytes([can]))
            they = (await read_exactly(self, 1)) == b"\1"
            if not dialled:
                await write_all(self, bytes([can]))
            other.readable = can and they
        except BaseException:
            other.close()
            raise
        return other

    async def _present(self, sock: socket.socket, region: Region | None) -> None:
        if region is None:
            await write_all(self, _CARD.pack(0, bytes(16), 0))
            return
        card = _CARD.pack(1, region.nonce.raw, ctypes.addressof(region.nonce))
        fd = region.offered()
        try:
            while True:
                try:
                    sent = socket.send_fds(sock, [card], [fd, region.bell])
                    break
                except BlockingIOError:
                    await until(self.notify_writable)
        finally:
            os.close(fd)
        await write_all(self, card[sent:])

    async def _hear(self, sock: socket.socket) -> tuple[bytes, list[int]]:
        while True:
            try:
                said, fds, _, _ = socket.recv_fds(sock, _CARD.size, 2, socket.MSG_CMSG_CLOEXEC)
                break
            except BlockingIOError:
                await until(self.notify_readable)
        try:
            if not said:
                raise Refusal("the other side hung up")
            return said + await read_exactly(self, _CARD.size - len(said)), fds
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise


def _try(other: Neighbour, nonce: bytes, address: int) -> bool:
    """Whether its memory can be read."""
    seen = np.zeros(len(nonce), np.uint8)
    try:
        other.read(address, seen)
    except OSError as e:
        logger.info("the memory of process %d cannot be read (%s): what it sends is copied into shared memory", other.pid, e)
        return False
    return bool(seen.tobytes() == nonce and other.is_alive())


class HostTransport(TcpTransport):
    """TCP to other hosts, UNIX sockets within this one.

    Args:
        identity: what peers of this host have in common. Who has another one is on another host, even if it could be met.
        region: what peers of this host may map.
    """

    def __init__(
        self,
        host: str,
        port: int = 0,
        *,
        advertise: tuple[str, int | None] | None = None,
        user_timeout: float = 0.0,
        identity: str,
        region: Region | None,
    ) -> None:
        super().__init__(host, port, advertise=advertise, user_timeout=user_timeout)
        self._prefix = f"pccl-{xxhash.xxh3_64_hexdigest(identity.encode())}-"
        self._region = region

    async def _serve(self) -> tuple[str, ...]:
        endpoints = await super()._serve()
        name = self._prefix + os.urandom(16).hex()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        sock.bind(f"\0{name}")
        sock.listen(512)
        fork.guard(sock.fileno())
        self._listeners.append(sock)
        asyncio.get_running_loop().add_reader(sock.fileno(), self._accept, sock)
        return (SCHEME + name, *endpoints)

    def _taken(self, sock: socket.socket, peer: Any) -> tuple[Wire, str]:
        return (UnixWire(sock), "this host") if sock.family == socket.AF_UNIX else super()._taken(sock, peer)

    async def _meet(self, wire: Wire, *, dialled: bool) -> Neighbour | None:
        return await wire.meet(self._region, dialled=dialled) if isinstance(wire, UnixWire) else None

    async def _connect(self, endpoint: str) -> Wire:
        if not endpoint.startswith(SCHEME):
            return await super()._connect(endpoint)
        if not endpoint.startswith(SCHEME + self._prefix):
            raise Refusal("of another host")
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(sock, "\0" + endpoint[len(SCHEME) :])
        except BaseException:
            sock.close()
            raise
        return UnixWire(sock)
