"""Check 21: newcomers that die, or turn out to be no good, on their way in."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import pytest

import pccl
from pccl.communicator import Communicator
from pccl.core import codec
from pccl.core.address import parse_address
from pccl.core.messages import PROTOCOL_VERSION, Gone, Hello, PeerInfo, Prepare, Ready, Welcome
from pccl.transports.zmq_client import ZmqClient
from tests.checks.processes import ROOT
from tests.checks.support import each, members, until
from tests.checks.support_state import newcomer

OPTIONS = pccl.Options(heartbeat_interval=0.1, heartbeat_timeout=3.0, stall_timeout=4.0)


class Going:
    """Members that update and reduce until they are told to stop."""

    def __init__(self, comms: list[Communicator]) -> None:
        self.comms = comms
        self.steps = 0
        self.over = False
        self.seen: set[tuple[str, ...]] = set()
        self._tasks = [asyncio.create_task(self._run(c)) for c in comms]

    async def _run(self, comm: Communicator) -> None:
        x = np.empty(1000)
        while True:
            view = await comm.update()
            self.seen.add(tuple(m.name for m in view.members))
            x[:] = comm.rank
            stop = np.array([self.over])
            info = await comm.all_reduce(x, retry=True)
            assert (x == sum(range(info.world_size))).all()
            await comm.all_reduce(stop, "band", retry=True)
            if stop[0]:
                return
            self.steps += comm is self.comms[0]

    async def more(self, steps: int = 5) -> None:
        """Wait until they have made some more."""
        due = self.steps + steps

        def there() -> bool:
            for task in self._tasks:
                if task.done():
                    task.result()
            return self.steps >= due

        await until(there, within=40.0)

    async def stop(self) -> None:
        self.over = True
        await each(self._tasks)


@asynccontextmanager
async def going(world: int = 3) -> AsyncIterator[tuple[str, Going]]:
    """Busy members; at the end all of them are still there, and the next newcomer comes in."""
    async with pccl.Master(options=OPTIONS) as master, members(master.address, world, dial_timeout=1.0) as comms:
        run = Going(comms)
        await run.more()
        yield master.address, run
        await run.more()
        await run.stop()
        names = {f"P{k}" for k in range(world)}
        assert all(names <= set(seen) for seen in run.seen)
        assert {m.name for m in comms[0].view.members} == names
        async with newcomer(master.address, comms) as new:
            tensors = [np.ones(10) for _ in range(world + 1)]
            await each(c.all_reduce(x) for c, x in zip([*comms, new], tensors, strict=True))
            assert all((x == world + 1).all() for x in tensors)


# --- strangers that speak the protocol as far as they like ------------------------------------------------------------


class Stranger:
    """A peer without an engine."""

    def __init__(self, address: str, endpoint: str) -> None:
        self._info = PeerInfo(os.urandom(16), "stranger", "elsewhere", (endpoint,), 1)
        self.client = ZmqClient(parse_address(address))
        self.welcome, self.prepare, self.gone = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.prepared: list[Prepare] = []
        self.answers: tuple[bool, ...] = ()
        """Whether the dials of each round work, as it says; it falls silent after that"""

    def control_up(self) -> None:
        self.client.send(codec.encode(Hello(PROTOCOL_VERSION, "default", self._info, False)))

    def control_down(self) -> None: ...

    def control_refused(self, error: Exception) -> None:
        raise error

    def control_received(self, data: bytes) -> None:
        m = codec.decode(data)
        if isinstance(m, Welcome):
            self.welcome.set()
        elif isinstance(m, Prepare):
            self.prepared.append(m)
            self.prepare.set()
            if len(self.prepared) <= len(self.answers):
                failed = () if self.answers[len(self.prepared) - 1] else m.dial
                self.client.send(codec.encode(Ready(m.admission, failed)))
        elif isinstance(m, Gone):
            self.gone.set()


@asynccontextmanager
async def stranger(address: str, endpoint: str, *answers: bool) -> AsyncIterator[Stranger]:
    made = Stranger(address, endpoint)
    made.answers = answers
    await made.client.start(made)
    try:
        yield made
    finally:
        await made.client.close()


@asynccontextmanager
async def mute_listener() -> AsyncIterator[str]:
    """Takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


async def test_check_21_it_goes_before_it_is_let_in() -> None:
    async with going() as (address, run):
        for _ in range(3):
            async with stranger(address, "127.0.0.1:1") as it:
                await it.welcome.wait()
            await run.more(1)


async def test_check_21_it_goes_when_links_are_to_be_made() -> None:
    async with going() as (address, run), stranger(address, "127.0.0.1:1") as it:
        await it.prepare.wait()
        assert len(it.prepared[0].dial) == 3
        await it.client.close()
        await run.more()


async def test_check_21_it_claims_links_that_it_has_not_made() -> None:
    """It is let in with nothing behind it, and goes as soon as somebody misses a link to it that cannot be made."""
    async with going() as (address, run), stranger(address, "127.0.0.1:1", True) as it:
        await it.gone.wait()
        async with asyncio.timeout(30):
            while any("stranger" in m.name for m in run.comms[0].view.members):
                await run.more(1)


async def test_check_21_it_is_reached_by_nobody_and_reaches_nobody() -> None:
    async with going() as (address, run), mute_listener() as endpoint, stranger(address, endpoint, False) as it:
        await it.gone.wait()  # after the others have dialled in vain
        assert len(it.prepared) == 2
        await run.more()


async def test_check_21_it_falls_silent_while_links_are_made() -> None:
    """Its connection lives, its engine does not: that is an interpreter that is held, and lost after stall_timeout."""
    async with going() as (address, run), stranger(address, "127.0.0.1:1") as it:
        await it.gone.wait()
        await run.more()


# --- real processes that are killed where it hurts --------------------------------------------------------------------

DIES = """
import asyncio, importlib, os, signal, sys
import pccl
address, module, name, method = sys.argv[1:]
setattr(getattr(importlib.import_module(module), name), method, lambda *args: os.kill(os.getpid(), signal.SIGKILL))
asyncio.run(asyncio.wait_for(pccl.connect(address).__aenter__(), 60))
"""


@pytest.mark.process
@pytest.mark.parametrize(
    "where",
    [
        ("pccl.engine", "Engine", "make_links"),  # it has heard whom to dial
        ("pccl.protocol.peer", "Peer", "links_made"),  # it has dialled them, and not said so
        ("pccl.engine", "Engine", "admitted"),  # it is a member, but does not know
    ],
    ids=lambda where: where[2],
)
async def test_check_21_its_process_is_killed(where: tuple[str, str, str]) -> None:
    async with going() as (address, run):
        for _ in range(2):
            env = os.environ | {"PYTHONPATH": str(ROOT)}
            child = await asyncio.create_subprocess_exec(sys.executable, "-c", DIES, address, *where, env=env)
            assert await child.wait() == -signal.SIGKILL
            await run.more()
