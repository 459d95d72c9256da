"""Processes that do what a benchmark tells them. None outlives it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import signal
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from pccl.tools.child import LINE, Child, Message
from pccl.tools.cli import FAILED, TIMEOUT, UNREACHABLE, USAGE

ENDING = 20.0
"""Seconds that workers may take to end in good order."""


class BenchFailed(Exception):
    """A worker ended that should not have, or a result is wrong: there is nothing to report."""

    def __init__(self, text: str, code: int = FAILED) -> None:
        super().__init__(text)
        self.code = code
        """What the command is to end with"""


class Worker:
    """Something that runs `pccl.tools.bench.worker`. It carries out orders one after another, and answers each.

    Args:
        say: gives it a line of text.
    """

    def __init__(self, say: Callable[[str], object]) -> None:
        self.said: asyncio.Queue[Message] = asyncio.Queue()
        self._say = say

    def tell(self, order: str, **details: Any) -> None:
        """Give an order."""
        self._say(json.dumps({"order": order, **details}))

    async def hear(self) -> Message:
        """Wait for the next thing that the worker says."""
        return await self.said.get()

    async def ask(self, order: str, **details: Any) -> Any:
        """Give an order and wait for its result."""
        self.tell(order, **details)
        return (await self.hear())["result"]


class Process(Worker):
    """A worker that this process has started.

    Args:
        number: counts the workers of a crew, from 0; none is given twice.
    """

    def __init__(self, number: int, child: Child) -> None:
        super().__init__(child.say)
        self.number = number
        self.pid = child.pid
        self._child = child

    def kill(self) -> None:
        """SIGKILL."""
        self._child.kill()

    def stop(self) -> None:
        """SIGSTOP."""
        self._child.signal(signal.SIGSTOP)


class Team:
    """Workers that end together."""

    def __init__(self, tasks: asyncio.TaskGroup) -> None:
        self.workers: Sequence[Worker] = []
        self._tasks = tasks
        self._ending = False
        self._attending: list[asyncio.Task[None]] = []

    async def ask(self, order: str, **details: Any) -> list[Any]:
        """Give all the same order, and collect their results."""
        return await ask_all(self.workers, order, **details)

    def attend(self, child: Child, name: str, on_message: Callable[[Message], None]) -> None:
        """Have a process listened to; until the team ends, it may not end by itself."""
        self._attending.append(self._tasks.create_task(self._attend(child, name, on_message)))

    async def _attend(self, child: Child, name: str, on_message: Callable[[Message], None]) -> None:
        code = await child.attend(on_message)
        if not (self._ending or child.killed):
            text = f"{name} ended with exit code {code}; the end of its log:\n{child.last_words()}"
            raise BenchFailed(text, code if code in (USAGE, UNREACHABLE, TIMEOUT) else FAILED)

    async def end(self) -> None:
        """Let all end in good order, if they are quick about it."""
        self._ending = True
        for worker in self.workers:
            worker.tell("finish")
        _, late = await asyncio.wait(self._attending, timeout=ENDING)
        for task in late:
            task.cancel()


class Crew(Team):
    """A team whose workers come and go."""

    def __init__(self, tasks: asyncio.TaskGroup) -> None:
        super().__init__(tasks)
        self.workers: list[Process] = []
        self._started = 0

    async def add(self) -> Process:
        """Start one more."""
        self._started += 1
        number = self._started - 1
        child = await Child.start("bench.worker")
        worker = Process(number, child)
        self.attend(child, f"worker {number}", worker.said.put_nowait)
        self.workers.append(worker)
        return worker

    def kill(self, worker: Process) -> None:
        """SIGKILL, and forget it."""
        worker.kill()
        self.workers.remove(worker)


async def ask_all(workers: Iterable[Worker], order: str, **details: Any) -> list[Any]:
    """Give several workers the same order at the same time, and collect their results."""
    return list(await asyncio.gather(*(worker.ask(order, **details) for worker in workers)))


@contextlib.asynccontextmanager
async def _tasks() -> AsyncIterator[asyncio.TaskGroup]:
    """A task group whose first error comes out as it is."""
    try:
        async with asyncio.TaskGroup() as tasks:
            yield tasks
    except ExceptionGroup as group:
        raise group.exceptions[0] from None


@contextlib.asynccontextmanager
async def crew(count: int) -> AsyncIterator[Crew]:
    """So many workers.

    Raises:
        BenchFailed: one of them ended; the others are killed, and the body is cancelled.
    """
    async with _tasks() as tasks:
        made = Crew(tasks)
        await asyncio.gather(*(made.add() for _ in range(count)))
        yield made
        await made.end()


@contextlib.asynccontextmanager
async def launched(launcher: Sequence[str], count: int) -> AsyncIterator[Team]:
    """So many workers that a program starts together. It has their stdin and stdout; they talk to this process through sockets.

    Args:
        launcher: the program with its arguments; what it is to start comes after them.

    Raises:
        BenchFailed: the program ended, as it does when one of them ends; the body is cancelled.
    """
    connections: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
    with tempfile.TemporaryDirectory(prefix="pccl-bench-") as folder:
        path = str(Path(folder) / "team")
        server = await asyncio.start_unix_server(lambda *ends: connections.put_nowait(ends), path, limit=LINE)
        try:
            async with _tasks() as tasks:
                made = Team(tasks)
                child = await Child.start("bench.worker", path, launcher=["sh", "-c", 'exec "$0" "$@" >&2', *launcher])
                made.attend(child, "the launcher of the workers", lambda message: None)
                for _ in range(count):
                    reader, writer = await connections.get()
                    worker = Worker(functools.partial(_write, writer))
                    tasks.create_task(_listen(worker, reader, writer))
                    made.workers = [*made.workers, worker]
                try:
                    yield made
                finally:
                    await made.end()  # also after an error: who is killed leaves files in /dev/shm
        finally:
            server.close()


def _write(writer: asyncio.StreamWriter, word: str) -> None:
    writer.write(word.encode() + b"\n")


async def _listen(worker: Worker, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        async for line in reader:
            worker.said.put_nowait(json.loads(line))
    except ConnectionError:
        pass  # it was killed
    finally:
        writer.close()  # that ends it, even where its launcher does not
