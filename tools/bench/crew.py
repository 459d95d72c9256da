"""Processes that do what a benchmark tells them. None outlives it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator, Iterable
from typing import Any

Message = dict[str, Any]

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), "1")
"""Workers share a few cores: libraries that start a thread per core would only get in each other's way."""
LINE = 1 << 24
"""Longest message: the times of a batch."""
ENDING = 20.0
"""Seconds that workers may take to end in good order."""


class BenchFailed(Exception):
    """A worker ended that should not have, or a result is wrong: there is nothing to report."""


class Worker:
    """A process that runs `pccl.tools.bench.worker`. It carries out orders one after another, and answers each.

    Args:
        number: counts the workers of a crew, from 0; none is given twice.
    """

    def __init__(self, number: int, process: asyncio.subprocess.Process) -> None:
        self.number = number
        self.pid = process.pid
        self._process = process
        self._said: asyncio.Queue[Message] = asyncio.Queue()
        self._last_words: deque[str] = deque(maxlen=20)
        self._may_end = False

    @classmethod
    async def start(cls, number: int) -> Worker:
        """Start one; `attend` has to run from then on."""
        pipe = asyncio.subprocess.PIPE
        command = [sys.executable, "-m", "pccl.tools.bench.worker"]
        env = os.environ | ONE_THREAD
        process = await asyncio.create_subprocess_exec(
            *command, stdin=pipe, stdout=pipe, stderr=pipe, env=env, limit=LINE, start_new_session=True
        )
        return cls(number, process)

    async def attend(self) -> None:
        """Listen until the process ends; if this is cancelled, kill it.

        Raises:
            BenchFailed: it ended, and should not have.
        """
        try:
            await asyncio.gather(self._listen(), self._collect())
            code = await self._process.wait()
        finally:
            if self._process.returncode is None:
                self._process.kill()
                await self._process.communicate()  # closes its pipes, too
        if not self._may_end:
            raise BenchFailed("\n".join([f"worker {self.number} ended with exit code {code}; the end of its log:", *self._last_words]))

    def tell(self, order: str, **details: Any) -> None:
        """Give an order."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps({"order": order, **details}).encode() + b"\n")

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
        self._may_end = True
        self._process.kill()

    def stop(self) -> None:
        """SIGSTOP."""
        self._process.send_signal(signal.SIGSTOP)

    async def _listen(self) -> None:
        assert self._process.stdout
        async for line in self._process.stdout:
            if line.endswith(b"\n"):  # else it was killed in the middle of a word
                self._said.put_nowait(json.loads(line))

    async def _collect(self) -> None:
        assert self._process.stderr
        async for line in self._process.stderr:
            self._last_words.append(line.decode(errors="replace").rstrip())


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
        worker = await Worker.start(self._started - 1)
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
