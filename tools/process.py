"""What the long-running commands share: signals that end them cleanly, and a log on stderr."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Coroutine
from typing import Any, TypeVar

import typer

from pccl.runtime import new_loop
from pccl.tools.cli import SIGNALLED

T = TypeVar("T")

LEVELS = ("debug", "info", "warning", "error")


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run a command's coroutine. SIGINT and SIGTERM cancel it; once it has cleaned up, the process ends with 130 or 143.

    Raises:
        typer.Exit: a signal came.
    """
    caught: list[int] = []

    async def watched() -> T:
        loop, task = asyncio.get_running_loop(), asyncio.ensure_future(main)

        def end(number: int) -> None:
            caught.append(number)
            task.cancel()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, end, number)
        return await task

    try:
        with asyncio.Runner(loop_factory=new_loop) as runner:
            return runner.run(watched())
    except asyncio.CancelledError:
        if not caught:
            raise
        raise typer.Exit(SIGNALLED + caught[0]) from None


def log_to_stderr(level: str) -> None:
    """Have the library's log written to stderr, from this level up."""
    if level not in LEVELS:
        raise typer.BadParameter(f"one of {', '.join(LEVELS)} is needed, not {level!r}", param_hint="--log")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    logger = logging.getLogger("pccl")
    logger.addHandler(handler)
    logger.setLevel(level.upper())
