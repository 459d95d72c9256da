"""The engine of one peer: its control connection, its links, its protocol and its transfers, on one event loop.

It is the shell around `pccl.protocol.peer` and `pccl.collectives.executor`: it turns what they ask for into connections and timers,
and what happens there into their events. Both faces of the library, and the simulator, use it as it is. All methods are called on its loop.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pccl.calls import Collective, Part, is_local
from pccl.collectives.executor import Executor
from pccl.collectives.flow import CallKey, Flow, Moving
from pccl.collectives.pull import LOCAL
from pccl.collectives.quantize import Codec
from pccl.collectives.reduction import Kernels
from pccl.core import codec
from pccl.core.codec import WireError
from pccl.core.errors import (
    ConnectError,
    Evicted,
    InternalError,
    InvalidArgument,
    MasterUnreachable,
    PcclError,
    StateConflict,
    VersionMismatch,
)
from pccl.core.messages import PeerInfo, Prepare, Reason, SplitResult, Waiting
from pccl.core.options import Options
from pccl.core.types import CallId, Epoch, Info, View
from pccl.express import Express, Manner
from pccl.lanes import Lanes
from pccl.operations import Operation, failure
from pccl.poller import Poller
from pccl.protocol.member import Membership
from pccl.protocol.peer import ROOT, Peer, Standpoint
from pccl.protocol.record import Outcome, Record
from pccl.repeat import Repeat
from pccl.route import Ask, Route, Routes
from pccl.staging import Pool
from pccl.transports.base import ControlClient, Link, LinkHandler, LinkTicket, Refusal, Source, Transport
from pccl.transports.region import OwnShared

if TYPE_CHECKING:
    from pccl.runtime import ThreadRuntime
    from pccl.sync import Work

logger = logging.getLogger("pccl")

LAZY_CREDIT = 0.005
"""Seconds that a credit nobody waits for may wait for company."""
SPARE_KEPT = 10.0
"""Seconds of idleness after which the buffer for undoing is given back to the system."""


class Engine:
    """One peer in one group.

    Args:
        client: not yet started.
        transport: not yet listening.
        key: 16 random bytes that tell this peer from all others.
        region: what this peer shares with others of its host, if it does.
    """

    def __init__(
        self,
        client: ControlClient,
        transport: Transport,
        *,
        group: str,
        name: str,
        host: str,
        key: bytes,
        address: str,
        options: Options,
        region: OwnShared | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.options = options
        self.executor = Executor(self)
        self.kernels = Kernels()
        self.codec = Codec(self.kernels)
        self.routes = Routes(self.executor.flow)
        self.error: PcclError | None = None
        """Why this peer is no member any more, once it is not"""
        self._left = False
        self._leaving_subs: set[int] = set()
        self._client = client
        self._transport = transport
        self._group = group
        self._name = name
        self._host = host
        self._key = key
        self._address = address
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self.pinned = Pool(self._loop)
        self._peer: Peer | None = None
        self._admitted: asyncio.Future[View] = self._loop.create_future()
        self._leaving: asyncio.Future[None] | None = None
        self._timers: dict[int, asyncio.TimerHandle] = {}
        self._timer_due: dict[int, float] = {}
        self._heart: asyncio.TimerHandle | None = None
        self._lazy: asyncio.TimerHandle | None = None
        self._tasks: dict[asyncio.Task[None], None] = {}
        self._ticket: Prepare | None = None
        self._ticket_came = asyncio.Event()
        self._running: dict[Moving, Operation] = {}
        self._in_flight: dict[Operation, None] = {}
        self._express: Express | None = None
        """A call that has no record yet"""
        self._spare: npt.NDArray[np.uint8] | None = None
        self._spare_release: asyncio.TimerHandle | None = None
        self._region = region
        self.lanes = Lanes(region, self.executor.flows)
        self._stepping = False
        self.poller = Poller(client, self._links, self._is_alone, lambda e: self._complain("a handler failed", e), self.executor, region)
        if region:
            region.notify(self._rung)

    # --- life -------------------------------------------------------------------------------------------------------

    async def connect(self) -> View:
        """Connect and wait to be admitted.

        Raises:
            ConnectError: this peer cannot become a member, and why.
        """
        endpoints = await self._transport.listen(self._admit, self._accepted)
        info = PeerInfo(self._key, self._name, self._host, endpoints, self.options.min_world_size)
        self._peer = Peer(self, self._group, info, self.options)
        await self._client.start(self)
        self._beat()
        try:
            async with asyncio.timeout(self.options.connect_timeout):
                return await self._admitted
        except TimeoutError:
            await self.close()
            raise self._why_not() from None
        except BaseException:
            await self.close()
            raise

    def _why_not(self) -> ConnectError:
        """The reason why nobody admitted this peer in time."""
        within = f"within {self.options.connect_timeout:g} s"
        if self._peer and self._peer.standpoint is Standpoint.PENDING:
            return ConnectError(
                f"the master at {self._address} knows this peer, but the members of group {self._group!r} did not let it in {within}: "
                f"they do so when all of them call update(); an empty group begins with {self.options.min_world_size} (min_world_size)"
            )
        return MasterUnreachable(
            f"no pccl master answered at {self._address} {within}: is it running, is the address right, does a firewall stand between?"
        )

    async def leave(self) -> None:
        """Leave the group in the place of the next update, and close."""
        if self._peer and self._peer.standpoint is Standpoint.MEMBER and self.error is None:
            self._leaving = self._loop.create_future()
            self._try_leave()
            try:
                async with asyncio.timeout(self.options.heartbeat_timeout):
                    await self._leaving
            except TimeoutError:
                logger.warning("the master did not confirm that this peer leaves; it goes anyway")
        await self.close()

    async def close(self) -> None:
        """Stop at once; calls in flight fail."""
        self._fail_all(self.error or Evicted("its communicator was closed"))
        for timer in (self._heart, self._lazy, self._spare_release, *self._timers.values()):
            if timer:
                timer.cancel()
        self._heart = self._lazy = None
        self._timers.clear()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._client.close()  # first: then the others find this peer gone, and not its links broken
        for uid in list(self.executor.flows):
            self.executor.drop_flow(uid)
        await self._transport.close()
        self._spare = None
        self.pinned.drop()
        self.lanes.close()
        region, self._region = self._region, None
        if region:
            region.notify(None)
            region.close()

    @property
    def busy(self) -> bool:
        """Whether calls are in flight."""
        return bool(self._in_flight)

    def returned(self) -> bool:
        """A borrower is done with this engine; returns whether calls are in flight, for the loop to go on with."""
        if not self._in_flight:
            return False
        if self.executor.pulls:
            self.step_soon()
        return True

    # --- calls ------------------------------------------------------------------------------------------------------

    def membership(self, comm: int) -> Membership:
        """A communicator of this peer.

        Raises:
            PcclError: the peer is out of its group.
        """
        if self.error:
            raise self.error
        if self._peer is None or comm not in self._peer.comms:
            raise InternalError(f"communicator {comm} is not known")
        return self._peer.comms[comm]

    def route(self, membership: Membership, part: Part, *, local: bool) -> Route:
        """How a call runs in a membership; see `Routes.find`."""
        return self.routes.find(part.ask, membership.view, membership.uid, membership.broken, part.description, local=local)

    def submit(self, op: Operation) -> None:
        """Make a call; `op.settle` is called when it has ended. It never raises: errors go there, too."""
        op.engine = self
        op.began = self._clock()
        try:
            membership = self.membership(op.comm)
            self._in_flight[op] = None
            self._set_deadline(op)
            membership.enter(op.record, self._loop.time())
            self._arm(membership)
        except Exception as e:
            op.settle(self._reason(op, e))

    def _set_deadline(self, op: Operation) -> None:
        """A timer of its own for a deadline that is near; `_watch_deadlines` looks after the others."""
        if op.timeout is not None and op.timeout < 4 * self.options.heartbeat_interval:
            op.deadline = self._loop.call_later(op.timeout, self.expire, op)

    def call(self, op: Operation, patience: float, at_most: float) -> None:
        """Make a call for a caller that has this engine to itself; it may be over when this returns.

        Args:
            patience, at_most: as for `Poller.serve`.
        """
        self.submit(op)
        self.poller.serve(op, patience, at_most)

    def express(
        self,
        comm: int,
        part: Part,
        how: Manner,
        seen: Epoch,
        make: Callable[[], Collective],
        patience: float,
        at_most: float,
        index: int = -1,
    ) -> Info | None:
        """Make a call for a caller that has this engine to itself. None if `make` was called: the operation tells how it ends.

        Args:
            seen: the epoch that the caller knows.
            patience, at_most: as for `Poller.serve`.
            index: the place that the call has already; its input is in shared memory.
        """
        membership = self._peer.comms.get(comm) if self._peer and self.error is None else None
        call = Express.of(self, membership, part, how, seen, make) if membership else None
        if call is None and index >= 0:
            raise InternalError(f"{part.description} has a place, and cannot be gone on with")
        if call is None:
            op = make()
            self.submit(op)
            if op.small:
                self.poller.serve(op, patience, at_most)
            return None
        self._express = call
        try:
            info = call.run(patience, at_most, index)
        except Exception as e:
            if call.settled and call.op is None:  # the result is here, and cannot be handed over
                part.release(self)
                raise self._reason(part, e) from e
            call.become_operation()
            assert call.op
            call.op.reason = self._reason(call.op, e)
            self.fail(call.op, str(call.op.reason))
        else:
            if call.op is None:
                return info
        finally:
            self._express = None
        self.poller.serve(call.op, patience, at_most)
        return None

    def repeat(
        self,
        runtime: ThreadRuntime,
        comm: int,
        part: Part,
        how: Manner,
        go_on: Callable[[Any, Part | None, int], Info],
        give_up: Callable[[Any, Part | None, int], Work],
    ) -> Repeat | None:
        """What there is to know of a small call that is made again and again; None if it does not go through shared memory."""
        membership, lane = self._peer.comms.get(comm) if self._peer else None, self.lanes.get(comm)
        if membership is None or lane is None or not lane.complete or not (is_local(part) and part.is_plain):
            return None
        route = self.route(membership, part, local=True)
        if not route.errand or not route.errand.small:
            return None
        arithmetic = part.arithmetic(self.kernels, membership.view.world_size)
        crowded = not self._is_alone()
        return Repeat(runtime, membership, lane, part, how, route, arithmetic, crowded=crowded, go_on=go_on, give_up=give_up)

    def abandon(self, comm: int, op: Collective, index: int) -> None:
        """Take on a call that its caller has begun in the place of this index and given up, and end it for all."""
        membership = self.membership(comm)
        op.resume(self, membership.view, self._clock())
        membership.resume(op.record, CallId(None, index), self._loop.time())
        lane, part = self.lanes.get(comm), op.parts[0]
        route = self.route(membership, part, local=True)
        pull = part.begin(self, route, CallKey(membership.epoch, index, 0), atomic=op.atomic, lane=lane, call=op.signature)
        assert part.pull
        part.pull.adopt()
        self.resume(op, pull, membership)
        self.executor.start(pull)
        self.cancel(op)

    def resume(self, op: Collective, transfer: Moving | None, membership: Membership) -> None:
        """Take on a call that was begun without an operation."""
        self._in_flight[op] = None
        if transfer:
            self._running[transfer] = op
        self._set_deadline(op)
        self._arm(membership)

    def ended(self, op: Operation) -> None:
        """The call's caller has been told."""
        self._in_flight.pop(op, None)
        if (self._leaving or self._leaving_subs) and self.error is None:
            self._loop.call_soon(self._try_leave)

    def expire(self, op: Operation) -> None:
        """The call's deadline has passed."""
        self._end(op, Reason.DEADLINE, f"its timeout of {op.timeout:g} s passed" if op.timeout is not None else "")

    def cancel(self, op: Operation) -> None:
        """The caller does not want the call any more."""
        self._end(op, Reason.CANCELLED, "its caller cancelled it")

    def fail(self, op: Operation, detail: str) -> None:
        """The call cannot go on here: the body of a round raised, or the call does not fit the membership."""
        self._end(op, Reason.EXCEPTION, detail)

    def sealed(self, op: Operation) -> None:
        """All of a round is known now."""
        self._check_complete(op)

    def moved(self, op: Operation) -> None:
        """Something that is no transfer has brought the operation further."""
        self._check_complete(op)

    def given(self, op: Operation) -> None:
        """What this member gives to the call is there now."""
        if not op.settled and self.error is None and self._peer and op.comm in self._peer.comms:
            self._peer.comms[op.comm].give(op.record)

    def conflict(self, op: Operation, detail: str) -> None:
        """This member's state cannot become what the others have: it has to go."""
        self._end(op, Reason.CONFLICT, detail)

    def mismatched(self, op: Operation, uid: int) -> None:
        """A peer's frames are not of the same call."""
        self._end(op, Reason.MISMATCH, f"peer {uid} sent frames of another call")

    def in_thread(self, work: Callable[[], None]) -> asyncio.Future[None]:
        """Run something that takes long besides the loop."""
        return self._loop.run_in_executor(None, work)

    def from_thread(self, callback: Callable[..., None], *args: Any) -> None:
        """Have the loop call this; for `in_thread`."""
        self._loop.call_soon_threadsafe(callback, *args)

    def failed(self, op: Operation, error: Exception) -> None:
        """A step of a call that was taken elsewhere has failed, and so has the call."""
        if op.decided:  # only here: its result comes to an error
            op.complete()
            self._check_complete(op)
            return
        op.reason = self._reason(op, error)
        self.fail(op, str(op.reason))

    def _end(self, op: Operation, reason: int, detail: str) -> None:
        if op in self._in_flight and self.error is None and self._peer and op.comm in self._peer.comms:
            membership = self._peer.comms[op.comm]
            membership.expire(op.record, reason, detail, self._loop.time())
            self._arm(membership)

    def _check_complete(self, op: Operation) -> None:
        if not op.settled and op.is_complete() and self._peer and op.comm in self._peer.comms:
            membership = self._peer.comms[op.comm]
            membership.complete(op.record, self._loop.time())
            self._arm(membership)

    def explain(self, comm: int, ask: Ask) -> str:
        """How a call would run, and why."""
        membership = self.membership(comm)
        view, lane = membership.view, self.lanes.get(comm)
        local = bool(lane) and ask.algorithm in ("auto", LOCAL)
        route = self.routes.find(ask, view, membership.uid, membership.broken, ask.collective, local=local)
        what = f"{ask.collective} of {ask.given * ask.itemsize} bytes among {route.world} members: {route.algorithm}"
        if lane and route.errand:
            how = "through slots in shared memory" if route.errand.small else lane.manner
            return f"{what}, {how}; with atomic=True it commits there, without the master"
        near = self._peer.near if self._peer else set()
        apart = [m.name for m in view.members if m.uid not in near and m.uid != membership.uid]
        if route.world == 1:
            why = "nobody else is there"
        elif lane:
            why = "the algorithm says so"
        else:
            why = f"this member shares no memory with {', '.join(apart)}" if apart else "not all others share memory"
        slices = f" in slices of {route.layout.slice_size * ask.itemsize} bytes" if route.layout else ""
        return f"{what}{slices}, over links: {why}; with atomic=True the master commits it"

    def time(self) -> float:
        """The loop's, for deadlines."""
        return self._loop.time()

    def now(self) -> float:
        """Seconds, for measuring; uvloop's own clock counts milliseconds."""
        return self._clock()

    def spare(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """Memory for undoing or staging a call; hand it back with `give_spare`."""
        spare, self._spare = self._spare, None
        if spare is None or len(spare) < nbytes:
            return np.empty(nbytes, np.uint8)
        return spare

    def give_spare(self, spare: npt.NDArray[np.uint8]) -> None:
        """It is not needed any more. The largest is kept for a while: fresh memory costs a page fault per 4 KiB."""
        if self._spare is None or len(self._spare) < len(spare):
            self._spare = spare
        if self._spare_release:
            self._spare_release.cancel()
        self._spare_release = self._loop.call_later(SPARE_KEPT, self._drop_spare)

    def _drop_spare(self) -> None:
        self._spare = None

    # --- control client ---------------------------------------------------------------------------------------------

    def control_up(self) -> None:
        """The control connection is there, perhaps again."""
        self.poller.forget()
        if self._peer:
            self._peer.connected()

    def control_down(self) -> None:
        """It is gone for now."""
        self.poller.forget()
        logger.info("the control connection to %s is down; trying again", self._address)

    def control_refused(self, error: Exception) -> None:
        """The master does not talk to this peer."""
        if isinstance(error, PcclError):
            self._out(error)

    def control_received(self, data: bytes) -> None:
        """A message of the master."""
        assert self._peer
        if self._express:
            self._express.become_operation()
        try:
            self._peer.receive(codec.decode(data), self._loop.time())
        except WireError as e:
            logger.warning("a message of the master at %s makes no sense: %s", self._address, e)
        for membership in list(self._peer.comms.values()):
            self._arm(membership)
        if self._leaving or self._leaving_subs:
            self._try_leave()

    # --- protocol (PeerHost) ----------------------------------------------------------------------------------------

    def send(self, message: object) -> None:
        """To the master."""
        self._client.send(codec.encode(message))

    def make_links(self, m: Prepare) -> None:
        """Dial what an admission asks for."""
        self.poller.forget()
        assert self._peer
        for uid in (*m.dial, *m.accept):
            self.executor.flow(uid).detach()
            self._peer.near.discard(uid)
        self._ticket = m
        self._ticket_came.set()
        self._ticket_came = asyncio.Event()
        self._spawn(self._make_links(m))

    async def _make_links(self, m: Prepare) -> None:
        contacts = {c.uid: c.endpoints for c in m.contacts}
        results = await asyncio.gather(*(self._dial(m, uid, contacts.get(uid, ())) for uid in m.dial))
        if self._peer and self._ticket is m:
            self._peer.links_made(m.admission, tuple(uid for uid, ok in zip(m.dial, results, strict=True) if not ok))

    async def _dial(self, m: Prepare, uid: int, endpoints: tuple[str, ...]) -> bool:
        ticket = LinkTicket(m.admission, m.secret, m.uid, uid)
        flow = self.executor.flow(uid)
        try:
            link = await self._transport.dial(endpoints, ticket, flow, self.options.dial_timeout)
        except Refusal as e:
            logger.warning("no link to peer %d: %s", uid, e)
            return False
        if self.executor.flows.get(uid) is not flow:  # the peer, or this one, has gone meanwhile
            if link.near:
                link.near.close()
            link.close()
            return False
        self._attach(flow, link)
        return True

    def _attach(self, flow: Flow, link: Link) -> None:
        flow.attach(link)
        if link.near and self._peer:
            self._peer.near.add(link.uid)
            self.lanes.met(link.uid, link.near)
        self.poller.forget()

    async def _admit(self, admission: int, dialer: int, acceptor: int) -> LinkTicket | None:
        """A stranger claims to be a peer of an admission, which this one may not have heard of yet."""
        while self._ticket is None or self._ticket.admission < admission:
            await self._ticket_came.wait()
        m = self._ticket
        if m.admission != admission or m.uid != acceptor or all(c.uid != dialer for c in m.contacts):
            return None
        return LinkTicket(admission, m.secret, dialer, acceptor)

    def _accepted(self, link: Link) -> LinkHandler:
        flow = self.executor.flow(link.uid)
        self._attach(flow, link)
        return flow

    def admitted(self, view: View) -> None:
        """This peer is a member."""
        self.executor.enter_epoch(view.epoch, None, ())
        self._open_lane(ROOT)
        self._check_links(view)
        if not self._admitted.done():
            self._admitted.set_result(view)

    def epoch_changed(self, comm: int, old: View, new: View) -> None:
        """A communicator goes on in a new epoch: old traffic is over, links to those who are out are closed."""
        self.poller.forget()
        self.routes.clear()
        here = {m.uid for m in new.members}
        self.executor.enter_epoch(new.epoch, old.epoch, [m.uid for m in old.members])
        if comm == ROOT:
            for uid in [uid for uid in self.executor.flows if uid not in here]:
                self.executor.drop_flow(uid)
            if self._peer:
                self._peer.near &= here
            self._check_links(new)
        self._open_lane(comm)

    def _open_lane(self, comm: int) -> None:
        """Have a place in shared memory for a communicator's new epoch, if all its members do."""
        assert self._peer
        try:
            self.lanes.open(self._peer.comms[comm], self._here())
        except InvalidArgument as e:
            self._out(Evicted(str(e)))
            self._spawn(self._client.close())

    def _sweep_lanes(self) -> None:
        self.lanes.sweep(self._here())

    def _here(self) -> set[int]:
        """Uids of the group's members."""
        return {m.uid for m in self._peer.root.view.members} if self._peer and ROOT in self._peer.comms else set()

    def _check_links(self, view: View) -> None:
        """Complain of links that are missing without the master knowing."""
        assert self._peer
        mine = self._peer.uid
        broken = {frozenset(link) for link in self._peer.root.broken}
        for m in view.members:
            flow = self.executor.flows.get(m.uid)
            if m.uid != mine and (flow is None or flow.link is None) and frozenset((m.uid, mine)) not in broken:
                self._peer.link_lost(m.uid, "there is no link", lacking=False)

    def start(self, comm: int, record: Record) -> None:
        """Begin an attempt."""
        op = self._op(record)
        membership = self.membership(comm)
        if self._tried(op, lambda: op.begin(membership.view, record)):
            self._check_complete(op)

    def _tried(self, op: Operation, step: Callable[[], None]) -> bool:
        """Take a step of a call; if that cannot be, the call has failed."""
        try:
            step()
        except Exception as e:
            self.failed(op, e)  # a PcclError: the call does not fit this membership
            return False
        return True

    def _reason(self, op: Operation | Part, error: Exception) -> PcclError:
        """What the caller gets for an error that has come up here."""
        if isinstance(error, PcclError):
            return error
        self._complain(f"{op.description} failed", error)
        return InternalError(f"{op.description}: {error!r}")

    def run(self, op: Operation, transfer: Moving) -> None:
        """Run what moves a call's data."""
        self._running[transfer] = op
        self.executor.start(transfer)

    def stop(self, op: Operation) -> None:
        """Stop what moves a call's data; it holds no memory when this returns."""
        for transfer in [t for t, o in self._running.items() if o is op]:
            del self._running[transfer]
            self.executor.halt(transfer)

    def halt(self, comm: int, record: Record) -> None:
        """Stop a call's transfers for good; they hold no memory when this returns."""
        op = self._op(record)
        for transfer in [t for t, o in self._running.items() if o is op]:
            self.executor.void(transfer.key)
        self.stop(op)
        op.halt()

    def discard(self, comm: int, epoch: Epoch, call: CallId) -> None:
        """A call was aborted: nothing of it is kept."""
        membership = self.membership(comm)
        uids = call.pair or [m.uid for m in membership.view.members]
        self.executor.discard(epoch, call.key, [u for u in uids if u != membership.uid])

    def restore(self, comm: int, record: Record) -> None:
        """Give the inputs back; another attempt begins."""
        self._op(record).restore()

    def agreed(self, comm: int, record: Record, payload: bytes) -> None:
        """The master has answered what all members gave."""
        op = self._op(record)
        self._tried(op, lambda: op.agreed(codec.decode(payload)))

    def finish(self, comm: int, record: Record, outcome: Outcome) -> None:
        """A call is over."""
        op = self._op(record)
        op.view = outcome.view
        if not outcome.committed:
            op.restore()
            op.settle(op.reason or failure(op, record, outcome))
            return
        try:
            result = op.result(outcome, record)
        except Exception as e:
            result = self._reason(op, e)
        op.settle(result)

    def adopt(self, parent: int, result: SplitResult) -> Membership | None:
        """The communicator that a split made for this peer."""
        assert self._peer
        made = self._peer.adopt(self.membership(parent), result)
        if made:
            self.executor.enter_epoch(made.epoch, None, ())
            self._open_lane(made.comm)
        return made

    def newcomers_wait(self, comm: int, waiting: bool) -> None:
        """Have this said by calls that commit in shared memory."""
        lane = self.lanes.get(comm)
        if lane:
            lane.waiting = waiting

    def waits_for(self, comm: int, m: Waiting) -> None:
        """Log that a call waits."""
        names = {x.uid: x.name for x in self.membership(comm).view.members}
        text = "call %s waits for %s, which have not made it for %g s"
        logger.warning(text, m.call, ", ".join(names.get(u, str(u)) for u in m.missing), self.options.log_waiting)

    def refused(self, reason: int, detail: str) -> None:
        """The master does not want this peer."""
        self._out(VersionMismatch(detail) if reason == Reason.REFUSED else ConnectError(detail))

    def gone(self, reason: int, detail: str) -> None:
        """This peer is out of its group."""
        if reason == Reason.LEFT:
            self._out(Evicted("it left"))
        elif reason == Reason.CONFLICT:
            self._out(StateConflict(f"this peer is no longer in its group: {detail}"))
        else:
            self._out(Evicted(detail))

    def give_up(self, detail: str) -> None:
        """No verdict came."""
        self._out(Evicted(detail))

    def _out(self, error: PcclError) -> None:
        """This peer is out: everything in flight fails, and everything from now on."""
        if self.error:
            return
        self.error = error
        if self._leaving and not self._leaving.done():
            self._leaving.set_result(None)
        else:
            logger.warning("out of group %r: %s", self._group, error)
        self._fail_all(error)
        for uid in list(self.executor.flows):
            self.executor.drop_flow(uid)
        if not self._admitted.done():
            reason = error.reason if isinstance(error, Evicted) else str(error)
            refused = isinstance(error, (ConnectError, StateConflict))
            self._admitted.set_exception(error if refused else ConnectError(f"the group did not let this peer in: {reason}"))

    def _fail_all(self, error: PcclError) -> None:
        self.error = self.error or error
        for membership in list(self._peer.comms.values()) if self._peer else ():
            for record in membership.abandon():
                op = self._op(record)
                self.halt(membership.comm, record)
                if op.decided:
                    self.finish(membership.comm, record, Outcome(True, membership.view))
                    continue
                op.restore()
                op.settle(self.error)

    def leave_sub(self, comm: int, at_once: bool) -> None:
        """Leave a sub-communicator, once no call on it is in flight; at once: end those for all."""
        for op in [op for op in self._in_flight if at_once and op.comm == comm]:
            self.cancel(op)
        if self._peer and comm in self._peer.comms:
            self._leaving_subs.add(comm)
            self._try_leave()

    def _try_leave(self) -> None:
        """Leave what is to be left, once no call is in flight there."""
        assert self._peer
        comms = self._peer.comms
        for comm in [n for n in self._leaving_subs if n in comms and not comms[n].in_flight]:
            self._leaving_subs.discard(comm)
            left = comms.pop(comm)
            left.leave()
            self.lanes.leave(comm)
            self._sweep_lanes()
            self.executor.leave_epoch(left.epoch, [m.uid for m in left.view.members])
        if self._leaving and not self._left and not any(c.in_flight for c in comms.values()):
            self._left = True
            for comm in sorted(comms, reverse=True):  # the root at last: that is the end
                comms[comm].leave()

    # --- executor ---------------------------------------------------------------------------------------------------

    def transfer_done(self, transfer: Moving) -> None:
        """A transfer is complete."""
        op = self._running.pop(transfer, None)
        if op:
            op.transfer_done(transfer)
            self._check_complete(op)
        elif self._express and self._express.transfer is transfer:
            self._express.transfer_done()

    def transfer_mismatch(self, transfer: Moving, uid: int) -> None:
        """A peer's frames are not of the same call."""
        if self._express and self._express.transfer is transfer:
            self._express.become_operation()
        op = self._running.get(transfer)
        if op:
            self.mismatched(op, uid)

    def transfer_failed(self, transfer: Moving, error: Exception) -> None:
        """A transfer cannot go on here; so the call ends for all."""
        if self._express and self._express.transfer is transfer:
            self._express.become_operation()
        op = self._running.get(transfer)
        if op:
            self.failed(op, error)

    def flow_broken(self, uid: int, error: Exception, *, lacking: bool) -> None:
        """The link to a peer is gone; data of it may have yet to come in a call that is under way."""
        self.poller.forget()
        if self._peer and self.error is None:
            self._peer.link_lost(uid, str(error) or type(error).__name__, lacking=lacking)

    def links_changed(self) -> None:
        """A link has other descriptors than before."""
        self.poller.forget()

    def flush_lazy_soon(self) -> None:
        """Send lazy credits after a while."""
        if self._lazy is None:
            self._lazy = self._loop.call_later(LAZY_CREDIT, self._flush_lazy)

    def _flush_lazy(self) -> None:
        self._lazy = None
        self.executor.flush_lazy()

    def step_soon(self) -> None:
        """Take what goes through shared memory further, between other things."""
        if not self._stepping:
            self._stepping = True
            self._loop.call_soon(self._step)

    def _step(self) -> None:
        self._stepping = False
        region = self._region
        if region is None:
            return
        region.sleeping(False)
        if not self.executor.pulls:
            return
        moved = self.executor.step()
        if not moved:
            region.sleeping(True)
            moved = self.executor.step()
        if moved:
            self.step_soon()

    def _rung(self) -> None:
        assert self._region
        self._region.receive()
        self.step_soon()

    # --- time -------------------------------------------------------------------------------------------------------

    def _beat(self) -> None:
        """Every heartbeat interval."""
        if self._peer and self.error is None:
            self._peer.beat(self.executor.progress)
            self._watch_deadlines()
            self._sweep_lanes()
            self.lanes.trim(self._loop.time())
            for uid in self.executor.silent_flows(self.options.path_timeout):
                flow = self.executor.flow(uid)
                flow.detach()
                self.executor.link_lost(flow, ConnectionError(f"nothing was acknowledged for {self.options.path_timeout:g} s"))
        self._heart = self._loop.call_later(self.options.heartbeat_interval, self._beat)

    def _watch_deadlines(self) -> None:
        """Give those calls a timer that are due before the next beat but one: most end long before they would need it."""
        soon = self._clock() + 2 * self.options.heartbeat_interval
        for op in self._in_flight:
            if op.timeout is not None and op.deadline is None and op.began + op.timeout <= soon:
                op.deadline = self._loop.call_later(max(0.0, op.began + op.timeout - self._clock()), self.expire, op)

    def _arm(self, membership: Membership) -> None:
        """Have the membership's timer go off when it is due."""
        due = membership.timer()
        comm = membership.comm
        armed = self._timer_due.get(comm)
        if due is None or (armed is not None and armed <= due):
            return
        if comm in self._timers:
            self._timers[comm].cancel()
        self._timer_due[comm] = due
        self._timers[comm] = self._loop.call_at(due, self._tick, membership, due)

    def _tick(self, membership: Membership, due: float) -> None:
        self._timer_due.pop(membership.comm, None)
        self._timers.pop(membership.comm, None)
        if self.error is None:
            membership.tick(max(due, self._loop.time()))  # uvloop's timers may be a millisecond early
            self._arm(membership)

    # --- inside -----------------------------------------------------------------------------------------------------

    def _links(self) -> list[Source]:
        return [source for flow in self.executor.flows.values() if flow.link for source in flow.link.sources()]

    def _is_alone(self) -> bool:
        """Whether every member of this host can have a core to itself."""
        here = sum(m.host == self._host for m in self._peer.root.view.members) if self._peer and ROOT in self._peer.comms else 1
        return here <= (os.cpu_count() or 1)

    def _complain(self, what: str, error: Exception) -> None:
        self._loop.call_exception_handler({"message": what, "exception": error})

    def _op(self, record: Record) -> Operation:
        assert isinstance(record.op, Operation)
        return record.op

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(coroutine)
        self._tasks[task] = None
        task.add_done_callback(self._tasks.pop)
