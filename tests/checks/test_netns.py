"""Peers in network namespaces. Checks 11 and 12 with kernels in between, packets that vanish; and what several peers of a host send."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import numpy as np
import pytest

import pccl
from tests.checks.processes import ROOT, Failure, Peer, world_size
from tests.checks.support import QUICK

pytestmark = pytest.mark.process

HUB = "10.77.0.254"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class Net:
    """A bridge with three hosts on it; nothing outside these namespaces is touched."""

    def __init__(self) -> None:
        self.hub = f"pccl-{os.getpid()}-hub"
        self.hosts = [f"pccl-{os.getpid()}-{k}" for k in range(3)]

    def build(self) -> None:
        for name in (self.hub, *self.hosts):
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", self.hub, "link", "add", "br0", "type", "bridge")
        ip("-n", self.hub, "addr", "add", f"{HUB}/24", "dev", "br0")
        ip("-n", self.hub, "link", "set", "br0", "up")
        for k, name in enumerate(self.hosts):
            ip("-n", self.hub, "link", "add", f"port{k}", "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("-n", self.hub, "link", "set", f"port{k}", "master", "br0", "up")
            ip("-n", name, "addr", "add", f"10.77.0.{k + 1}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")

    def remove(self) -> None:
        for name in (self.hub, *self.hosts):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)

    def lose(self, source: int, target: int) -> None:
        """What one host sends to another goes to a card that does not exist: no reset, no error, no answer."""
        ip(
            "-n",
            self.hosts[source],
            "neigh",
            "replace",
            f"10.77.0.{target + 1}",
            "lladdr",
            "02:00:00:00:00:99",
            "nud",
            "permanent",
            "dev",
            "eth0",
        )

    def sent(self, host: int) -> int:
        """Bytes that have left a host, headers included."""
        found = subprocess.run(["ip", "-n", self.hosts[host], "-j", "-s", "link", "show", "eth0"], check=True, capture_output=True)
        return int(json.loads(found.stdout)[0]["stats64"]["tx"]["bytes"])


@pytest.fixture
def net() -> Iterator[Net]:
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("network namespaces need root and ip (iproute2)")
    made = Net()
    try:
        try:
            made.build()
        except subprocess.CalledProcessError as e:
            pytest.skip(f"network namespaces cannot be made here: {e.stderr.strip()}")
        yield made
    finally:
        made.remove()


@asynccontextmanager
async def running(net: Net, places: Sequence[int] = (0, 1, 2), **more: Any) -> AsyncIterator[list[Peer]]:
    """A master on the hub and peers on these hosts; by the end all processes are gone."""
    pipe, env = asyncio.subprocess.PIPE, os.environ | {"PYTHONPATH": str(ROOT)}

    def inside(name: str, *command: str) -> Any:
        words = ["ip", "netns", "exec", name, sys.executable, *command]
        return asyncio.create_subprocess_exec(*words, stdin=pipe, stdout=pipe, cwd=ROOT, env=env)

    master = await inside(net.hub, "-m", "pccl.tools", "master", "--listen", f"{HUB}:48148", "--insecure", "--heartbeat-timeout", "2")
    # all come in at once: of two that cannot reach each other, with nobody else there, one would be refused
    world = len(places)
    settings: dict[str, Any] = QUICK | {"dial_timeout": 1.0, "path_timeout": 1.0, "min_world_size": world} | more
    async with AsyncExitStack() as stack:
        stack.push_async_callback(end, master)
        await master.stdout.readline()
        peers = []
        for k, place in enumerate(places):
            arguments = pickle.dumps((f"{HUB}:48148", f"P{k}", world, False, settings)).hex()
            peers.append(Peer(f"P{k}", await inside(net.hosts[place], "-m", "tests.checks.child", arguments)))
            stack.push_async_callback(peers[-1].bury)
        assert await asyncio.gather(*(p.do(world_size) for p in peers)) == [world] * world
        yield peers


async def end(process: asyncio.subprocess.Process) -> None:
    process.kill()
    await process.communicate()


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
