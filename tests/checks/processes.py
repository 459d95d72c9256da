"""Peers in processes of their own, which do what a test asks of them and can be killed, stopped and interrupted."""

from __future__ import annotations

import asyncio
import itertools
import os
import pickle
import signal
import struct
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.checks.support import QUICK

ROOT = Path(__file__).parent.parent.parent


@dataclass
class Failure:
    """An exception that a job raised, as it comes over the pipe."""

    kind: str
    text: str
    data: dict[str, Any] = field(default_factory=dict)
    """Its attributes, for example `lost`"""


class Failed(Exception):
    """A job raised; `failure` says what."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(f"{failure.kind}: {failure.text}")
        self.failure = failure


class Dead(Exception):
    """The process ended before its job did."""


class Peer:
    """A peer's process. Jobs are module-level functions ``job(comm, *arguments)``, coroutines unless the peer is a blocking one."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self.process = process
        self.pid = process.pid
        self._numbers = itertools.count()
        self._jobs: dict[int, asyncio.Future[Any]] = {}
        self._reader = asyncio.create_task(self._read())

    def start(self, job: Callable[..., Any], *arguments: Any) -> asyncio.Future[Any]:
        """Have it do something; the future has what that returned, or `Failed`, or `Dead`."""
        number = next(self._numbers)
        future = self._jobs[number] = asyncio.get_running_loop().create_future()
        if self._reader.done():
            future.set_exception(Dead(self.name))
            return future
        data = pickle.dumps((number, job, arguments))
        assert self.process.stdin
        self.process.stdin.write(struct.pack("!I", len(data)) + data)
        return future

    async def do(self, job: Callable[..., Any], *arguments: Any, within: float = 50.0) -> Any:
        """Likewise, and wait for it."""
        return await asyncio.wait_for(self.start(job, *arguments), within)

    async def outcome(self, job: Callable[..., Any], *arguments: Any, within: float = 50.0) -> Any:
        """What the job returned, or the `Failure`, or `Dead`."""
        try:
            return await self.do(job, *arguments, within=within)
        except Failed as e:
            return e.failure
        except Dead as e:
            return e

    def signal(self, number: int) -> None:
        """SIGKILL, SIGSTOP, SIGCONT, SIGINT."""
        self.process.send_signal(number)

    async def ended(self) -> int:
        """How it ended: 0, or minus the signal that ended it."""
        await self._reader
        return await self.process.wait()

    async def bury(self) -> None:
        """Make sure that nothing is left of it."""
        if self.process.returncode is None:
            self.process.kill()
        for future in self._jobs.values():
            if future.done() and not future.cancelled():
                future.exception()  # nobody may have asked
        await self.ended()
        assert self.process.stdin
        self.process.stdin.close()
        for future in self._jobs.values():
            if future.done() and not future.cancelled():
                future.exception()

    async def _read(self) -> None:
        out = self.process.stdout
        assert out
        try:
            while True:
                (length,) = struct.unpack("!I", await out.readexactly(4))
                number, good, value = pickle.loads(await out.readexactly(length))
                future = self._jobs[number]
                if not future.done():
                    future.set_result(value) if good else future.set_exception(Failed(value))
        except asyncio.IncompleteReadError:
            for future in self._jobs.values():
                if not future.done():
                    future.set_exception(Dead(self.name))


@asynccontextmanager
async def process(address: str, name: str, *, world: int = 1, blocking: bool = False, **settings: Any) -> AsyncIterator[Peer]:
    """A peer's process that joins a group and updates until the group has so many members. It begins with its first job."""
    arguments = pickle.dumps((address, name, world, blocking, QUICK | settings)).hex()
    pipe = asyncio.subprocess.PIPE
    command = [sys.executable, "-W", "error", "-m", "tests.checks.child", arguments]
    child = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    peer = Peer(name, child)
    try:
        yield peer
    finally:
        await peer.bury()


@asynccontextmanager
async def processes(address: str, world: int, *, blocking: bool = False, **settings: Any) -> AsyncIterator[list[Peer]]:
    """So many of them, P0, P1, ..., which have become one group."""
    from contextlib import AsyncExitStack

    async with AsyncExitStack() as stack:
        peers = [
            await stack.enter_async_context(process(address, f"P{k}", world=world, blocking=blocking, **settings)) for k in range(world)
        ]
        await asyncio.gather(*(peer.do(blocking_world_size if blocking else world_size) for peer in peers))
        yield peers


@asynccontextmanager
async def master_process(*options: str, stderr: int | None = None) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """`pccl master`, and the address that it prints; at a free port of 127.0.0.1 unless an option says otherwise."""
    command = [sys.executable, "-m", "pccl.tools", "master", "--listen", "127.0.0.1:0", *options]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, stderr=stderr, cwd=ROOT, env=env)
    try:
        assert process.stdout
        line = (await process.stdout.readline()).decode()
        yield process, line.removeprefix("export PCCL_MASTER=").strip().strip("'")
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


# --- jobs that many tests use -----------------------------------------------------------------------------------------


async def world_size(comm: Any) -> int:
    """How many members the peer knows of."""
    return int(comm.world_size)


def blocking_world_size(comm: Any) -> int:
    """Likewise, on a blocking peer."""
    return int(comm.world_size)


async def strike_after(comm: Any, nbytes: int, number: int = signal.SIGKILL) -> None:
    """Have the process send itself a signal once its calls have moved so many payload bytes more, in and out."""
    executor = comm._runtime.engine.executor
    due, moved = executor.progress + nbytes, executor.moved

    def counted(n: int) -> None:
        moved(n)
        if executor.progress >= due and executor.moved is counted:
            executor.moved = moved
            # to this thread: one for the process may be taken by another, and this one goes on until that has got a core
            signal.pthread_kill(threading.get_ident(), number)

    executor.moved = counted
