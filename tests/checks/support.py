"""Masters and peers for the checks: over real sockets in this process, in threads, in virtual time.

`processes` has peers with a process each.
"""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

import pccl
from pccl import sync
from pccl.communicator import Communicator
from pccl.embedded import MasterThread
from tests.sim.loop import Node, VirtualLoop, bury
from tests.sim.world import World

T = TypeVar("T")

QUICK: dict[str, Any] = {"timeout": 30.0, "connect_timeout": 30.0, "dial_timeout": 10.0, "transport": "auto"}
"""Settings of peers, unless a test says otherwise: a hang is a failure before the test's own limit."""


# --- in this process, over TCP and ZeroMQ ---------------------------------------------------------------------------


async def join(address: str, name: str, world: int, **settings: Any) -> Communicator:
    """Connect, and update until the group has so many members, which all have to do. min_world_size stays 1."""
    comm = await pccl.connect(address, name=name, **(QUICK | settings))
    try:
        while comm.world_size < world:
            await comm.update()
    except BaseException:
        await comm.close()
        raise
    return comm


@asynccontextmanager
async def group(world: int, *, options: pccl.Options | None = None, **settings: Any) -> AsyncIterator[list[Communicator]]:
    """A master and so many peers, in rank order; their names are P0, P1, ... in some other order."""
    async with pccl.Master(options=options) as master, members(master.address, world, **settings) as comms:
        yield comms


@asynccontextmanager
async def members(address: str, world: int, **settings: Any) -> AsyncIterator[list[Communicator]]:
    """So many peers of a group of that master, in rank order; those that are left are closed at the end."""
    comms = await each(join(address, f"P{k}", world, **settings) for k in range(world))
    try:
        yield sorted(comms, key=lambda comm: comm.rank)
    finally:
        await asyncio.gather(*(comm.close() for comm in comms))


async def admit(address: str, comms: Sequence[Communicator], name: str, **settings: Any) -> Communicator:
    """Have one more peer join, while these, who are all of the group, update until they have let it in."""
    world = comms[0].world_size + 1

    async def update(comm: Communicator) -> None:
        while comm.world_size < world:
            await comm.update()

    newcomer = asyncio.create_task(join(address, name, world, **settings))
    await each([*(update(comm) for comm in comms), newcomer])
    return await newcomer


async def each(calls: Iterable[Awaitable[T]], *, within: float = 50.0) -> list[T]:
    """What all of these calls, of several peers, return; all end before the first error is raised."""
    async with asyncio.timeout(within):
        results = await asyncio.gather(*calls, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results  # type: ignore[return-value]


async def outcomes(calls: Iterable[Awaitable[Any]], *, within: float = 50.0) -> list[Any]:
    """What each of these calls returns or raises."""
    async with asyncio.timeout(within):
        return await asyncio.gather(*calls, return_exceptions=True)


async def until(condition: Callable[[], Any], *, within: float = 20.0) -> Any:
    """Poll until something is true that no event tells of; returns it."""
    async with asyncio.timeout(within):
        while not (found := condition()):  # noqa: ASYNC110
            await asyncio.sleep(0)
    return found


# --- blocking peers -------------------------------------------------------------------------------------------------


def in_threads(world: int, body: Callable[[sync.Communicator], T], *, address: str = "", **settings: Any) -> list[T]:
    """Run a program on so many blocking peers, each in a thread of its own; returns what it returns, in the order of P0, P1, ...

    Without an address a master is started for them.
    """
    if not address:
        with master_thread() as own:
            return in_threads(world, body, address=own, **settings)

    def peer(k: int) -> T:
        with sync.connect(address, name=f"P{k}", **(QUICK | settings)) as comm:
            while comm.world_size < world:
                comm.update()
            return body(comm)

    with ThreadPoolExecutor(world, thread_name_prefix="peer") as pool:
        futures = [pool.submit(peer, k) for k in range(world)]
        return [future.result() for future in futures]


@contextmanager
def master_thread(options: pccl.Options | None = None) -> Iterator[str]:
    """The address of a master, for tests without a loop."""
    with MasterThread(options=options) as master:
        yield master.address


def wait_until(condition: Callable[[], Any], *, within: float = 20.0) -> Any:
    """Likewise, for tests without a loop."""
    deadline = time.monotonic() + within
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {within:g} s"
        threading.Event().wait(0.002)
    return found


# --- virtual time ---------------------------------------------------------------------------------------------------


def simulate(main: Callable[[World], Coroutine[Any, Any, T]], *, seed: int = 0, **world: Any) -> T:
    """Run a scenario in a simulated world with a master, on virtual time; what is left of it is buried."""
    loop = VirtualLoop()
    asyncio.set_event_loop(loop)
    collects = gc.isenabled()
    gc.disable()
    the_world = World(loop, seed, **world)

    async def all_of_it() -> T:
        await the_world.start_master()
        return await main(the_world)

    try:
        result = loop.run_until_complete(all_of_it())
        assert not loop.errors, loop.errors
        return result
    finally:
        bury(loop, the_world.nodes.values())
        if collects:
            gc.enable()


async def simulated_members(world: World, names: Iterable[str], **options: object) -> dict[str, Communicator]:
    """Connect nodes of these names, which become one group; what a node does is to be run with `on_node`."""
    names = list(names)

    async def one(name: str) -> Communicator:
        comm = await world.connect(name, **options)
        while comm.world_size < len(names):
            await comm.update()
        return comm

    comms = await asyncio.gather(*(on_node(world, name, one(name)) for name in names))
    return dict(zip(names, comms, strict=True))


def on_node(world: World, name: str, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """A task of this node: it stops when the node is frozen, and never goes on once it is dead."""
    node = world.nodes.setdefault(name, Node(name))
    return world.loop.create_task(coroutine, context=node.context.copy())
