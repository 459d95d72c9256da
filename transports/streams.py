"""What transports over streams of bytes have in common: dialling, accepting, and proving before anything else."""

from __future__ import annotations

import asyncio
import logging
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

from pccl.transports.base import Admit, Link, LinkHandler, LinkTicket, Refusal, Transport
from pccl.transports.link import WireLink
from pccl.transports.region import OtherShared
from pccl.transports.wire import MAGIC, STRIPE_MAGIC, Proved, Wire, demand_proof, offer_proof

T = TypeVar("T")

logger = logging.getLogger("pccl.link")

PROOF_TIMEOUT = 3.0
"""Seconds in which a stranger has to prove itself."""
STRANGERS_PER_HOST = 256
"""Connections of one host that may be unproved at a time."""


class StreamTransport(Transport):
    """Makes links over wires. What kind of wires, says the subclass."""

    def __init__(self) -> None:
        self._links: dict[WireLink, None] = {}
        self._tasks: dict[asyncio.Task[None], None] = {}
        self._numbers: dict[int, tuple[WireLink, LinkTicket]] = {}
        """What stripes of accepted links prove"""
        self._strangers: Counter[str] = Counter()
        self._admit: Admit | None = None
        self._accepted: Callable[[Link], LinkHandler] | None = None

    @abstractmethod
    async def _connect(self, endpoint: str) -> Wire:
        """A wire to an endpoint; OSError or ValueError if there is none."""

    @abstractmethod
    async def _serve(self) -> tuple[str, ...]:
        """Give every wire that comes in to `_welcome_soon`; returns the endpoints."""

    @abstractmethod
    def _stop_serving(self) -> None:
        """No more wires come in."""

    async def listen(self, admit: Admit, accepted: Callable[[Link], LinkHandler]) -> tuple[str, ...]:
        """Accept links from now on."""
        self._admit, self._accepted = admit, accepted
        return await self._serve()

    async def dial(self, endpoints: tuple[str, ...], ticket: LinkTicket, handler: LinkHandler, timeout: float) -> Link:
        """Make a link at the first endpoint that answers."""
        errors = []
        try:
            async with asyncio.timeout(timeout):
                for endpoint in endpoints:
                    try:
                        wire = await self._connect(endpoint)
                        stripes, near = await self._proved(wire, self._offer(wire, ticket))
                    except (Refusal, OSError, ValueError) as e:
                        errors.append(f"{endpoint}: {e}")
                        continue
                    link = self._link(wire, ticket.acceptor, near, partial(self._dial_stripes, endpoint, stripes))
                    link.open(handler)
                    return link
        except TimeoutError:
            errors.append(f"no answer within {timeout:g} s")
        raise Refusal("; ".join(errors) or "no endpoint is known")

    def _dial_stripes(self, endpoint: str, ticket: LinkTicket, link: WireLink, count: int) -> None:
        for _ in range(count):
            task = asyncio.get_running_loop().create_task(self._dial_stripe(endpoint, ticket, link))
            self._tasks[task] = None
            task.add_done_callback(self._tasks.pop)

    async def _dial_stripe(self, endpoint: str, ticket: LinkTicket, link: WireLink) -> None:
        try:
            async with asyncio.timeout(PROOF_TIMEOUT):
                wire = await self._connect(endpoint)
                await self._proved(wire, offer_proof(wire, ticket, STRIPE_MAGIC))
        except (Refusal, OSError, TimeoutError) as e:
            logger.info("the link to peer %d gets no further stripe: %s", link.uid, e if str(e) else f"no answer in {PROOF_TIMEOUT:g} s")
            link.add(None)
            return
        link.add(wire)

    async def close(self) -> None:
        """Stop accepting; closed links get their moment."""
        self._stop_serving()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for link in list(self._links):
            await link.wait_closed()

    def _welcome_soon(self, wire: Wire, host: str) -> None:
        """A stranger has connected: have it prove itself."""
        if self._strangers[host] >= STRANGERS_PER_HOST:
            logger.warning("%s has %d unproved connections already: one more is refused", host, STRANGERS_PER_HOST)
            wire.close()
            return
        self._strangers[host] += 1
        task = asyncio.get_running_loop().create_task(self._welcome(wire, host))
        self._tasks[task] = None
        task.add_done_callback(lambda task: self._welcomed(task, wire, host))

    async def _welcome(self, wire: Wire, host: str) -> None:
        assert self._admit is not None
        assert self._accepted is not None
        try:
            async with asyncio.timeout(PROOF_TIMEOUT):
                proved, near = await self._proved(wire, self._demand(wire))
        except (Refusal, OSError) as e:
            logger.info("a connection from %s was closed: %s", host, e if str(e) else f"it proved nothing within {PROOF_TIMEOUT:g} s")
            return
        if proved.magic == STRIPE_MAGIC:
            link, _ = self._numbers.get(proved.ticket.admission, (None, None))
            if link:
                link.add(wire)
            else:  # it has ended meanwhile
                wire.close()
            return
        link = self._link(wire, proved.ticket.dialer, near)
        self._numbers[proved.stripes.admission] = link, proved.stripes
        link.open(self._accepted(link))

    async def _admit_stripe(self, number: int, dialer: int, acceptor: int) -> LinkTicket | None:
        _, ticket = self._numbers.get(number, (None, None))
        return ticket if ticket and ticket[2:] == (dialer, acceptor) else None

    def _welcomed(self, task: asyncio.Task[None], wire: Wire, host: str) -> None:
        del self._tasks[task]
        self._strangers[host] -= 1
        if not self._strangers[host]:
            del self._strangers[host]
        if task.cancelled():
            wire.close()  # perhaps it had not even begun

    async def _proved(self, wire: Wire, proof: Coroutine[Any, Any, T]) -> T:
        """The wire is closed unless the proof succeeds."""
        try:
            return await proof
        except BaseException:
            wire.close()
            raise

    async def _offer(self, wire: Wire, ticket: LinkTicket) -> tuple[LinkTicket, OtherShared | None]:
        return await offer_proof(wire, ticket), await self._meet(wire, dialled=True)

    async def _demand(self, wire: Wire) -> tuple[Proved, OtherShared | None]:
        assert self._admit is not None
        proved = await demand_proof(wire, {MAGIC: self._admit, STRIPE_MAGIC: self._admit_stripe})
        return proved, await self._meet(wire, dialled=False) if proved.magic == MAGIC else None

    async def _meet(self, wire: Wire, *, dialled: bool) -> OtherShared | None:
        """What the other side shares with this process, if both are on one host."""
        return None

    def _link(self, wire: Wire, uid: int, near: OtherShared | None, dial: Callable[[WireLink, int], None] | None = None) -> WireLink:
        link = WireLink(wire, uid, near=near, closed=self._forget, stripes=self._stripes_on(wire), dial=dial)
        self._links[link] = None
        return link

    def _stripes_on(self, wire: Wire) -> int:
        """How many a link may have that begins with this wire."""
        return wire.stripes

    def _forget(self, link: WireLink) -> None:
        del self._links[link]
        for number in [n for n, (known, _) in self._numbers.items() if known is link]:
            del self._numbers[number]
