"""Members on several hosts, of which some have several: hosts are what `host=` says."""

from __future__ import annotations

import asyncio
import itertools
import random
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import numpy as np
import pytest

import pccl
from pccl.communicator import Communicator
from pccl.core.dtypes import DTYPES
from tests.checks import oracle
from tests.checks.jobs import reduce
from tests.checks.processes import Dead, Peer, process, strike_after, world_size
from tests.checks.support import each, join

HOSTS = ["aabb", "abab", "aaab", "abbcc"]
"""The host of each peer: 2 + 2, 2 + 2 in turn, 3 + 1, 1 + 2 + 2"""
COUNT = 600_001


@asynccontextmanager
async def spread(hosts: Sequence[str], **settings: Any) -> AsyncIterator[list[Communicator]]:
    """Peers with these host ids, in the order of their ranks."""
    async with pccl.Master() as master:
        comms = await each(join(master.address, f"P{k}", len(hosts), host=host, **settings) for k, host in enumerate(hosts))
        try:
            yield sorted(comms, key=lambda comm: comm.rank)
        finally:
            await asyncio.gather(*(comm.close() for comm in comms))


@asynccontextmanager
async def spread_processes(hosts: Sequence[str]) -> AsyncIterator[list[Peer]]:
    """Likewise, with a process each; P0, P1, ... in the order of the host ids."""
    async with pccl.Master() as master, AsyncExitStack() as stack:
        world = len(hosts)
        peers = [await stack.enter_async_context(process(master.address, f"P{k}", world=world, host=host)) for k, host in enumerate(hosts)]
        await asyncio.gather(*(peer.do(world_size) for peer in peers))
        yield peers


@pytest.mark.parametrize("hosts", HOSTS)
async def test_results_are_right_and_the_same_everywhere(hosts: str) -> None:
    rng = np.random.default_rng(1)
    async with spread(hosts) as comms:
        for count, op, name in itertools.product((1, 1000, 5003, 70_001, 400_000), ("sum", "avg", "max"), ("float32", "float16")):
            inputs = [(rng.standard_normal(count)).astype(name) for _ in comms]
            for chosen in ("auto", "hierarchical"):
                outs = [x.copy() for x in inputs]
                infos = await each(c.all_reduce(y, op, algorithm=chosen) for c, y in zip(comms, outs, strict=True))
                oracle.check(op, DTYPES[name], inputs, outs[0], algorithm=infos[0].algorithm)
                oracle.same_bits(outs)
                expected = "hierarchical" if chosen == "hierarchical" or outs[0].nbytes > 64 << 10 else None
                assert expected in (None, infos[0].algorithm)


@pytest.mark.parametrize("hosts", HOSTS)
async def test_other_collectives(hosts: str) -> None:
    world = len(hosts)
    async with spread(hosts) as comms:
        for count, algorithm in itertools.product((10, 300_000), ("auto", "hierarchical")):
            inputs = [np.arange(count * world, dtype=np.int64) * (rank + 1) for rank in range(world)]
            scattered = await each(c.reduce_scatter(x, algorithm=algorithm) for c, x in zip(comms, inputs, strict=True))
            total = np.split(sum(inputs), world)
            assert all((info.out == total[rank]).all() for rank, info in enumerate(scattered))
            gathered = await each(c.all_gather(x[:count], algorithm=algorithm) for c, x in zip(comms, inputs, strict=True))
            assert all((info.out.reshape(-1) == np.concatenate([x[:count] for x in inputs])).all() for info in gathered)
            for root in (0, world - 1):
                copies = [x.copy() for x in inputs]
                told = await each(c.broadcast(x, root=root, algorithm=algorithm) for c, x in zip(comms, copies, strict=True))
                assert all((x == inputs[root]).all() for x in copies)
            used = {info.algorithm for info in (*scattered, *gathered, *told)}
            assert used == {"hierarchical"} or (count, algorithm) == (10, "auto")


@pytest.mark.parametrize("kind", ["uint8", "float16"])
async def test_quantized_calls_have_the_same_bits(kind: str) -> None:
    async with spread("aabbb") as comms:
        for count in (1000, 100_003):
            outs = [np.random.default_rng(rank).standard_normal(count).astype(np.float32) for rank in range(5)]
            exact = sum(x.astype(np.float64) for x in outs)
            await each(c.all_reduce(x, algorithm="hierarchical", quantize=kind) for c, x in zip(comms, outs, strict=True))
            oracle.same_bits(outs)
            assert np.abs(outs[0] - exact).max() < 0.5


async def test_nans_are_alike_whoever_folds() -> None:
    """Each host's speaker folds the sums of the hosts for itself."""
    async with spread("aabb") as comms:
        outs = [np.zeros(4, np.float32) for _ in comms]
        for rank, x in enumerate(outs):
            x[:2].view(np.uint32)[:] = 0x7FC00001 + rank  # NaNs with a payload
        await each(c.all_reduce(x, algorithm="hierarchical") for c, x in zip(comms, outs, strict=True))
        oracle.same_bits(outs)


async def test_only_peers_of_one_host_share_memory() -> None:
    """Although all of them could."""
    async with spread("abab") as comms:
        x = [np.ones(1000) for _ in comms]
        whole = await each(c.all_reduce(a) for c, a in zip(comms, x, strict=True))
        assert all(info.algorithm != "local" for info in whole)
        assert {m.name: m.host for m in comms[0].view.members} == {"P0": "a", "P1": "b", "P2": "a", "P3": "b"}
        names = [c.view.members[c.rank].name for c in comms]
        for colour, algorithm in (({"P0": 0, "P1": 1, "P2": 0, "P3": 1}, "local"), ({"P0": 0, "P1": 0, "P2": 1, "P3": 1}, "direct")):
            halves = await each(c.split(colour[name]) for c, name in zip(comms, names, strict=True))
            infos = await each(c.all_reduce(a) for c, a in zip(halves, x, strict=True))
            assert {info.algorithm for info in infos} == {algorithm}


@pytest.mark.process
@pytest.mark.parametrize("retry", [False, True])
@pytest.mark.parametrize("hosts", HOSTS)
async def test_killed_inside_a_call(hosts: str, retry: bool) -> None:
    """One member after the other, at some byte of a call: the others get the same verdict, and what belongs to it; until one is left."""
    r = random.Random(f"{hosts} {retry}")
    async with spread_processes(hosts) as peers:
        turn = 0
        while len(peers) > 1:
            infos = await asyncio.gather(*(p.do(reduce, p.name, turn, COUNT, True) for p in peers))
            assert all(one["right"] and len(one["members"]) == len(peers) for one in infos)
            assert len({one["bits"] for one in infos}) == 1
            victim = peers.pop(r.randrange(len(peers)))
            await victim.do(strike_after, r.randrange(1, COUNT))
            end, *found = await asyncio.gather(*(p.outcome(reduce, p.name, turn, COUNT, turn % 2 == 0, retry) for p in (victim, *peers)))
            assert isinstance(end, Dead)
            assert await victim.ended() == -signal.SIGKILL
            for one in found:
                assert one["intact"]
                if retry:
                    assert one["right"], one
                    assert sorted(one["members"]) == sorted(p.name for p in peers)
                else:
                    assert one["error"].kind == "CollectiveAborted"
                    assert one["error"].data["lost"] == (victim.name,)
            assert len({one.get("bits") for one in found}) == 1
            turn += 1
