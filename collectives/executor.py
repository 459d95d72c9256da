"""Runs transfers over the flows to all peers, and keeps apart what belongs to which epoch.

One executor serves all communicators of a peer. It is driven by the engine (start, halt, epochs) and by links (through the flows), and
tells the engine what has happened. It never waits.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pccl.collectives.flow import CallKey, Flow, Moving
from pccl.collectives.pull import Pull
from pccl.core.frames import Header, Kind
from pccl.core.types import Epoch

SCRATCH_KEPT = 16 << 20
"""Bytes of scratch that are kept for the next call."""


class ExecutorHost(Protocol):
    """The engine."""

    def transfer_done(self, transfer: Moving) -> None:
        """All of it is here, and all of it is out."""

    def transfer_mismatch(self, transfer: Moving, uid: int) -> None:
        """A peer's frames are not of the same call."""

    def transfer_failed(self, transfer: Moving, error: Exception) -> None:
        """It cannot go on here."""

    def flow_broken(self, uid: int, error: Exception, *, lacking: bool) -> None:
        """The link to a peer is gone; data of it may have yet to come."""

    def flush_lazy_soon(self) -> None:
        """Call `Executor.flush_lazy` in a few milliseconds."""

    def step_soon(self) -> None:
        """Call `Executor.step`, and again as long as it says so, and whenever a neighbour rings."""


class _Dead:
    """A call that ended here before its time."""

    __slots__ = ("heard", "waits")

    def __init__(self) -> None:
        self.heard: set[int] = set()
        """Peers that have discarded it"""
        self.waits: set[int] | None = None
        """Peers that have yet to, once this one has"""


class Executor:
    """All running transfers, and the flows that carry them."""

    def __init__(self, host: ExecutorHost) -> None:
        self.progress = 0
        """Payload bytes sent and received so far"""
        self.flows: dict[int, Flow] = {}
        self._host = host
        self._transfers: dict[CallKey, Moving] = {}
        self._pulls: dict[Pull, None] = {}
        self._epochs: set[Epoch] = set()
        """The present ones of all communicators"""
        self._newest: tuple[int, int] = (0, -1)
        self._dead: dict[Epoch, dict[int, _Dead]] = defaultdict(dict)
        """Calls that ended before their time; what still comes of them is dropped, until every peer has said that nothing more will"""
        self._scratch: dict[int, list[npt.NDArray[np.uint8]]] = defaultdict(list)
        self._scratch_kept = 0
        self._dirty: dict[Flow, None] = {}
        self._flushing = False

    # --- the engine -------------------------------------------------------------------------------------------------

    def flow(self, uid: int) -> Flow:
        """The traffic with a peer."""
        if uid not in self.flows:
            self.flows[uid] = Flow(self, uid)
        return self.flows[uid]

    def drop_flow(self, uid: int) -> None:
        """The peer is no longer in the group."""
        flow = self.flows.pop(uid, None)
        if flow:
            flow.detach()

    def start(self, transfer: Moving) -> None:
        """Run a transfer."""
        self._transfers[transfer.key] = transfer
        if isinstance(transfer, Pull):
            self._pulls[transfer] = None
            self._host.step_soon()
            return
        transfer.start()
        for flow in [f for f in self.flows.values() if f.link is None and transfer.lacks(f)]:
            self._host.flow_broken(flow.uid, ConnectionError("there is no link"), lacking=True)
        self._host.flush_lazy_soon()
        self.flush()

    def halt(self, transfer: Moving) -> None:
        """Stop a transfer; it holds no memory when this returns."""
        if self._transfers.pop(transfer.key, None):
            self._forget_pull(transfer)
            transfer.halt()

    def _forget_pull(self, transfer: Moving) -> None:
        if isinstance(transfer, Pull):
            self._pulls.pop(transfer, None)

    def step(self) -> bool:
        """Take what goes through shared memory a step further; returns whether anything has moved."""
        moved = False
        for pull in list(self._pulls):
            try:
                moved |= pull.step()
            except Exception as e:
                moved = True
                self._host.transfer_failed(pull, e)
        return moved

    @property
    def pulls(self) -> bool:
        """Whether anything goes through shared memory now."""
        return bool(self._pulls)

    def void(self, key: CallKey) -> None:
        """The attempt will not go on: what its peers still send, for which they have credit, is dropped."""
        self._dead[key.epoch].setdefault(key.call, _Dead())

    def discard(self, epoch: Epoch, call: int, uids: Iterable[int]) -> None:
        """A call has ended before its time: nothing of it is kept, and its members are told so."""
        dead = self._dead[epoch].setdefault(call, _Dead())
        dead.waits = set()
        for uid in uids:
            if uid in self.flows:
                flow = self.flows[uid]
                if flow.link and uid not in dead.heard and not flow.is_unwanted(epoch, call):
                    dead.waits.add(uid)
                flow.forget(epoch, call)
                flow.say(Header(Kind.DISCARDED, epoch, call))
        self._bury(epoch, call)
        self.flush()

    def discarded(self, flow: Flow, epoch: Epoch, call: int) -> bool:
        """A peer keeps nothing of a call, and sends no more of it. Returns whether the call is over here, too."""
        dead = self._dead[epoch].get(call) if epoch in self._dead else None
        if dead is None:
            return self.is_over(CallKey(epoch, call, 0))
        dead.heard.add(flow.uid)
        if dead.waits is not None:
            dead.waits.discard(flow.uid)
            self._bury(epoch, call)
        return True

    def _bury(self, epoch: Epoch, call: int) -> None:
        if not self._dead[epoch][call].waits:
            del self._dead[epoch][call]

    def enter_epoch(self, new: Epoch, old: Epoch | None, uids: Iterable[int]) -> None:
        """A communicator has gone from one epoch to the next; its transfers were halted before.

        Args:
            uids: who may have sent something in the old one.
        """
        self._epochs.add(new)
        self._newest = max(self._newest, (new.term, new.number))
        if old is None:
            return
        self._epochs.discard(old)
        self._dead.pop(old, None)
        self._forget(old, uids)

    def leave_epoch(self, epoch: Epoch, uids: Iterable[int]) -> None:
        """This peer is no longer in a communicator: what still comes of it is dropped, and its members are told so."""
        self._epochs.discard(epoch)
        self._dead.pop(epoch, None)
        self._forget(epoch, uids)

    def _forget(self, epoch: Epoch, uids: Iterable[int]) -> None:
        for uid in uids:
            if uid in self.flows:
                self.flows[uid].forget(epoch)
                self.flows[uid].say(Header(Kind.MARK, epoch))
        self.flush()

    def flush(self) -> None:
        """Send what the last events made ready."""
        if self._flushing:
            return
        self._flushing = True
        try:
            while self._dirty:
                flow = next(iter(self._dirty))
                del self._dirty[flow]
                flow.wake()
        finally:
            self._flushing = False

    def flush_lazy(self) -> None:
        """Send credits that could wait until now."""
        for flow in self.flows.values():
            flow.flush_lazy()
        self.flush()

    def silent_flows(self, limit: float) -> list[int]:
        """Peers whose links have waited that long for an acknowledgement."""
        return [uid for uid, flow in self.flows.items() if flow.link and flow.link.silent_for() >= limit]

    # --- flows ------------------------------------------------------------------------------------------------------

    def transfer(self, key: CallKey) -> Moving | None:
        """The running transfer of this name."""
        return self._transfers.get(key)

    def is_over(self, key: CallKey) -> bool:
        """Whether what comes of a call is worthless; a call that was not entered yet, or an epoch not yet heard of, is not over."""
        if key.epoch in self._epochs:
            return key.epoch in self._dead and key.call in self._dead[key.epoch]
        return (key.epoch.term, key.epoch.number) <= self._newest

    def moved(self, n: int) -> None:
        """Payload bytes were received or sent."""
        self.progress += n

    def made_way(self) -> None:
        """A slot is free that a call may wait for."""
        if self._pulls:
            self._host.step_soon()

    def link_lost(self, flow: Flow, error: Exception) -> None:
        """A link broke."""
        self._host.flow_broken(flow.uid, error, lacking=any(transfer.lacks(flow) for transfer in self._transfers.values()))

    def needs_flush(self, flow: Flow) -> None:
        """A flow has something to send."""
        self._dirty[flow] = None

    # --- transfers --------------------------------------------------------------------------------------------------

    def done(self, transfer: Moving) -> None:
        """A transfer is complete."""
        self._transfers.pop(transfer.key, None)
        self._forget_pull(transfer)
        self._host.transfer_done(transfer)

    def mismatch(self, transfer: Moving, uid: int) -> None:
        """A peer's call is not the same."""
        self._host.transfer_mismatch(transfer, uid)

    def unreadable(self, transfer: Moving, uid: int, error: OSError) -> None:
        """A peer's memory cannot be read, though it lives: meet it again."""
        self._host.flow_broken(uid, error, lacking=True)

    def take_scratch(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """Memory for one slice, rounded up to a power of two."""
        size = 1 << max(6, (nbytes - 1).bit_length())
        free = self._scratch[size]
        if free:
            self._scratch_kept -= size
            return free.pop()
        return np.empty(size, np.uint8)

    def give_scratch(self, scratch: npt.NDArray[np.uint8]) -> None:
        """It is no longer needed."""
        if self._scratch_kept + scratch.nbytes <= SCRATCH_KEPT:
            self._scratch_kept += scratch.nbytes
            self._scratch[scratch.nbytes].append(scratch)
