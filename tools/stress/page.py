"""A page of memory in which a worker notes what it is about, for its driver to read even when the worker has just been killed."""

from __future__ import annotations

import functools
import mmap
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

from pccl.core.messages import Done
from pccl.core.types import CallId
from pccl.engine import Engine
from pccl.protocol.record import Record

SIZE = mmap.PAGESIZE
CALLER, ENGINE, DONE = 0, 1, 2
"""Places: what the worker's loop is about; what its engine is about; calls that are done here and have no verdict."""
WIRING, FETCHING = 1, 2
"""Bits of the engine's place."""


class Phase(Enum):
    """What a fault can hit."""

    STARTING = "starting"
    WAITING = "waiting"
    """To be admitted; nobody makes links yet."""
    WIRING = "wiring"
    """Links are being made to a newcomer, at it or at a member."""
    UPDATE = "update"
    HASHING = "hashing"
    """In sync_state, before the truth is known."""
    TRANSFER = "transfer"
    """In sync_state, after that."""
    FLIGHT = "flight"
    """In collectives, some of which are not done here."""
    DONE = "done"
    """In collectives, some of which are done here and wait for their verdict."""
    BETWEEN = "between"
    """Between calls."""
    LEAVING = "leaving"

    @property
    def counts(self) -> bool:
        """Whether a run has to hit it."""
        return self not in (Phase.STARTING, Phase.LEAVING)


_CALLER = [Phase.STARTING, Phase.WAITING, Phase.UPDATE, Phase.HASHING, Phase.FLIGHT, Phase.BETWEEN, Phase.LEAVING]


class Page:
    """One worker's page, at either end. Places are bytes: nothing is ever half written.

    Args:
        path: of a file, which the driver makes.
    """

    def __init__(self, path: Path, *, create: bool = False) -> None:
        if create:
            path.write_bytes(bytes(SIZE))
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), SIZE)

    def close(self) -> None:
        """Give the memory back."""
        self._memory.close()

    def enter(self, phase: Phase) -> None:
        """The worker's loop goes on to this. Only for phases that its loop knows."""
        self._memory[CALLER] = _CALLER.index(phase)

    def set_engine(self, bits: int) -> None:
        """What the engine is about."""
        self._memory[ENGINE] = bits

    def set_done(self, calls: int) -> None:
        """How many calls are done and have no verdict."""
        self._memory[DONE] = min(calls, 255)

    def phases(self) -> set[Phase]:
        """Where the worker is. More than one, if calls in flight differ."""
        caller, engine, done = _CALLER[self._memory[CALLER]], self._memory[ENGINE], self._memory[DONE]
        if engine & WIRING and caller in (Phase.WAITING, Phase.UPDATE):
            return {Phase.WIRING} if caller is Phase.WAITING else {Phase.WIRING, Phase.UPDATE}
        if caller is Phase.HASHING and engine & FETCHING:
            return {Phase.TRANSFER}
        if caller is Phase.FLIGHT and done:
            return {Phase.FLIGHT, Phase.DONE}
        return {caller}


def watch_engines(page: Page) -> None:
    """Have the engines of this process note in the page how far they are. There is one at a time, in a thread of its own."""
    done: set[CallId] = set()

    def links(engine: Engine, *args: Any) -> None:
        page.set_engine(WIRING)

    def nothing(engine: Engine, *args: Any) -> None:
        page.set_engine(0)

    def agreed(engine: Engine, comm: int, record: Record, payload: bytes) -> None:
        page.set_engine(FETCHING)

    def send(engine: Engine, message: object) -> None:
        if isinstance(message, Done):
            done.add(message.call)
            page.set_done(len(done))

    def begun(engine: Engine, comm: int, record: Record) -> None:
        done.discard(record.id)  # it may be another attempt
        page.set_done(len(done))

    def ended(engine: Engine, comm: int, record: Record, *args: Any) -> None:
        begun(engine, comm, record)
        page.set_engine(0)

    def out(engine: Engine, *args: Any) -> None:
        done.clear()
        page.set_done(0)
        page.set_engine(0)

    for name, note in {
        "make_links": links,
        "admitted": nothing,
        "epoch_changed": nothing,
        "agreed": agreed,
        "send": send,
        "start": begun,
        "finish": ended,
        "close": out,
    }.items():
        setattr(Engine, name, _before(getattr(Engine, name), note))


def _before(method: Callable[..., Any], note: Callable[..., None]) -> Callable[..., Any]:
    @functools.wraps(method)
    def noted(*args: Any) -> Any:
        note(*args)
        return method(*args)

    return noted
