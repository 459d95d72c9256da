"""Slices that overtake each other between two peers: each goes to its place, and is used in its turn."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pytest

from pccl.collectives import flow as flow_module
from pccl.collectives import planner
from pccl.collectives.exchange import Want, _Blocks
from pccl.collectives.transfer import Array
from pccl.core.codec import WireError
from pccl.core.frames import Header, Kind
from tests.collectives import test_flow
from tests.collectives.test_flow import Pair, Peer, Pipe

SLICES = 8


@pytest.fixture(autouse=True)
def slices() -> Iterator[None]:
    """Calls have several slices a part, and there is room for all of them on the way."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(test_flow, "ROOM", 1 << 10)
        m.setattr(planner, "SLICE", 4 * test_flow.LARGE // SLICES)
        m.setattr(planner, "LEAST_SLICE", 64)
        m.setattr(flow_module, "MOST_SMALL", 64)
        planner.plan.cache_clear()
        yield
        planner.plan.cache_clear()


class Loose(Pipe):
    """Several wires: begins and ends frames with a payload in any order, and tells of DISCARDED and MARK after all that was sent before."""

    def __init__(self, inner: Pipe, rng: random.Random) -> None:
        super().__init__(inner.handler)
        self.rng = rng
        self.begun: list[tuple[Header, bytes, memoryview | None]] = []
        self.overtaken = 0

    def redirect(self, header: Header) -> None:
        self.begun = [(h, payload, None if h == header else target) for h, payload, target in self.begun]

    @property
    def readable(self) -> bool:
        return not self.closed and bool(self.begun or self.inbox)

    def step(self) -> None:
        if self.begun and (not self.inbox or self.rng.random() < 0.5):
            header, payload, target = self.begun.pop(self.rng.randrange(len(self.begun)))
            if target is not None:
                target[:] = payload
            self.handler.frame_ended(self, header, target is not None)
        else:
            barriers = [i for i, (h, _) in enumerate(self.inbox) if h.kind in (Kind.DISCARDED, Kind.MARK)]
            at = self.rng.randrange(barriers[0] + 1 if barriers else len(self.inbox))
            header, payload = self.inbox[at]
            if header.kind in (Kind.DISCARDED, Kind.MARK) and (at or self.begun):
                return  # not yet
            del self.inbox[at]
            self.overtaken += at > 0
            if header.length:
                target = self.handler.frame_begun(self, header)
                self.begun.append((header, payload, target))
            else:
                self.handler.frame_ended(self, header, True)
        self.other.wake()


def loosen(pair: Pair, rng: random.Random) -> tuple[Loose, Loose]:
    pipes = []
    for peer in pair.peers:
        pipe = Loose(peer.pipe, rng)
        peer.pipe = pipe
        peer.flow.attach(pipe)
        pipes.append(pipe)
    pipes[0].other, pipes[1].other = pipes[1], pipes[0]
    return pipes[0], pipes[1]


def settle(pair: Pair, rng: random.Random) -> None:
    for _ in range(100_000):
        moves = pair.moves(1 << 10)
        if not moves:
            return
        rng.choice(moves)()
        pair.check()
    raise AssertionError("P3: it never ends")


@pytest.mark.parametrize("seed", range(20))
def test_calls_whose_slices_come_in_any_order(seed: int) -> None:
    rng = random.Random(seed)
    pair = Pair(4, flow_module.UNCREDITED_PER_PEER, small=frozenset({3}))
    pipes = loosen(pair, rng)
    settle(pair, rng)
    pair.assert_over()
    assert sum(pipe.overtaken for pipe in pipes) > 0


@pytest.mark.parametrize("seed", range(20))
def test_an_abort_while_slices_are_under_way(seed: int) -> None:
    """Nothing of it is left on either side, its memory is not touched any more, and the other calls go on."""
    rng = random.Random(seed)
    pair = Pair(4, flow_module.UNCREDITED_PER_PEER)
    loosen(pair, rng)
    kept: list[tuple[Array, Array]] = []

    def keep(peer: Peer, hear: Callable[[int], None], call: int) -> None:
        transfer = peer.running.get(call)
        hear(call)
        if transfer and transfer._target is not None:
            kept.append((transfer._target, transfer._target.copy()))

    for peer in pair.peers:
        peer.hear_abort = partial(keep, peer, peer.hear_abort)  # type: ignore[method-assign]
    for _ in range(rng.randrange(60)):
        moves = pair.moves(1 << 10)
        if moves:
            rng.choice(moves)()
    pair.aborted = {0, 2}
    settle(pair, rng)
    pair.assert_over()
    assert all(np.array_equal(now, then) for now, then in kept)
    for peer in pair.peers:
        assert not peer.flow._incoming
        assert not peer.executor._dead[test_flow.EPOCH]


@pytest.mark.parametrize("position", [-4, 4, 1 << 40])
def test_a_slice_that_is_none_is_a_mismatch(position: int) -> None:
    """Also one that has come already: it is not put over the first."""
    peer = Peer(0)
    mismatches: list[int] = []
    peer.transfer_mismatch = lambda transfer, uid: mismatches.append(uid)  # type: ignore[method-assign]
    peer.pipe.other = Pipe(peer.flow)
    peer.enter(0, test_flow.LARGE)
    transfer = peer.running[0]
    (stream,) = transfer._ins.values()
    nbytes = transfer.slice_bytes(stream.units[0].use.block, 0)
    header = Header(Kind.DATA, test_flow.EPOCH, 0, length=nbytes, signature=test_flow.LARGE, position=nbytes)
    assert peer.flow.frame_begun(peer.pipe, header) is not None  # the second one, first
    assert peer.flow.frame_begun(peer.pipe, header._replace(position=nbytes + position)) is None
    assert mismatches == [1]
    assert peer.flow.frame_begun(peer.pipe, header) is None
    assert mismatches == [1, 1]


class Blocks:
    """A store of blocks that are as long as their number."""

    def __init__(self) -> None:
        self.here: dict[Want, memoryview] = {}
        self.got: list[Want] = []

    def read(self, want: Want) -> memoryview | None:
        raise AssertionError

    def place(self, want: Want) -> memoryview:
        return self.here.setdefault(want, np.zeros(want.block, np.uint8).data)

    def came(self, want: Want, uid: int) -> None:
        self.got.append(want)


def test_blocks_of_a_state_are_told_apart_by_their_position() -> None:
    store = Blocks()
    blocks = _Blocks(store, 1)
    wants = [Want(0, n) for n in (10, 20, 30)]
    blocks.ask(wants)
    for position, length in ((0, 20), (11, 20), (60, 10)):
        with pytest.raises(WireError):
            blocks.take(position, length)
    for position, want in ((30, wants[2]), (10, wants[1])):
        block = blocks.take(position, want.block)
        assert len(block.place()) == want.block
        block.arrived()
        with pytest.raises(WireError):
            blocks.take(position, want.block)
    assert store.got == [wants[2], wants[1]]
    assert blocks.due == 1
