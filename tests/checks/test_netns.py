"""Peers in network namespaces. Checks 11 and 12 with kernels in between, packets that vanish; and what several peers of a host send."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import pccl
from tests.checks.netns import Net, network, running
from tests.checks.processes import Failure, Peer

pytestmark = pytest.mark.process


@pytest.fixture
def net() -> Iterator[Net]:
    with network(3) as made:
        yield made


async def reduce(comm: Any, count: int, retry: bool) -> tuple[int, tuple[str, ...], str]:
    """Checks the sum; returns how many took part, who was lost, and the algorithm."""
    x = np.full(count, comm.rank + 1.0, np.float32)
    try:
        info = await comm.all_reduce(x, retry=retry)
    except pccl.PcclError:
        assert (x == comm.rank + 1).all()
        raise
    assert (x == comm.world_size * (comm.world_size + 1) / 2).all()
    return info.world_size, tuple(m.name for m in comm.view.lost), info.algorithm


async def all_reduce(peers: list[Peer], *, retry: bool, within: float = 15.0) -> list[Any]:
    return await asyncio.gather(*(p.outcome(reduce, 2_000_000, retry, within=within) for p in peers))


@pytest.mark.parametrize("retry", [False, True])
async def test_check_11_a_link_whose_packets_vanish(net: Net, retry: bool) -> None:
    async with running(net) as peers:
        usual = await all_reduce(peers, retry=False)
        assert [(world, lost) for world, lost, _ in usual] == [(3, ())] * 3
        assert all(algorithm != "local" for _, _, algorithm in usual), "hosts of one machine are hosts"
        net.lose(0, 1)
        net.lose(1, 0)
        found = await all_reduce(peers, retry=retry)
        if not retry:
            assert [type(f) for f in found] == [Failure] * 3
            assert [(f.kind, f.data["lost"]) for f in found] == [("CollectiveAborted", ())] * 3
        for _ in range(3):
            found = await all_reduce(peers, retry=False, within=5.0)  # the link is not tried again
            assert found == [(3, (), "spanning_tree")] * 3


@pytest.mark.parametrize("way", [(0, 1), (2, 0)])
async def test_check_12_a_pair_that_is_unreachable_one_way(net: Net, way: tuple[int, int]) -> None:
    net.lose(*way)
    async with running(net) as peers:
        for _ in range(3):
            assert await all_reduce(peers, retry=False) == [(3, (), "spanning_tree")] * 3


async def test_each_host_sends_an_all_reduce_once(net: Net) -> None:
    """2 (h - 1) / h of it, with two hosts, though each has two members, and ranks that follow each other are on different ones."""
    nbytes = 4 * 2_000_000
    async with running(net, (0, 1, 0, 1)) as peers:
        before = [net.sent(host) for host in (0, 1)]
        assert await all_reduce(peers, retry=False) == [(4, (), "hierarchical")] * 4
        for host in (0, 1):
            assert nbytes <= net.sent(host) - before[host] <= 1.05 * nbytes


async def test_hosts_that_are_said_to_be_one_and_are_not(net: Net) -> None:
    """Their UNIX sockets and their memory are out of each other's reach: they meet over TCP."""
    async with running(net, (0, 1, 0, 1), host="rack") as peers:
        assert await all_reduce(peers, retry=False) == [(4, (), "ring")] * 4
