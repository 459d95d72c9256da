"""The calls of one step at one member: made, awaited, and checked against the oracle."""

from __future__ import annotations

import asyncio
import random

import numpy as np
import xxhash

import pccl
from pccl.tools.stress.program import Array, Call, Oracle, difference, launch_order


class Made:
    """A call that this member makes: its buffers, and what came of it.

    Args:
        view: the membership when it is made.
    """

    def __init__(self, call: Call, oracle: Oracle, view: pccl.View, step: int) -> None:
        self.call = call
        self.outcome = "?"
        """C committed, A aborted, E evicted, X an error that should not be"""
        self.error: BaseException | None = None
        self.problems: list[str] = []
        """What is wrong"""
        self.checked = 0
        """Results that were compared with the oracle"""
        self.restored = 0
        """Inputs that were compared with what was given, after an abort"""
        self.pairs: dict[str, bool] = {}
        """source>target of a call between two -> whether it was committed here"""
        self._infos: list[pccl.Info] = []
        self._uids: tuple[int, ...] = ()
        self._digest = 0
        """Of the result, where all members have the same"""
        self._oracle = oracle
        self._step = step
        self._members = [m.uid for m in view.members]
        self._me = self._members[view.rank]
        self._root = self._members[call.root % len(self._members)]
        self._next = self._members[(view.rank + 1) % len(self._members)]
        self._previous = self._members[view.rank - 1]
        self._given = [oracle.given(self._me, step, call, i) for i in range(len(call.sizes))]
        self._x = [x.copy() for x in self._given]
        self._out = [np.zeros_like(x) for x in self._x] if call.out or call.kind in ("ring", "broadcast") else self._x
        if call.kind == "broadcast" and self._me == self._root:
            self._out = self._x

    # --- making it --------------------------------------------------------------------------------------------------

    async def run(self, comm: pccl.Communicator) -> None:
        """Make the call, and wait for its end."""
        try:
            self._infos = await (self._run_ring(comm) if self.call.kind == "ring" else self._run(comm))
            self.outcome = "C"
        except Exception as e:
            self.outcome = (
                "A" if isinstance(e, pccl.CollectiveAborted) else "E" if isinstance(e, (pccl.Evicted, pccl.StateConflict)) else "X"
            )
            self.error = e.with_traceback(None)  # whose frames hold this

    async def _run(self, comm: pccl.Communicator) -> list[pccl.Info]:
        call, x, retry = self.call, self._x[0], self.call.retry
        if call.kind == "round":
            async with comm.round(retry=retry) as r:
                parts = zip(self._x, self._out, strict=True)
                pending = [r.all_reduce(x, call.op, out=out if call.out else None) for x, out in parts]
            return [p.info for p in pending]
        if call.kind == "broadcast":
            return [await comm.broadcast(self._out[0], self._members.index(self._root), retry=retry)]
        if call.kind == "all_gather":
            return [await comm.all_gather(x, retry=retry)]
        if call.kind == "reduce_scatter":
            return [await comm.reduce_scatter(x, call.op, retry=retry)]
        if call.kind == "barrier":
            return [await comm.barrier(retry=retry)]
        return [await comm.all_reduce(x, call.op, out=self._out[0] if call.out else None, retry=retry, tag=call.tag)]

    async def _run_ring(self, comm: pccl.Communicator) -> list[pccl.Info]:
        """To the next, and from the one before."""
        if len(self._members) == 1:
            return []
        both = await asyncio.gather(
            comm.send(self._x[0], self._members.index(self._next), retry=self.call.retry),
            comm.recv(self._out[0], self._members.index(self._previous), retry=self.call.retry),
            return_exceptions=True,
        )
        for name, result in zip((f"{self._me}>{self._next}", f"{self._previous}>{self._me}"), both, strict=True):
            if isinstance(result, BaseException) and not isinstance(result, pccl.CollectiveAborted):
                raise result
            self.pairs[name] = isinstance(result, pccl.Info)
        return [result for result in both if isinstance(result, pccl.Info)]

    # --- checking it ------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Compare every buffer that is defined with what it has to be."""
        call = self.call
        if self.outcome == "X":
            self.problems.append(f"{call}: {self.error!r}")
        elif self.outcome == "A" and call.retry and call.kind != "broadcast":
            self.problems.append(f"{call} was given up although it may be retried: {self.error}")
        if call.kind == "ring":
            self._check_inputs()
            if self.pairs.get(f"{self._previous}>{self._me}"):
                what = f"what {self._me} received from {self._previous} in {call}"
                self._compare(what, self._out[0], self._oracle.given(self._previous, self._step, call))
        elif self.outcome == "C":
            self._check_result()
            if call.out or call.kind in ("all_gather", "reduce_scatter"):
                self._check_inputs()
        elif call.kind != "broadcast" or self._me == self._root:
            self._check_inputs()

    def _check_inputs(self) -> None:
        for i, (x, given) in enumerate(zip(self._x, self._given, strict=True)):
            self.restored += self.outcome != "C"
            self.problems += filter(None, [difference(f"input {i} of {self.call} after outcome {self.outcome}", x, given)])

    def _check_result(self) -> None:
        call, uids = self.call, tuple(m.uid for m in self._infos[0].members)
        self._uids = uids
        if any(tuple(m.uid for m in info.members) != uids for info in self._infos):
            self.problems.append(f"{call}: its tensors were reduced over different members")
        if self._me not in uids or not set(uids) <= set(self._members):
            self.problems.append(f"{call}: members {uids} took part, made by {self._me} when they were {self._members}")
            return
        hasher = xxhash.xxh3_64()
        for i, (result, expected) in enumerate(self._results(uids)):
            self._compare(f"result {i} of {call} over {uids}", result, expected)
            hasher.update(np.ascontiguousarray(result).data)
        self._digest = 0 if call.kind == "reduce_scatter" else hasher.intdigest()

    def _results(self, uids: tuple[int, ...]) -> list[tuple[Array, Array]]:
        """What there is, and what there should be."""
        call = self.call
        if call.kind == "barrier":
            return []
        if call.kind == "broadcast":
            return [(self._out[0], self._oracle.given(self._root, self._step, call))]
        if call.kind == "all_gather":
            return [(self._infos[0].out, self._oracle.gathered(uids, self._step, call))]
        expected = [self._oracle.reduced(uids, self._step, call, i) for i in range(len(call.sizes))]
        if call.kind == "reduce_scatter":
            part = call.size // len(uids)
            start = uids.index(self._me) * part
            return [(self._infos[0].out, expected[0][start : start + part])]
        return list(zip(self._out, expected, strict=True))

    def _compare(self, what: str, found: Array, expected: Array) -> None:
        self.checked += 1
        self.problems += filter(None, [difference(what, found, expected)])

    # --- what the others must have, too -----------------------------------------------------------------------------

    @property
    def fingerprint(self) -> str:
        """How the call ended, as all members have to see it; of pairwise calls, they need not see the same."""
        if self.call.kind == "ring":
            return "-"
        return f"C{self._uids}{self._digest:x}".replace(" ", "") if self.outcome == "C" else self.outcome

    @property
    def retried(self) -> int:
        """Attempts beyond the first."""
        return self._infos[0].attempts - 1 if self._infos else 0

    def spoil(self) -> None:
        """For tests of these checks: a wrong bit in the result."""
        self._out[0].view(np.uint8)[-1] ^= 1


async def make_all(comm: pccl.Communicator, calls: list[Call], oracle: Oracle, step: int, own: random.Random) -> list[Made]:
    """Make the calls of a step, all at once, and wait until every one has ended.

    Args:
        own: this member's chance, for what may come in any order.
    """
    made = [Made(call, oracle, comm.view, step) for call in launch_order(calls, own)]
    await asyncio.gather(*[asyncio.create_task(each.run(comm)) for each in made])
    return sorted(made, key=lambda each: each.call.number)
