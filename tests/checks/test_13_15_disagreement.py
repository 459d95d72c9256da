"""Checks 13, 14 and 15: members that make different calls, none, or the same tag twice."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

import pccl
from pccl.communicator import Communicator
from tests.checks.support import each, group, on_node, outcomes, simulate, simulated_members
from tests.sim.world import World

pytestmark = pytest.mark.usefixtures("every_transport")

MODES = pytest.mark.parametrize("in_place", [True, False], ids=["in place", "out of place"])


class Buffers:
    """What a member gives, where the result goes, and whether the input is as it was."""

    def __init__(self, count: int, dtype: str, k: int, in_place: bool) -> None:
        self.x = ((np.arange(count) + 31 * k) % 97).astype(dtype)
        self._before = self.x.copy()
        self.out = None if in_place else np.zeros_like(self.x)

    @property
    def result(self) -> np.ndarray[Any, Any]:
        return self.x if self.out is None else self.out

    def intact(self) -> bool:
        return self.x.tobytes() == self._before.tobytes()


async def works(comms: list[Communicator], tag: Any = None) -> None:
    """The communicator is usable, with that tag, too."""
    tensors = [np.full(1000, k + 1.0) for k in range(len(comms))]
    await each(c.all_reduce(x, tag=tag) for c, x in zip(comms, tensors, strict=True))
    assert all((x == sum(range(1, len(comms) + 1))).all() for x in tensors)


ODD: dict[str, dict[str, Any]] = {
    "count": {"count": 1001},
    "larger count": {"count": 400_000},
    "dtype": {"dtype": "int32"},
    "dtype of another size": {"dtype": "float64"},
    "op": {"op": "max"},
    "algorithm": {"algorithm": "tree"},
    "retry": {"retry": True},
    "shape in all but name": {"count": 999},
}


@MODES
@pytest.mark.parametrize("tag", [None, "t"])
@pytest.mark.parametrize("what", ODD)
@pytest.mark.parametrize("count", [1000, 300_000])
async def test_check_13_members_disagree(what: str, tag: Any, count: int, in_place: bool) -> None:
    async with group(3) as comms:
        usual: dict[str, Any] = {"count": count, "dtype": "float32", "op": "sum", "algorithm": "auto", "retry": False}
        made = [usual, usual | ODD[what], usual]
        buffers = [Buffers(m["count"], m["dtype"], k, in_place) for k, m in enumerate(made)]
        calls = [
            c.all_reduce(b.x, m["op"], out=b.out, algorithm=m["algorithm"], retry=m["retry"], tag=tag)
            for c, b, m in zip(comms, buffers, made, strict=True)
        ]
        for error in await outcomes(calls, within=10.0):
            assert isinstance(error, pccl.CollectiveMismatch), error
            names = {comm.view.members[comm.rank].name for comm in comms}
            assert names >= error.calls.keys()
            assert comms[1].view.members[1].name in error.calls
            assert len(error.calls) >= 2
            for name, call in error.calls.items():
                k = next(k for k, m in enumerate(comms[0].view.members) if m.name == name)
                assert f"all_reduce({made[k]['dtype']}[{made[k]['count']}], {made[k]['op']}" in call
                assert name in str(error)
                assert call in str(error)
        assert all(b.intact() for b in buffers)
        await works(comms, tag)
        await works(comms)


@pytest.mark.parametrize(
    ("one", "other", "named"),
    [
        (lambda c, x: c.broadcast(x, root=0), lambda c, x: c.broadcast(x, root=1), ("broadcast(float32[1000], root=0)", "root=1")),
        (lambda c, x: c.all_reduce(x), lambda c, x: c.broadcast(x, root=0), ("all_reduce(", "broadcast(")),
        (lambda c, x: c.all_reduce(x), lambda c, x: c.barrier(), ("all_reduce(", "barrier()")),
        (lambda c, x: c.all_reduce(x), lambda c, x: c.sync_state({"x": x}, revision=1), ("all_reduce(", "sync_state(")),
        (lambda c, x: c.all_reduce(x), lambda c, x: c.split(0), ("all_reduce(", "split()")),
        (lambda c, x: c.all_gather(x), lambda c, x: c.gather(x), ("all_gather(", "gather(")),
        (lambda c, x: c.subgroup([0, 1]), lambda c, x: c.subgroup([1, 0]), ("subgroup([0, 1])", "subgroup([1, 0])")),
    ],
)
async def test_check_13_members_make_calls_of_different_kinds(one: Any, other: Any, named: tuple[str, str]) -> None:
    async with group(2) as comms:
        await each(c.update() for c in comms)  # the free one after the admission
        await works(comms)
        buffers = [Buffers(1000, "float32", k, True) for k in range(2)]
        for error in await outcomes((one(comms[0], buffers[0].x), other(comms[1], buffers[1].x)), within=10.0):
            assert isinstance(error, pccl.CollectiveMismatch), error
            assert all(text in str(error) for text in named), error
        assert buffers[0].intact()
        await works(comms)


async def test_check_13_an_update_of_one_is_a_call_of_the_other() -> None:
    """While nobody waits an update costs nothing and asks nobody: the other hears of it with the next call, which is not concerned."""
    async with group(2) as comms:
        await each(c.update() for c in comms)
        await works(comms)
        b = Buffers(1000, "float32", 0, True)
        calls = [comms[0].all_reduce(b.x), comms[0].barrier()], [comms[1].update(), comms[1].barrier()]
        error, *rest = await outcomes((*calls[0], *calls[1]), within=10.0)
        assert isinstance(error, pccl.CollectiveMismatch), error
        assert "all_reduce(float32[1000], sum)" in str(error)
        assert "update()" in str(error)
        assert b.intact()
        assert not any(isinstance(other, Exception) for other in rest), rest
        await works(comms)


@MODES
async def test_check_13_members_disagree_about_a_round(in_place: bool) -> None:
    async with group(2) as comms:
        buffers = [[Buffers(1000, "float32", k, in_place) for _ in range(3)] for k in range(2)]

        async def run(comm: Communicator, mine: list[Buffers], ops: list[str]) -> None:
            async with comm.round() as r:
                for b, op in zip(mine, ops, strict=True):
                    r.all_reduce(b.x, op, out=b.out)

        for error in await outcomes(
            (run(comms[0], buffers[0], ["sum"] * 3), run(comms[1], buffers[1], ["sum", "sum", "min"])), within=10.0
        ):
            assert isinstance(error, pccl.CollectiveMismatch), error
            assert "min" in str(error)
        assert all(b.intact() for mine in buffers for b in mine)
        await works(comms)


@MODES
async def test_check_13_of_send_and_receive(in_place: bool) -> None:
    """The two sides of a pair disagree; the third member is not concerned."""
    async with group(3) as comms:
        x, y = np.ones(1000, np.float32), np.zeros(999, np.float32)
        for error in await outcomes((comms[0].send(x, 2), comms[2].recv(y, 0)), within=10.0):
            assert isinstance(error, pccl.CollectiveMismatch), error
            assert "float32[1000]" in str(error)
            assert "float32[999]" in str(error)
        z = np.zeros(1000, np.float32)
        await each((comms[0].send(x, 2), comms[2].recv(z, 0)))
        assert (z == 1).all()
        await works(comms)


@MODES
@pytest.mark.parametrize("count", [100, 100_000])
def test_check_14_one_member_never_calls(count: int, in_place: bool) -> None:
    """In virtual time: after the deadline, and no later than a verdict takes, all who called know who did not."""

    async def main(world: World) -> None:
        comms = await simulated_members(world, "ABCD")
        buffers = {name: Buffers(count, "float32", k, in_place) for k, name in enumerate(comms)}
        began = world.loop.time()
        calls = [on_node(world, n, comms[n].all_reduce(buffers[n].x, out=buffers[n].out, timeout=5.0 + k)) for k, n in enumerate("ABC")]
        for error in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(error, pccl.CollectiveTimeout), error
            assert isinstance(error, TimeoutError)
            assert error.missing == ("D",)
            assert "D" in str(error)
        assert 5.0 <= world.loop.time() - began < 5.1
        assert all(b.intact() for b in buffers.values())
        late = on_node(world, "D", comms["D"].all_reduce(buffers["D"].x, out=buffers["D"].out))
        (error,) = await asyncio.gather(late, return_exceptions=True)
        assert isinstance(error, pccl.CollectiveTimeout), "the call has failed for D, too"
        assert world.loop.time() - began < 5.2
        assert buffers["D"].intact()
        again = [on_node(world, n, c.all_reduce(buffers[n].x, out=buffers[n].out)) for n, c in comms.items()]
        await asyncio.gather(*again)
        want = sum(Buffers(count, "float32", k, True).x for k in range(4))
        assert all((b.result == want).all() for b in buffers.values())

    simulate(main, seed=14)


async def test_check_14_over_real_sockets() -> None:
    async with group(3) as comms:
        x = np.ones(100_000)
        for error in await outcomes(c.all_reduce(x, out=np.empty_like(x), timeout=0.2) for c in comms[:2]):
            assert isinstance(error, pccl.CollectiveTimeout), error
            assert error.missing == (comms[2].view.members[2].name,)
        (error,) = await outcomes([comms[2].all_reduce(x, out=np.empty_like(x))])
        assert isinstance(error, pccl.CollectiveTimeout), error
        await works(comms)


@MODES
async def test_check_15_the_same_tag_twice(in_place: bool) -> None:
    async with group(2) as comms:
        first = [Buffers(200_000, "float32", k, in_place) for k in range(2)]
        second = Buffers(200_000, "float32", 5, in_place)
        running = asyncio.ensure_future(comms[0].all_reduce(first[0].x, out=first[0].out, tag="t"))
        with pytest.raises(pccl.InvalidArgument, match="'t' is in use"):
            await each([comms[0].barrier(tag="t")])
        for _ in range(3):  # it cannot have ended: the other member has not called
            with pytest.raises(pccl.InvalidArgument, match="'t' is in use"):
                await comms[0].all_reduce(second.x, out=second.out, tag="t")
        assert not running.done()
        assert second.intact()
        await each([running, comms[1].all_reduce(first[1].x, out=first[1].out, tag="t")])
        want = sum(Buffers(200_000, "float32", k, True).x for k in range(2))
        assert all((b.result == want).all() for b in first)
        await works(comms, "t")


async def test_check_15_a_tag_is_free_after_a_failure_and_of_a_round() -> None:
    async with group(2) as comms:
        x = np.ones(10)
        for error in await outcomes([comms[0].all_reduce(x, tag=7, timeout=0.1)]):
            assert isinstance(error, pccl.CollectiveTimeout)
        for error in await outcomes([comms[1].all_reduce(x, tag=7)]):
            assert isinstance(error, pccl.CollectiveTimeout), "the first use of the tag has failed for all"
        await works(comms, 7)
        async with asyncio.timeout(20):

            async def run(comm: Communicator) -> str:
                async with comm.round(tag=7) as r:
                    r.barrier()
                    with pytest.raises(pccl.InvalidArgument, match="tag"):
                        await comm.barrier(tag=7)
                return "done"

            assert await each(run(c) for c in comms) == ["done"] * 2
        await works(comms, 7)
