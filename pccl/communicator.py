"""The asynchronous face."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Generator, Mapping, Sequence
from types import TracebackType
from typing import Any, Unpack

from pccl.calls import Part, Round
from pccl.connection import Settings, prepare
from pccl.core.errors import InvalidArgument, PcclError
from pccl.core.types import Info, RoundInfo, StateInfo, Tag, View
from pccl.engine import Engine
from pccl.face import Collectives, Handle, How, check_retry, check_tag
from pccl.operations import Operation, Update
from pccl.runtime import InlineRuntime, ThreadRuntime
from pccl.state import Sync


class connect:
    """Join a group, and leave it in the end.

    ``async with pccl.connect("host:48148") as comm: ...``; or ``comm = await pccl.connect(...)`` and, in the end, ``await comm.leave()``.

    Args:
        address: the master's, as it prints it: ``host:port``, ``[v6]:port`` or ``pccl://host:port?key=...``.
        group: peers of one group reduce together; groups of one master have nothing to do with each other.
        settings: see `Settings`.

    Raises:
        ConnectError: on entry; this peer cannot become a member (MasterUnreachable, AuthenticationError, VersionMismatch tell more).
        InvalidArgument: at once.
    """

    def __init__(self, address: str, *, group: str = "default", **settings: Unpack[Settings]) -> None:
        self._prepared = prepare(address, group, settings)
        self._comm: Communicator | None = None

    def __await__(self) -> Generator[Any, None, Communicator]:
        return open_communicator(ThreadRuntime, self._prepared.engine, self._prepared.options.timeout).__await__()

    async def __aenter__(self) -> Communicator:
        self._comm = await self
        return self._comm

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._comm
        await self._comm._end(leave=error is None)


async def open_communicator(
    kind: Callable[[Callable[[], Engine]], InlineRuntime | ThreadRuntime], make: Callable[[], Engine], timeout: float | None
) -> Communicator:
    """Start an engine in a runtime of some kind, and wait until it is admitted."""
    runtime = kind(make)
    await runtime.connect()
    return Communicator(runtime, 0, runtime.engine.membership(0).view, timeout)


class Communicator(Handle[Coroutine[Any, Any, Info]]):
    """A member's hold on its group, or on a part of it (`split`).

    To be used from one event loop; several calls may be in flight at a time. Cancelling a task that awaits a call ends the call on all
    members, with inputs as they were; a cancellation that comes too late for that still raises CancelledError, with the result in the
    buffer.
    """

    async def update(self, *, timeout: float | None = ...) -> View:  # type: ignore[assignment]
        """Let in whoever waits, and hear who has gone. Every member has to call it.

        The first update after an admission returns at once, on newcomers and others alike, so that one loop text with one update per
        iteration serves both. While nobody waits, an update costs nothing. It waits while the group is smaller than min_world_size.

        Returns:
            The membership, with what has changed since this caller last heard of it.
        """
        before = self._begin_update()
        await self._run(Update(self._comm, timeout=self._within(timeout)))
        return self._seen if self._seen.epoch != before.epoch else self._unchanged()

    async def sync_state(
        self,
        state: Mapping[str, Any],
        revision: int,
        *,
        strategy: str = "elect",
        declare: bool = False,
        may_differ: Sequence[str] = (),
        tag: Tag = None,
        timeout: float | None = ...,  # type: ignore[assignment]
    ) -> StateInfo:
        """Give every member the same tensors and values, to the bit. See `pccl.state.Sync`."""
        sync = Sync(self._comm, state, revision, strategy, declare, tuple(may_differ), tag=check_tag(tag), timeout=self._within(timeout))
        result = await self._run(sync)
        assert isinstance(result, StateInfo)
        return result

    def round(self, *, retry: bool = False, tag: Tag = None, timeout: float | None = ...) -> AsyncRound:  # type: ignore[assignment]
        """Several calls that run at the same time and commit together: ``async with comm.round() as r: r.all_reduce(a); r.all_reduce(b)``.

        Calls begin as the body makes them; buffers hold uncommitted values until the block ends. An exception in the body aborts the
        round on all members. With ``retry=True`` the recorded calls run again on the restored inputs after a loss.
        """
        operation = Round(self._comm, tag=check_tag(tag), timeout=self._within(timeout), retry=check_retry(retry, True))
        return AsyncRound(self, operation)

    async def split(self, color: int | None, key: int = 0, *, timeout: float | None = ...) -> Communicator | None:  # type: ignore[assignment]
        """Make a communicator of all members that give the same color, ranked by key, then by rank. None: be in none of them."""
        return self._sub(await self._run(self._split(color, key, self._within(timeout))))

    async def subgroup(self, ranks: Sequence[int], *, timeout: float | None = ...) -> Communicator | None:  # type: ignore[assignment]
        """Make a communicator of the members of these ranks, in this order. All members call it; those outside get None."""
        return self._sub(await self._run(self._subgroup(ranks, self._within(timeout))))

    async def leave(self) -> None:
        """Leave in the place of the next update, after all calls of this peer have ended. Idempotent."""
        await self._end(leave=True)

    async def close(self) -> None:
        """Go at once; calls in flight fail, and the others find this peer lost, or out of a sub-communicator. Idempotent."""
        await self._end(leave=False)

    async def _end(self, *, leave: bool) -> None:
        if self._closed:
            return
        self._closed = True
        if self._comm:
            self._runtime.post(self._runtime.engine.leave_sub, self._comm, not leave)
        else:
            await self._runtime.close(leave=leave)

    async def __aenter__(self) -> Communicator:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._end(leave=error is None)

    def _sub(self, made: tuple[int, View] | None) -> Communicator | None:
        return Communicator(self._runtime, made[0], made[1], self._timeout) if made else None

    def _do(self, part: Part, how: How) -> Coroutine[Any, Any, Info]:
        if "async_op" in how:
            raise InvalidArgument("async_op: this is the asynchronous face; make a task of the call instead")
        return self._run(self._operation(part, how))

    async def _run(self, op: Operation) -> Any:
        """Make a call and wait for its end."""
        self._check_open()
        op.hand_over()
        future = asyncio.get_running_loop().create_future()
        op.on_settled = self._runtime.deliver(future)
        self._runtime.post(self._runtime.engine.submit, op)
        try:
            result = await asyncio.shield(future)  # cancelling the task must not cancel what the engine settles
        except asyncio.CancelledError:
            with contextlib.suppress(PcclError):  # closed: that ends it, too
                self._runtime.post(self._runtime.engine.cancel, op)
            await _outlast(future)
            self._see(op)
            raise
        self._see(op)
        if isinstance(result, BaseException):
            raise result
        return result


async def _outlast(future: asyncio.Future[Any]) -> None:
    """Wait for the engine to let go of the caller's memory, however often the task is cancelled meanwhile."""
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError:
            pass


class AsyncRound(Collectives["Pending"]):
    """The body of a round: each call returns a `Pending`, which has its result when the block has ended."""

    def __init__(self, comm: Communicator, operation: Round) -> None:
        self._owner = comm
        self._operation = operation
        self._future: asyncio.Future[Any]
        self.info: RoundInfo | None = None
        """What the round did, once it is committed"""

    async def __aenter__(self) -> AsyncRound:
        self._owner._check_open()
        runtime = self._owner._runtime
        self._future = asyncio.get_running_loop().create_future()
        self._operation.on_settled = runtime.deliver(self._future)
        runtime.post(runtime.engine.submit, self._operation)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        runtime = self._owner._runtime
        if error is None:
            runtime.post(self._operation.seal)
        elif isinstance(error, asyncio.CancelledError):
            runtime.post(runtime.engine.cancel, self._operation)
        else:
            runtime.post(runtime.engine.fail, self._operation, f"the body of the round raised {error!r}")
        try:
            result = await asyncio.shield(self._future)
        except asyncio.CancelledError:
            with contextlib.suppress(PcclError):
                runtime.post(runtime.engine.cancel, self._operation)
            await _outlast(self._future)
            self._owner._see(self._operation)
            raise
        self._owner._see(self._operation)
        if isinstance(result, RoundInfo):
            self.info = result
        elif error is None and isinstance(result, BaseException):
            raise result

    def _do(self, part: Part, how: How) -> Pending:
        odd = [name for name in how if name != "algorithm"]
        if odd:
            raise InvalidArgument(f"{', '.join(odd)}: a call in a round takes what the round says; give it to round() instead")
        part.hand_over()
        self._owner._runtime.post(self._operation.add, part)
        return Pending(part)

    def _view(self) -> View:
        return self._owner.view

    def _uid(self) -> int:
        return self._owner._uid()


class Pending:
    """A call in a round."""

    def __init__(self, part: Part) -> None:
        self._part = part

    @property
    def info(self) -> Info:
        """What the call did.

        Raises:
            InvalidArgument: the round has not been committed.
        """
        if self._part.info is None:
            raise InvalidArgument("the round has not been committed (yet): its calls have no results")
        return self._part.info
