"""Where an engine lives: on an event loop of its own in a thread of its own, or on the caller's loop.

Callers hand work to the engine with `post`, which may be called from any thread and keeps its order.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar

from pccl.calls import Collective, Part
from pccl.core.errors import InvalidArgument, PcclError
from pccl.core.types import Epoch, Info
from pccl.engine import Engine
from pccl.express import Manner
from pccl.operations import Operation
from pccl.signals import SignalsHeld
from pccl.transports import fork

T = TypeVar("T")

logger = logging.getLogger("pccl")

PATIENCE = 0.005
"""Seconds without any news after which a borrower leaves the rest to the engine's thread."""
KEEP = 0.005
STRETCH = 0.05
GLANCE = 0.1
"""Longest wait at a time: a signal that comes just before a thread goes to sleep does not wake it, and its handler waits, too."""


class Runtime(Protocol):
    """A place where an engine runs."""

    engine: Engine

    def post(self, callback: Callable[..., None], *args: Any) -> None:
        """Have the engine's loop call this, in the order of the posts; errors of a closed or forked engine are raised here."""

    def deliver(self, future: asyncio.Future[Any]) -> Callable[[Any], None]:
        """A callback for the engine's loop that settles a future of the present loop."""

    async def connect(self) -> None:
        """Start the engine and wait until it is admitted."""

    async def close(self, *, leave: bool) -> None:
        """Leave the group, or just go, and end the engine."""


class InlineRuntime:
    """The engine runs on the caller's loop. For the simulator, and for programs that are asynchronous through and through."""

    def __init__(self, make: Callable[[], Engine]) -> None:
        self.engine = make()
        self._closed = False

    def post(self, callback: Callable[..., None], *args: Any) -> None:
        """Call it soon."""
        if self._closed:
            raise closed_error()
        asyncio.get_running_loop().call_soon(callback, *args)

    def deliver(self, future: asyncio.Future[Any]) -> Callable[[Any], None]:
        """Settle the future at once."""

        def settle(result: Any) -> None:
            if not future.done():
                future.set_result(result)

        return settle

    async def connect(self) -> None:
        """Start the engine."""
        await self.engine.connect()

    async def close(self, *, leave: bool) -> None:
        """End the engine."""
        if not self._closed:
            self._closed = True
            await (self.engine.leave() if leave else self.engine.close())


class ThreadRuntime:
    """The engine has a thread and an event loop (uvloop's if it is installed) of its own.

    A caller that waits for a small call can have the engine to itself meanwhile: the thread stops the loop and lends it out, so that the
    call does not go through another thread and back. It takes the loop back when nobody has come for it for KEEP seconds, and after STRETCH
    seconds in any case, for heartbeats, timers, and whatever else only the loop does. `_turn` is held by whoever acts for the engine.

    Args:
        make: makes the engine, in its thread with its loop running.
    """

    engine: Engine

    def __init__(self, make: Callable[[], Engine]) -> None:
        self._make = make
        self._loop = new_loop()
        self._forked = False
        self._closed = False
        self._ending = False
        self._turn = threading.RLock()
        self._due = False
        """It is the loop's turn, whoever else comes"""
        self._borrower = 0
        """Its thread"""
        self._borrowed = 0
        """How often"""
        self._recall = threading.Lock()
        """Released: the thread is to run the loop. An Event would stay locked for ever if Ctrl-C came at a bad moment."""
        self._recall.acquire()
        self._inbox: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._thread = threading.Thread(target=self._live, name="pccl-engine", daemon=True)
        self._thread.start()
        fork.on_fork(self._fork)
        _runtimes.add(self)

    def post(self, callback: Callable[..., None], *args: Any) -> None:
        """Hand something to the engine."""
        self._check_turn()
        if self._forked:
            raise forked_error()
        if self._closed:
            raise closed_error()
        self._inbox.append((callback, args))
        try:
            self._loop.call_soon_threadsafe(self._take)
        except RuntimeError:  # it was closed just now
            raise closed_error() from None
        self._wake()

    @property
    def forked(self) -> bool:
        """Whether this is a child of the process that the engine is in: nothing will ever end here."""
        return self._forked

    def _wake(self) -> None:
        """Have the thread run the loop if nobody else has the engine."""
        with contextlib.suppress(RuntimeError):  # as it is about to, already
            self._recall.release()

    def submit(self, op: Operation) -> None:
        """Make a call whose caller is going to wait for it: a small one may have ended when this returns."""
        if not op.small or self._forked or self._closed:
            self.post(self.engine.submit, op)
            return
        with SignalsHeld():
            if not self._borrow():
                self.post(self.engine.submit, op)
                return
            self._use(self.engine.call, op, PATIENCE, STRETCH)

    def express(self, comm: int, part: Part, how: Manner, seen: Epoch, make: Callable[[], Collective]) -> Info | None:
        """Make a call whose caller is going to wait for it. None if `make` was called: the operation tells how it ends.

        Args:
            seen: the epoch that the caller knows.
            make: makes an operation of the call.
        """
        with SignalsHeld():
            if self._forked or self._closed or not self._borrow():
                self.post(self.engine.submit, make())
                return None
            return self._use(self.engine.express, comm, part, how, seen, make, PATIENCE, STRETCH)

    def _borrow(self) -> bool:
        """Have the engine to oneself; False if another caller has it, or nobody is to."""
        self._check_turn()
        self._borrowed += 1
        while self._due or self._borrower or not self._turn.acquire(blocking=False):
            if self._due or self._borrower or self._closed:
                return False
            try:
                self._loop.call_soon_threadsafe(self._loop.stop)
            except RuntimeError:  # it was closed just now
                return False
            if self._turn.acquire(timeout=STRETCH):
                break
        self._borrower = threading.get_ident()
        return True

    def _use(self, function: Callable[..., T], *args: Any) -> T:
        """Call it with the engine borrowed, and give that back; the engine's thread goes on with what is under way."""
        try:
            self._take()
            return function(*args)
        finally:
            self.give_back()

    def take_turn(self) -> bool:
        """Have the engine to oneself if nobody else has it or wants it; to be given back by `give_back`."""
        if self._forked or self._closed or self._due or self._borrower or self._inbox or not self._turn.acquire(False):
            return False
        self._borrowed += 1
        self._borrower = threading.get_ident()
        return True

    def _check_turn(self) -> None:
        if self.has_turn and self._borrower:
            raise InvalidArgument(
                "the communicator is in the midst of a call of this very thread: a signal handler must not use it; "
                "have it set a flag, or raise, and act when the call has returned"
            )

    @property
    def has_turn(self) -> bool:
        """Whether this thread has the engine to itself."""
        return self._turn._is_owned()  # type: ignore[attr-defined,no-any-return]

    def give_back(self) -> None:
        """The engine's thread goes on with what is under way."""
        self._borrower = 0
        busy = self.engine.returned()
        self._turn.release()
        if busy:
            self._wake()

    def go_on(self, index: int, comm: int, part: Part, how: Manner, seen: Epoch, make: Callable[[], Collective]) -> Info | None:
        """`express`, for a call that this caller has made in the place of this index. It gives the engine back."""
        with SignalsHeld():
            try:
                return self.engine.express(comm, part, how, seen, make, PATIENCE, STRETCH, index)
            finally:
                self.give_back()

    def _take(self) -> None:
        """Do what was posted."""
        while self._inbox:
            callback, args = self._inbox.popleft()
            try:
                callback(*args)
            except Exception as e:
                self._loop.call_exception_handler({"message": "what was posted to the engine failed", "exception": e})

    def deliver(self, future: asyncio.Future[Any]) -> Callable[[Any], None]:
        """Settle the future on its own loop."""
        loop = future.get_loop()

        def settle(result: Any) -> None:
            try:
                loop.call_soon_threadsafe(_settle, future, result)
            except RuntimeError:
                logger.debug("a call ended after its event loop")

        return settle

    def run(self, make: Callable[[], Coroutine[Any, Any, T]]) -> concurrent.futures.Future[T]:
        """Run a coroutine on the engine's loop."""
        self._check_turn()
        if self._forked:
            raise forked_error()
        future = asyncio.run_coroutine_threadsafe(make(), self._loop)
        self._wake()
        return future

    async def _start(self) -> None:
        self.engine = self._make()
        await self.engine.connect()

    async def connect(self) -> None:
        """Start the engine; if this is cancelled, or fails, the thread ends."""
        try:
            await asyncio.wrap_future(self.run(self._start))
        except BaseException:
            await asyncio.to_thread(self._end)
            raise

    def connect_blocking(self) -> None:
        """Likewise, for callers without a loop."""
        future = self.run(self._start)
        try:
            _outcome(future)
        except BaseException:
            future.cancel()
            self._end()
            raise

    async def close(self, *, leave: bool) -> None:
        """End the engine and its thread."""
        await asyncio.to_thread(self.close_blocking, leave=leave)

    def close_blocking(self, *, leave: bool) -> None:
        """Likewise, for callers without a loop."""
        if self._closed or self._forked:
            return
        self._closed = True
        try:
            _outcome(self.run(self.engine.leave if leave else self.engine.close))
        finally:
            self._end()

    def _end(self) -> None:
        """Stop the loop; the thread closes it."""
        self._closed = True
        _runtimes.discard(self)
        if self._thread.is_alive():
            self._ending = True
            with contextlib.suppress(RuntimeError):  # another thread has come first
                self._loop.call_soon_threadsafe(self._loop.stop)
            self._wake()
            self._thread.join()

    def _fork(self) -> None:
        """This is a child that a user's code has forked: the engine stayed with its parent."""
        self._forked = True
        SignalsHeld.forked()
        _runtimes.discard(self)

    def _live(self) -> None:
        """The engine's thread: run the loop, or leave it to callers that come for it again and again."""
        loop = self._loop
        asyncio.set_event_loop(loop)
        try:
            while not self._ending:
                self._due = True
                with self._turn:
                    self._due = False
                    loop.run_forever()
                self._rest()
            with self._turn:
                end = loop.create_task(self._bury())
                end.add_done_callback(lambda end: loop.stop())
                while not end.done():  # a caller that wanted to borrow may have stopped it
                    loop.run_forever()
                end.result()
        finally:
            asyncio.set_event_loop(None)
            loop.close()
            self._take()  # posted by threads that had not seen that it closes

    async def _bury(self) -> None:
        """Leave nothing behind, however the engine was left."""
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if hasattr(self, "engine"):
            await self.engine.close()
        await self._loop.shutdown_asyncgens()
        await self._loop.shutdown_default_executor()

    def _rest(self) -> None:
        until = time.perf_counter() + STRETCH
        self._recall.acquire(blocking=False)
        while not (self._ending or self._inbox) and time.perf_counter() < until:
            borrowed = self._borrowed
            if self._recall.acquire(timeout=KEEP) or (self._borrowed == borrowed and not self._borrower):
                return


def _outcome(future: concurrent.futures.Future[T]) -> T:
    """Wait for it."""
    while not future.done():
        concurrent.futures.wait([future], GLANCE)
    return future.result()


def _settle(future: asyncio.Future[Any], result: Any) -> None:
    if not future.done():
        future.set_result(result)


def new_loop() -> asyncio.AbstractEventLoop:
    """An event loop for an engine."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def closed_error() -> PcclError:
    """What calls on a closed communicator get."""
    return InvalidArgument("the communicator is closed; connect again")


def forked_error() -> PcclError:
    """What calls in a forked child get."""
    return InvalidArgument(
        "this process was forked from the one that connected, and has no part in the communicator; "
        "connect here, or start workers with the 'spawn' or 'forkserver' method"
    )


_runtimes: weakref.WeakSet[ThreadRuntime] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Interpreters end without mercy for daemon threads: go before."""
    for runtime in list(_runtimes):
        try:
            runtime.close_blocking(leave=False)
        except (PcclError, RuntimeError) as e:
            logger.debug("closing at exit: %s", e)
