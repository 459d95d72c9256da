"""A small all-reduce in one frame each way per pair: what `Transfer` would do with the same schedule, without streams, slices and windows.

Everyone sends its input to everyone and folds for itself (direct), or all send it to a hub, which folds and sends the result back (star).
Parts are folded in the order of ranks, so the bits are those of the schedule.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from pccl.collectives.flow import UNCREDITED_PER_CALL, CallKey, Flow
from pccl.collectives.transfer import Arithmetic, TransferHost, Undo
from pccl.core.frames import Header, Kind
from pccl.transports.base import OutFrame

Array = npt.NDArray[np.generic]

MOST = UNCREDITED_PER_CALL
"""Bytes that need nobody's credit."""


class Lane:
    """What goes to one peer and what comes from it: a frame each way. Implements `Outgoing` and `Incoming`."""

    __slots__ = ("_data", "flow", "here", "limit", "position", "queued", "transfer")

    def __init__(self, transfer: Volley, flow: Flow, data: memoryview) -> None:
        self.transfer = transfer
        self.flow = flow
        self.queued = False
        self.position = 0
        self.limit = 0
        self.here = False
        """The peer's frame has come."""
        self._data = data

    def is_ready(self) -> bool:
        """Once, when there is something to send."""
        return not self.position and self.transfer.payload is not None

    def head_bytes(self) -> int:
        """All of it."""
        return self.transfer.nbytes

    def pull(self) -> OutFrame:
        """The frame."""
        t = self.transfer
        self.position = t.nbytes
        t.bytes_sent += t.nbytes
        return OutFrame(Header(Kind.DATA, t.key.epoch, t.key.call, t.key.sub, 0, 0, t.nbytes, t.signature), t.payload, t, (0, 0))

    def place(self) -> memoryview:
        """Where the peer's frame goes."""
        self.transfer.receives()
        return self._data

    def arrived(self) -> None:
        """It is there; so the peer is in the call, and has a place for ours."""
        self.here = True
        self.limit = self.transfer.nbytes
        self.transfer.received()

    def voided(self) -> None:
        """Its sender has given up; so will this one."""


class Volley:
    """One attempt. Implements `Moving`.

    Args:
        source, target: flat arrays of one dtype and at most MOST bytes, or the same one.
        flows: rank -> flow, of all others, or of those that this rank has to do with.
        hub: the rank that folds for all; None: each for itself.
        undo: saves what is overwritten, if the call may have to give its input back.
    """

    def __init__(
        self,
        host: TransferHost,
        key: CallKey,
        signature: int,
        source: Array,
        target: Array,
        arithmetic: Arithmetic,
        flows: Mapping[int, Flow],
        *,
        rank: int,
        hub: int | None,
        undo: Undo | None,
    ) -> None:
        self.host = host
        self.key = key
        self.signature = signature
        self.nbytes = source.nbytes
        self.bytes_sent = 0
        self.bytes_received = 0
        self.halted = False
        self.payload: memoryview | None = None
        """What goes to each peer, once it is known"""
        self._target = target
        self._arithmetic = arithmetic
        self._undo = undo
        self._folds = hub is None or hub == rank
        self._spreads = hub == rank
        self._expected = len(flows)
        self._unsent = len(flows)
        if not self._spreads:
            self.payload = source.view(np.uint8).data
        if self._folds:
            size, world = len(source), len(flows) + 1
            room = bytearray(self.nbytes * world)
            rows, places = np.frombuffer(room, source.dtype), memoryview(room)
            self._parts = [source if r == rank else rows[r * size : (r + 1) * size] for r in range(world)]
            self._lanes = {flow: Lane(self, flow, places[r * self.nbytes : (r + 1) * self.nbytes]) for r, flow in flows.items()}
        else:
            self._parts = []
            self._lanes = {flow: Lane(self, flow, target.view(np.uint8).data) for flow in flows.values()}

    # --- Moving -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin: say that this member is in, take what came early, and send."""
        for flow, lane in self._lanes.items():
            if self._folds:  # else the hub answers to what this sends, and needs no other word of it
                flow.grant(self.key, 0, self.nbytes, self.signature, lazy=True)
            flow.deliver_early(self)
            if self.halted:  # what came early was not of this call
                return
            if lane.is_ready():
                flow.offer(lane)

    def halt(self) -> None:
        """Stop, and hold no memory."""
        self.halted = True
        for flow in self._lanes:
            flow.halt(self)

    def forget(self) -> None:
        """It is over. It and its lanes know each other: without this, its memory would wait for the garbage collector."""
        self._lanes = {}

    def lacks(self, flow: Flow) -> bool:
        """Its frame."""
        lane = self._lanes.get(flow)
        return lane is not None and not lane.here

    def in_stream(self, flow: Flow, header: Header) -> Lane | None:
        """The peer's lane; None if the frame is not of the same call."""
        lane = self._lanes.get(flow)
        right = lane and not lane.here and (header.channel, header.position, header.length) == (0, 0, self.nbytes)
        if self.halted or not right or header.signature != self.signature:
            if not self.halted:
                self.host.mismatch(self, flow.uid)
            return None
        return lane

    def is_due_credit(self, flow: Flow) -> bool:
        """A frame from it says as much."""
        return False

    def credited(self, flow: Flow, header: Header) -> None:
        """The peer is in the call."""
        lane = self._lanes.get(flow)
        if lane is None or header.signature != self.signature:
            if not self.halted:
                self.host.mismatch(self, flow.uid)
            return
        lane.limit = self.nbytes
        if lane.is_ready():
            flow.offer(lane)

    def sent(self, block: int, s: int) -> None:
        """A frame is out."""
        if not self.halted:
            self._unsent -= 1
            self._go_on()

    # --- lanes ------------------------------------------------------------------------------------------------------

    def receives(self) -> None:
        """A frame begins to come in: a result goes to where the caller's input may be."""
        if not self._folds:
            self._save()

    def received(self) -> None:
        """A frame is here."""
        self.bytes_received += self.nbytes
        self._expected -= 1
        self._go_on()

    def _go_on(self) -> None:
        if self._expected or (self._unsent and not self._spreads):
            return  # the input may lie where the result goes
        if self._parts:
            parts, self._parts = self._parts, []
            self._save()
            self._arithmetic.fold(self._target, parts, True)
            if self._spreads:
                self.payload = self._target.view(np.uint8).data
                for flow, lane in self._lanes.items():
                    flow.offer(lane)
        if not self._unsent:
            self.host.done(self)

    def _save(self) -> None:
        """Once: what is there the second time may be half a result."""
        undo, self._undo = self._undo, None
        if undo:
            undo.save(0, self.nbytes)
