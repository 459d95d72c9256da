"""Small all-reduces in one frame each way, on flows whose links a test delivers by hand in any order."""

from __future__ import annotations

import random
from collections import deque
from typing import Any

import numpy as np
import pytest

from pccl.collectives.flow import CallKey, Moving
from pccl.collectives.transfer import Undo
from pccl.collectives.volley import MOST, Volley
from pccl.core.frames import Header, Kind
from pccl.core.types import Epoch

KEY = CallKey(Epoch(1, 2, 3), 4, 0)


class Sum:
    def combine(self, out: Any, a: Any, b: Any) -> None:
        raise AssertionError("a volley folds")

    def fold(self, out: Any, parts: list[Any], final: bool) -> None:
        assert final
        out[:] = np.sum(parts, axis=0)

    def finish(self, x: Any) -> None:
        raise AssertionError("a volley folds")


class Pipe:
    """What a Flow is to a volley: one direction's frames wait until the test delivers them."""

    def __init__(self, member: Member, other: int) -> None:
        self.member, self.other, self.uid = member, other, other
        self.ready: deque[Any] = deque()
        self.early: list[tuple[Header, bytearray]] = []

    def grant(self, key: CallKey, channel: int, limit: int, signature: int, *, lazy: bool) -> None:
        assert lazy
        assert limit <= MOST

    def deliver_early(self, volley: Volley) -> None:
        early, self.early = self.early, []
        for header, data in early:
            self.redeliver(volley, header, data)

    def offer(self, lane: Any) -> None:
        if not lane.queued:
            lane.queued = True
            self.ready.append(lane)

    def redeliver(self, volley: Volley, header: Header, data: bytearray) -> None:
        lane = volley.in_stream(self, header)  # type: ignore[arg-type]
        if lane:
            lane.place()[:] = data
            lane.arrived()

    def halt(self, volley: Moving) -> None:
        self.ready.clear()


class Member:
    """One rank with its volley; also its host."""

    def __init__(self, rank: int, world: int, hub: int | None, *, in_place: bool = True, signature: int = 7) -> None:
        self.rank = rank
        self.x = np.arange(5, dtype=np.float32) + 10 * rank
        self.before = self.x.copy()
        self.out = self.x if in_place else np.full(5, -1, np.float32)
        self.finished = 0
        self.mismatches: list[int] = []
        others = [r for r in range(world) if r != rank] if hub in (None, rank) else [hub]
        self.pipes = {r: Pipe(self, r) for r in others if r is not None}
        memory = self.out.view(np.uint8)
        self.undo = Undo(memory, np.empty_like(memory))
        self.volley = Volley(
            self, KEY, signature, self.x, self.out, Sum(), self.pipes, rank=rank, hub=hub, undo=self.undo if in_place else None,  # type: ignore[arg-type]
        )  # fmt: skip
        self.started = False

    def done(self, transfer: Moving) -> None:
        self.finished += 1

    def mismatch(self, transfer: Moving, uid: int) -> None:
        self.mismatches.append(uid)

    def take_scratch(self, nbytes: int) -> Any:
        raise AssertionError("a volley has its own")

    give_scratch = take_scratch


def deliver(members: list[Member], source: int, target: int) -> None:
    """The next frame on the way, whole; to a member that has not begun, early."""
    lane = members[source].pipes[target].ready.popleft()
    lane.queued = False
    frame = lane.pull()
    payload = bytearray(frame.payload)
    members[source].volley.sent(*frame.note)
    into = members[target].pipes[source]
    if members[target].started:
        into.redeliver(members[target].volley, frame.header, payload)
    else:
        into.early.append((frame.header, payload))


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("hub", [None, 0, 1])
@pytest.mark.parametrize("world", [2, 3, 5])
def test_any_order_gives_the_sum(world: int, hub: int | None, in_place: bool) -> None:
    for seed in range(20):
        r = random.Random(seed)
        members = [Member(k, world, hub, in_place=in_place) for k in range(world)]
        total = np.sum([m.before for m in members], axis=0)
        while not all(m.finished for m in members):
            moves: list[Any] = [m for m in members if not m.started]
            moves += [(m.rank, other) for m in members if m.started for other, pipe in m.pipes.items() if pipe.ready]
            move = r.choice(moves)
            if isinstance(move, Member):
                move.started = True
                move.volley.start()
            else:
                deliver(members, *move)
        for m in members:
            assert (m.out == total).all()
            assert m.finished == 1
            assert in_place or (m.x == m.before).all()
            assert m.volley.bytes_sent == m.volley.bytes_received == 20 * len(m.pipes)


@pytest.mark.parametrize("hub", [None, 0])
def test_halted_at_any_moment_the_input_can_be_restored(hub: int | None) -> None:
    world = 3
    for stop in range(12):
        members = [Member(k, world, hub) for k in range(world)]
        for m in members:
            m.started = True
            m.volley.start()
        r = random.Random(stop)
        for _ in range(stop):
            ways = [(m.rank, other) for m in members for other, pipe in m.pipes.items() if pipe.ready]
            if ways:
                deliver(members, *r.choice(ways))
        for m in members:
            if not m.finished:
                m.volley.halt()
            m.undo.restore()
            assert (m.x == m.before).all()
            assert not any(pipe.ready for pipe in m.pipes.values()) or m.finished


def test_a_result_that_came_half_is_undone() -> None:
    leaf = Member(1, 3, 0)
    leaf.volley.start()
    lane = leaf.volley.in_stream(leaf.pipes[0], Header(Kind.DATA, *KEY, 0, 0, 20, 7))  # type: ignore[arg-type]
    assert lane is not None
    lane.place()[:8] = bytes(8)
    lane.voided()
    lane.place()[:4] = bytes(4)  # of what is there now nothing may be saved
    leaf.volley.halt()
    leaf.undo.restore()
    assert (leaf.x == leaf.before).all()


@pytest.mark.parametrize(
    "header",
    [
        Header(Kind.DATA, *KEY, 0, 0, 20, 8),
        Header(Kind.DATA, *KEY, 0, 0, 16, 7),
        Header(Kind.DATA, *KEY, 0, 4, 20, 7),
        Header(Kind.DATA, *KEY, 1, 0, 20, 7),
    ],
    ids=["signature", "length", "position", "channel"],
)
def test_frames_of_another_call_are_a_mismatch(header: Header) -> None:
    a = Member(0, 2, None)
    a.volley.start()
    assert a.volley.in_stream(a.pipes[1], header) is None  # type: ignore[arg-type]
    assert a.mismatches == [1]
    assert (a.x == a.before).all()


def test_a_second_frame_of_a_peer_is_a_mismatch() -> None:
    a = Member(0, 3, None)
    a.volley.start()
    header = Header(Kind.DATA, *KEY, 0, 0, 20, 7)
    a.pipes[1].redeliver(a.volley, header, bytearray(20))
    assert a.volley.in_stream(a.pipes[1], header) is None  # type: ignore[arg-type]
    assert a.mismatches == [1]
