"""Credits between two peers: calls in any order on either, what is kept is bounded, and nothing is stuck.

Real flows, executors and transfers (rings of two: each sends a part, reduces what comes, and sends the result) over a wire that holds two
frames a direction and delivers one when told to. The counterexamples of the state-space model of credits (M5) are replayed, with its
rules on and off.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pccl.collectives import flow as flow_module
from pccl.collectives.executor import Executor
from pccl.collectives.flow import FRAME_OVERHEAD, UNCREDITED_PER_CALL, CallKey, Flow
from pccl.collectives.planner import WINDOW, plan
from pccl.collectives.program import layout, program
from pccl.collectives.transfer import Array, Transfer
from pccl.core.frames import Header, Kind
from pccl.core.types import Epoch
from pccl.transports.base import Link, LinkHandler

EPOCH = Epoch(1, 2, 3)
ROOM = 2
LARGE, SMALL = 3000, 500
"""Elements (int32) of half a call: of a large one, half may go without credit; of a small one, all"""


class Pipe(Link):
    """One end of a wire; what the other end has sent is taken in step by step."""

    other: Pipe

    def __init__(self, handler: LinkHandler) -> None:
        self.handler = handler
        self.inbox: deque[tuple[Header, bytes]] = deque()
        self.closed = False
        self._present: tuple[Header, bytes, memoryview | None] | None = None

    def fileno(self) -> int:
        return -1

    def receive(self) -> None:
        pass

    def wake(self) -> None:
        while not self.closed and len(self.other.inbox) < ROOM:
            frame = self.handler.next_frame(self)
            if frame is None:
                break
            self.other.inbox.append((frame.header, bytes(frame.payload or b"")))
            self.handler.frame_sent(self, frame)

    def abort(self, token: object) -> None:
        """Frames are copied at once."""

    def redirect(self, header: Header) -> None:
        assert self._present
        self._present = (*self._present[:2], None)

    def silent_for(self) -> float:
        return 0.0

    def close(self) -> None:
        self.closed = True

    @property
    def readable(self) -> bool:
        return not self.closed and (self._present is not None or bool(self.inbox))

    def step(self) -> None:
        """A frame with a payload begins, or ends; one without comes."""
        if self._present is None:
            header, payload = self.inbox[0]
            if header.length:
                target = self.handler.frame_begun(self, header)
                assert target is None or len(target) == header.length
                self._present = header, payload, target
                return
            self.inbox.popleft()
            self.handler.frame_ended(self, header, True)
        else:
            header, payload, target = self._present
            self._present = None
            self.inbox.popleft()
            if target is not None:
                target[:] = payload
            self.handler.frame_ended(self, header, target is not None)
        self.other.wake()


class Sum:
    """The arithmetic of the calls."""

    def combine(self, out: Array, a: Array, b: Array) -> None:
        np.add(a, b, out=out)

    def fold(self, out: Array, parts: list[Array], final: bool) -> None:
        raise AssertionError("rings fold nothing")

    def finish(self, x: Array) -> None:
        pass


class Peer:
    """An executor, its flow to the one other peer, and what became of its calls."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.executor = Executor(self)
        self.executor.enter_epoch(EPOCH, None, ())
        self.flow = self.executor.flow(1 - rank)
        self.pipe = Pipe(self.flow)
        self.flow.attach(self.pipe)
        self.running: dict[int, Transfer] = {}
        self.done: dict[int, Array] = {}
        self.dead: set[int] = set()
        self.broken: list[Exception] = []
        self.lazy = False

    def enter(self, call: int, half: int) -> None:
        x = np.arange(2 * half, dtype=np.int32) * (call + 1) + self.rank
        planned = plan("all_reduce", "ring", 2, len(x), 4)
        prog = program(planned.schedule, self.rank)
        self.running[call] = Transfer(
            self.executor,
            CallKey(EPOCH, call, 0),
            half,
            prog,
            layout(prog, len(x), half),
            x,
            x,
            Sum(),
            {1 - self.rank: self.flow},
            undo=None,
            window=WINDOW,
        )
        self.executor.start(self.running[call])

    def hear_abort(self, call: int) -> None:
        self.dead.add(call)
        self.done.pop(call, None)
        transfer = self.running.pop(call, None)
        if transfer:
            self.executor.halt(transfer)
        self.executor.discard(EPOCH, call, [1 - self.rank])

    def started(self, call: int) -> bool:
        return call in self.running or call in self.done or call in self.dead

    # what executors tell

    def transfer_done(self, transfer: Transfer) -> None:
        del self.running[transfer.key.call]
        assert transfer._target is not None
        self.done[transfer.key.call] = transfer._target

    def transfer_mismatch(self, transfer: Transfer, uid: int) -> None:
        raise AssertionError("both made the same call")

    def flow_broken(self, uid: int, error: Exception, *, lacking: bool) -> None:
        self.broken.append(error)

    def flush_lazy_soon(self) -> None:
        self.lazy = True


class Pair:
    """Two peers P and Q, and their calls: large ones but for those that are named."""

    def __init__(self, calls: int, cap: int, small: frozenset[int] = frozenset()) -> None:
        self.calls = range(calls)
        self.cap = cap
        self.small = small
        self.P, self.Q = Peer(0), Peer(1)
        self.P.pipe.other, self.Q.pipe.other = self.Q.pipe, self.P.pipe
        self.aborted: set[int] = set()
        self.may_read: Callable[[Peer], bool] = lambda peer: True

    @property
    def peers(self) -> tuple[Peer, Peer]:
        return self.P, self.Q

    def enter(self, peer: Peer, call: int) -> None:
        peer.enter(call, SMALL if call in self.small else LARGE)

    def read(self, peer: Peer) -> None:
        """A whole frame."""
        peer.pipe.step()
        if peer.pipe._present:
            peer.pipe.step()

    def check(self) -> None:
        for peer in self.peers:
            assert not peer.broken, "P8: more came than may"
            assert peer.flow._early_bytes <= self.cap
            assert peer.flow._share_total <= self.cap

    def moves(self, window: int) -> list[Callable[[], None]]:
        """All that can happen next."""
        found: list[Callable[[], None]] = []
        for p in self.peers:
            if p.pipe.readable and self.may_read(p):
                found.append(p.pipe.step)
            if p.lazy:
                found.append(lambda p=p: self._flush_lazy(p))  # type: ignore[misc]
            if len(p.running) < window:
                found += [lambda p=p, c=c: self.enter(p, c) for c in self.calls if not p.started(c)]  # type: ignore[misc]
            found += [lambda p=p, c=c: p.hear_abort(c) for c in self.aborted - p.dead]  # type: ignore[misc]
        return found

    def _flush_lazy(self, peer: Peer) -> None:
        peer.lazy = False
        peer.executor.flush_lazy()

    def settle(self, window: int = 1 << 10) -> None:
        """All that can happen does."""
        while moves := self.moves(window):
            moves[0]()
            self.check()

    def assert_over(self) -> None:
        for call in self.calls:
            if call in self.aborted:
                assert all(call in p.dead for p in self.peers)
            else:
                n = 2 * (SMALL if call in self.small else LARGE)
                for p in self.peers:
                    assert call in p.done, f"P3: call {call} is stuck"
                    assert np.array_equal(p.done[call], np.arange(n, dtype=np.int32) * (2 * call + 2) + 1)
        for p in self.peers:
            flow = p.flow
            assert (flow._share_total, flow._shares, flow._early_bytes, flow._early, flow._credits, flow._lazy) == (0, {}, 0, {}, {}, {})
            assert not flow._capped
            assert not flow._ready
            assert not p.pipe.inbox


def read_all(pair: Pair, peer: Peer) -> None:
    while peer.pipe.readable:
        pair.read(peer)
        pair.check()


@contextmanager
def capped(units: int) -> Iterator[int]:
    """So many parts of large calls may be sent without credit, all told."""
    cap = units * (4 * LARGE + FRAME_OVERHEAD)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(flow_module, "UNCREDITED_PER_PEER", cap)
        yield cap


def test_the_calls_are_of_the_kind_that_was_modelled() -> None:
    """The first part of a large call may go without credit, the second may not."""
    assert 4 * LARGE <= UNCREDITED_PER_CALL < 8 * LARGE
    assert 8 * SMALL <= UNCREDITED_PER_CALL


@given(st.integers(1, 6), st.integers(1, 2), st.frozensets(st.integers(0, 5)), st.lists(st.integers(0, 1000), max_size=80))
def test_any_order_of_calls_aborts_and_frames(calls: int, units: int, small: frozenset[int], choices: list[int]) -> None:
    with capped(units) as cap:
        pair = Pair(calls, cap, small)
        for choice in choices:
            moves = pair.moves(calls)
            open_calls = [c for c in pair.calls if c not in pair.aborted and any(c in p.running for p in pair.peers)]
            if open_calls and choice % 11 == 0:
                pair.aborted.add(open_calls[choice % len(open_calls)])
            elif moves:
                moves[choice % len(moves)]()
            pair.check()
        pair.settle()
        pair.assert_over()


# --- the model's counterexamples ------------------------------------------------------------------------------------


def uncounted(m: pytest.MonkeyPatch) -> None:
    """Off: the sender counts what it sends without credit."""

    def may_send(self: Flow, stream: flow_module.Outgoing) -> bool:
        end = stream.position + stream.head_bytes()
        return end <= stream.limit or end <= UNCREDITED_PER_CALL

    m.setattr(Flow, "_may_send", may_send)


def own_word(m: pytest.MonkeyPatch) -> None:
    """Off: a share comes back by the receiver's word only."""
    discard = Executor.discard

    def frees_its_share(self: Executor, epoch: Epoch, call: int, uids: list[int]) -> None:
        discard(self, epoch, call, ())
        for uid in uids:
            self.flows[uid].forget(epoch, call)
            self.flows[uid]._take(Header(Kind.DISCARDED, epoch, call), True)

    m.setattr(Executor, "discard", frees_its_share)


def one_at_a_time(pair: Pair) -> None:
    """Q has one call at a time in flight, in its own order."""
    P, Q = pair.peers
    pair.enter(P, 0)  # and sends its first part
    pair.enter(Q, 1)
    pair.read(P)  # credit
    pair.read(P)  # Q's first part of 1, which P has not entered
    pair.read(Q)  # credit
    pair.enter(P, 2)
    pair.read(Q)  # P's first part of 0, likewise
    pair.read(Q)  # credit of 2
    pair.enter(P, 1)


def finish_one_at_a_time(pair: Pair) -> None:
    """Q enters the next call only when the last has ended."""
    while True:
        moves = [p.pipe.step for p in pair.peers if p.pipe.readable and pair.may_read(p)]
        if not moves and not pair.Q.running:
            moves = [lambda c=c: pair.enter(pair.Q, c) for c in pair.calls if not pair.Q.started(c)]  # type: ignore[misc]
        if not moves:
            return
        moves[0]()
        pair.check()


def test_one_at_a_time_at_one_side_is_no_deadlock() -> None:
    with capped(1) as cap:
        pair = Pair(3, cap)
        one_at_a_time(pair)
        finish_one_at_a_time(pair)
        pair.assert_over()


def test_one_that_stops_reading_instead_of_a_sender_that_counts_is_a_deadlock(monkeypatch: pytest.MonkeyPatch) -> None:
    uncounted(monkeypatch)
    with capped(1) as cap:
        pair = Pair(3, cap)
        pair.may_read = lambda peer: peer.flow._early_bytes < cap or peer.pipe._present is not None
        one_at_a_time(pair)
        finish_one_at_a_time(pair)
        with pytest.raises(AssertionError, match="P3"):
            pair.assert_over()


def test_a_sender_that_does_not_count_breaks_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    uncounted(monkeypatch)
    with capped(1) as cap:
        pair = Pair(3, cap)
        for call in pair.calls:
            pair.enter(pair.P, call)
        with pytest.raises(AssertionError, match="P8"):
            read_all(pair, pair.Q)


def aborted_before_it_was_read(pair: Pair) -> None:
    """P hears of the abort of 0 first, and sends of 1 what Q then has beside what came of 0."""
    P, Q = pair.peers
    pair.enter(P, 0)
    pair.aborted.add(0)
    pair.read(Q)  # credit of 0
    P.hear_abort(0)
    pair.enter(P, 1)
    read_all(pair, Q)


def test_a_share_comes_back_by_the_receivers_word() -> None:
    with capped(1) as cap:
        pair = Pair(3, cap)
        aborted_before_it_was_read(pair)
        pair.settle()
        pair.assert_over()


def test_a_share_that_comes_back_by_the_senders_word_breaks_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    own_word(monkeypatch)
    with capped(1) as cap:
        pair = Pair(3, cap)
        with pytest.raises(AssertionError, match="P8"):
            aborted_before_it_was_read(pair)


def many_in_flight(pair: Pair) -> None:
    """Each has two calls in flight, none of them the same."""
    P, Q = pair.peers
    pair.enter(P, 0)
    pair.enter(Q, 1)
    pair.read(P)
    pair.read(P)
    pair.enter(Q, 2)
    pair.read(P)
    pair.read(Q)
    pair.enter(P, 3)
    pair.read(Q)
    pair.read(Q)


def test_calls_in_any_order_all_in_flight_are_no_deadlock() -> None:
    with capped(1) as cap:
        pair = Pair(4, cap)
        many_in_flight(pair)
        pair.settle()
        pair.assert_over()


def test_calls_that_wait_for_others_to_end_are_a_deadlock() -> None:
    """That is why one call too many raises, and does not wait."""
    with capped(1) as cap:
        pair = Pair(4, cap)
        many_in_flight(pair)
        pair.settle(window=2)
        with pytest.raises(AssertionError, match="P3"):
            pair.assert_over()


def test_nothing_more_is_sent_of_a_call_that_the_peer_has_dropped() -> None:
    """Its share would never come back: the peer has said its last word on the call."""
    with capped(4) as cap:
        pair = Pair(2, cap)
        P, Q = pair.peers
        pair.enter(Q, 0)
        pair.enter(Q, 1)  # of which nothing is out: the wire is full
        pair.aborted.add(1)
        P.hear_abort(1)
        pair.read(Q)
        while P.pipe.readable:
            assert (P.pipe.inbox[0][0].kind, P.pipe.inbox[0][0].call) != (Kind.DATA, 1)
            pair.read(P)
        pair.settle()
        pair.assert_over()


# --- epochs ---------------------------------------------------------------------------------------------------------


def test_shares_come_back_from_who_leaves_and_from_who_stays() -> None:
    """A communicator goes on, or ends here, while peers still owe each other words about its calls."""
    with capped(4) as cap:
        pair = Pair(2, cap)
        pair.enter(pair.P, 0)
        pair.enter(pair.Q, 1)
        assert all(p.flow._share_total for p in pair.peers)
        for p in pair.peers:
            for transfer in list(p.running.values()):
                p.executor.halt(transfer)
        pair.P.executor.leave_epoch(EPOCH, [0, 1])
        pair.Q.executor.enter_epoch(Epoch(1, 2, 4), EPOCH, [0, 1])
        pair.P.executor.flush()
        for p in pair.peers:
            while p.pipe.readable:
                p.pipe.step()
        assert [p.flow._share_total for p in pair.peers] == [0, 0]
        assert [p.flow._early_bytes for p in pair.peers] == [0, 0]
