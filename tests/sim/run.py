"""One simulated run: a seed is a plan, a world and a schedule of faults. ``python -m tests.sim.run SEED`` replays one."""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from unittest import mock

from pccl.collectives import flow, planner
from pccl.core.errors import ConnectError, PcclError
from pccl.transports import framing, link
from pccl.transports.region import supported
from tests.sim.loop import VirtualLoop, bury
from tests.sim.program import Book, Plan, Trainer, Violation
from tests.sim.world import MASTER, Hosts, Weather, World

LIMIT = 400.0
"""Virtual seconds in which a run has to end; faults end after a fraction of that."""


@dataclass
class Result:
    """What a run came to."""

    seed: int
    book: Book
    faults: list[str] = field(default_factory=list)
    trace: str = ""
    steps: int = 0
    seconds: float = 0.0


def scenario(seed: int) -> tuple[Plan, Weather, list[str], int]:
    """What a seed stands for: a plan, a network, the kinds of faults, and how many peers begin."""
    r = random.Random(f"scenario {seed}")
    plan = Plan(steps=r.choice((3, 5, 8)), calls=r.choice((1, 2, 4)), sync=True, late=r.choice((0.0, 0.3)))
    kinds = ["kill", "kill", "join", "join", "master", "master", "leave", "freeze", "hold", "cut", "cut one way", "slow", "reset", "crash"]
    chosen = sorted(set(r.sample(kinds, r.choice((0, 1, 2, 2, 3, 3, 5)))))
    peers = r.choice((2, 3, 3, 4, 5))
    plan.update_last = r.random() < 0.2
    if r.random() < 0.4:
        plan.cancel = r.choice((0.05, 0.3))
    if r.random() < 0.1:
        plan.disagree = 0.03
    if set(chosen) <= {"join"} and not plan.cancel and not plan.disagree and r.random() < 0.5:
        plan.wait_for = peers  # newcomers do not wait, so nobody may be lost
    plan.may_evict = bool(set(chosen) & {"freeze", "crash", "cut", "cut one way", "master"})
    weather = Weather(latency=r.choice((0.0001, 0.0005, 0.02)), jitter=r.choice((0.0, 0.002, 0.05)))
    return plan, weather, chosen, peers


def hosts(seed: int) -> Hosts:
    """Where a seed's peers run: those of about every second seed share memory."""
    r = random.Random(f"hosts {seed}")
    count = r.choice((0, 0, 0, 0, 1, 1, 1, 1, 1, 2)) if supported() else 0
    return Hosts(
        count,
        shut=r.choice((0.0, 0.0, 0.3, 1.0)),
        apart=r.choice((0.0, 0.0, 0.0, 0.2)),
        pace=r.choice((0.00001, 0.0001, 0.002, 0.02)),
        crowd=r.choice((0, 1, 5, 30)),
        names={f"P{k}": f"pair {k // 2}" for k in range(100)} if seed % 2 else {},
    )


class Run:
    """A run under way."""

    def __init__(self, loop: VirtualLoop, seed: int) -> None:
        self.seed = seed
        self.plan, weather, self.kinds, self.peers = scenario(seed)
        where = hosts(seed)
        self.plan.near = where.count > 0
        if self.plan.near:
            self.kinds += ["forbid"] * (seed % 3 == 0)
        self.world = World(loop, seed, weather=weather, hosts=where)
        self.stripes = random.Random(f"stripes {seed}")
        self.world.links.stripes = self.stripes.choice((1, 3)) if seed % 4 == 3 else 0
        self.random = random.Random(f"faults {seed}")
        self.result = Result(seed, Book())
        self.born = 0
        self.trainers: dict[str, Trainer] = {}

    async def main(self) -> None:
        world = self.world
        await world.start_master()
        for _ in range(self.peers):
            self.start(min_world_size=self.random.choice((1, self.peers)))
        faults = world.loop.create_task(self.faults())
        try:
            while True:
                running = [world.tasks[n] for n in world.alive()]
                if not running and faults.done():
                    break
                await asyncio.wait([*running, *([] if faults.done() else [faults])], return_when=asyncio.FIRST_COMPLETED, timeout=LIMIT)
                self.check_tasks()
                if faults.done():
                    faults.result()
                if world.loop.time() > LIMIT:
                    raise Violation(f"P3: {self.stuck()} after {LIMIT:g} s")
        finally:
            faults.cancel()
        self.result.book.check()
        if self.result.book.slowest > 40.0 + 30.0:
            raise Violation(f"P3: a call took {self.result.book.slowest:.1f} s, its deadline was 40 s")
        if world.loop.errors:
            raise Violation(f"callbacks raised: {world.loop.errors}")

    def start(self, **options: object) -> str:
        """Another peer."""
        self.born += 1
        name = f"P{self.born}"
        self.trainers[name] = Trainer(self.result.book, self.plan, self.seed)
        self.world.start(name, self.trainers[name], **options)
        return name

    def check_tasks(self) -> None:
        """Programs end well, or because they were not let in before everyone was gone."""
        for name, task in list(self.world.tasks.items()):
            if task.done() and not self.world.nodes[name].dead and not task.cancelled():
                error = task.exception()
                if isinstance(error, ConnectError) or error is None:
                    continue
                if isinstance(error, PcclError):
                    raise Violation(f"{name} ended with {error!r}") from error
                raise error

    def stuck(self) -> str:
        out = []
        for name in self.world.alive():
            stack = self.world.tasks[name].get_stack()
            where = f"{stack[-1].f_code.co_name}:{stack[-1].f_lineno}" if stack else "?"
            out.append(f"{name} in {where} {self.world.nodes[name]}")
        return f"still running: {'; '.join(out)}"

    # --- faults -----------------------------------------------------------------------------------------------------

    async def faults(self) -> None:
        """A few faults at random times, each of a kind that the scenario has; what can heal, heals in the end."""
        world, r = self.world, self.random
        for _ in range(r.choice((1, 2, 3, 5)) if self.kinds else 0):
            await self.a_while()
            kind = r.choice(self.kinds)
            alive = [n for n in world.alive() if not world.nodes[n].paused]
            note = await self.strike(kind, alive)
            if note:
                self.result.faults.append(f"{world.loop.time():.4f} {note}")
        await asyncio.sleep(12.0)
        world.slow.clear()
        for a, b in sorted(world.cuts):
            if not (world.nodes[a].dead or world.nodes[b].dead):
                world.heal(a, b)
        for name in list(world.nodes):
            if world.nodes[name].paused:
                world.thaw(name)

    async def a_while(self) -> None:
        """Some time, or some number of callbacks: that hits the busy moments, which are short."""
        loop, r = self.world.loop, self.random
        if r.random() < 0.3:
            await asyncio.sleep(r.expovariate(1 / r.choice((0.01, 0.1, 1.0))))
            return
        due = asyncio.Event()
        loop.alarms.append((loop.steps + r.randrange(1, r.choice((20, 200, 1500))), due))
        try:
            await asyncio.wait_for(due.wait(), 3.0)
        except TimeoutError:
            pass

    async def strike(self, kind: str, alive: list[str]) -> str:
        world, r, loop = self.world, self.random, self.world.loop
        one = r.choice(alive) if alive else ""
        two = r.choice([n for n in alive if n != one] or [""])
        if kind == "join":
            return f"{self.start()} joins"
        if kind == "master":
            deaf = [n for n in world.alive() if r.random() < 0.5]
            for name in deaf:  # a little before, so that something is on its way
                world.control.cut(name, MASTER)
            await asyncio.sleep(r.choice((0.0, 0.001, 0.02)))
            world.kill_master(deaf=deaf)
            await asyncio.sleep(r.choice((0.0, 0.1, 1.0)))
            await world.start_master(recover=True)
            return f"the master is lost and comes back; {deaf} did not hear its last words"
        if not one:
            return ""
        if kind in ("kill", "crash"):
            if len(alive) < 2:
                return ""
            if kind == "crash" and len({world.places.get(n, n) for n in alive}) < 2:
                kind = "kill"  # a host that goes takes everyone along
            if kind == "kill" and one in world.places and r.random() < 0.5:
                return await self.kill_in_a_step(one)
            (world.kill if kind == "kill" else world.crash)(one)
        elif kind in ("freeze", "hold"):
            seconds = r.choice((0.05, 1.0, 2.5, 5.0, 10.0))
            (world.freeze if kind == "freeze" else world.hold)(one)
            loop.call_later(seconds, world.thaw, one)
            return f"{kind} {one} for {seconds} s"
        elif kind in ("cut", "cut one way") and two:
            world.cut(one, two, both=kind == "cut")
            if r.random() < 0.5:
                loop.call_later(r.random() * 4, world.heal, one, two)
            return f"{kind} {one} {two}"
        elif kind == "slow" and two:
            world.slow[one, two] = r.choice((0.05, 0.3))
            return f"slow {one} {two}"
        elif kind == "reset" and two:
            whole = self.stripes.random() < 0.5
            world.links.reset(one, two, self.stripes.choice if not whole else None)
            return f"reset {one} {two}{'' if whole else ', one wire'}"
        elif kind == "leave":
            self.trainers[one].leaves = True
        elif kind == "forbid":
            world.forbid(one)
        return f"{kind} {one}"

    async def kill_in_a_step(self, name: str) -> str:
        """Kill a peer while it reads and writes shared memory."""
        words = self.random.randrange(1, self.random.choice((10, 100, 1000)))
        self.world.doom(name, words)
        for _ in range(20):
            await asyncio.sleep(0.05)
            if self.world.nodes[name].dead:
                return f"kill {name} after {words} words"
        self.world.kill(name)
        return f"kill {name}"


@contextmanager
def short_frames() -> Iterator[None]:
    """Nearly every frame counts as large, and a call has many: else there is hardly ever more than one under way between two peers."""
    planner.plan.cache_clear()
    with (
        mock.patch.object(flow, "MOST_SMALL", 2000),
        mock.patch.object(framing, "MOST_SMALL", 2000),
        mock.patch.object(link, "LOOK", 0.001),
        mock.patch.object(planner, "SLICE", 16 << 10),
        mock.patch.object(planner, "LEAST_SLICE", 4 << 10),
    ):
        yield
    planner.plan.cache_clear()


def run(seed: int) -> Result:
    """Run a seed.

    Raises:
        Violation: a promise was broken.
    """
    loop = VirtualLoop()
    asyncio.set_event_loop(loop)
    garbage = gc.isenabled()
    gc.disable()
    sim = None
    try:
        sim = Run(loop, seed)
        with short_frames() if sim.world.links.stripes else nullcontext():
            loop.run_until_complete(sim.main())
        sim.result.trace = sim.world.trace.hexdigest()
        sim.result.steps, sim.result.seconds = loop.steps, loop.now
        return sim.result
    except AssertionError as e:
        faults = "; ".join(sim.result.faults) if sim else ""
        raise Violation(f"seed {seed}: {e}\nfaults: {faults}\nreplay: python -m tests.sim.run {seed}") from e
    finally:
        if sim:
            sim.result.book.closed = True
        bury(loop, sim.world.nodes.values() if sim else ())
        if garbage:
            gc.enable()
        if seed % 10 == 0:  # between runs too little is made for it to come by itself
            gc.collect()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO if "-v" in sys.argv else logging.ERROR, stream=sys.stdout, format="%(name)s %(message)s")
    found = run(int(sys.argv[1]))
    print(f"seed {found.seed}: {dict(found.book.counts)}, {found.seconds:.2f} virtual s, {found.steps} callbacks, trace {found.trace[:12]}")
    for line in found.faults:
        print("  ", line)
