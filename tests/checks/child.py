"""The process of a peer (`processes.Peer`): joins, does the jobs that come through stdin, answers through stdout, ends with stdin."""

from __future__ import annotations

import asyncio
import ctypes
import os
import pickle
import signal
import struct
import sys
from collections.abc import Callable
from typing import Any

import pccl
from pccl import sync
from tests.checks.processes import Failure
from tests.checks.support import join


def failure(error: BaseException) -> Failure:
    data = {k: v for k, v in vars(error).items() if not k.startswith("__")}
    return Failure(type(error).__name__, str(error), data)


class Answers:
    """Stdout, which nothing else may write to."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)

    def send(self, number: int, good: bool, value: Any) -> None:
        data = pickle.dumps((number, good, value))
        self._out.write(struct.pack("!I", len(data)) + data)
        self._out.flush()


async def asynchronous(address: str, name: str, world: int, settings: dict[str, Any]) -> None:
    answers = Answers()
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(0, "rb"))
    joining = asyncio.create_task(join(address, name, world, **settings))
    jobs: set[asyncio.Task[None]] = set()

    async def do(number: int, job: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        try:
            answers.send(number, True, await job(await asyncio.shield(joining), *arguments))
        except BaseException as e:
            answers.send(number, False, failure(e))

    try:
        while True:
            (length,) = struct.unpack("!I", await reader.readexactly(4))
            task = asyncio.create_task(do(*pickle.loads(await reader.readexactly(length))))
            jobs.add(task)
            task.add_done_callback(jobs.discard)
    except asyncio.IncompleteReadError:
        os._exit(0)
    finally:
        transport.close()


def blocking(address: str, name: str, world: int, settings: dict[str, Any]) -> None:
    """Jobs run in the main thread, where Ctrl-C strikes."""
    answers = Answers()
    stdin = os.fdopen(0, "rb")
    comm = sync.connect(address, name=name, **settings)
    while comm.world_size < world:
        comm.update()
    while head := stdin.read(4):
        (length,) = struct.unpack("!I", head)
        number, job, arguments = pickle.loads(stdin.read(length))
        try:
            answers.send(number, True, job(comm, *arguments))
        except (pccl.PcclError, KeyboardInterrupt, AssertionError) as e:
            answers.send(number, False, failure(e))
    os._exit(0)


if __name__ == "__main__":
    parent = os.getppid()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it never outlives its test, not even stopped
    if os.getppid() == parent:
        address, name, world, blocks, settings = pickle.loads(bytes.fromhex(sys.argv[1]))
        if blocks:
            blocking(address, name, world, settings)
        else:
            asyncio.run(asynchronous(address, name, world, settings))
