"""Small plain all-reduces of blocking callers: nobody has a record of them, unless something happens."""

from __future__ import annotations

import contextlib
import signal
import threading
from typing import Any

import numpy as np
import pytest

import pccl
from pccl import sync
from pccl.calls import Part
from pccl.core.types import CallId
from pccl.express import Express
from pccl.sync import Work
from tests.checks.support import in_threads
from tests.test_runtime import Interrupted, handlers, interrupt, pair


@pytest.fixture
def works(monkeypatch: pytest.MonkeyPatch) -> list[Work]:
    """The operations that somebody waited for."""
    made: list[Work] = []
    init = Work.__init__

    def noting(self: Work, *args: Any) -> None:
        init(self, *args)
        made.append(self)

    monkeypatch.setattr(Work, "__init__", noting)
    return made


def reduce(comm: sync.Communicator, value: float = 1.0, **how: Any) -> float:
    x = np.full(3, value, np.float32)
    comm.all_reduce(x, atomic=False, **how)
    return float(x[0])


@pytest.mark.parametrize("world", [1, 2, 3])
def test_calls_that_nothing_happens_to(world: int) -> None:
    """In place and not, between calls that have records."""

    def body(comm: sync.Communicator) -> tuple[int, int]:
        x, y = np.full(1000, comm.rank, np.float64), np.zeros(1000)
        comm.barrier(atomic=False)  # what follows meets others that are about to call, too
        for k in range(50):
            info = comm.all_reduce(x, out=y, atomic=False)
            assert (y == sum(range(world))).all()
            assert info.call == "all_reduce(float64[1000], sum)"
            assert [m.name for m in info.members] == [m.name for m in comm.view.members]
            assert info.attempts == 1
            assert info.out is y
            if k % 10 == 0:
                comm.all_reduce(y)
        membership = comm._runtime.engine.membership(0)
        return membership.next_index, membership.in_flight

    found = in_threads(world, body)
    assert len(set(found)) == 1
    assert found[0][1] == 0


def test_a_call_that_waits_for_a_late_one_becomes_an_operation(works: list[Work]) -> None:
    late = threading.Event()

    def other(comm: sync.Communicator) -> None:
        assert late.wait(30)
        assert reduce(comm, 2.0) == 3
        assert reduce(comm, 2.0) == 3

    with pair(other) as comm:
        works.clear()
        threading.Timer(0.05, late.set).start()  # longer than a borrower's patience
        assert reduce(comm) == 3
        assert [work._op.description for work in works if work._owner is comm] == ["all_reduce(float32[3], sum)"]
        assert reduce(comm) == 3


@pytest.mark.parametrize("moment", range(3))
def test_a_message_of_the_master_in_the_middle(moment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it is, there is a record before it is read; the call goes on."""
    run = Express.run
    records: list[int] = []

    def interrupted(self: Express, *limits: float) -> Any:
        engine = self._engine

        def strike() -> None:
            self.become_operation()  # as control_received does
            records.append(engine.membership(0).in_flight)

        if moment < 2:
            owner, name = (engine.executor, "start") if moment == 0 else (engine.poller, "serve")
            original = getattr(owner, name)

            def struck(*args: Any) -> Any:
                setattr(owner, name, original)
                strike()
                return original(*args)

            setattr(owner, name, struck)
        else:
            done = self.transfer_done

            def too_late() -> None:
                done()
                self.become_operation()
                records.append(engine.membership(0).in_flight)

            self.transfer_done = too_late  # type: ignore[method-assign]
        return run(self, *limits)

    monkeypatch.setattr(Express, "run", interrupted)

    def body(comm: sync.Communicator) -> None:
        for _ in range(20):
            assert reduce(comm, comm.rank + 1.0) == 3
        assert not comm._runtime.engine._running
        assert not comm._runtime.engine.busy

    in_threads(2, body)
    assert set(records) in {0: ({1},), 1: ({1}, {0, 1}), 2: ({0},)}[moment]  # what the other had sent may have been there at once


def test_members_whose_calls_do_not_match(works: list[Work]) -> None:
    def body(comm: sync.Communicator) -> None:
        x = np.ones(3 + comm.rank, np.float32)
        with pytest.raises(pccl.CollectiveMismatch) as caught:
            comm.all_reduce(x, atomic=False)
        assert sorted(caught.value.calls.values()) == ["all_reduce(float32[3], sum)", "all_reduce(float32[4], sum)"]
        assert reduce(comm) == 2

    in_threads(2, body)


def test_a_member_that_goes_while_another_one_waits_for_it() -> None:
    one_done = threading.Event()

    def other(comm: sync.Communicator) -> None:
        assert reduce(comm) == 2
        assert one_done.wait(30)
        comm.close()

    with pair(other) as comm:
        assert reduce(comm) == 2
        one_done.set()
        with pytest.raises(pccl.CollectiveAborted) as caught:
            reduce(comm)
        assert caught.value.lost == ("other",)
        assert reduce(comm, 5.0) == 5


def test_a_deadline() -> None:
    over = threading.Event()

    def other(comm: sync.Communicator) -> None:
        assert over.wait(30)

    with pair(other, timeout=0.3) as comm:
        try:
            with pytest.raises(pccl.CollectiveTimeout) as caught:
                reduce(comm)
            assert caught.value.missing == ("other",)
        finally:
            over.set()


def test_an_exception_of_a_signal_handler_ends_the_call() -> None:
    go = threading.Event()

    def other(comm: sync.Communicator) -> None:
        assert go.wait(30)
        with contextlib.suppress(pccl.CollectiveAborted):  # or it has what main had sent: there is no commit
            assert reduce(comm) == 2
        assert reduce(comm) == 2

    with pair(other) as comm:
        main = threading.get_ident()
        threading.Timer(0.1, signal.pthread_kill, (main, signal.SIGUSR1)).start()
        with handlers(SIGUSR1=interrupt):
            try:
                with pytest.raises(Interrupted):
                    reduce(comm)
            finally:
                go.set()
        assert reduce(comm) == 2


@pytest.mark.parametrize("where", ["begin", "start", "commit"])
def test_an_error_on_the_way(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller hears of it, and the others do not wait; if it comes at the end, they have their results."""
    failed = threading.Event()

    def other(comm: sync.Communicator) -> None:
        if where == "commit":
            assert reduce(comm) == 2
        else:
            with pytest.raises(pccl.CollectiveAborted, match="main could not go on with it"):
                reduce(comm)
        assert failed.wait(30)
        assert reduce(comm) == 2

    with pair(other) as comm:
        engine = comm._runtime.engine
        owner, name = (engine.executor, "start") if where == "start" else (Part, where)
        original = getattr(owner, name)

        def failing(*args: Any, **how: Any) -> Any:
            if owner is Part and engine not in args:
                return original(*args, **how)
            raise MemoryError("no memory")

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, failing)
            with pytest.raises(pccl.InternalError, match="no memory"):
                reduce(comm)
        failed.set()
        assert reduce(comm) == 2


def test_who_leaves_with_a_plain_call_under_way_leaves_when_that_has_ended() -> None:
    """It ends by what its peers send, without a word of the master."""
    leaving = threading.Event()

    def other(comm: sync.Communicator) -> None:
        assert leaving.wait(30)
        assert reduce(comm) == 2
        while comm.world_size > 1:
            gone = comm.update()
        assert [m.name for m in gone.left] == ["main"]
        assert not gone.lost

    with pair(other) as comm:
        work = comm.all_reduce(np.ones(3, np.float32), atomic=False, async_op=True)
        engine = comm._runtime.engine
        try_leave = engine._try_leave

        def trying() -> None:
            try_leave()
            leaving.set()

        engine._try_leave = trying  # type: ignore[method-assign]
        comm.leave()
        assert work.wait().out[0] == 2


def test_several_threads_at_once() -> None:
    """Their calls take an order as they come, and all are alike."""

    def body(comm: sync.Communicator) -> list[float]:
        found: list[float] = []

        def caller() -> None:
            found.extend(reduce(comm) for _ in range(30))

        threads = [threading.Thread(target=caller) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    assert in_threads(2, body) == [[2.0] * 90] * 2


def test_a_bad_keyword_is_refused_before_anything_begins() -> None:
    def body(comm: sync.Communicator) -> None:
        with pytest.raises(pccl.InvalidArgument):
            comm.all_reduce(np.ones(3), atomic=False, tags=3)  # type: ignore[call-arg]
        assert reduce(comm) == 2

    in_threads(2, body)


def test_updates_and_calls_with_records_among_them() -> None:
    def body(comm: sync.Communicator) -> None:
        x = np.ones(3, np.float32)
        for k in range(40):
            if k % 3 == 0:
                comm.update()
            assert reduce(comm) == 2
            if k % 4 == 0:
                works = [comm.all_reduce(x.copy(), async_op=True) for _ in range(3)]
                assert reduce(comm) == 2
                assert all(work.wait().out[0] == 2 for work in works)

    in_threads(2, body)


def test_a_fence_right_after_a_commit_in_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The member reports the call as committed, though its caller has not got it yet: the others may not have seen that."""
    said: list[str | None] = []
    done = Express.transfer_done

    def fenced(self: Express) -> None:
        done(self)
        membership = self._membership
        report = {c.call: c.state for c in membership.stop().calls}
        said.append(report.get(CallId(None, self._index)))
        membership.stopped = False

    monkeypatch.setattr(Express, "transfer_done", fenced)

    def body(comm: sync.Communicator) -> None:
        for _ in range(20):
            x = np.full(3, 1.0)
            comm.all_reduce(x)
            assert x[0] == 2

    in_threads(2, body)
    assert set(said) == {"C"}
