"""A pytest plugin: a test that leaves a task, a thread, a descriptor or a child process behind fails, and the message names it.

What was there before a test, and what fixtures of a wider scope hold, is nobody's fault. What is on its way out gets a moment.
"""

from __future__ import annotations

import asyncio
import gc
import multiprocessing.resource_tracker
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any, NamedTuple

import pytest

from pccl.runtime import new_loop

PATIENCE = 3.0
"""Seconds in which what is about to end has to."""


class Snapshot(NamedTuple):
    """What a process has that a test can leave behind, tasks apart."""

    threads: frozenset[threading.Thread]
    descriptors: frozenset[tuple[int, str]]
    children: frozenset[int]

    @classmethod
    def take(cls) -> Snapshot:
        return cls(frozenset(threading.enumerate()), descriptors(), children())

    def newer_than(self, other: Snapshot) -> Snapshot:
        return Snapshot(self.threads - other.threads, self.descriptors - other.descriptors, self.children - other.children)

    def describe(self) -> list[str]:
        return [
            *(f"thread {thread.name!r}" for thread in self.threads),
            *(f"descriptor {fd}: {describe_descriptor(fd, target)}" for fd, target in sorted(self.descriptors)),
            *(f"child process {pid}: {describe_process(pid)}" for pid in sorted(self.children)),
        ]


def descriptors() -> frozenset[tuple[int, str]]:
    """Open descriptors, with what they are open on."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            found.append((int(name), os.readlink(f"/proc/self/fd/{name}")))
        except OSError:  # the one for the listing itself
            continue
    tracker = multiprocessing.resource_tracker._resource_tracker._fd  # type: ignore[attr-defined]
    return frozenset(one for one in found if one[0] != tracker)


def children() -> frozenset[int]:
    """Processes that any of the threads has started and nobody has waited for; the standard library's own helper lives for ever."""
    found: set[int] = set()
    for thread in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{thread}/children") as file:
                found.update(map(int, file.read().split()))
        except OSError:  # the thread has ended
            continue
    found.discard(multiprocessing.resource_tracker._resource_tracker._pid)  # type: ignore[attr-defined]
    return frozenset(found)


def describe_descriptor(fd: int, target: str) -> str:
    """What is open, and for a socket between whom."""
    if not target.startswith("socket:"):
        return target
    try:
        with socket.socket(fileno=os.dup(fd)) as sock:
            try:
                to = f" to {sock.getpeername()}"
            except OSError:
                to = ""
            return f"{target} {sock.family.name} {sock.type.name} at {sock.getsockname()}{to}"
    except OSError as e:
        return f"{target} ({e.strerror})"


def describe_process(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/cmdline") as file:
            return file.read().replace("\0", " ").strip() or "ended, and nobody has waited for it"
    except OSError:
        return "ended just now"


def describe_task(task: asyncio.Task[Any]) -> str:
    stack = task.get_stack(limit=1)
    where = f" at {stack[-1].f_code.co_filename}:{stack[-1].f_lineno}" if stack else ""
    return f"task {task.get_name()!r}: {getattr(task.get_coro(), '__qualname__', task.get_coro())}{where}"


@pytest.fixture(scope="session", autouse=True)
def _loop_library() -> None:
    """What the loop's library makes once for each process, a pipe for signals, is there before anybody counts."""
    new_loop().close()


@pytest.fixture(autouse=True)
def nothing_left(_loop_library: None) -> Iterator[None]:
    """Threads, descriptors and child processes."""
    before = Snapshot.take()
    yield
    left = Snapshot.take().newer_than(before)
    deadline = time.monotonic() + PATIENCE
    while any(left) and time.monotonic() < deadline:
        gc.collect()  # the traceback of an exception may hold a socket
        threading.Event().wait(0.002)
        left = Snapshot.take().newer_than(before)
    if any(left):
        pytest.fail("left behind: " + "; ".join(left.describe()), pytrace=False)


@pytest.fixture
async def no_tasks_left() -> AsyncIterator[None]:
    """Tasks of the loop that the test runs on. Every asynchronous test has this fixture, inside of `nothing_left`."""
    before = asyncio.all_tasks()
    yield
    left = asyncio.all_tasks() - before - {asyncio.current_task()}
    if left:
        _, left = await asyncio.wait(left, timeout=PATIENCE)
    if left:
        described = "; ".join(map(describe_task, left))
        for task in left:
            task.cancel()
        await asyncio.wait(left, timeout=PATIENCE)
        pytest.fail(f"left behind: {described}", pytrace=False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("asyncio") and "no_tasks_left" not in item.fixturenames:
            item.fixturenames.insert(item.fixturenames.index("nothing_left") + 1, "no_tasks_left")
