"""What goes on between this peer and one other: whose slices are sent next, how much may be sent unasked, and what came early.

Credits: a receiver that has entered a call grants each of its streams a place for so many bytes. Without that grant a sender sends
at most 16 KiB of a call, and counts at most 1 MiB of all calls outstanding; a call's share comes back with its credit, with data of
the same call where it needs none (which shows that the peer has entered it), or with the receiver's word that it keeps nothing of
it. So a reader never stops reading, and what it keeps is bounded.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple, Protocol

from pccl.core.codec import WireError
from pccl.core.frames import HEADER_BYTES, SEAL_BYTES, Header, Kind
from pccl.core.types import Epoch
from pccl.transports.base import MOST_SMALL, Link, OutFrame

UNCREDITED_PER_CALL = 16 << 10
"""Payload bytes of a call that may be sent to a peer that has not granted a place for them."""
UNCREDITED_PER_PEER = 1 << 20
"""Bytes of all calls, headers included, that may be outstanding in this way."""
FRAME_OVERHEAD = HEADER_BYTES + SEAL_BYTES


class CallKey(NamedTuple):
    """A transfer, as frames name it."""

    epoch: Epoch
    call: int
    sub: int


class Incoming(Protocol):
    """A slice that comes in; of one stream several may be under way, and come in any order."""

    def place(self) -> memoryview:
        """Where it goes."""

    def arrived(self) -> None:
        """It is there."""

    def voided(self) -> None:
        """It was given up by its sender."""


class Outgoing(Protocol):
    """What goes out of one stream, in order."""

    @property
    def transfer(self) -> Moving:
        """What it belongs to."""

    queued: bool
    """Whether the flow has it in its queue; the flow's own note"""
    position: int
    """Bytes that were pulled"""
    limit: int
    """Bytes that have a place at the peer"""

    def is_ready(self) -> bool:
        """Whether there is a next slice that may be sent, credit apart."""

    def head_bytes(self) -> int:
        """Its length."""

    def pull(self) -> OutFrame:
        """It, as a frame whose token is `transfer` and whose note are arguments for `Moving.sent`."""


class Moving(Protocol):
    """Something that moves the data of one call: a transfer, or the exchange of a shared state."""

    key: CallKey
    halted: bool

    def start(self) -> None:
        """Begin."""

    def halt(self) -> None:
        """Stop, and hold no memory."""

    def lacks(self, flow: Flow) -> bool:
        """Whether data of this peer has yet to come, however the call goes on."""

    def in_stream(self, flow: Flow, header: Header) -> Incoming | None:
        """The slice that a frame brings; None if it does not belong here."""

    def is_due_credit(self, flow: Flow) -> bool:
        """Whether the peer will say CREDIT for this call, whatever else comes of it."""

    def credited(self, flow: Flow, header: Header) -> None:
        """The peer has a place for more of a stream."""

    def sent(self, block: int, s: int) -> None:
        """A slice with this note is out."""


class FlowHost(Protocol):
    """The executor."""

    def transfer(self, key: CallKey) -> Moving | None:
        """What runs under this name."""

    def is_over(self, key: CallKey) -> bool:
        """Whether frames of this call are worthless: its epoch or the call itself is over here."""

    def discarded(self, flow: Flow, epoch: Epoch, call: int) -> bool:
        """The peer sends nothing more of a call that was aborted, and keeps nothing. Returns whether the call is over here, too."""

    def moved(self, n: int) -> None:
        """So many payload bytes were received or sent."""

    def link_changed(self) -> None:
        """A link reads from more or from fewer descriptors than before."""

    def link_lost(self, flow: Flow, error: Exception) -> None:
        """The link broke, or was closed for a breach of the protocol."""

    def needs_flush(self, flow: Flow) -> None:
        """There is something to send, as soon as `flush` is called."""

    def flush(self) -> None:
        """Send what the last events made ready."""


class Flow:
    """The traffic with one peer. A LinkHandler."""

    def __init__(self, host: FlowHost, uid: int) -> None:
        self.uid = uid
        self.link: Link | None = None
        self._host = host
        self._ready: deque[Outgoing] = deque()
        """Streams whose next slice is small; and large, next"""
        self._large: deque[Outgoing] = deque()
        self._capped: list[Outgoing] = []
        """Streams that wait for shares to come back"""
        self._control: deque[Header] = deque()
        self._lazy: dict[CallKey, list[tuple[int, int, int]]] = {}
        """Credits that can wait: the sender has all it needs, they only return its share. Most are overtaken by data: no headers yet."""
        self._shares: dict[CallKey, tuple[int, int]] = {}
        """Bytes outstanding without credit, with headers and without"""
        self._share_total = 0
        self._early: dict[CallKey, list[tuple[Header, bytearray]]] = {}
        self._early_bytes = 0
        self._credits: dict[CallKey, list[Header]] = {}
        """Grants for calls that this peer has not entered yet"""
        self._incoming: dict[Header, tuple[Moving, Incoming] | bytearray] = {}
        """Frames that are coming in"""
        self._unwanted: set[tuple[Epoch, int | None]] = set()
        """Calls, or whole epochs, that are over for the peer and not yet here: no share of them would ever come back"""

    # --- for transfers ----------------------------------------------------------------------------------------------

    def offer(self, stream: Outgoing) -> None:
        """A stream has a slice to send."""
        if not stream.queued:
            self._queue(stream)
            self._host.needs_flush(self)

    def _queue(self, stream: Outgoing) -> None:
        stream.queued = True
        (self._ready if stream.head_bytes() <= MOST_SMALL else self._large).append(stream)

    def grant(self, key: CallKey, channel: int, limit: int, signature: int, *, lazy: bool) -> None:
        """Tell the peer that bytes up to `limit` of a stream have a place here."""
        if lazy:
            self._lazy.setdefault(key, []).append((channel, limit, signature))
        else:
            self._credit(key, channel, limit, signature)
            self._host.needs_flush(self)

    def _credit(self, key: CallKey, channel: int, limit: int, signature: int) -> None:
        self._control.append(Header(Kind.CREDIT, key.epoch, key.call, key.sub, channel, limit, 0, signature))

    def say(self, header: Header) -> None:
        """Send a frame without payload."""
        self._control.append(header)
        self._host.needs_flush(self)

    def deliver_early(self, transfer: Moving) -> None:
        """Give a transfer that begins what came of its call before: grants for its streams, and frames."""
        if not self._early and not self._credits:
            return
        frames, credits = self._take_early(transfer.key)
        for header in credits:
            transfer.credited(self, header)
        for header, data in frames:
            if not transfer.halted:
                self.redeliver(transfer, header, data)

    def _take_early(self, key: CallKey) -> tuple[list[tuple[Header, bytearray]], list[Header]]:
        frames = self._early.pop(key, [])
        self._early_bytes -= sum(len(data) + FRAME_OVERHEAD for _, data in frames)
        return frames, self._credits.pop(key, [])

    def forget(self, epoch: Epoch, call: int | None = None) -> None:
        """Whatever came early of a call, or of an epoch, is worthless."""
        for key in [k for k in self._early if k.epoch == epoch and call in (None, k.call)]:
            self._take_early(key)
        for table in (self._credits, self._lazy):
            for key in [k for k in table if k.epoch == epoch and call in (None, k.call)]:
                table.pop(key)
        self._unwanted = {u for u in self._unwanted if u[0] != epoch or call not in (None, u[1])}

    def is_unwanted(self, epoch: Epoch, call: int) -> bool:
        """Whether the peer has said that it is done with a call that goes on here."""
        return bool(self._unwanted) and ((epoch, call) in self._unwanted or (epoch, None) in self._unwanted)

    def halt(self, transfer: Moving) -> None:
        """Let go of a transfer's memory."""
        if self.link:
            self.link.abort(transfer)
        for header, incoming in list(self._incoming.items()):
            if isinstance(incoming, tuple) and incoming[0] is transfer:
                del self._incoming[header]
                if self.link:
                    self.link.redirect(header)
                incoming[1].voided()
        self._ready = deque(s for s in self._ready if s.transfer is not transfer)
        self._large = deque(s for s in self._large if s.transfer is not transfer)
        self._capped = [s for s in self._capped if s.transfer is not transfer]
        self._lazy.pop(transfer.key, None)

    def flush_lazy(self) -> None:
        """Send the credits that could wait until now."""
        if self._lazy:
            for key, credits in self._lazy.items():
                for credit in credits:
                    self._credit(key, *credit)
            self._lazy.clear()
            self._host.needs_flush(self)

    # --- the link ---------------------------------------------------------------------------------------------------

    def attach(self, link: Link) -> None:
        """A new link to the peer; what was under way on an old one is lost, and so are the calls that it belonged to."""
        self.detach()
        self.link = link

    def detach(self) -> None:
        """Go without a link, and without what came over it."""
        self._cut()
        self._early.clear()
        self._early_bytes = 0
        self._credits.clear()

    def _cut(self) -> None:
        link, self.link = self.link, None
        if link:
            link.close()
        self._incoming.clear()
        self._ready.clear()
        self._large.clear()
        self._capped.clear()
        self._control.clear()
        self._lazy.clear()
        self._shares.clear()
        self._share_total = 0
        self._unwanted.clear()

    def wake(self) -> None:
        """Send what can be sent."""
        if self.link and (self._ready or self._control or self._large):
            self.link.wake()

    def next_frame(self, link: Link, *, small: bool = True, large: bool = True) -> OutFrame | None:
        """Control frames first, then small slices, then large ones, of all streams in turn."""
        if small:
            if self._control:
                return OutFrame(self._control.popleft(), None, None)
            while self._ready:
                frame = self._pull(self._ready)
                if frame:
                    return frame
        if large:
            while self._large:
                frame = self._pull(self._large)
                if frame:
                    return frame
        return None

    def _pull(self, streams: deque[Outgoing]) -> OutFrame | None:
        stream = streams.popleft()
        stream.queued = False
        if not self._may_send(stream):
            return None
        frame = stream.pull()
        self._lazy.pop(stream.transfer.key, None)  # data says as much
        if stream.is_ready():
            self._queue(stream)
            self._host.needs_flush(self)  # it may be another stripe's turn
        return frame

    def _may_send(self, stream: Outgoing) -> bool:
        length = stream.head_bytes()
        if stream.position + length <= stream.limit:
            return True
        key = stream.transfer.key
        if self.is_unwanted(key.epoch, key.call):
            return False
        share, payload = self._shares.get(key, (0, 0))
        if payload + length > UNCREDITED_PER_CALL:
            return False  # the credit will offer the stream again
        if self._share_total + length + FRAME_OVERHEAD > UNCREDITED_PER_PEER:
            self._capped.append(stream)
            return False
        self._shares[key] = share + length + FRAME_OVERHEAD, payload + length
        self._share_total += length + FRAME_OVERHEAD
        return True

    def _return_share(self, key: CallKey) -> None:
        share, _ = self._shares.pop(key, (0, 0))
        if share:
            self._share_total -= share
            capped, self._capped = self._capped, []
            for stream in capped:
                if stream.is_ready():  # a credit may have sent it since
                    self.offer(stream)

    def frame_sent(self, link: Link, frame: OutFrame) -> None:
        """A slice is out."""
        if isinstance(frame.note, tuple):
            self._host.moved(frame.header.length)
            frame.token.sent(*frame.note)  # type: ignore[attr-defined]
            self._host.flush()

    def frame_begun(self, link: Link, header: Header) -> memoryview | None:
        """A slice comes in: to its place if its call is running, aside if that is not so far."""
        key = CallKey(header.epoch, header.call, header.sub)
        transfer = self._host.transfer(key)
        if transfer:
            incoming = self._arrival(transfer, header)
            if incoming is None:
                return None
            place = incoming.place()
            self._incoming[header] = transfer, incoming
            return place
        if self._host.is_over(key):
            return None
        if self._early_bytes + header.length + FRAME_OVERHEAD > UNCREDITED_PER_PEER or header in self._incoming:
            self._breach("it sent more than it was allowed to without credit")
            return None
        self._early_bytes += header.length + FRAME_OVERHEAD
        aside = self._incoming[header] = bytearray(header.length)
        return memoryview(aside)

    def _arrival(self, transfer: Moving, header: Header) -> Incoming | None:
        """Which slice of a running transfer a frame brings; it says that the peer's call is running, too.

        A credit that is still to come is waited for: it would find the call gone, if that could do without.
        """
        if self._shares and not transfer.is_due_credit(self):
            self._return_share(transfer.key)
        return transfer.in_stream(self, header)

    def frame_ended(self, link: Link, header: Header, good: bool) -> None:
        """A frame is complete."""
        self._take(header, good)
        self._host.flush()

    def _take(self, header: Header, good: bool) -> None:
        if header.kind == Kind.DATA:
            incoming = self._incoming.pop(header, None)
            if isinstance(incoming, tuple):
                self._host.moved(header.length)
                if good:
                    incoming[1].arrived()
                else:
                    incoming[1].voided()
            elif incoming is not None:
                key = CallKey(header.epoch, header.call, header.sub)
                transfer = self._host.transfer(key)
                if not good or self._host.is_over(key):
                    self._early_bytes -= header.length + FRAME_OVERHEAD
                elif transfer:  # it was entered while the frame came in
                    self._early_bytes -= header.length + FRAME_OVERHEAD
                    self.redeliver(transfer, header, incoming)
                else:
                    self._early.setdefault(key, []).append((header, incoming))
            return
        key = CallKey(header.epoch, header.call, header.sub)
        if header.kind == Kind.CREDIT:
            transfer = self._host.transfer(key)
            if transfer:
                self._return_share(key)
                transfer.credited(self, header)
            elif not self._host.is_over(key):
                self._credits.setdefault(key, []).append(header)
        else:
            whole = header.kind == Kind.MARK
            for share in [k for k in self._shares if k.epoch == header.epoch and (whole or k.call == header.call)]:
                self._return_share(share)
            over = self._host.is_over(CallKey(header.epoch, -1, 0)) if whole else self._host.discarded(self, header.epoch, header.call)
            if not over:
                self._unwanted.add((header.epoch, None if whole else header.call))

    def redeliver(self, transfer: Moving, header: Header, data: bytearray) -> None:
        """Treat a frame that came early as if it came now; another one may be on its way in."""
        incoming = self._arrival(transfer, header)
        if incoming is not None:
            incoming.place()[:] = data
            self._host.moved(header.length)
            incoming.arrived()

    def link_changed(self, link: Link) -> None:
        """The link has other descriptors than before."""
        self._host.link_changed()

    def link_lost(self, link: Link, error: Exception) -> None:
        """The link broke. Frames that came whole before are as good as ever: calls of a peer that left need no more."""
        if link is self.link:
            self.link = None
            self._early_bytes -= sum(len(aside) + FRAME_OVERHEAD for aside in self._incoming.values() if isinstance(aside, bytearray))
            self._cut()
            self._host.link_lost(self, error)

    def _breach(self, what: str) -> None:
        """The peer does not keep to the protocol: there is no going on with this link."""
        self.detach()
        self._host.link_lost(self, WireError(f"peer {self.uid} broke the protocol: {what}"))
