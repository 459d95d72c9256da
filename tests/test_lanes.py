"""For how long lanes and neighbours are kept: until nobody who may still read there does."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pccl.collectives.flow import Flow
from pccl.collectives.lane import DONE, OUT, RING, ROOM, VOID
from pccl.core.types import Epoch, Member, View
from pccl.lanes import Lanes
from pccl.transports.memory_region import MemoryHost, MemoryNeighbour, MemoryRegion
from pccl.transports.region import supported

pytestmark = pytest.mark.skipif(not supported(), reason="shared memory needs Linux on x86-64")


class Peers:
    """Three peers of one host, each with its lanes, as far as links and the protocol are concerned."""

    def __init__(self) -> None:
        host = MemoryHost()
        self.regions = [MemoryRegion(host, ROOM + (1 << 20)) for _ in range(3)]
        self.flows: list[dict[int, Flow]] = [{} for _ in range(3)]
        self.lanes = [Lanes(region, flows) for region, flows in zip(self.regions, self.flows, strict=True)]
        self.seen: list[dict[int, MemoryNeighbour]] = [{} for _ in range(3)]
        for mine in range(3):
            for other in range(3):
                near = self.regions[mine].meet(self.regions[other])
                if other != mine and near:
                    self.seen[mine][other] = near
                    self.flows[mine][other] = SimpleNamespace(link=SimpleNamespace(near=near))  # type: ignore[assignment]
                    self.lanes[mine].met(other, near)

    def epoch(self, number: int, *uids: int, apart: int = -1) -> None:
        """The group is in a new epoch, with these, but for one that has no lane; links to others are closed."""
        for uid in uids:
            for gone in [other for other in self.flows[uid] if other not in uids]:
                del self.flows[uid][gone]
            self.enter(number, uid, uids, near=uid != apart)
        self.sweep(*uids)

    def enter(self, number: int, uid: int, uids: tuple[int, ...], *, near: bool = True) -> None:
        """One member hears of a new epoch."""
        view = View(Epoch(1, number, 1), uids.index(uid), tuple(Member(u, f"P{u}", "here") for u in uids))
        self.lanes[uid].open(SimpleNamespace(comm=0, view=view, near=near, epoch=view.epoch), uids)  # type: ignore[arg-type]

    def sweep(self, *uids: int) -> None:
        """Heartbeats, of these members."""
        for uid in uids:
            self.lanes[uid].sweep(uids)

    def is_kept(self, mine: int, other: int) -> bool:
        """Whether a peer still has another one's region."""
        return len(self.seen[mine][other].memory) > 0


def into_a_call(peers: Peers, *phases: int) -> None:
    """Each makes the same call, and comes this far."""
    for lanes, phase in zip(peers.lanes, phases, strict=True):
        lane = lanes.get(0)
        if lane and phase:
            lane.line_up(0)
            lane.enter(0, 1, 0)
            lane.publish(0, phase)
            if phase >= OUT:
                lane.step_out(0)


@pytest.mark.parametrize("alive", [True, False])
def test_who_is_out_keeps_no_lane_open(alive: bool) -> None:
    """It stands still within a call, lives on or does not, and is out: its region goes with the last lane that it was in."""
    peers = Peers()
    peers.epoch(1, 0, 1, 2)
    into_a_call(peers, OUT, OUT, DONE)
    peers.regions[2].alive = alive
    peers.epoch(2, 0, 1)
    assert peers.is_kept(0, 2), "it is in the last lane"
    peers.epoch(3, 0, 1)
    peers.sweep(0, 1)
    assert not peers.is_kept(0, 2)
    assert peers.is_kept(0, 1)


def test_a_member_that_may_have_to_fetch_a_result_keeps_its_lane_open() -> None:
    """It does not know yet that the call is committed."""
    peers = Peers()
    peers.epoch(1, 0, 1, 2)
    into_a_call(peers, OUT, OUT, DONE)
    late = peers.lanes[2].get(0)
    assert late
    assert late.phase(0, 0) == OUT
    for number in (2, 3, 4):
        peers.epoch(number, 0, 1, 2)
    peers.sweep(0, 1, 2)
    assert late.stands()
    late.publish(0, OUT)
    late.step_out(0)
    peers.sweep(0, 1, 2)
    assert not late.stands()


def test_a_member_that_never_made_a_call_keeps_no_lane_open() -> None:
    """The call was aborted: in the new epoch it has no place."""
    peers = Peers()
    peers.epoch(1, 0, 1, 2)
    into_a_call(peers, VOID, VOID, 0)
    lane = peers.lanes[0].get(0)
    assert lane
    assert not lane.is_free(RING)
    peers.epoch(2, 0, 1, 2)
    peers.epoch(3, 0, 1, 2)
    peers.sweep(0, 1, 2)
    assert peers.lanes[0]._left == []


def test_a_member_that_has_no_lane_of_an_epoch_keeps_none_open() -> None:
    """A link was missing there."""
    peers = Peers()
    peers.epoch(1, 0, 1, 2, apart=2)
    into_a_call(peers, VOID, VOID, 0)
    peers.epoch(2, 0, 1, 2)
    peers.epoch(3, 0, 1, 2)
    peers.sweep(0, 1, 2)
    assert peers.lanes[0]._left == []


def test_neighbours_go_when_nothing_is_left_that_they_are_needed_for() -> None:
    peers = Peers()
    peers.epoch(1, 0, 1, 2)
    peers.epoch(2, 0, 1)
    assert peers.is_kept(0, 2)
    for lanes in peers.lanes[:2]:
        lanes.leave(0)
    peers.sweep(0, 1)
    assert not peers.is_kept(0, 2)
    assert peers.is_kept(0, 1), "there is a link"


@pytest.mark.parametrize("then", ["leaves, too", "goes on"])
def test_who_leaves_keeps_its_lane_for_those_who_have_none_yet(then: str) -> None:
    """They are in the same epoch, and late: a call without commit may have ended here before they make it."""
    peers = Peers()
    peers.enter(1, 0, (0, 1))
    into_a_call(peers, OUT, 0, 0)
    peers.lanes[0].leave(0)
    peers.sweep(0, 1)
    peers.enter(1, 1, (0, 1))
    late = peers.lanes[1].get(0)
    assert late
    assert late.phase(0, 0) == OUT
    late.line_up(0)
    late.enter(0, 1, 0)
    peers.sweep(0, 1)
    assert late.stands()
    late.publish(0, OUT)
    late.step_out(0)
    if then == "leaves, too":
        peers.lanes[1].leave(0)
    peers.sweep(1, 0)
    assert not late.stands()


def test_who_came_and_went_keeps_no_lane_open() -> None:
    """It was not seen there, and has closed its lane before the other one looked."""
    peers = Peers()
    for uid in (0, 1):
        peers.enter(1, uid, (0, 1))
    into_a_call(peers, VOID, 0, 0)
    peers.lanes[1].leave(0)
    peers.sweep(1)
    peers.lanes[0].leave(0)
    peers.sweep(0)
    assert peers.lanes[0]._left == []
