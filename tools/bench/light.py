"""Light peers: the control channel and the protocol of a peer, without links and tensors. Many fit into a process."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar, cast

import zmq

import pccl
from pccl.core import codec
from pccl.core.address import parse_address
from pccl.core.errors import Evicted, PcclError
from pccl.core.messages import PeerInfo, Prepare, Waiting
from pccl.core.options import Options
from pccl.core.types import CallId, Epoch, View
from pccl.operations import Operation, Update, signature
from pccl.protocol.member import Membership
from pccl.protocol.peer import Peer
from pccl.protocol.record import Outcome, Record
from pccl.runtime import new_loop
from pccl.transports.base import ClientHandler
from pccl.transports.zmq_client import ZmqClient

T = TypeVar("T")

OPTIONS = Options()


class LightClient(ZmqClient):
    """All of a process share ZeroMQ's threads: a thousand of them would measure the scheduler."""

    async def start(self, handler: ClientHandler) -> None:
        """Begin to connect."""
        await super().start(handler)
        self._context = zmq.Context.instance()


class LightPeer:
    """Handles its control client, and hosts its protocol: links are made and calls are done as soon as they are asked for."""

    def __init__(self, address: str, group: str, name: str, size: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._client = LightClient(parse_address(address))
        self._peer = Peer(self, group, PeerInfo(uuid.uuid4().bytes, name, "light", ("127.0.0.1:1",), size), OPTIONS)
        self._member: asyncio.Future[None] = self._loop.create_future()
        self._ended: asyncio.Future[Any] = self._loop.create_future()

    async def join(self) -> None:
        """Become a member."""
        await self._client.start(self)
        await self._member

    async def commit(self, rounds: int) -> None:
        """Update and commit."""
        for _ in range(rounds):
            await self._make(Update(0, timeout=None))
            await self._make(Operation(0, "commit()", signature=signature("commit()"), timeout=None))

    def beat(self) -> None:
        """The heartbeat interval has passed."""
        self._peer.beat(0)

    def membership(self, comm: int) -> Membership:
        """What an update asks its engine for."""
        return self._peer.comms[comm]

    async def _make(self, op: Operation) -> None:
        self._ended = self._loop.create_future()
        op.engine = cast(Any, self)
        self._peer.root.enter(op.record, self._loop.time())
        outcome: Outcome = await self._ended
        if not outcome.committed:
            raise PcclError(f"{op.description} was aborted: {outcome.detail}")

    def _out(self, error: PcclError) -> None:
        for future in (self._member, self._ended):
            if not future.done():
                future.set_exception(error)

    # --- control client ---------------------------------------------------------------------------------------------

    def control_up(self) -> None:
        """Say hello."""
        self._peer.connected()

    def control_received(self, data: bytes) -> None:
        """A message of the master."""
        self._peer.receive(codec.decode(data), self._loop.time())

    def control_down(self) -> None:
        """The client tries again."""

    def control_refused(self, error: Exception) -> None:
        """The master does not talk to this peer."""
        self._out(PcclError(str(error)))

    # --- protocol (PeerHost) ----------------------------------------------------------------------------------------

    def send(self, message: object) -> None:
        """To the master."""
        self._client.send(codec.encode(message))

    def make_links(self, m: Prepare) -> None:
        """There are none to make."""
        self._peer.links_made(m.admission, ())

    def admitted(self, view: View) -> None:
        """This peer is a member."""
        self._member.set_result(None)

    def newcomers_wait(self, comm: int, waiting: bool) -> None:
        """Its calls all go through the master."""

    def refused(self, reason: int, detail: str) -> None:
        """This peer cannot come in."""
        self._out(PcclError(detail))

    def gone(self, reason: int, detail: str) -> None:
        """This peer is out."""
        self._out(Evicted(detail))

    def give_up(self, detail: str) -> None:
        """No verdict came."""
        self._out(Evicted(detail))

    def start(self, comm: int, record: Record) -> None:
        """There is no data to move."""
        self._peer.comms[comm].complete(record, self._loop.time())

    def finish(self, comm: int, record: Record, outcome: Outcome) -> None:
        """A call is over."""
        self._ended.set_result(outcome)

    def epoch_changed(self, comm: int, old: View, new: View) -> None:
        """There are no links to close."""

    def halt(self, comm: int, record: Record) -> None:
        """Nothing moves."""

    def restore(self, comm: int, record: Record) -> None:
        """Nothing was changed."""

    def discard(self, comm: int, epoch: Epoch, call: CallId) -> None:
        """Nothing is kept."""

    def agreed(self, comm: int, record: Record, payload: bytes) -> None:
        """No call asks for it."""

    def waits_for(self, comm: int, m: Waiting) -> None:
        """Somebody is slow."""


class Background:
    """An event loop in a thread, with a master or with light peers on it."""

    def __init__(self) -> None:
        self._loop = new_loop()
        self._peers: list[LightPeer] = []
        threading.Thread(target=self._loop.run_forever, name="background", daemon=True).start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Have something done there, and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def serve(self) -> str:
        """Start a master; returns its address."""
        self._master = pccl.Master()
        await self._master.start()
        return self._master.address

    async def populate(self, address: str, groups: Mapping[str, int], size: int) -> None:
        """Start light peers, so many of each group, and wait until all are members."""
        self._peers = [LightPeer(address, group, f"{group}:{i}", size) for group, count in groups.items() for i in range(count)]
        self._beat()
        await asyncio.gather(*(peer.join() for peer in self._peers))

    async def commit(self, rounds: int) -> None:
        """All of them at the same time."""
        await asyncio.gather(*(peer.commit(rounds) for peer in self._peers))

    def _beat(self) -> None:
        for peer in self._peers:
            peer.beat()
        self._loop.call_later(OPTIONS.heartbeat_interval, self._beat)
