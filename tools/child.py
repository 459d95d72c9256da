"""A process that a command has started, as the command sees it: it says things, does as it is told, and never outlives the command."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Message = dict[str, Any]

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), "1")
"""Processes share a few cores: libraries that start a thread per core would only get in each other's way."""
LINE = 1 << 24
"""Longest message"""
LAST_WORDS = 4000
"""Characters of a log that are quoted when something went wrong"""


class Child:
    """A process that runs a module of `pccl.tools`, which talks to its `Parent`. Signals go to this process alone, and only while it has
    not been waited for.
    """

    def __init__(self, process: asyncio.subprocess.Process, log: Path | None) -> None:
        self.pid = process.pid
        self.killed = False
        """By `kill`"""
        self._process = process
        self._log = log
        self._last_lines: deque[bytes] = deque(maxlen=20)

    @classmethod
    async def start(cls, module: str, *arguments: str, log: Path | None = None, launcher: Sequence[str] = ()) -> Child:
        """Start one; `attend` has to run from then on.

        Args:
            log: where its stderr goes; the end of that is kept in memory if this is None.
            launcher: a program, with its arguments, that is to start it: this is about that program's process then.
        """
        pipe = asyncio.subprocess.PIPE
        command = [*launcher, sys.executable, "-m", f"pccl.tools.{module}", *arguments]
        stderr = log.open("ab") if log else None
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=pipe,
                stdout=pipe,
                stderr=stderr or pipe,
                env=os.environ | ONE_THREAD,
                limit=LINE,
                start_new_session=True,
            )
        finally:
            if stderr:
                stderr.close()
        return cls(process, log)

    async def attend(self, on_message: Callable[[Message], None]) -> int:
        """Listen until it ends; returns its exit code. If this is cancelled, it is killed."""
        readers = [asyncio.ensure_future(self._listen(on_message)), asyncio.ensure_future(self._collect())]
        try:
            await asyncio.gather(*readers)
            return await self._process.wait()
        finally:
            for reader in readers:
                reader.cancel()
            await asyncio.gather(*readers, return_exceptions=True)
            if self.alive:
                self._process.kill()
                await self._process.communicate()  # closes its pipes, too

    @property
    def alive(self) -> bool:
        """Whether it may still do something."""
        return self._process.returncode is None

    def say(self, word: str) -> None:
        """Tell it something, in one line."""
        if self.alive:
            assert self._process.stdin
            self._process.stdin.write(word.encode() + b"\n")

    def signal(self, number: int) -> None:
        """Send a signal."""
        if self.alive:
            self._process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL."""
        self.killed = True
        self.signal(signal.SIGKILL)

    async def end(self) -> None:
        """SIGKILL, and wait until it is dead."""
        self.kill()
        await self._process.wait()

    def last_words(self) -> str:
        """The end of its log."""
        data = self._log.read_bytes() if self._log else b"".join(self._last_lines)
        return data[-LAST_WORDS:].decode(errors="replace")

    async def _listen(self, on_message: Callable[[Message], None]) -> None:
        assert self._process.stdout
        async for line in self._process.stdout:
            if line.endswith(b"\n"):  # else it was killed in the middle of a word
                on_message(json.loads(line))

    async def _collect(self) -> None:
        if self._process.stderr:
            async for line in self._process.stderr:
                self._last_lines.append(line)
