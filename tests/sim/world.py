"""A world of nodes that run real engines and a real master over memory transports, and everything that can befall them."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import hashlib
import random
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field

from pccl.collectives.lane import ROOM
from pccl.communicator import Communicator, open_communicator
from pccl.core.options import Options
from pccl.engine import Engine
from pccl.master import MasterShell
from pccl.runtime import InlineRuntime
from pccl.transports.memory import MemoryNetwork, MemoryTransport
from pccl.transports.memory_control import MemoryControl
from pccl.transports.memory_region import MemoryHost, MemoryRegion
from tests.sim.loop import NODE, Node, VirtualLoop

MASTER = "master:48148"
REGION = ROOM + (64 << 20)
"""Bytes of a node's region"""


@dataclass
class Weather:
    """What the network is like."""

    latency: float = 0.0005
    jitter: float = 0.002
    """Each stretch of a stream is late by up to so much, links independently: they overtake each other."""


@dataclass
class Hosts:
    """Where peers run, and how those of one host take turns."""

    count: int = 0
    """0: each on a host of its own"""
    shut: float = 0.0
    """Chance that a peer's own memory may not be read by the others"""
    apart: float = 0.0
    """Chance that a peer shares no memory"""
    pace: float = 0.0
    """Seconds that a look into shared memory is late at most"""
    names: Mapping[str, str] = field(default_factory=dict)
    """Of those that are on hosts of their own: what theirs is said to be; some are said to be on one"""
    crowd: float = 0
    """About every so many words that a peer reads or writes another one comes in between; 0: never"""


BUSY = 0.02
"""Chance that a peer is busy with something else for much longer than usual before it looks again"""
DEPTH = 2
"""So many peers at most stand in the midst of what they do while another one acts."""


class Killed(BaseException):
    """The node was killed here."""


class NearEngine(Engine):
    """An engine that looks into shared memory when its world says so."""

    world: World
    name: str
    _due: asyncio.TimerHandle | None = None

    def step_soon(self) -> None:
        if not self._stepping:
            self._stepping = True
            self._due = self._loop.call_later(self.world.pause(), self._step)

    def step_now(self) -> None:
        """In the midst of another node's step."""
        if self._due:
            self._due.cancel()
        self._step()

    def _step(self) -> None:
        self._due = None
        with self.world.acting(self.name):
            super()._step()


class World:
    """Nodes by name. Peers are started with a program; the master is a node, too."""

    def __init__(
        self,
        loop: VirtualLoop,
        seed: int,
        *,
        options: Options | None = None,
        weather: Weather | None = None,
        hosts: Hosts | None = None,
    ) -> None:
        self.loop = loop
        self.random = random.Random(f"world {seed}")
        self.options = options or Options(
            timeout=40.0, connect_timeout=300.0, stall_timeout=15.0, takeover_timeout=10.0, log_waiting=5.0, min_world_size=1
        )
        self.weather = weather or Weather()
        self.hosts = hosts or Hosts()
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
        self._memory = random.Random(f"memory {seed}")
        self._computers = [MemoryHost(self.pause, self._look) for _ in range(self.hosts.count)]
        self.places: dict[str, int] = {}
        """Peer -> number of its host"""
        self._engines: dict[str, NearEngine] = {}
        self._acting: list[str] = []
        """Peers whose code is under way: each was interrupted by the next one"""
        self._until_next = 1
        self._doomed: dict[str, int] = {}
        """Peer -> so many words, and it dies"""

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
        if name in self.links.regions:  # the process ends
            self.links.regions.pop(name).alive = False

    async def connect(self, name: str, **changes: object) -> Communicator:
        """Connect as this node."""
        settings = {f: getattr(self.options, f) for f in self.options.__dataclass_fields__} | changes
        options = Options(**settings)  # type: ignore[arg-type]

        def make() -> Engine:
            place = self._place(name)
            engine = NearEngine(
                self.control.client(MASTER, name),
                MemoryTransport(self.links, name, region=place),
                group="g",
                name=name,
                host=self._host(name),
                key=bytes(self._keys.randrange(256) for _ in range(16)),
                address=MASTER,
                options=options,
                region=place,
                clock=self.loop.time,
            )
            engine.world, engine.name = self, name
            if place:
                self._engines[name] = engine
            return engine

        return await open_communicator(InlineRuntime, make, options.timeout)

    # --- shared memory ----------------------------------------------------------------------------------------------

    def _place(self, name: str) -> MemoryRegion | None:
        """Give a peer its host, and what it shares there."""
        if not self._computers:
            return None
        self.places[name] = self._memory.randrange(len(self._computers))
        if self._memory.random() < self.hosts.apart:
            return None
        return MemoryRegion(self._computers[self.places[name]], REGION, open=self._memory.random() >= self.hosts.shut)

    def pause(self) -> float:
        """Seconds before somebody looks into shared memory again, or hears a bell."""
        delay = self._memory.random() * self.hosts.pace
        if self._memory.random() < BUSY:
            delay *= 100
        self.trace.update(f"{self.loop.now:.9f} {delay}".encode())
        return delay

    @contextlib.contextmanager
    def acting(self, name: str) -> Iterator[None]:
        """A peer takes a step; it may die in it."""
        self._acting.append(name)
        try:
            yield
        except Killed:
            pass
        finally:
            self._acting.pop()

    def _look(self) -> None:
        """Somebody is about to read or write a word: others may come in between, or its end."""
        node = NODE.get()
        if node is None or node.dead:
            return
        if node.name in self._doomed and self._acting and self._acting[-1] == node.name:
            self._doomed[node.name] -= 1
            if self._doomed[node.name] <= 0:
                del self._doomed[node.name]
                contextvars.Context().run(self.kill, node.name)
                raise Killed
        if not self.hosts.crowd or len(self._acting) > DEPTH:
            return
        self._until_next -= 1
        if self._until_next > 0:
            return
        self._until_next = self._memory.randrange(1, 2 * self.hosts.crowd * 10 ** len(self._acting))
        busy = {node.name, *self._acting}
        others = [n for n in self._engines if n not in busy and not self.nodes[n].dead and not self.nodes[n].paused]
        if others:
            other = self._memory.choice(others)
            self._acting.append(node.name)  # perhaps once more
            try:
                self.nodes[other].context.copy().run(self._engines[other].step_now)
            except Exception as e:
                self.loop.call_exception_handler({"message": f"a step of {other}", "exception": e})
            finally:
                self._acting.pop()

    def forbid(self, name: str) -> None:
        """From now on nobody may read a peer's own memory."""
        if name in self.links.regions:
            self.links.regions[name].open = False

    def doom(self, name: str, words: int) -> None:
        """Have a peer killed when it has read or written so many more words."""
        self._doomed[name] = words

    def _host(self, name: str) -> str:
        if name in self.places:
            return f"host {self.places[name]}"
        return self.hosts.names.get(name, name)

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
        for name in [n for n in self.nodes if n == name or (n in self.places and self.places[n] == self.places.get(name))]:
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
