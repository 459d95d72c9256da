"""Processes that do what a benchmark tells them. None outlives it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from collections.abc import AsyncIterator, Iterable
from typing import Any

from pccl.tools.child import Child, Message

ENDING = 20.0
"""Seconds that workers may take to end in good order."""


class BenchFailed(Exception):
    """A worker ended that should not have, or a result is wrong: there is nothing to report."""


class Worker:
    """A process that runs `pccl.tools.bench.worker`. It carries out orders one after another, and answers each.

    Args:
        number: counts the workers of a crew, from 0; none is given twice.
    """

    def __init__(self, number: int, child: Child) -> None:
        self.number = number
        self.pid = child.pid
        self._child = child
        self._said: asyncio.Queue[Message] = asyncio.Queue()
        self._may_end = False

    async def attend(self) -> None:
        """Listen until the process ends; if this is cancelled, kill it.

        Raises:
            BenchFailed: it ended, and should not have.
        """
        code = await self._child.attend(self._said.put_nowait)
        if not (self._may_end or self._child.killed):
            raise BenchFailed(f"worker {self.number} ended with exit code {code}; the end of its log:\n{self._child.last_words()}")

    def tell(self, order: str, **details: Any) -> None:
        """Give an order."""
        self._child.say(json.dumps({"order": order, **details}))

    async def hear(self) -> Message:
        """Wait for the next thing that the worker says."""
        return await self._said.get()

    async def ask(self, order: str, **details: Any) -> Any:
        """Give an order and wait for its result."""
        self.tell(order, **details)
        return (await self.hear())["result"]

    def finish(self) -> None:
        """Let it leave and end."""
        self._may_end = True
        self.tell("finish")

    def kill(self) -> None:
        """SIGKILL."""
        self._child.kill()

    def stop(self) -> None:
        """SIGSTOP."""
        self._child.signal(signal.SIGSTOP)


class Crew:
    """The workers of a benchmark."""

    def __init__(self, tasks: asyncio.TaskGroup) -> None:
        self.workers: list[Worker] = []
        self._tasks = tasks
        self._started = 0
        self._attending: list[asyncio.Task[None]] = []

    async def add(self) -> Worker:
        """Start one more."""
        self._started += 1
        worker = Worker(self._started - 1, await Child.start("bench.worker"))
        self._attending.append(self._tasks.create_task(worker.attend()))
        self.workers.append(worker)
        return worker

    async def ask(self, order: str, **details: Any) -> list[Any]:
        """Give all the same order, and collect their results."""
        return await ask_all(self.workers, order, **details)

    def kill(self, worker: Worker) -> None:
        """SIGKILL, and forget it."""
        worker.kill()
        self.workers.remove(worker)

    async def end(self) -> None:
        """Let all end in good order, if they are quick about it."""
        for worker in self.workers:
            worker.finish()
        _, late = await asyncio.wait(self._attending, timeout=ENDING)
        for task in late:
            task.cancel()


async def ask_all(workers: Iterable[Worker], order: str, **details: Any) -> list[Any]:
    """Give several workers the same order at the same time, and collect their results."""
    return list(await asyncio.gather(*(worker.ask(order, **details) for worker in workers)))


@contextlib.asynccontextmanager
async def crew(count: int) -> AsyncIterator[Crew]:
    """So many workers.

    Raises:
        BenchFailed: one of them ended; the others are killed, and the body is cancelled.
    """
    try:
        async with asyncio.TaskGroup() as tasks:
            made = Crew(tasks)
            await asyncio.gather(*(made.add() for _ in range(count)))
            yield made
            await made.end()
    except ExceptionGroup as group:
        raise group.exceptions[0] from None
