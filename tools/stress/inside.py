"""What the processes of a run have in common: a log, a driver, and knowledge of what they hold."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import pccl
from pccl.tools.parent import Parent

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def begin(on_word: Callable[[], object]) -> Parent:
    """Log to stderr, and call this for every word of the driver, in a thread."""
    parent = Parent(lambda word: on_word())
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s.%(msecs)03d %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    return parent


def usage(comm: pccl.Communicator | None) -> dict[str, int]:
    """Memory (bytes), descriptors, sockets among them, threads, and tasks of this loop and of the engine's."""
    found = {"memory": 0, "descriptors": 0, "sockets": 0, "threads": 0, "tasks": len(asyncio.all_tasks())}
    with contextlib.suppress(OSError):  # elsewhere than on Linux
        with open("/proc/self/statm") as file:
            found["memory"] = int(file.read().split()[1]) * PAGE_BYTES
        targets = [_target(name) for name in os.listdir("/proc/self/fd")]
        found["descriptors"] = len(targets)
        found["sockets"] = sum(target.startswith("socket:") for target in targets)
        found["threads"] = len(os.listdir("/proc/self/task"))
    if comm is not None:
        found["tasks"] += len(asyncio.all_tasks(getattr(comm._runtime, "_loop", None)))
    return found


def _target(descriptor: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:  # the one for the listing itself
        return ""


def explain_on_signal(root: Callable[[], object]) -> None:
    """On SIGUSR1, write to the log where every task is, and what the library's objects from this one on hold."""

    def explain() -> None:
        lines = [f"task {task.get_name()}: {[str(f) for f in task.get_stack(limit=4)]}" for task in asyncio.all_tasks()]
        print(*lines, *_inventory(root()), sep="\n", file=sys.stderr, flush=True)

    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, explain)


def _inventory(root: object) -> list[str]:
    """Every object of the library that can be reached, with its attributes, briefly."""
    lines: list[str] = []
    seen: set[int] = set()
    todo: list[Any] = [root]
    while todo:
        x = todo.pop(0)
        if isinstance(x, dict):
            todo += [*x.keys(), *x.values()]
        elif isinstance(x, (list, tuple, set)) or type(x).__name__ == "deque":
            todo += list(x)
        if id(x) not in seen and type(x).__module__.startswith("pccl.") and not isinstance(x, (type, tuple)):
            seen.add(id(x))
            fields = {name: getattr(x, name, None) for name in [*getattr(x, "__dict__", ()), *getattr(type(x), "__slots__", ())]}
            if fields:
                lines.append(f"{type(x).__name__} {id(x):x}: " + ", ".join(f"{k}={v!r:.150}" for k, v in fields.items()))
            todo += fields.values()
    return lines
