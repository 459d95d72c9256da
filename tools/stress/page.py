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

CALLER, ROUNDS, ENGINE, DONE = range(4)
"""Bytes of the page: what the worker's loop is about; rounds in flight; what its engine is about; calls that are done here and have no
verdict. Each is written by one thread."""
WIRING, FETCHING = 1, 2
"""Values of the engine's byte."""


class Phase(Enum):
    """What a fault can hit."""

    STARTING = "starting"
    JOINING = "joining"
    """Waiting to be admitted; nobody makes links yet."""
    WIRING = "wiring"
    """Links are being made to a newcomer, at it or at a member."""
    UPDATE = "update"
    SYNC = "sync_state"
    """Before the truth is known."""
    TRANSFER = "transfer"
    """In sync_state, after that."""
    COLLECTIVE = "collective"
    ROUND = "round"
    DECISION = "decision"
    """A call is done here and waits for its verdict."""
    IDLE = "idle"
    """Between calls."""
    LEAVING = "leaving"

    @property
    def counts(self) -> bool:
        """Whether a run has to hit it."""
        return self not in (Phase.STARTING, Phase.LEAVING)


NEWCOMERS = (Phase.JOINING, Phase.WIRING, Phase.TRANSFER)
"""Phases that there are only when somebody joins, or that take long only then."""
_CALLER = [Phase.STARTING, Phase.JOINING, Phase.UPDATE, Phase.SYNC, Phase.COLLECTIVE, Phase.IDLE, Phase.LEAVING]


class Page:
    """One worker's page, at either end.

    Args:
        path: of a file, which the driver makes.
    """

    def __init__(self, path: Path, *, create: bool = False) -> None:
        if create:
            path.write_bytes(bytes(mmap.PAGESIZE))
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), mmap.PAGESIZE)

    def close(self) -> None:
        """Give the memory back."""
        self._memory.close()

    def enter(self, phase: Phase, *, rounds: int = 0) -> None:
        """The worker's loop goes on to this. Only for phases that its loop knows."""
        self._memory[ROUNDS] = rounds
        self._memory[CALLER] = _CALLER.index(phase)

    def note(self, place: int, value: int) -> None:
        """The engine has come so far."""
        self._memory[place] = min(value, 255)

    def phases(self) -> set[Phase]:
        """Where the worker is. More than one, if calls are in flight."""
        caller, rounds, engine, done = _CALLER[self._memory[CALLER]], *self._memory[ROUNDS : DONE + 1]
        if engine == WIRING and caller in (Phase.JOINING, Phase.UPDATE):
            return {Phase.WIRING} if caller is Phase.JOINING else {Phase.WIRING, Phase.UPDATE}
        if caller is Phase.SYNC and engine == FETCHING:
            return {Phase.TRANSFER}
        if caller is Phase.COLLECTIVE:
            return {caller, *([Phase.ROUND] if rounds else []), *([Phase.DECISION] if done else [])}
        return {caller}


def watch_engines(page: Page) -> None:
    """Have the engines of this process note in the page how far they are. There is one at a time, in a thread of its own."""
    done: set[CallId] = set()

    def at(value: int) -> Callable[..., None]:
        return lambda *args: page.note(ENGINE, value)

    def send(engine: Engine, message: object) -> None:
        if isinstance(message, Done):
            done.add(message.call)
            page.note(DONE, len(done))

    def begun(engine: Engine, comm: int, record: Record) -> None:
        done.discard(record.id)  # it may be another attempt
        page.note(DONE, len(done))

    def ended(engine: Engine, comm: int, record: Record, *args: Any) -> None:
        begun(engine, comm, record)
        page.note(ENGINE, 0)

    def out(engine: Engine) -> None:
        done.clear()
        page.note(DONE, 0)
        page.note(ENGINE, 0)

    notes = {"make_links": at(WIRING), "admitted": at(0), "epoch_changed": at(0), "agreed": at(FETCHING)}
    notes |= {"send": send, "start": begun, "finish": ended, "close": out}
    for name, note in notes.items():
        setattr(Engine, name, _before(getattr(Engine, name), note))


def _before(method: Callable[..., Any], note: Callable[..., None]) -> Callable[..., Any]:
    @functools.wraps(method)
    def noted(*args: Any) -> Any:
        note(*args)
        return method(*args)

    return noted
