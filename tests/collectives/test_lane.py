"""Slots of a lane: when one may be used again, and by whom what lies there is read."""

from __future__ import annotations

from unittest.mock import Mock

import numpy as np
import numpy.typing as npt
import pytest

from pccl.calls import Reduction
from pccl.collectives.executor import Executor
from pccl.collectives.flow import CallKey
from pccl.collectives.lane import DONE, IN, OUT, RING, ROOM, VOID, Commons, Lane
from pccl.collectives.pull import Pull, errand
from pccl.collectives.reduction import Kernels
from pccl.core.dtypes import ReduceOp
from pccl.core.errors import Evicted
from pccl.core.types import Epoch
from pccl.transports.memory_region import MemoryHost, MemoryRegion
from pccl.transports.region import supported

pytestmark = pytest.mark.skipif(not supported(), reason="shared memory needs Linux on x86-64")


def lanes(world: int) -> list[Lane]:
    host = MemoryHost()
    regions = [MemoryRegion(host, ROOM + (1 << 20)) for _ in range(world)]
    met = [{r: regions[mine].meet(other) for r, other in enumerate(regions) if r != mine} for mine in range(world)]
    return [
        Lane(Commons(region), Epoch(1, 1, 1), rank, {r: o for r, o in met[rank].items() if o is not None})
        for rank, region in enumerate(regions)
    ]


@pytest.mark.parametrize("late", range(3))
@pytest.mark.parametrize("phase", [IN, DONE])
def test_a_slot_is_free_when_everyone_is_out(late: int, phase: int) -> None:
    """This member, too: it may have several calls in flight."""
    members = lanes(3)
    for lane in members:
        lane.line_up(5)
        assert lane.is_free(5)
        lane.enter(5, 1, 0)
        lane.line_up(5 + RING)
        assert not lane.is_free(5 + RING)
        lane.step_out(5)
    for rank, lane in enumerate(members):
        lane.publish(5, phase if rank == late else OUT)
    assert not any(lane.is_free(5 + RING) for lane in members)
    members[late].publish(5, OUT)
    assert all(lane.is_free(5 + RING) for lane in members)


@pytest.mark.parametrize("end", [OUT, VOID])
def test_memory_of_a_call_is_kept_until_everyone_is_out(end: int) -> None:
    members = lanes(2)
    for lane in members:
        lane.enter(5, 1, 0)
    _, where = members[0].take(5, 1000)
    members[1].publish(5, OUT)
    assert members[0].take(6, 1000)[1] != where
    members[0].publish(5, end)
    assert members[0].take(7, 1000)[1] == where


def test_calls_get_a_slot_in_their_order() -> None:
    """Though the other member goes out of it between the looks of two that wait."""
    mine, other = lanes(2)
    for n in (5 + RING, 5 + 2 * RING):
        mine.line_up(n)
    for lane in (mine, other):
        lane.enter(5, 1, 0)
    mine.publish(5, OUT)
    assert not mine.is_free(5 + RING)
    other.publish(5, OUT)
    assert not mine.is_free(5 + 2 * RING)
    assert mine.is_free(5 + RING)
    mine.enter(5 + RING, 1, 0)
    assert not mine.is_free(5 + 2 * RING)


def test_a_call_that_has_failed_does_not_wait_for_its_slot() -> None:
    mine, other = lanes(2)
    for n in (5 + RING, 5 + 2 * RING):
        mine.line_up(n)
    for lane in (mine, other):
        lane.enter(5, 1, 0)
    assert not mine.is_free(5 + RING)
    assert not mine.is_free(5 + 2 * RING)
    mine.step_out(5 + RING)
    for lane in (mine, other):
        lane.publish(5, OUT)
    assert mine.is_free(5 + 2 * RING)


def test_what_a_member_shows_in_a_later_call_is_not_taken_for_that_of_one_it_never_was_in() -> None:
    """Its own call had failed while it waited for the slot."""
    mine, other = lanes(2)
    result = np.zeros(4, np.uint8)
    work = errand("broadcast", 2, 0, 1, 4, 1)
    pull = Pull(Mock(spec=Executor), CallKey(mine.epoch, 5, 0), 1, mine, (0, 1), work, None, result, Mock(), commits=False)
    assert not pull.step()
    other.room(5 + RING)[:4] = 7
    other.enter(5 + RING, 1, other.room_at(5 + RING))
    assert not pull.step()
    other.publish(5 + RING, OUT)
    assert not pull.step()
    assert not result.any()


def test_a_call_that_fails_wakes_the_one_that_waits_for_its_slot() -> None:
    """Nobody rings: what this member waits for is its own."""
    mine, other = lanes(2)
    host = Mock()
    executor = Executor(host)
    work = errand("broadcast", 2, 0, 1, 4, 1)
    first, second = [
        Pull(executor, CallKey(mine.epoch, n, 0), 1, mine, (0, 1), work, None, np.zeros(4, np.uint8), Mock(), commits=False)
        for n in (5, 5 + RING)
    ]
    executor.start(first)
    executor.start(second)
    other.enter(5, 1, 0)
    other.publish(5, VOID)
    while executor.step():
        pass
    host.reset_mock()
    executor.halt(first)
    host.step_soon.assert_called_once()
    executor.step()
    other.enter(5 + RING, 1, other.room_at(5 + RING))
    while executor.step():
        pass
    host.transfer_done.assert_called_once_with(second)


def two_pulls(both: list[Lane], xs: list[npt.NDArray[np.float64]], *, commits: bool) -> tuple[list[Pull], list[Mock]]:
    """A large sum of two members."""
    n = len(xs[0])
    sums = Reduction(Kernels(), ReduceOp("sum"), 2, everywhere=False)
    hosts = [Mock(spec=Executor, take_scratch=lambda nbytes: np.empty(nbytes, np.uint8)) for _ in both]
    key = CallKey(both[0].epoch, 5, 0)
    return [
        Pull(host, key, 1, lane, (0, 1), errand("all_reduce", 2, k, -1, n, 8), x, x, sums, commits=commits)
        for k, (host, lane, x) in enumerate(zip(hosts, both, xs, strict=True))
    ], hosts


def one_is_out(*, commits: bool) -> tuple[list[Lane], list[Pull], list[Mock], list[npt.NDArray[np.float64]]]:
    """Both have done their share, and one has fetched its result."""
    both, xs = lanes(2), [np.full(100_000, k + 1.0) for k in range(2)]
    pulls, hosts = two_pulls(both, xs, commits=commits)
    while both[0].phase(1, 5) != DONE:
        for pull in pulls:
            pull.step()
    while both[1].phase(0, 5) != OUT:
        pulls[0].step()
    return both, pulls, hosts, xs


def test_who_fails_while_others_read_its_memory_withdraws_that() -> None:
    """In a call without commit it may have its result, and be out, while others still read its part."""
    _, (one, other), hosts, xs = one_is_out(commits=False)
    one.halt()
    xs[0][:] = -1
    for _ in range(100):
        other.step()
    hosts[1].done.assert_not_called()


@pytest.mark.parametrize("commits", [False, True])
@pytest.mark.parametrize("closed", [False, True])
def test_who_was_left_behind_takes_nothing_of_what_came_later(closed: bool, commits: bool) -> None:
    """It stood still while it fetched the result, and the others have gone on to the epoch after next."""
    both, (_, other), hosts, _ = one_is_out(commits=commits)
    if closed:
        both[0].close()
    for _ in range(100):
        other.step()
    assert hosts[1].done.called is not closed


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("seen", [False, True])
def test_a_committed_result_that_the_others_keep_no_longer(seen: bool, closed: bool) -> None:
    """Who stood still when all had committed has the result, or an error: nothing of what came later."""
    both, (_, other), _, xs = one_is_out(commits=True)
    while seen and not other.committed:
        other.step()
    if closed:
        both[0].close()
        both[0].commons.open_lane(Epoch(1, 3, 1))
    other.halt()
    if closed:
        with pytest.raises(Evicted, match="cannot be had any more"):
            other.conclude()
    else:
        other.conclude()
        assert (xs[1] == 3).all()
