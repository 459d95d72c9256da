"""A worker as its driver sees it."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable

from pccl.tools.child import Child, Message


class WorkerFailed(Exception):
    """A worker has ended that should not have."""


class WorkerProcess:
    """A process that runs `pccl.tools.demo.worker`.

    Args:
        on_message: called with everything that it says.
    """

    def __init__(self, name: str, child: Child, on_message: Callable[[str, Message], None]) -> None:
        self.name = name
        self.child = child
        self._on_message = on_message
        self._said: defaultdict[str, asyncio.Queue[Message]] = defaultdict(asyncio.Queue)

    @classmethod
    async def start(cls, name: str, arguments: list[str], on_message: Callable[[str, Message], None]) -> WorkerProcess:
        """Start one; `attend` has to run from then on."""
        return cls(name, await Child.start("demo.worker", *arguments), on_message)

    async def attend(self) -> None:
        """Listen until the process ends; if this is cancelled, kill it.

        Raises:
            WorkerFailed: it ended by itself, and not well.
        """
        code = await self.child.attend(self._heard)
        if code and not self.child.killed:
            raise WorkerFailed(f"{self.name} ended with exit code {code}; the end of its log:\n{self.child.last_words()}")

    async def hears(self, event: str) -> Message:
        """Wait until the worker has said this (once more)."""
        return await self._said[event].get()

    def go_on(self) -> None:
        """Let it go on from where it waits."""
        self.child.say("go")

    def _heard(self, message: Message) -> None:
        self._on_message(self.name, message)
        if message["event"] != "step":
            self._said[message["event"]].put_nowait(message)
