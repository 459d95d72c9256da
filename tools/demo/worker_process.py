"""A worker as its driver sees it: a process that says things, does as it is told, and never outlives its driver."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any

Message = dict[str, Any]

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), "1")
"""Peers share a few cores: libraries that start a thread per core would only get in each other's way."""


class WorkerFailed(Exception):
    """A worker has ended that should not have."""


class WorkerProcess:
    """A process that runs `pccl.tools.demo.worker`.

    Args:
        on_message: called with everything that it says.
    """

    def __init__(self, name: str, process: asyncio.subprocess.Process, on_message: Callable[[str, Message], None]) -> None:
        self.name = name
        self.pid = process.pid
        self._process = process
        self._on_message = on_message
        self._said: defaultdict[str, asyncio.Queue[Message]] = defaultdict(asyncio.Queue)
        self._last_words: deque[str] = deque(maxlen=20)
        self._killed = False

    @classmethod
    async def start(cls, name: str, arguments: list[str], on_message: Callable[[str, Message], None]) -> WorkerProcess:
        """Start one; `attend` has to run from then on."""
        pipe = asyncio.subprocess.PIPE
        command = [sys.executable, "-m", "pccl.tools.demo.worker", *arguments]
        process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=pipe, env=os.environ | ONE_THREAD)
        return cls(name, process, on_message)

    async def attend(self) -> None:
        """Listen until the process ends; if this is cancelled, kill it.

        Raises:
            WorkerFailed: it ended by itself, and not well.
        """
        try:
            await asyncio.gather(self._listen(), self._collect())
            code = await self._process.wait()
        finally:
            if self._process.returncode is None:
                self._process.kill()
                await self._process.wait()
        if code and not self._killed:
            raise WorkerFailed("\n".join([f"{self.name} ended with exit code {code}; the end of its log:", *self._last_words]))

    async def hears(self, event: str) -> Message:
        """Wait until the worker has said this (once more)."""
        return await self._said[event].get()

    def go_on(self) -> None:
        """Let it go on from where it waits."""
        assert self._process.stdin
        self._process.stdin.write(b"go\n")

    def kill(self) -> None:
        """SIGKILL."""
        self._killed = True
        self._process.kill()

    async def _listen(self) -> None:
        assert self._process.stdout
        async for line in self._process.stdout:
            if not line.endswith(b"\n"):  # killed in the middle of a word
                return
            message = json.loads(line)
            self._on_message(self.name, message)
            if message["event"] != "step":
                self._said[message["event"]].put_nowait(message)

    async def _collect(self) -> None:
        assert self._process.stderr
        async for line in self._process.stderr:
            self._last_words.append(line.decode(errors="replace").rstrip())
