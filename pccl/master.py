"""The master: a process, or a part of one, that keeps the membership of its groups and says how calls end. It never carries tensor data.

The shell around `pccl.protocol.group`: connections, bytes and the clock.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from pccl.core import codec
from pccl.core.codec import WireError
from pccl.core.messages import Hello
from pccl.core.options import Options
from pccl.protocol.group import Group
from pccl.transports.base import ControlServer, Origin

if TYPE_CHECKING:
    from pccl.transports.keys import KeyPair

logger = logging.getLogger("pccl.master")


class MasterShell:
    """Serves groups over a control server, whatever that is made of.

    Args:
        recover: peers of a master that was here before may still be there: wait for their reports before an empty group begins anew.
        random_bytes: where secrets and the master's identity come from.
    """

    def __init__(
        self,
        server: ControlServer,
        options: Options,
        *,
        recover: bool = False,
        random_bytes: Callable[[int], bytes] = secrets.token_bytes,
    ) -> None:
        self._server = server
        self._options = options
        self._recover = recover
        self._random_bytes = random_bytes
        self._rid = int.from_bytes(random_bytes(4)) or 1
        self._groups: dict[str, Group] = {}
        self._group_of: dict[Origin, Group] = {}
        self._idle = asyncio.Event()
        """No peer is connected"""
        self._recover_until = 0.0
        self._ticker: asyncio.TimerHandle | None = None
        self.address = ""

    async def start(self) -> None:
        """Serve from now on."""
        self._loop = asyncio.get_running_loop()
        self._recover_until = self._loop.time() + (self._options.heartbeat_timeout if self._recover else 0.0)
        self.address = await self._server.start(self)
        self._tick()

    async def close(self) -> None:
        """Stop. Peers go on with what needs no master, and wait for the next one."""
        if self._ticker:
            self._ticker.cancel()
            self._ticker = None
        await self._server.close()

    async def idle(self) -> None:
        """Until no peer is connected any more."""
        await self._idle.wait()

    def received(self, origin: Origin, data: bytes) -> None:
        """A message of a connection."""
        try:
            message = codec.decode(data)
            if isinstance(message, Hello):
                self._group_of[origin] = self._group(message.group)
                self._idle.clear()
            group = self._group_of.get(origin)
            if group:
                group.receive(origin, message, self._loop.time())
                self._flush(group)
        except WireError as e:
            logger.warning("a message from %s makes no sense, its connection is closed: %s", origin.host, e)
            self._server.cut(origin)

    def disconnected(self, origin: Origin) -> None:
        """A connection is no more."""
        group = self._group_of.pop(origin, None)
        if group:
            group.disconnect(origin, self._loop.time())
            self._flush(group)
        if not self._group_of:
            self._idle.set()

    def _group(self, name: str) -> Group:
        if name not in self._groups:
            self._groups[name] = Group(name, self._rid, self._options, self._random_bytes, recover_until=self._recover_until)
        return self._groups[name]

    def _flush(self, group: Group) -> None:
        outbox, group.outbox = group.outbox, []
        for conns, message in outbox:
            data = codec.encode(message)
            for conn in conns:
                assert isinstance(conn, Origin)
                self._server.send(conn, data)

    def _tick(self) -> None:
        for group in self._groups.values():
            group.tick(self._loop.time())
            self._flush(group)
        self._ticker = self._loop.call_later(min(0.1, self._options.heartbeat_interval), self._tick)


class Master:
    """A master over ZeroMQ, as an asynchronous context manager.

    ``async with pccl.Master("127.0.0.1:0") as master: print(master.address)``

    Args:
        listen: ``host:port``; port 0 takes any that is free. Hosts other than loopback need a key, or ``insecure``.
        key: a key pair, or the path of a file with one (``pccl keys new``), for encryption and authentication.
        allow: path of a list of public keys; peers with others are refused. Without it, whoever knows the master's public key may come.
        insecure: serve off loopback in plain text.
        advertise: ``host`` or ``host:port`` that the address for peers names, where that differs (a NAT, a container).
        recover: this master may stand in for one that was lost; `pccl master` says so, an embedded master usually knows better.

    Raises:
        ConnectError: the address cannot be listened on.
        InvalidArgument: a file or address is not what it should be.
    """

    def __init__(
        self,
        listen: str = "127.0.0.1:0",
        *,
        key: str | KeyPair | None = None,
        allow: str | None = None,
        insecure: bool = False,
        advertise: str | None = None,
        recover: bool = False,
        options: Options | None = None,
    ) -> None:
        from pccl.core.address import parse_address, parse_endpoint
        from pccl.transports.keys import load_keypair
        from pccl.transports.zmq_server import ZmqServer

        self._options = options or Options()
        server = ZmqServer(
            parse_address(listen, "listen"),
            keypair=load_keypair(key) if isinstance(key, str) else key,
            allowed=allow,
            insecure=insecure,
            advertise=parse_endpoint(advertise, "advertise") if advertise else None,
            heartbeat_interval=self._options.heartbeat_interval,
            heartbeat_timeout=self._options.heartbeat_timeout,
        )
        self._shell = MasterShell(server, self._options, recover=recover)

    @property
    def address(self) -> str:
        """What peers give to `pccl.connect`."""
        return self._shell.address

    async def start(self) -> None:
        """Serve from now on."""
        await self._shell.start()

    async def idle(self) -> None:
        """Until no peer is connected any more, of those that have come."""
        await self._shell.idle()

    async def close(self) -> None:
        """Stop serving."""
        await self._shell.close()

    async def __aenter__(self) -> Master:
        await self.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()
