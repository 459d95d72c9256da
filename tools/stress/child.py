"""A process of the run as its driver sees it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Message = dict[str, Any]

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), "1")
"""Peers share a few cores: libraries that start a thread per core would only get in each other's way."""
LINE = 1 << 20
LAST_WORDS = 4000
"""Characters of a log that a violation quotes"""


class Child:
    """A process that runs a module of this package. Signals go to this process alone, and only while it has not been waited for.

    Args:
        log: where its stderr goes.
    """

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self.pid = process.pid
        self.killed = False
        """By `kill`"""
        self._process = process
        self._log = log

    @classmethod
    async def start(cls, module: str, arguments: list[str], log: Path) -> Child:
        """Start one; `attend` has to run from then on."""
        pipe = asyncio.subprocess.PIPE
        command = [sys.executable, "-m", f"pccl.tools.stress.{module}", *arguments]
        with log.open("ab") as stderr:
            process = await asyncio.create_subprocess_exec(
                *command, stdin=pipe, stdout=pipe, stderr=stderr, env=os.environ | ONE_THREAD, limit=LINE, start_new_session=True
            )
        return cls(process, log)

    async def attend(self, on_message: Callable[[Message], None]) -> int:
        """Listen until it ends; returns its exit code. If this is cancelled, it is killed."""
        assert self._process.stdout
        try:
            async for line in self._process.stdout:
                if line.endswith(b"\n"):  # else it was killed in the middle of a word
                    on_message(json.loads(line))
            return await self._process.wait()
        finally:
            if self.alive:
                self._process.kill()
                await self._process.wait()

    @property
    def alive(self) -> bool:
        """Whether it may still do something."""
        return self._process.returncode is None

    async def kill(self) -> None:
        """SIGKILL; returns when it is dead."""
        self.killed = True
        self.signal(signal.SIGKILL)
        await self._process.wait()

    def signal(self, number: int) -> None:
        """Send a signal."""
        if self.alive:
            self._process.send_signal(number)

    def finish(self) -> None:
        """Tell it to end in good order."""
        if self.alive:
            assert self._process.stdin
            self._process.stdin.write(b"finish\n")

    def last_words(self) -> str:
        """The end of its log."""
        return self._log.read_bytes()[-LAST_WORDS:].decode(errors="replace")
