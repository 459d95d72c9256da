"""The blocking face: the same calls without `await`, for ordinary loops and from any thread.

``with pccl.sync.connect("host:48148") as comm: comm.all_reduce(x)``. With ``async_op=True`` a call returns a `Work` at once.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Unpack

import numpy as np

from pccl.calls import Collective, Part, Round
from pccl.collectives.lane import SMALL
from pccl.communicator import Pending
from pccl.connection import Settings, prepare
from pccl.core.dtypes import ReduceOp
from pccl.core.errors import InvalidArgument, PcclError
from pccl.core.quantization import Quantization
from pccl.core.types import RoundInfo, StateInfo, Tag, View
from pccl.express import Manner, suits
from pccl.face import Collectives, Handle, How, check_retry, check_tag
from pccl.operations import Operation, Update
from pccl.repeat import Repeat
from pccl.runtime import GLANCE, Runtime, ThreadRuntime, forked_error
from pccl.state import Sync

ATOMIC = frozenset(("atomic",))
KEPT = 256
"""Kinds of small calls"""
LAST_WORD = 0.1
"""Seconds that an interrupted call may take to let go of its buffers."""


def connect(address: str, *, group: str = "default", **settings: Unpack[Settings]) -> Communicator:
    """Join a group; returns once admitted. See `pccl.connect`. The result is a context manager that leaves in the end."""
    prepared = prepare(address, group, settings)
    runtime = ThreadRuntime(prepared.engine)
    runtime.connect_blocking()
    return Communicator(runtime, 0, runtime.engine.membership(0).view, prepared.options.timeout)


class Work:
    """A call under way."""

    def __init__(self, owner: Communicator, op: Operation) -> None:
        self._owner = owner
        self._op = op
        self._result: Any = None
        self._ended = False
        self._over = threading.Lock()
        """Held until the call has ended, and then by one of those who wait after the other"""
        self._over.acquire()
        self._callbacks: list[Callable[[Work], None]] = []
        op.on_settled = self._settle

    def _settle(self, result: Any) -> None:
        self._result = result
        self._ended = True
        self._over.release()
        self._call_back()

    def add_done_callback(self, callback: Callable[[Work], None]) -> None:
        """Call this with the work once the call has ended: in the engine's thread, where it must not wait for anything, or, if the call has
        ended already, now.
        """
        self._callbacks.append(callback)
        if self._ended:
            self._call_back()

    def _call_back(self) -> None:
        while self._callbacks:
            try:
                callback = self._callbacks.pop(0)
            except IndexError:  # another thread has come first
                return
            callback(self)

    def done(self) -> bool:
        """Whether the call has ended."""
        return self._ended

    def wait(self, timeout: float | None = None) -> Any:
        """Wait for the call's end; returns its record, or raises its error.

        Args:
            timeout: seconds; after them TimeoutError is raised, and the call goes on.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._ended:
            runtime = self._owner._runtime
            if isinstance(runtime, ThreadRuntime) and runtime.forked:
                raise forked_error()
            left = GLANCE if deadline is None else min(GLANCE, deadline - time.monotonic())
            if left <= 0:
                raise TimeoutError(f"{self._op.description} is still under way after {timeout:g} s")
            try:
                if self._over.acquire(timeout=left):
                    self._over.release()
            except BaseException:  # Ctrl-C
                self._abandon()
                raise
        self._owner._see(self._op)
        if isinstance(self._result, BaseException):
            raise self._result
        return self._result

    def _abandon(self) -> None:
        """Its caller was interrupted: end it for all, and give it a moment to let go of its buffers."""
        runtime = self._owner._runtime
        with contextlib.suppress(PcclError):  # closed: that ends it, too
            runtime.post(runtime.engine.cancel, self._op)
        self.outlast()

    def outlast(self) -> None:
        """Wait a moment for a call that is cancelled to let go of its buffers."""
        if not self._ended and self._over.acquire(timeout=LAST_WORD):
            self._over.release()

    def result(self) -> Any:
        """The call's record, or its error, without waiting.

        Raises:
            InvalidArgument: the call has not ended.
        """
        if not self.done():
            raise InvalidArgument(f"{self._op.description} has not ended")
        return self.wait()


class Communicator(Handle[Any]):
    """A member's hold on its group, or on a part of it (`split`). See `pccl.communicator.Communicator`; this one's calls block.

    Calls may come from several threads; they take an order as they come.
    """

    def __init__(self, runtime: Runtime, comm: int, view: View, timeout: float | None) -> None:
        super().__init__(runtime, comm, view, timeout)
        self._repeats: dict[tuple[int, bool, bool], Repeat | None] = {}
        """(signature, atomic, retry) of calls that were made before -> what is known of them, from the second time on"""
        self._kinds: dict[tuple[Any, ...], Repeat] = {}
        """(dtype, shape, operator, atomic) -> the same, of all-reduces of arrays in place"""

    def all_reduce(
        self,
        x: Any,
        op: str | ReduceOp = "sum",
        *,
        out: Any = None,
        accumulate: str | None = None,
        quantize: str | Quantization | None = None,
        **how: Unpack[How],
    ) -> Any:
        """See `pccl.face.Collectives.all_reduce`."""
        special = out is not None or accumulate is not None or quantize is not None or not ATOMIC.issuperset(how)
        if special or type(x) is not np.ndarray or type(op) is not str:
            return self._do(self._all_reduce(x, op, how, out=out, accumulate=accumulate, quantize=quantize), how)
        kind = (x.dtype, x.shape, op, how.get("atomic", True))
        repeat, flags = self._kinds.get(kind), x.flags
        if repeat and flags.c_contiguous and flags.writeable:
            flat = x if x.ndim == 1 else x.reshape(-1)
            info = repeat(flat, flat, x)
            if info:
                return info
        part = self._all_reduce(x, op, how)
        info = self._do(part, how)
        repeat = self._repeats.get((part.signature, kind[3], False))
        if repeat:
            self._kinds[kind] = repeat
        return info

    def _expect(self, kind: tuple[int, bool, bool], part: Part, how: How) -> None:
        """Such a call has been made: another one may come, and then many more."""
        if len(self._repeats) > KEPT:
            self._forget_repeats()
        if kind not in self._repeats:
            self._repeats[kind] = None
            return
        assert isinstance(self._runtime, ThreadRuntime)
        engine, reduction = self._runtime.engine, part.reduction

        def made(given: Any, part: Part | None) -> Part:
            return part or self._all_reduce(given, reduction, how)

        def go_on(given: Any, part: Part | None, index: int) -> Any:
            return self._express(made(given, part), how, index)

        def give_up(given: Any, part: Part | None, index: int) -> Work:
            op = self._operation(made(given, part), how)
            work = Work(self, op)
            engine.abandon(self._comm, op, index)
            return work

        if self._runtime.take_turn():  # else the next time
            try:
                self._repeats[kind] = engine.repeat(self._runtime, self._comm, part, Manner(*kind[1:]), go_on, give_up)
            finally:
                self._runtime.give_back()

    def _forget_repeats(self) -> None:
        self._repeats.clear()
        self._kinds.clear()

    def update(self, *, timeout: float | None = ...) -> View:  # type: ignore[assignment]
        """Let in whoever waits, and hear who has gone. Every member has to call it."""
        before = self._begin_update()
        self._run(Update(self._comm, timeout=self._within(timeout)))
        return self._seen if self._seen.epoch != before.epoch else self._unchanged()

    def sync_state(
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
        result = self._run(sync)
        assert isinstance(result, StateInfo)
        return result

    def round(self, *, retry: bool = False, tag: Tag = None, timeout: float | None = ...) -> SyncRound:  # type: ignore[assignment]
        """Several calls that run at the same time and commit together: ``with comm.round() as r: r.all_reduce(a); r.all_reduce(b)``."""
        operation = Round(self._comm, tag=check_tag(tag), timeout=self._within(timeout), retry=check_retry(retry, True))
        return SyncRound(self, operation)

    def split(self, color: int | None, key: int = 0, *, timeout: float | None = ...) -> Communicator | None:  # type: ignore[assignment]
        """Make a communicator of all members that give the same color, ranked by key, then by rank. None: be in none of them."""
        return self._sub(self._run(self._split(color, key, self._within(timeout))))

    def subgroup(self, ranks: Sequence[int], *, timeout: float | None = ...) -> Communicator | None:  # type: ignore[assignment]
        """Make a communicator of the members of these ranks, in this order. All members call it; those outside get None."""
        return self._sub(self._run(self._subgroup(ranks, self._within(timeout))))

    def leave(self) -> None:
        """Leave in the place of the next update, after all calls of this peer have ended. Idempotent."""
        self._end(leave=True)

    def close(self) -> None:
        """Go at once; calls in flight fail, and the others find this peer lost, or out of a sub-communicator. Idempotent."""
        self._end(leave=False)

    def _end(self, *, leave: bool) -> None:
        if self._closed:
            return
        self._closed = True
        self._forget_repeats()
        if self._comm:
            self._runtime.post(self._runtime.engine.leave_sub, self._comm, not leave)
        else:
            assert isinstance(self._runtime, ThreadRuntime)
            self._runtime.close_blocking(leave=leave)

    def _see(self, op: Operation) -> None:
        before = self._seen.epoch
        super()._see(op)
        if self._seen.epoch != before:
            self._forget_repeats()

    def __enter__(self) -> Communicator:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end(leave=error is None)

    def _sub(self, made: tuple[int, View] | None) -> Communicator | None:
        return Communicator(self._runtime, made[0], made[1], self._timeout) if made else None

    def _do(self, part: Part, how: How) -> Any:
        near = self._runtime.engine.lanes.get(self._comm) is not None
        if not suits(part, how, near=near):
            op = self._operation(part, how)
            return self._start(op) if how.get("async_op") else self._run(op)
        if not near or part.nbytes > SMALL or not part.is_plain or "timeout" in how:
            return self._express(part, how)
        kind = (part.signature, bool(how.get("atomic", True)), bool(how.get("retry", False)))
        repeat = self._repeats.get(kind)
        flat = part.flat(repeat.route) if repeat else None
        info = repeat(*flat, part) if repeat and flat else None
        if info:
            return info
        info = self._express(part, how)
        if not repeat:
            self._expect(kind, part, how)
        return info

    def _express(self, part: Part, how: How, index: int = -1) -> Any:
        """Make a call that may need no record; with an index, one that has that place already."""
        self._check_open()
        assert isinstance(self._runtime, ThreadRuntime)
        manner = Manner(bool(how.get("atomic", True)), bool(how.get("retry", False)))
        if manner.retry or "timeout" in how:
            self._operation(part, how)  # which complains of what is not allowed
        works: list[Work] = []

        def make() -> Collective:
            op = self._operation(part, how)
            works.append(Work(self, op))
            return op

        try:
            express = self._runtime.express if index < 0 else partial(self._runtime.go_on, index)
            info = express(self._comm, part, manner, self._seen.epoch, make)
        except BaseException:  # Ctrl-C, perhaps after the call has begun
            for work in works:
                work._abandon()
            raise
        return works[0].wait() if works else info

    def _start(self, op: Operation) -> Work:
        self._check_open()
        op.hand_over()
        work = Work(self, op)
        self._submit(work, self._runtime.post, self._runtime.engine.submit, op)
        return work

    def _run(self, op: Operation) -> Any:
        self._check_open()
        assert isinstance(self._runtime, ThreadRuntime)
        op.hand_over()
        work = Work(self, op)
        self._submit(work, self._runtime.submit, op)
        return work.wait()

    def _submit(self, work: Work, how: Callable[..., None], *args: Any) -> None:
        try:
            how(*args)
        except BaseException:  # Ctrl-C, perhaps after the call has begun
            work._abandon()
            raise


class SyncRound(Collectives[Pending]):
    """The body of a round: each call returns a `Pending`, which has its result when the block has ended."""

    def __init__(self, comm: Communicator, operation: Round) -> None:
        self._owner = comm
        self._operation = operation
        self.info: RoundInfo | None = None
        """What the round did, once it is committed"""

    def __enter__(self) -> SyncRound:
        self._work = self._owner._start(self._operation)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        runtime = self._owner._runtime
        if error is None:
            runtime.post(self._operation.seal)
        else:
            runtime.post(runtime.engine.fail, self._operation, f"the body of the round raised {error!r}")
        try:
            self.info = self._work.wait()
        except Exception:
            if error is None:
                raise

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
