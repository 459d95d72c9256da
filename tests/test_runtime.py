"""The blocking face under threads and signals: callers that borrow the engine, are interrupted, or come when it closes."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

import pccl
from pccl import signals as module
from pccl import sync
from pccl.signals import SIGNALS, SignalsHeld
from tests.checks.support import QUICK, group, in_threads, master_thread, until, wait_until


class Interrupted(Exception):
    """What a signal's handler raises here."""


@contextmanager
def handlers(**given: Callable[[], None]) -> Iterator[None]:
    """With these handlers: ``handlers(SIGUSR1=function)``."""
    before = {getattr(signal, name): signal.getsignal(getattr(signal, name)) for name in given}
    for name, handler in given.items():
        signal.signal(getattr(signal, name), lambda number, frame, handler=handler: handler())
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def interrupt() -> None:
    raise Interrupted


@contextmanager
def pair(other: Callable[[sync.Communicator], None], **settings: Any) -> Iterator[sync.Communicator]:
    """A blocking peer in the main thread, and another one in a thread, which does something else."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            with sync.connect(address, name="other", **(QUICK | settings)) as comm:
                while comm.world_size < 2:
                    comm.update()
                other(comm)
        except BaseException as e:
            failed.append(e)

    with master_thread() as address:
        thread = threading.Thread(target=run)
        thread.start()
        try:
            with sync.connect(address, name="main", **(QUICK | settings)) as comm:
                while comm.world_size < 2:
                    comm.update()
                yield comm
        finally:
            thread.join(60)
    assert not thread.is_alive()
    if failed:
        raise failed[0]


# --- borrowing ----------------------------------------------------------------------------------------------------------


def test_who_borrows_the_engine_gives_it_back_although_something_always_comes() -> None:
    """Traffic of other calls, say, without an end: the call's own deadline is the loop's to watch."""
    over = threading.Event()

    def body(comm: sync.Communicator) -> None:
        if comm.rank:
            over.wait(30)
            comm.barrier()
            return
        engine = comm._runtime.engine
        ready = os.eventfd(1)

        def feed() -> None:
            engine.poller._look()
            engine.poller._receivers[ready] = lambda: None
            engine.poller._poll.register(ready, select.POLLIN)

        comm._runtime.post(feed)
        wait_until(lambda: ready in engine.poller._receivers)
        try:
            with pytest.raises(pccl.CollectiveTimeout):
                comm.all_reduce(np.ones(4), tag="nobody else", timeout=0.2)
        finally:
            over.set()
            comm._runtime.post(engine.poller._receivers.clear)
            comm.barrier()
            os.close(ready)

    in_threads(2, body)


def test_timers_of_the_engine_go_off_while_its_callers_do_not_stop_calling() -> None:
    def body(comm: sync.Communicator) -> int:
        runtime: Any = comm._runtime
        left = [20]

        def tick() -> None:
            left[0] -= 1
            if left[0] > 0:
                runtime._loop.call_later(0.001, tick)

        runtime.post(tick)
        calls = 0
        while left[0] > 0:
            comm.all_reduce(np.ones(1), atomic=False)
            calls += 1
        return calls

    (calls,) = in_threads(1, body)
    assert calls > 20


def test_many_threads_with_calls_of_all_sizes_at_once() -> None:
    """Small ones borrow, large ones and works are posted, some are interrupted by their deadline; all sums are right."""
    sizes = (1, 100, 300_000)

    def body(comm: sync.Communicator) -> None:
        errors: list[BaseException] = []

        def caller(k: int) -> None:
            try:
                for i in range(12):
                    x = np.full(sizes[(k + i) % 3], comm.rank + 1.0, np.float32)
                    if i % 4 == 3:
                        work = comm.all_reduce(x, tag=k, async_op=True)
                        assert work.wait().world_size == 2
                        assert work.done()
                    else:
                        comm.all_reduce(x, tag=k, atomic=i % 2 == 0)
                    assert (x == 3).all()
                with pytest.raises(pccl.CollectiveTimeout):
                    comm.all_reduce(np.ones(1), tag=f"only rank {comm.rank}, thread {k}", timeout=0.05)
            except BaseException as e:
                errors.append(e)

        threads = [threading.Thread(target=caller, args=(k,)) for k in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        engine = comm._runtime.engine
        comm.barrier()
        assert not engine._running
        assert not engine.busy

    in_threads(2, body)


# --- signals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [4, 100_000])
def test_an_exception_of_a_signal_handler_ends_the_call_for_all(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it comes: here when the call has just begun, in the caller's thread or, if it is large, in the engine's."""
    go = threading.Event()

    def other(comm: sync.Communicator) -> None:
        go.wait(30)
        y = np.ones(count)
        with pytest.raises(pccl.CollectiveAborted, match="main cancelled it"):
            comm.all_reduce(y)
        assert (y == 1).all()
        comm.all_reduce(y)
        assert (y == 3).all()

    with pair(other) as comm:
        engine = comm._runtime.engine
        submit, main = engine.submit, threading.get_ident()

        def submit_and_strike(op: Any) -> None:
            submit(op)
            signal.pthread_kill(main, signal.SIGUSR1)

        monkeypatch.setattr(engine, "submit", submit_and_strike)
        x = np.full(count, 2.0)
        with handlers(SIGUSR1=interrupt):
            try:
                with pytest.raises(Interrupted):
                    comm.all_reduce(x)
                assert (x == 2).all()
                assert not engine.busy
            finally:
                monkeypatch.undo()
                go.set()
        comm.all_reduce(x)
        assert (x == 3).all()


def test_a_work_that_its_caller_never_got_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()

    def other(comm: sync.Communicator) -> None:
        go.wait(30)
        with pytest.raises(pccl.CollectiveAborted, match="main cancelled it"):
            comm.all_reduce(np.ones(4))

    with pair(other) as comm:
        post = comm._runtime.post

        def post_and_strike(callback: Callable[..., None], *args: Any) -> None:
            monkeypatch.undo()
            post(callback, *args)
            signal.raise_signal(signal.SIGUSR1)

        monkeypatch.setattr(comm._runtime, "post", post_and_strike)
        try:
            with handlers(SIGUSR1=interrupt), pytest.raises(Interrupted):
                comm.all_reduce(np.ones(4), async_op=True)
            assert not comm._runtime.engine.busy
        finally:
            go.set()


def test_a_call_that_was_interrupted_before_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    """It never begins; the others' goes on with the next one."""

    def other(comm: sync.Communicator) -> None:
        y = np.ones(4)
        comm.all_reduce(y)
        assert (y == 3).all()

    with pair(other) as comm:

        def strike(*args: Any) -> None:
            monkeypatch.undo()
            signal.raise_signal(signal.SIGUSR1)

        monkeypatch.setattr(comm._runtime, "post", strike)
        x = np.full(4, 2.0)
        with handlers(SIGUSR1=interrupt), pytest.raises(Interrupted):
            comm.all_reduce(x, async_op=True)
        comm.all_reduce(x)
        assert (x == 3).all()


@pytest.mark.parametrize("number", SIGNALS)
def test_handlers_wait_while_the_engine_is_borrowed(number: int) -> None:
    """Also torch's for SIGCHLD, which raises when a DataLoader's worker has died."""
    before = signal.getsignal(number)
    signal.signal(number, lambda number, frame: interrupt())
    after = []

    def borrow() -> None:
        with SignalsHeld():
            signal.raise_signal(number)
            after.append("the block goes on")

    try:
        with pytest.raises(Interrupted):
            borrow()
        assert after
        with pytest.raises(Interrupted):
            signal.raise_signal(number)
    finally:
        signal.signal(number, before)


def test_all_handlers_are_back_whatever_one_of_them_raises() -> None:
    seen: list[str] = []

    def terminate() -> None:
        seen.append("terminate")
        raise Interrupted("terminate")

    def borrow() -> None:
        with SignalsHeld():
            for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR2, signal.SIGUSR1):
                signal.raise_signal(number)

    with handlers(SIGUSR1=interrupt, SIGTERM=terminate, SIGUSR2=lambda: seen.append("usr2")):
        before = [signal.getsignal(number) for number in SIGNALS]
        with pytest.raises(Interrupted):
            borrow()
        assert seen == ["terminate", "usr2"]
        assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize("strike_at", range(8))
def test_all_handlers_are_back_whenever_one_of_them_raises(strike_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal at each of the moments at which handlers are replaced and put back."""

    class Struck:
        """`signal`, with a signal before or after each of its `signal` calls."""

        calls = 0

        def __getattr__(self, name: str) -> Any:
            return getattr(signal, name)

        def signal(self, number: int, handler: Any) -> None:
            first, self.calls = self.calls, self.calls + 2
            if first == strike_at:
                signal.raise_signal(signal.SIGTERM)
            signal.signal(number, handler)
            if first + 1 == strike_at:
                signal.raise_signal(signal.SIGTERM)

    with handlers(SIGINT=interrupt, SIGTERM=interrupt):
        before = [signal.getsignal(number) for number in SIGNALS]
        monkeypatch.setattr(module, "SIGNALS", (signal.SIGINT, signal.SIGTERM))
        monkeypatch.setattr(module, "signals", Struck())
        with pytest.raises(Interrupted), SignalsHeld():
            pass
        assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_child_that_is_forked_meanwhile_has_its_handlers() -> None:
    """Another thread forks while the main thread has the engine."""
    found: list[int] = []

    def fork() -> None:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                signal.raise_signal(signal.SIGUSR1)
            except Interrupted:
                code = 42
            finally:
                os._exit(code)
        found.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    with pair(lambda comm: None), handlers(SIGUSR1=interrupt), SignalsHeld():
        thread = threading.Thread(target=fork)
        thread.start()
        thread.join()
    assert found == [42]


def test_a_work_of_the_parent_does_not_end_in_a_child() -> None:
    go = threading.Event()

    def other(comm: sync.Communicator) -> None:
        go.wait(30)
        comm.barrier()

    with pair(other) as comm:
        work = comm.barrier(async_op=True)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                work.wait(20)
            except pccl.InvalidArgument:
                code = 42
            finally:
                os._exit(code)
        try:
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42
        finally:
            go.set()
        assert work.wait().world_size == 2


# --- the end ------------------------------------------------------------------------------------------------------------


class Late(deque[Any]):
    """An inbox whose sender is held up until the runtime has closed."""

    def __init__(self, runtime: Any) -> None:
        super().__init__()
        self._runtime: Any = runtime

    def append(self, item: Any) -> None:
        runtime, self._runtime = self._runtime, None
        if runtime:
            closing = threading.Thread(target=runtime.close_blocking, kwargs={"leave": False})
            closing.start()
            closing.join()
        super().append(item)


@pytest.mark.parametrize("count", [4, 100_000])
def test_a_call_that_meets_the_close_of_another_thread_ends(count: int) -> None:
    with pair(lambda comm: None) as comm:
        runtime: Any = comm._runtime
        runtime._inbox = Late(runtime)
        with pytest.raises(pccl.PcclError):
            comm.all_reduce(np.ones(count), async_op=True).wait(20)
        with pytest.raises(pccl.PcclError):
            comm.all_reduce(np.ones(count))


def test_an_interrupted_leave_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither descriptors nor threads (what is left behind fails the test), nor a member that others would wait for."""
    main = threading.get_ident()

    async def leave() -> None:
        signal.pthread_kill(main, signal.SIGUSR1)
        await asyncio.Event().wait()

    def other(comm: sync.Communicator) -> None:
        with pytest.raises(pccl.CollectiveAborted):
            comm.all_reduce(np.ones(4))

    with pair(other) as comm, handlers(SIGUSR1=interrupt):
        runtime: Any = comm._runtime
        monkeypatch.setattr(runtime.engine, "leave", leave)
        with pytest.raises(Interrupted):
            comm.leave()
        assert not runtime._thread.is_alive()


async def test_a_call_that_is_cancelled_while_its_communicator_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    async with group(2) as comms:
        runtime: Any = comms[0]._runtime
        close = runtime.engine.close

        async def close_later() -> None:
            await asyncio.to_thread(go.wait, 20)
            await close()

        monkeypatch.setattr(runtime.engine, "close", close_later)
        call = asyncio.create_task(comms[0].all_reduce(np.ones(4)))
        await until(lambda: runtime.engine.busy)
        closing = asyncio.create_task(comms[0].close())
        await until(lambda: runtime._closed)
        call.cancel()
        asyncio.get_running_loop().call_soon(go.set)
        with pytest.raises(asyncio.CancelledError):
            await call
        await closing


def test_a_work_that_several_threads_ask_has_ended_for_all_of_them() -> None:
    with pair(lambda comm: comm.barrier() and None) as comm:
        work = comm.barrier(async_op=True)
        work.wait()
        with work._over:  # as one that has waited holds it for a moment
            assert work.done()
            assert work.result() is work.wait(5)
