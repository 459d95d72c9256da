"""Who lacks a block asks for it; who has it sends it. The data path of sync_state.

A peer that fetches has at most a window of blocks under way, so everything that arrives has its place. Blocks are sent by each peer in the
order in which they were asked for, which is how their positions in the stream are known; a peer that is asked for what it has yet to fetch
itself answers when it has it. Requests are small frames, which keep their order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

import msgpack

from pccl.collectives.flow import CallKey, Flow
from pccl.core.codec import WireError
from pccl.core.frames import Header, Kind
from pccl.transports.base import OutFrame

ASK, BLOCK = 0, 1
"""Channels"""
ASKED_AT_ONCE = 64
"""Blocks that one frame may ask for"""


class Want(NamedTuple):
    """A block: of the tensor of this index in the manifest, or, with index -1, of the manifest itself."""

    item: int
    block: int


class Store(Protocol):
    """What the exchange serves from and fetches into."""

    def read(self, want: Want) -> memoryview | None:
        """A block for somebody else; None if this peer does not have it yet.

        Raises:
            WireError: there is no such block.
        """

    def place(self, want: Want) -> memoryview:
        """Where a block goes that was asked for."""

    def came(self, want: Want, uid: int) -> None:
        """It is there; whether it is right is for the store to find out. It may `ask` for more."""


class _Asks:
    """Requests of one peer."""

    def __init__(self, exchange: Exchange, flow: Flow) -> None:
        self._exchange = exchange
        self._flow = flow
        self._buffer = bytearray()

    def prepare(self, n: int) -> None:
        self._buffer = bytearray(n)

    def place(self) -> memoryview:
        return memoryview(self._buffer)

    def arrived(self) -> None:
        try:
            wants = [Want(int(i), int(b)) for i, b in msgpack.unpackb(bytes(self._buffer), use_list=False)]
        except (ValueError, TypeError, msgpack.UnpackException) as e:
            raise WireError(f"a request for blocks makes no sense: {e!r}") from None
        self._exchange.serve(self._flow, wants)

    def voided(self) -> None:
        self._buffer = bytearray()


class _Block:
    """One that comes in."""

    def __init__(self, blocks: _Blocks, want: Want) -> None:
        self._blocks = blocks
        self._want = want

    def place(self) -> memoryview:
        return self._blocks.store.place(self._want)

    def arrived(self) -> None:
        self._blocks.due -= 1
        self._blocks.store.came(self._want, self._blocks.uid)

    def voided(self) -> None:
        pass


class _Blocks:
    """Blocks that one peer was asked for."""

    def __init__(self, store: Store, uid: int) -> None:
        self.store = store
        self.uid = uid
        self.due = 0
        """Blocks that have not come"""
        self._end = 0
        self._asked: dict[int, Want] = {}
        """Where a block begins in the stream -> it"""

    def ask(self, wants: list[Want]) -> None:
        self.due += len(wants)
        for want in wants:
            self._asked[self._end] = want
            self._end += len(self.store.place(want))

    def take(self, position: int, length: int) -> _Block:
        want = self._asked.pop(position, None)
        if want is None or len(self.store.place(want)) != length:
            raise WireError("a block that was not asked for")
        return _Block(self, want)


class _Out:
    """What goes to one peer on one channel: requests as they are, or blocks as they are to be had."""

    def __init__(self, exchange: Exchange, channel: int, limit: int) -> None:
        self.transfer = exchange
        self.queued = False
        self.position = 0
        self.limit = limit
        self._channel = channel
        self.waiting: deque[memoryview | Want] = deque()

    def is_ready(self) -> bool:
        return bool(self.waiting) and self._head() is not None

    def head_bytes(self) -> int:
        return len(self._head() or b"")

    def _head(self) -> memoryview | None:
        head = self.waiting[0]
        return self.transfer.store.read(head) if isinstance(head, Want) else head

    def pull(self) -> OutFrame:
        payload, t = self._head(), self.transfer
        assert payload is not None
        self.waiting.popleft()
        header = Header(Kind.DATA, t.key.epoch, t.key.call, t.key.sub, self._channel, self.position, len(payload), t.signature)
        self.position += len(payload)
        if self._channel == BLOCK:
            t.bytes_sent += len(payload)
        return OutFrame(header, payload, t, (0, 0))


class Exchange:
    """One attempt of a sync_state, on all its members. Implements `Moving`."""

    def __init__(self, key: CallKey, signature: int, store: Store, flows: Iterable[Flow], mismatch: Callable[[Flow], None]) -> None:
        self.key = key
        self.signature = signature
        self.store = store
        self.bytes_sent = 0
        self.bytes_received = 0
        self.halted = False
        self._flows = {flow.uid: flow for flow in flows}
        self._mismatch = mismatch
        self._asks = {uid: _Asks(self, flow) for uid, flow in self._flows.items()}
        self._blocks = {uid: _Blocks(store, uid) for uid in self._flows}
        self._requests = {uid: _Out(self, ASK, 0) for uid in self._flows}
        self._replies = {uid: _Out(self, BLOCK, 1 << 62) for uid in self._flows}

    def ask(self, uid: int, wants: list[Want]) -> None:
        """Ask a peer for blocks, at most ASKED_AT_ONCE."""
        self._blocks[uid].ask(wants)
        self._requests[uid].waiting.append(memoryview(msgpack.packb(wants)))
        self._flows[uid].offer(self._requests[uid])

    def due(self, uid: int) -> int:
        """Blocks that were asked of a peer and have not come."""
        return self._blocks[uid].due

    def serve(self, flow: Flow, wants: list[Want]) -> None:
        """A peer has asked for blocks."""
        replies = self._replies[flow.uid]
        replies.waiting.extend(wants[:ASKED_AT_ONCE])
        if replies.is_ready():
            flow.offer(replies)

    def refresh(self) -> None:
        """The store has more than before: go on with what others asked for."""
        for uid, replies in self._replies.items():
            if not replies.queued and replies.is_ready():
                self._flows[uid].offer(replies)

    # --- Moving -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin: answer what was asked early."""
        for flow in self._flows.values():
            flow.deliver_early(self)

    def halt(self) -> None:
        """Stop."""
        self.halted = True
        for flow in self._flows.values():
            flow.halt(self)

    def lacks(self, flow: Flow) -> bool:
        """Who leaves has seen the commit."""
        return False

    def in_stream(self, flow: Flow, header: Header) -> _Asks | _Block | None:
        """Requests and blocks."""
        if header.signature != self.signature or flow.uid not in self._flows or header.channel not in (ASK, BLOCK):
            if not self.halted:
                self._mismatch(flow)
            return None
        if header.channel == ASK:
            asks = self._asks[flow.uid]
            asks.prepare(header.length)
            return asks
        block = self._blocks[flow.uid].take(header.position, header.length)
        self.bytes_received += header.length
        return block

    def is_due_credit(self, flow: Flow) -> bool:
        """Nobody says so here."""
        return False

    def credited(self, flow: Flow, header: Header) -> None:
        """Requests are small, and blocks have been asked for: nobody grants anything here."""

    def sent(self, block: int, s: int) -> None:
        """A block is out."""
