"""Hosts of their own for peers: network namespaces on a bridge, with the packets lost, slowed down or held up on the way."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any

import pytest

from tests.checks.processes import ROOT, Peer, world_size
from tests.checks.support import QUICK
from tests.support import delay

HUB = "10.77.0.254"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class Net:
    """A bridge with some hosts on it; nothing outside these namespaces is touched."""

    def __init__(self, hosts: int) -> None:
        self.hub = f"pccl-{os.getpid()}-hub"
        self.hosts = [f"pccl-{os.getpid()}-{k}" for k in range(hosts)]

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

    def limit(self, rate: str) -> None:
        """What each host may send."""
        for name in self.hosts:
            inside(name, "tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", rate, "burst", "256kb", "limit", "16mb")

    def set(self, name: str, value: str) -> None:
        """A sysctl, on each host."""
        for host in self.hosts:
            inside(host, "sysctl", "-qw", f"{name}={value}")

    @contextmanager
    def held_up(self, seconds: float) -> Iterator[None]:
        """Each host gets its packets so much later."""
        for name in self.hosts:
            inside(name, "iptables", *delay.RULE)
        command = [sys.executable, "-m", "tests.support.delay", str(seconds), *self.hosts]
        with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as engine:
            assert engine.stdout
            assert engine.stdin
            try:
                assert engine.stdout.readline() == b"ready\n"
                yield
            finally:
                engine.stdin.close()


def inside(name: str, *command: str) -> None:
    ip("netns", "exec", name, *command)


@contextmanager
def network(hosts: int, *tools: str) -> Iterator[Net]:
    """Such a network, or the test is skipped; by the end nothing is left of it."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", *tools))):
        pytest.skip(f"network namespaces need root and {', '.join(('ip', *tools))}")
    made = Net(hosts)
    try:
        try:
            made.build()
        except subprocess.CalledProcessError as e:
            pytest.skip(f"network namespaces cannot be made here: {e.stderr.strip()}")
        yield made
    finally:
        made.remove()


@asynccontextmanager
async def running(net: Net, places: Sequence[int] = (), **changes: Any) -> AsyncIterator[list[Peer]]:
    """A master on the hub, and peers on these hosts, or one on each; by the end all processes are gone."""
    pipe, env = asyncio.subprocess.PIPE, os.environ | {"PYTHONPATH": str(ROOT)}

    def start(name: str, *command: str) -> Any:
        words = ["ip", "netns", "exec", name, sys.executable, *command]
        return asyncio.create_subprocess_exec(*words, stdin=pipe, stdout=pipe, cwd=ROOT, env=env)

    master = await start(net.hub, "-m", "pccl.tools", "master", "--listen", f"{HUB}:48148", "--insecure", "--heartbeat-timeout", "2")
    names = [net.hosts[k] for k in places] or net.hosts
    world = len(names)
    # all come in at once: of two that cannot reach each other, with nobody else there, one would be refused
    settings: dict[str, Any] = QUICK | {"dial_timeout": 1.0, "path_timeout": 1.0, "min_world_size": world} | changes
    async with AsyncExitStack() as stack:
        stack.push_async_callback(end, master)
        await master.stdout.readline()
        peers = []
        for k, name in enumerate(names):
            arguments = pickle.dumps((f"{HUB}:48148", f"P{k}", world, False, settings)).hex()
            peers.append(Peer(f"P{k}", await start(name, "-m", "tests.checks.child", arguments)))
            stack.push_async_callback(peers[-1].bury)
        assert await asyncio.gather(*(p.do(world_size) for p in peers)) == [world] * world
        yield peers


async def end(process: asyncio.subprocess.Process) -> None:
    process.kill()
    await process.communicate()
