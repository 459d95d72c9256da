"""Regions of nodes in one process behave as those of processes do."""

from __future__ import annotations

import asyncio
import errno

import numpy as np
import pytest

from pccl.transports.memory_region import MemoryHost, MemoryRegion
from pccl.transports.region import ASLEEP, supported

pytestmark = pytest.mark.skipif(not supported(), reason="shared memory needs Linux on x86-64")

SIZE = 1 << 20


def two(*, open: bool = True) -> tuple[MemoryRegion, MemoryRegion]:
    host = MemoryHost()
    return MemoryRegion(host, SIZE), MemoryRegion(host, SIZE, open=open)


def test_a_neighbour_sees_what_is_written_and_cannot_write() -> None:
    mine, theirs = two()
    seen = mine.meet(theirs)
    assert seen
    theirs.words[512] = 7
    theirs.view(8192, 3)[:] = 5
    assert seen.words[512] == 7
    assert list(seen.view(8192, 3)) == [5, 5, 5]
    with pytest.raises(TypeError):
        seen.words[512] = 8
    with pytest.raises(ValueError, match="read-only"):
        seen.view(8192, 3)[:] = 6


def test_nodes_of_two_hosts_do_not_meet() -> None:
    assert MemoryRegion(MemoryHost(), SIZE).meet(MemoryRegion(MemoryHost(), SIZE)) is None


def test_memory_is_read_by_its_address() -> None:
    mine, theirs = two()
    seen = mine.meet(theirs)
    assert seen
    assert seen.readable
    source, into = np.arange(1000.0), np.zeros(10)
    seen.read(source.__array_interface__["data"][0] + 80, into)
    assert (into == source[10:20]).all()
    with pytest.raises(OSError, match="no such memory") as caught:
        seen.read(4096, into)
    assert caught.value.errno == errno.EFAULT


def test_memory_that_may_not_be_read() -> None:
    mine, theirs = two(open=False)
    for one, other in ((mine, theirs), (theirs, mine)):
        seen = one.meet(other)
        assert seen
        assert not seen.readable
    seen = mine.meet(theirs)
    assert seen
    with pytest.raises(PermissionError):
        seen.read(0, np.zeros(1))


def test_what_a_killed_node_has_shared_outlives_it() -> None:
    mine, theirs = two()
    seen = mine.meet(theirs)
    assert seen
    theirs.words[600] = 9
    theirs.alive = False
    assert not seen.is_alive()
    assert seen.words[600] == 9
    with pytest.raises(ProcessLookupError):
        seen.read(0, np.zeros(1))


def test_released_memory_is_zero_and_a_closed_region_is_still_mapped() -> None:
    mine, theirs = two()
    seen = mine.meet(theirs)
    assert seen
    theirs.view(8192, 4096)[:] = 1
    theirs.words[600] = 9
    theirs.release(8192, 4096)
    theirs.close()
    assert not seen.view(8192, 4096).any()
    assert seen.words[600] == 9
    seen.close()
    with pytest.raises(ValueError, match="released"):
        seen.words[600]


def test_a_bell_is_heard_until_nobody_wants_to_hear_it() -> None:
    async def body() -> int:
        mine, theirs = two()
        seen, heard = mine.meet(theirs), asyncio.Event()
        assert seen
        count = 0

        def hear() -> None:
            nonlocal count
            count += 1
            heard.set()

        theirs.notify(hear)
        theirs.sleeping(True)
        assert seen.words[ASLEEP]
        seen.ring()
        await heard.wait()
        seen.ring()
        theirs.notify(None)
        for _ in range(5):
            await asyncio.sleep(0)
        return count

    assert asyncio.run(body()) == 1
