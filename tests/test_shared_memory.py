"""What members of one host do in shared memory besides reducing: evictions, mismatches, many communicators."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import pccl
from pccl import sync
from pccl.collectives.executor import Executor
from pccl.collectives.pull import Pull
from tests.checks.support import each, group, in_threads, outcomes


async def total(comms: list[Any], **how: Any) -> None:
    """One sum, checked on all."""
    tensors = [np.full(10, k + 1.0) for k in range(len(comms))]
    await each(c.all_reduce(x, **how) for c, x in zip(comms, tensors, strict=True))
    assert all((x == sum(range(1, len(comms) + 1))).all() for x in tensors)


@pytest.mark.parametrize("count", [3, 300_000])
def test_who_is_evicted_after_a_commit_has_its_result(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others have committed, and the result is on its way to its place: there is no way back."""
    deliver, step = Pull._deliver, Executor.step
    evicted: list[Executor] = []

    def slowly(self: Pull) -> Iterator[bool]:
        yield True
        yield from deliver(self)

    def interrupted(self: Executor) -> bool:
        moved = step(self)
        if not evicted and any(pull.committed for pull in self._pulls):
            evicted.append(self)
            self._host._out(pccl.Evicted("a test says so"))  # type: ignore[attr-defined]
        return moved

    monkeypatch.setattr(Pull, "_deliver", slowly)
    monkeypatch.setattr(Executor, "step", interrupted)

    def body(comm: sync.Communicator) -> bool:
        x = np.full(count, comm.rank + 1.0)
        comm.all_reduce(x, async_op=True).wait()
        assert (x == 3).all()
        return comm._runtime.engine.error is None

    assert sorted(in_threads(2, body)) == [False, True]
    assert evicted


@pytest.mark.parametrize("first", ["the reduction", "the round"])
async def test_a_round_without_calls_where_others_reduce(first: str) -> None:
    """It is done at once, and sends nothing by which the others could tell."""
    async with group(2) as comms:

        async def empty_round() -> None:
            async with comms[1].round():
                pass

        x = np.ones(100_000)
        calls = [comms[0].all_reduce(x), empty_round()]
        for error in await outcomes(calls if first == "the reduction" else calls[::-1], within=10.0):
            assert isinstance(error, pccl.CollectiveMismatch), error
            assert len(error.calls) == 2
        assert (x == 1).all()
        await total(comms)
