"""A world of nodes that run real engines and a real master over memory transports, and everything that can befall them."""

from __future__ import annotations

import asyncio
import contextvars
import hashlib
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from pccl.communicator import Communicator, open_communicator
from pccl.core.options import Options
from pccl.engine import Engine
from pccl.master import MasterShell
from pccl.runtime import InlineRuntime
from pccl.transports.memory import MemoryNetwork, MemoryTransport
from pccl.transports.memory_control import MemoryControl
from tests.sim.loop import Node, VirtualLoop

MASTER = "master:48148"


@dataclass
class Weather:
    """What the network is like."""

    latency: float = 0.0005
    jitter: float = 0.002
    """Each stretch of a stream is late by up to so much, links independently: they overtake each other."""


class World:
    """Nodes by name. Peers are started with a program; the master is a node, too."""

    def __init__(
        self,
        loop: VirtualLoop,
        seed: int,
        *,
        options: Options | None = None,
        weather: Weather | None = None,
        hosts: Mapping[str, str] | None = None,
    ) -> None:
        self.loop = loop
        self.hosts = hosts or {}
        """Name -> host; nodes that are not in it have one each"""
        self.random = random.Random(f"world {seed}")
        self.options = options or Options(
            timeout=40.0, connect_timeout=300.0, stall_timeout=15.0, takeover_timeout=10.0, log_waiting=5.0, min_world_size=1
        )
        self.weather = weather or Weather()
        self.nodes: dict[str, Node] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.cuts: set[tuple[str, str]] = set()
        """(source, target) pairs between which data streams stand still"""
        self.slow: dict[tuple[str, str], float] = {}
        self.trace = hashlib.sha256()
        self.links = MemoryNetwork(self._delay, lambda: self.random.choice((100, 5000, 30000, 300000)))
        self.control = MemoryControl(
            self._control_delay, heartbeat_timeout=self.options.heartbeat_timeout, heartbeat_interval=self.options.heartbeat_interval
        )
        self._keys = random.Random(f"keys {seed}")
        self._lives = 0
        self.master: MasterShell | None = None

    # --- the network ------------------------------------------------------------------------------------------------

    def _delay(self, source: str, target: str) -> float | None:
        if (source, target) in self.cuts:
            return None
        extra = self.slow.get((source, target), 0.0)
        delay = self.weather.latency + self.random.random() * self.weather.jitter + extra
        self.trace.update(f"{self.loop.now:.9f} {source}>{target}".encode())
        return delay

    def _control_delay(self, source: str, target: str) -> float | None:
        return self.weather.latency + self.random.random() * self.weather.jitter

    # --- nodes ------------------------------------------------------------------------------------------------------

    async def start_master(self, *, recover: bool = False) -> None:
        """Begin to serve; after the loss of a master, in its place."""
        self._lives += 1
        name = f"master {self._lives}"
        node = self.nodes[name] = Node(name)
        shell = MasterShell(
            self.control.server(MASTER),
            self.options,
            recover=recover,
            random_bytes=lambda n: bytes(self._keys.randrange(256) for _ in range(n)),
        )
        await self.loop.create_task(shell.start(), context=node.context)
        self.master = shell

    def kill_master(self, *, deaf: list[str] | None = None) -> None:
        """The master's process dies. What is on its way to or from these peers is lost."""
        for name in deaf or ():
            self.control.cut(name, MASTER)
            self.loop.call_later(0.5, self.control.mend, name, MASTER, context=contextvars.Context())
        self.nodes[f"master {self._lives}"].dead = True
        self.control.kill(MASTER)
        self.master = None

    def start(self, name: str, program: Callable[[World, str, Communicator], Awaitable[None]], **options: object) -> None:
        """Start a peer that connects and runs a program."""
        node = self.nodes[name] = Node(name)
        task = self.loop.create_task(self._live(name, program, options), context=node.context)
        self.tasks[name] = task

    async def _live(self, name: str, program: Callable[[World, str, Communicator], Awaitable[None]], options: dict[str, object]) -> None:
        comm = await self.connect(name, **options)
        await program(self, name, comm)
        await comm.leave()

    async def connect(self, name: str, **changes: object) -> Communicator:
        """Connect as this node."""
        settings = {f: getattr(self.options, f) for f in self.options.__dataclass_fields__} | changes
        options = Options(**settings)  # type: ignore[arg-type]

        def make() -> Engine:
            return Engine(
                self.control.client(MASTER, name),
                MemoryTransport(self.links, name),
                group="g",
                name=name,
                host=self.hosts.get(name, name),
                key=bytes(self._keys.randrange(256) for _ in range(16)),
                address=MASTER,
                options=options,
                clock=self.loop.time,
            )

        return await open_communicator(InlineRuntime, make, options.timeout)

    # --- faults -----------------------------------------------------------------------------------------------------

    def kill(self, name: str) -> None:
        """SIGKILL: nothing of the node runs any more; its system closes all connections."""
        node = self.nodes[name]
        node.dead = True
        node.parked.clear()
        self.links.kill(name)
        self.control.kill(name)

    def crash(self, name: str) -> None:
        """The whole machine is gone: nobody is told."""
        node = self.nodes[name]
        node.dead = True
        node.parked.clear()
        self.isolate(name)
        self.control.freeze(name)

    def freeze(self, name: str) -> None:
        """SIGSTOP."""
        self.nodes[name].paused = True
        self.control.freeze(name)

    def hold(self, name: str) -> None:
        """Something holds the interpreter: sockets and ZeroMQ's thread live on."""
        self.nodes[name].paused = True
        self.control.hold(name)

    def thaw(self, name: str) -> None:
        """SIGCONT, or the interpreter is free again."""
        if not self.nodes[name].dead:
            self.control.release(name)
            self.loop.thaw(self.nodes[name])

    def cut(self, a: str, b: str, *, both: bool = True) -> None:
        """Data from a to b (and back) stands still."""
        self.cuts |= {(a, b), (b, a)} if both else {(a, b)}

    def heal(self, a: str, b: str) -> None:
        """It flows again."""
        self.cuts -= {(a, b), (b, a)}

    def isolate(self, name: str) -> None:
        """Cut a node from all others."""
        for other in self.nodes:
            if other != name:
                self.cut(name, other)

    def alive(self) -> list[str]:
        """Peers that have not been killed and whose program has not ended."""
        return [n for n, t in self.tasks.items() if not self.nodes[n].dead and not t.done()]
