"""An asyncio event loop with virtual time, on which each callback belongs to a node that can be stopped.

Time stands still while anything is ready and jumps to the next timer when nothing is. A node is a `contextvars` value: whatever a node's
code schedules inherits it, so that a node can be frozen (its callbacks wait) or killed (they never run) without its code knowing.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
from collections.abc import Callable, Iterable
from typing import Any

NODE: contextvars.ContextVar[Node | None] = contextvars.ContextVar("node", default=None)


class Stuck(Exception):
    """Nothing is ready and no timer is set: whoever waits, waits for ever."""


class Node:
    """A process of the simulated world."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.dead = False
        self.paused = False
        self.parked: list[tuple[Callable[..., Any], tuple[Any, ...], contextvars.Context]] = []
        self.context = contextvars.copy_context()
        self.context.run(NODE.set, self)

    def __repr__(self) -> str:
        return f"<node {self.name}{' dead' if self.dead else ''}{' paused' if self.paused else ''}>"


class _Selector:
    """Where a real loop would wait for sockets, this one lets time pass."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    def select(self, timeout: float | None) -> list[Any]:
        if timeout is None:
            raise Stuck("nothing is scheduled")
        if timeout > 0:
            self._loop.now += timeout
        return []


class VirtualLoop(asyncio.BaseEventLoop):
    """See the module's docstring."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.steps = 0
        self._clock_resolution = 1e-9
        self._selector = _Selector(self)
        self.set_exception_handler(self._note)
        self.alarms: list[tuple[int, asyncio.Event]] = []
        """(number of a callback, event to set before it)"""
        self.errors: list[str] = []
        """What callbacks raised"""

    def time(self) -> float:
        return self.now

    def call_soon(self, callback: Any, *args: Any, context: contextvars.Context | None = None) -> asyncio.Handle:
        context = context if context is not None else contextvars.copy_context()
        return super().call_soon(self._run_in_node, callback, args, context, context=context)

    def call_at(self, when: float, callback: Any, *args: Any, context: contextvars.Context | None = None) -> asyncio.TimerHandle:
        context = context if context is not None else contextvars.copy_context()
        return super().call_at(when, self._run_in_node, callback, args, context, context=context)

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> Any:
        """Threads would not be deterministic: the work is done at once, and takes a millisecond."""
        future = self.create_future()
        try:
            result = func(*args)
        except Exception as e:
            self.call_later(0.001, lambda error=e: future.done() or future.set_exception(error))
        else:
            self.call_later(0.001, lambda: future.done() or future.set_result(result))
        return future

    def thaw(self, node: Node) -> None:
        """The node's callbacks that came due meanwhile run now."""
        node.paused = False
        if node.dead:
            return
        parked, node.parked = node.parked, []
        for callback, args, context in parked:
            self.call_soon(callback, *args, context=context)

    def pending(self) -> int:
        """How much is scheduled."""
        return len(self._ready) + len(self._scheduled)  # type: ignore[attr-defined]

    def _run_in_node(self, callback: Any, args: tuple[Any, ...], context: contextvars.Context) -> None:
        self.steps += 1
        if self.alarms and self.alarms[0][0] <= self.steps:
            self.alarms.pop(0)[1].set()
        node = NODE.get()
        if node is not None and (node.dead or node.paused):
            node.parked.append((callback, args, context))
        else:
            callback(*args)

    def _note(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if "was never retrieved" not in context.get("message", "") and "was destroyed" not in context.get("message", ""):
            self.errors.append(f"{context.get('message')}: {error!r}")
            if error is not None:
                import traceback

                self.errors.append("".join(traceback.format_exception(error)))

    def _process_events(self, event_list: list[Any]) -> None:
        pass

    def _write_to_self(self) -> None:
        pass

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        super()._timer_handle_cancelled(handle)  # type: ignore[misc]
        while self._scheduled and self._scheduled[0]._cancelled:  # type: ignore[attr-defined]
            heapq.heappop(self._scheduled)._scheduled = False  # type: ignore[attr-defined]
            self._timer_cancelled_count -= 1  # type: ignore[attr-defined]


def bury(loop: VirtualLoop, nodes: Iterable[Node]) -> None:
    """End what is left on a loop, quietly, and close it: tasks of dead nodes, and everyone's after a failure."""
    for task in asyncio.all_tasks(loop):
        task.cancel()
    for node in nodes:
        node.dead = False
        loop.thaw(node)  # what is parked may be what a task waits for
    for _ in range(20):
        tasks = asyncio.all_tasks(loop)
        if not tasks:
            break
        for task in tasks:
            task.cancel()
        loop.now += 100.0
        loop.run_until_complete(asyncio.wait(tasks, timeout=50.0))
    asyncio.set_event_loop(None)
    loop.close()
