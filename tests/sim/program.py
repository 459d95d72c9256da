"""What simulated peers run, and the book in which they write what happened, so that it can be checked.

The loop is that of a training job: update, sync_state, some collectives, a deterministic step. Contributions are small integers that depend
on who gives them and on the step, so that every result can be told from its list of members; after an abort the inputs must be as they
were.
"""

from __future__ import annotations

import asyncio
import contextvars
import random
from collections import defaultdict, deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pccl.collectives.pull import LOCAL
from pccl.communicator import Communicator
from pccl.core.errors import (
    CollectiveAborted,
    CollectiveError,
    CollectiveMismatch,
    CollectiveTimeout,
    Evicted,
    InvalidArgument,
    PcclError,
    StateConflict,
    TooFewPeers,
)
from pccl.core.types import Epoch, Info, Member
from pccl.operations import Operation

Key = tuple[Epoch, str]
"""(the epoch that founded the group, the call's id)"""

MADE: contextvars.ContextVar[list[Operation]] = contextvars.ContextVar("made")
"""Operations that the present job has made: their ids tell which calls of different members are the same"""


SIZES = (1, 5, 50, 50, 9000, 9000, 150000)
KINDS = ("plain", "retry", "out", "round", "tagged", "gather", "loose", "broadcast", "neighbours", "sub")
NEAR_KINDS = (*KINDS, "plain", "out", "loose", "burst", "reduce", "reduce_scatter", "all_to_all")
"""Of members that share memory"""
SHARED_OUT = 2520
"""Elements that as many members as a run has can share out evenly"""
BURST = 24
"""Calls: more than there are slots in a lane"""
KEPT = 24
"""So many buffers of its last calls a member keeps: nobody may read them any more, and whoever does gets what is in them now"""

CANCELS = 40
"""So many calls of a run are cancelled at most: each costs all members a step."""


class Violation(AssertionError):
    """A promise was broken."""


@dataclass
class Outcome:
    """How a call ended for one member."""

    node: str
    committed: bool
    error: str
    after: int
    """Where in its history of epochs the member was when it heard"""
    members: tuple[Member, ...] = ()
    value: bytes = b""


@dataclass
class Book:
    """What all nodes have seen."""

    outcomes: dict[Key, list[Outcome]] = field(default_factory=lambda: defaultdict(list))
    digests: dict[tuple[Epoch, int], dict[str, str]] = field(default_factory=lambda: defaultdict(dict))
    """(founding epoch, revision) -> node -> digest of the state that sync_state gave it"""
    epochs: dict[str, list[Epoch]] = field(default_factory=lambda: defaultdict(list))
    """node -> the epochs that it was in"""
    founded: dict[str, Epoch] = field(default_factory=dict)
    """node -> the first epoch of its group"""
    slowest: float = 0.0
    closed: bool = False
    """The run is over: what still happens is the clearing away."""
    counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    final: dict[str, tuple[Epoch, bytes]] = field(default_factory=dict)
    """node -> founding epoch, weights of those who came to the last step"""

    def check(self) -> None:
        """P1 and P2 over the whole run."""
        for key, outcomes in self.outcomes.items():
            committed = [o for o in outcomes if o.committed]
            for a in committed[1:]:
                if (a.members, a.value) != (committed[0].members, committed[0].value):
                    raise Violation(f"P2: {key}: {committed[0].node} and {a.node} committed different results: {committed[0]} {a}")
            for c in committed:
                for o in outcomes:
                    both = set(self.epochs[c.node][c.after :]) & set(self.epochs[o.node][o.after :])
                    if not o.committed and both:
                        raise Violation(f"P1: {key}: {c.node} committed, {o.node} got {o.error}, and both went on into {both}")
        for revision, digests in self.digests.items():
            if len(set(digests.values())) > 1:
                raise Violation(f"P2: states of revision {revision} differ: {digests}")
        for founded in set(self.founded.values()):
            weights = {name: w for name, (f, w) in self.final.items() if f == founded}
            if len(set(weights.values())) > 1:
                raise Violation(f"P2: members ended with different states: {list(weights)}")


@dataclass
class Plan:
    """What a run does."""

    steps: int = 6
    calls: int = 3
    sync: bool = True
    cancel: float = 0.0
    """Chance that a member cancels a call"""
    disagree: float = 0.0
    """Chance that a member makes another call than the others"""
    late: float = 0.0
    """Chance that a member takes its time"""
    update_last: bool = False
    """Where in the text the update stands"""
    wait_for: int = 0
    """Update until there are so many members, before the loop begins"""
    near: bool = False
    """Members share memory"""
    may_evict: bool = True
    """Whether a fault of the run may cost a living member its membership"""


def contribution(uid: int, step: int, k: int, size: int) -> npt.NDArray[np.float32]:
    """What a member gives."""
    return ((np.arange(size) * 7 + uid * 13 + step * 5 + k * 3) % 31).astype(np.float32)


class Trainer:
    """One node's program."""

    def __init__(self, book: Book, plan: Plan, seed: int) -> None:
        self.book = book
        self.plan = plan
        self.seed = seed
        self.leaves = False
        """Set to have it stop before its next iteration, and leave"""
        self.at_once = False
        """All calls of the present step are made at once"""

    async def __call__(self, world: Any, name: str, comm: Communicator) -> None:
        self.world, self.name, self.comm = world, name, comm
        view = comm.view
        older = [m.name for m in view.members if m not in view.joined]
        self.book.founded[name] = self.book.founded[older[0]] if older else view.epoch
        make = comm._operation

        def note(part: Any, *args: Any) -> Operation:
            op = make(part, *args)
            op.noted = part  # type: ignore[attr-defined]  # which the operation itself forgets
            MADE.get([]).append(op)
            return op

        comm._operation = note  # type: ignore[method-assign]
        self.own = random.Random(f"{self.seed} {name}")
        self.old: deque[npt.NDArray[np.float32]] = deque(maxlen=KEPT)
        self.step = 0
        self.weights = np.zeros(50, np.float32)
        self.synced = False
        if older:  # a newcomer with a state of its own, which must not count
            self.step, self.weights[:] = 1000, 7
        for _ in range(1000):
            if comm.world_size >= self.plan.wait_for:
                break
            await self.timed(comm.update())
        else:
            if len(world.alive()) >= self.plan.wait_for:
                raise Violation(f"P3: {name} has updated a thousand times and still waits for members")
            return
        while (self.step < self.plan.steps or not self.synced) and not self.leaves:
            try:
                await self.iteration()
            except CollectiveAborted:
                self.book.counts["CollectiveAborted"] += 1
            except CollectiveTimeout as e:
                self.book.counts["CollectiveTimeout"] += 1
                if not self.plan.disagree:
                    raise Violation(f"P3: {name}: {e}, although all run one text and every fault is noticed sooner") from e
            except CollectiveMismatch as e:
                self.book.counts["CollectiveMismatch"] += 1
                if not self.plan.disagree:
                    raise Violation(f"P4: {name}: {e}, although all run one text") from e
            except (Evicted, StateConflict, TooFewPeers) as e:
                self.book.counts[type(e).__name__] += 1
                if isinstance(e, Evicted) and not self.plan.may_evict:
                    raise Violation(f"P3: {name}: {e}, although no fault of this run costs a membership") from e
                return
        if not self.leaves:
            self.book.final[name] = self.book.founded[name], self.weights.tobytes()

    async def iteration(self) -> None:
        comm, book = self.comm, self.book
        if not self.plan.update_last:
            await self.timed(comm.update())
        if self.plan.sync:
            strategy = "elect" if self.synced or self.step < 1000 else "receive"
            info = await self.timed(comm.sync_state({"weights": self.weights, "step": self.step}, revision=self.step, strategy=strategy))
            if self.synced and (info.state["step"] != self.step or info.bytes_received):
                raise Violation(f"P2: {self.name}, a member of the last sync, was taken from step {self.step} to {info.state['step']}")
            self.synced = True
            self.step = info.state["step"]
            book.digests[book.founded[self.name], info.revision][self.name] = info.digest
        step = self.step
        # the text of a step: the same on all members, since they have the same step
        text = random.Random(f"{self.seed} step {step}")
        kinds = NEAR_KINDS if self.plan.near else KINDS
        jobs = [(k, text.choice(kinds), text.choice(SIZES)) for k in range(self.plan.calls)]
        if self.own.random() < self.plan.late:
            await asyncio.sleep(self.own.random() * 0.5)
        self.at_once = text.random() < 0.5
        if self.at_once:
            results = await asyncio.gather(
                *(self.job(step, k, kind, size) for k, kind, size in self.shuffled(jobs)), return_exceptions=True
            )
            errors = [r for r in results if isinstance(r, BaseException)]
            for e in errors:
                if not isinstance(e, CollectiveError):
                    raise e
            if errors:
                raise errors[0]
            sums = dict(r for r in results if isinstance(r, tuple))
        else:
            sums = dict([await self.job(step, k, kind, size) for k, kind, size in jobs])
        for k in sorted(sums):
            self.weights[:] = self.weights * np.float32(0.5) + sums[k]
        self.step += 1
        book.counts["steps"] += 1
        if self.plan.update_last:
            await self.timed(comm.update())

    def shuffled(self, jobs: list[tuple[int, str, int]]) -> list[tuple[int, str, int]]:
        """Tagged calls may be made in any order; untagged ones keep theirs."""
        tagged = [j for j in jobs if j[1] == "tagged"]
        self.own.shuffle(tagged)
        return [j for j in jobs if j[1] != "tagged"] + tagged

    async def job(self, step: int, k: int, kind: str, size: int) -> tuple[int, float]:
        """One call, or one round; its result in a number."""
        comm, uid = self.comm, self.comm._uid()
        if kind in ("reduce_scatter", "all_to_all"):
            size = SHARED_OUT * (1 + size // SHARED_OUT)
        x = contribution(uid, step, k, size)
        before = x.copy()
        made: list[Operation] = []
        MADE.set(made)
        members = comm.view.members
        retry = kind in ("retry", "round", "tagged")
        out: Any = None
        coroutine: Any
        if kind == "round":
            return await self.round(step, k, size)
        if kind == "neighbours":
            return await self.neighbours(step, k, size)
        if kind == "sub":
            return await self.sub(step, k, size)
        if kind == "burst":
            return await self.burst(step, k)
        op = "sum"
        root = 0
        if kind == "gather":
            coroutine = comm.all_gather(x)
        elif kind == "broadcast":
            root = comm.view.members[0].uid
            out = x
            coroutine = comm.broadcast(x, 0)
        elif kind == "reduce":
            coroutine = comm.reduce(x, 0, out=np.empty_like(x))
        elif kind == "reduce_scatter":
            coroutine = comm.reduce_scatter(x)
        elif kind == "all_to_all":
            coroutine = comm.all_to_all(x)
        else:
            out = np.empty_like(x) if kind == "out" else x
            tag = f"t{k}" if kind == "tagged" else None
            if self.own.random() < self.plan.disagree:
                op = "max"
                self.book.counts["disagreements"] += 1
            quantize = "float16" if self.seed % 3 == 0 and k % 2 == 0 else None  # in which these sums are exact
            coroutine = comm.all_reduce(x, op, out=out, tag=tag, retry=retry, atomic=kind != "loose", quantize=quantize)
        try:
            info: Info = await self.timed(coroutine, cancel=True)
        except PcclError as e:
            if kind == "loose" and isinstance(e, CollectiveError):
                self.spoil(x)
                return k, 0.0  # others may have the result: what a program does next must not depend on it
            self.failed(made[0], "", e)
            input_only = kind not in ("loose", "broadcast") or (kind == "broadcast" and uid == root)
            if self.plan.near and isinstance(e, Evicted):  # while it brought a result to its place the others may have gone on without it
                input_only = False
            if input_only and not np.array_equal(x, before):
                raise Violation(f"P1: {self.name} step {step} {kind}: inputs were not restored after {e!r}") from e
            self.spoil(x)
            raise
        if kind == "gather":
            value = np.asarray(info.out)
            expected = np.stack([contribution(m.uid, step, k, size) for m in info.members])
        elif kind == "broadcast":
            value, expected = out, contribution(root, step, k, size)
        elif kind in ("reduce", "reduce_scatter", "all_to_all"):
            self.apart(made[0], kind, info, [contribution(m.uid, step, k, size) for m in info.members])
            self.spoil(x)
            return k, 0.0
        else:
            value = out
            combine = np.sum if op == "sum" else np.max
            expected = combine([contribution(m.uid, step, k, size) for m in info.members], axis=0).astype(np.float32)
        if not retry and info.members != members and info.members != comm.view.members:
            raise Violation(f"P5: {self.name}: {made[0].description} ran with other members than its caller knew, and said nothing")
        self.committed(made[0], "", info, value, expected)
        total = float(value.sum() % 1000)
        self.spoil(x)
        return k, 0.0 if kind == "loose" else total

    def apart(self, op: Operation, kind: str, info: Info, given: list[npt.NDArray[np.float32]]) -> None:
        """Check a call of which each member has a result of its own."""
        rank = [m.uid for m in info.members].index(self.comm._uid())
        part = len(given[0]) // len(given)
        mine = slice(rank * part, (rank + 1) * part)
        if kind == "all_to_all":
            expected = np.concatenate([x[mine] for x in given])
        else:
            expected = np.sum(given, axis=0, dtype=np.float32)[mine if kind == "reduce_scatter" else slice(None)]
        if kind == "reduce" and rank:
            expected = np.empty(0, np.float32)
        value = np.empty(0, np.float32) if info.out is None else np.asarray(info.out)
        self.committed(op, "", info, value, expected, same=False)

    def spoil(self, x: npt.NDArray[np.float32]) -> None:
        """The call has ended: from now on its caller may do with its memory what it likes."""
        x[:] = -1
        self.old.append(x)

    async def burst(self, step: int, k: int) -> tuple[int, float]:
        """Many small calls without commit, of which the root needs nothing: it runs ahead. What comes next must not depend on them."""
        comm = self.comm
        at_once = self.at_once or (self.seed + step) % 2 == 0
        xs = [contribution(comm._uid(), step, 100 * k + i, 5) for i in range(BURST)]
        calls: list[asyncio.Task[Info]] = []

        async def one(x: npt.NDArray[np.float32]) -> Info:
            MADE.set([])
            found: Info = await self.timed(comm.broadcast(x, 0, atomic=False), cancel=True)
            return found

        for x in xs:
            calls.append(asyncio.create_task(one(x)))
            if not at_once:
                await asyncio.wait([calls[-1]])
        results = await asyncio.gather(*calls, return_exceptions=True)
        for i, (x, result) in enumerate(zip(xs, results, strict=True)):
            if isinstance(result, Info):
                root = result.members[0].uid
                if not np.array_equal(x, contribution(root, step, 100 * k + i, 5)):
                    raise Violation(f"wrong result: {self.name}, step {step}, broadcast {i} from {root} of a burst: {x}")
                self.book.counts["of a burst"] += 1
            elif not isinstance(result, CollectiveAborted):
                raise result
            self.spoil(x)
        return k, 0.0

    async def neighbours(self, step: int, k: int, size: int) -> tuple[int, float]:
        """Everyone sends to the next one and receives from the one before. Commits per pair, so what comes next must not depend on it."""
        comm = self.comm
        view = comm.view
        if view.world_size < 2:
            return k, 0.0
        after, before = (view.rank + 1) % view.world_size, (view.rank - 1) % view.world_size
        sender = view.members[before].uid
        x, y = contribution(comm._uid(), step, k, size), np.zeros(size, np.float32)
        made: list[Operation] = []
        MADE.set(made)
        # who hears of a loss by a commit goes on at once with other neighbours than those have who commit first, and hear of it here
        timeout = 5.0 if self.plan.near else 40.0
        both = self.timed(comm.send(x, after, timeout=timeout)), self.timed(comm.recv(y, before, timeout=timeout))
        results = await asyncio.gather(*both, return_exceptions=True)
        for op, result in zip(made, results, strict=True):
            if isinstance(result, Info):
                value = x if op.pair and op.pair.source == comm._uid() else y
                self.committed(op, "", result, value, contribution(op.pair.source if op.pair else sender, step, k, size))
            elif isinstance(result, (CollectiveAborted, CollectiveTimeout)):
                self.failed(op, "", result)
            elif isinstance(result, BaseException) and not isinstance(result, (CollectiveError, InvalidArgument)):
                raise result
        return k, 0.0

    async def sub(self, step: int, k: int, size: int) -> tuple[int, float]:
        """Two halves of the group reduce apart from each other."""
        half = await self.timed(self.comm.split(self.comm.rank % 2))
        x = contribution(self.comm._uid(), step, k, size)
        try:
            info = await self.timed(half.all_reduce(x, retry=True))
        except CollectiveAborted as e:
            if "not connected" not in str(e) and "could not go on" not in str(e):
                raise
            await half.leave()  # the other half knows nothing of it, so what comes next must not depend on it
            return k, 0.0
        expected = np.sum([contribution(m.uid, step, k, size) for m in info.members], axis=0, dtype=np.float32)
        if not np.array_equal(x, expected):
            raise Violation(f"wrong result: {self.name} in half {half} with members {[m.uid for m in info.members]}")
        self.book.counts["halves"] += 1
        await half.leave()
        return k, 0.0

    async def round(self, step: int, k: int, size: int) -> tuple[int, float]:
        comm, uid = self.comm, self.comm._uid()
        xs = [contribution(uid, step, 100 * k + i, size) for i in range(3)]
        befores = [x.copy() for x in xs]
        try:
            r = comm.round(retry=True)
            async with r:
                handles = []
                for x in xs:
                    handles.append(r.all_reduce(x))
                    if self.own.random() < self.plan.late:
                        await asyncio.sleep(self.own.random() * 0.05)
        except PcclError as e:
            self.failed(r._operation, "", e)
            if not all(np.array_equal(x, b) for x, b in zip(xs, befores, strict=True)):
                raise Violation(f"P1: {self.name} round {k} of step {step}: inputs were not restored after {e!r}") from e
            raise
        for i, (x, h) in enumerate(zip(xs, handles, strict=True)):
            expected = np.sum([contribution(m.uid, step, 100 * k + i, size) for m in h.info.members], axis=0, dtype=np.float32)
            self.committed(r._operation, f".{i}", h.info, x, expected)
        return k, float(sum(x.sum() for x in xs) % 1000)

    def timed(self, call: Any, *, cancel: bool = False) -> Any:
        """Make a call, and await it; perhaps cancel it; note how long it took."""
        # always a task, so that calls begin in the same order whether or not somebody cancels
        return self._timed(asyncio.ensure_future(call), cancel)

    async def _timed(self, task: asyncio.Future[Any], cancel: bool) -> Any:
        began = self.world.loop.time()
        try:
            if cancel and self.own.random() < self.plan.cancel and self.book.counts["cancelled"] < CANCELS:
                await asyncio.sleep(self.own.random() * self.own.choice((0.02, 0.2)))
                task.cancel()
                self.book.counts["cancelled"] += 1
                try:
                    return await task
                except asyncio.CancelledError:
                    op = MADE.get()[-1]
                    if op.noted.info:  # type: ignore[attr-defined]  # it came too late: the result is in the buffer
                        return op.noted.info  # type: ignore[attr-defined]
                    raise CollectiveAborted("cancelled by the test") from None
            return await task
        finally:
            epochs = self.book.epochs[self.name]
            if self.comm.view.epoch not in epochs:
                epochs.append(self.comm.view.epoch)
            if not self.book.closed:
                self.book.slowest = max(self.book.slowest, self.world.loop.time() - began)

    def committed(self, op: Operation, part: str, info: Info, value: Any, expected: Any, *, same: bool = True) -> None:
        """A call has a result: it has to be that of its members, and perhaps the same for all."""
        if not np.array_equal(value, expected):
            uids = [m.uid for m in info.members]
            what = f"{self.name} {op.description} {op.record.id} with members {uids}"
            raise Violation(f"wrong result: {what}: {np.asarray(value).ravel()[:4]} not {expected.ravel()[:4]}")
        self.book.counts["committed"] += 1
        if info.algorithm == LOCAL:
            self.book.counts["committed locally" if op.atomic else "locally without commit"] += 1
        if info.attempts > 1:
            self.book.counts["retried"] += 1
        if op.atomic:
            outcome = Outcome(self.name, True, "", self.place(), info.members, np.asarray(value).tobytes() if same else b"")
            self.book.outcomes[self.key(op, part)].append(outcome)

    def failed(self, op: Operation, part: str, error: PcclError) -> None:
        """A call has failed; where the member itself is out, that says nothing about the others."""
        if op.local and self.comm._runtime.engine.lanes.get(0):
            self.book.counts["aborted locally"] += 1
        if not isinstance(error, (Evicted, StateConflict)) and op.record.id.n >= 0:
            self.book.outcomes[self.key(op, part)].append(Outcome(self.name, False, repr(error), self.place()))

    def key(self, op: Operation, part: str) -> Key:
        return self.book.founded[self.name], f"{op.record.id}{part}"

    def place(self) -> int:
        """Where in the history of its epochs this node is."""
        epochs = self.book.epochs[self.name]
        if self.comm.view.epoch not in epochs:
            epochs.append(self.comm.view.epoch)
        return len(epochs) - 1
