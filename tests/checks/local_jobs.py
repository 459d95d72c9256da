"""What the processes of `test_local` do. Each job runs on both faces: on a blocking peer nothing in it has to be waited for."""

from __future__ import annotations

import hashlib
import inspect
import os
import random
import signal
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np

import pccl
from pccl.collectives.lane import SMALL, Lane
from pccl.core.dtypes import DTYPES, LEGAL
from tests.checks import oracle
from tests.checks.jobs import contribution, total
from tests.checks.processes import Failure

COLLECTIVES = ("all_reduce", "reduce", "reduce_scatter", "all_gather", "gather", "broadcast", "scatter", "all_to_all")
FORMS = {
    "all_reduce": ("in place", "out", "strided", "list"),
    "reduce": ("in place", "out", "strided"),
    "reduce_scatter": ("out", "inside", "made", "strided"),
    "all_gather": ("out", "inside", "made", "strided"),
    "gather": ("out", "inside", "made"),
    "broadcast": ("in place", "strided"),
    "scatter": ("out", "inside"),
    "all_to_all": ("out", "made"),
}


def blocking(job: Callable[..., Coroutine[Any, Any, Any]], comm: Any, *arguments: Any) -> Any:
    """Run a job on a blocking peer."""
    try:
        job(comm, *arguments).send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("a blocking call returned something to wait for")


def run_blocking(comm: Any, job: Callable[..., Coroutine[Any, Any, Any]], *arguments: Any) -> Any:
    """Likewise, as a job."""
    return blocking(job, comm, *arguments)


async def done(result: Any) -> Any:
    """What a call returns, on either face."""
    return await result if inspect.isawaitable(result) else result


def laid_out(x: np.ndarray[Any, Any], form: str) -> Any:
    """The same elements, lying as the form says."""
    if form == "strided":
        room = np.zeros((len(x), 3), x.dtype)
        room[:, 1] = x
        return room[:, 1]
    if form == "list":
        return [part.copy() for part in np.array_split(x, 3)]
    return x.copy()


def flat(x: Any) -> np.ndarray[Any, Any]:
    return np.concatenate([np.asarray(part).reshape(-1) for part in x]) if isinstance(x, list) else np.asarray(x).reshape(-1)


async def sweep(comm: Any, seed: int) -> list[tuple[str, str]]:
    """Every collective, plain and atomic, with sizes on both sides of every threshold; each result is checked.

    Returns each call, with a hash of the result where all members are to have the same.
    """
    text = random.Random(seed)  # the same on all
    hashes: list[tuple[str, str]] = []
    for collective in COLLECTIVES:
        for atomic in (True, False):
            for nbytes in (0, 1, SMALL, SMALL + 1, text.choice((300_000, 1_500_001))):
                dtype = text.choice(sorted(DTYPES))
                form = text.choice(FORMS[collective])
                op = text.choice([name for name in LEGAL if dtype in LEGAL[name] and name != "premul_sum"])
                root, case = text.randrange(comm.world_size), text.randrange(1 << 30)
                many = comm.world_size if collective in ("reduce_scatter", "scatter", "all_to_all") else 1
                count = -(-nbytes // DTYPES[dtype].itemsize // many)  # of a segment
                got = await one(comm, collective, op, dtype, count, form, root, atomic, case)
                hashes.append(
                    (f"{collective} {op} {dtype}[{count}] {form} {atomic=}", hashlib.sha1(got).hexdigest() if got is not None else "")
                )
    return hashes


async def one(comm: Any, collective: str, op: str, dtype: str, count: int, form: str, root: int, atomic: bool, case: int) -> bytes | None:
    """One call, compared with the oracle; returns what all members should have alike."""
    rank, world = comm.rank, comm.world_size
    many = world if collective in ("reduce_scatter", "scatter", "all_to_all") else 1
    given = [oracle.values(dtype, count * many, (case, r)) for r in range(world)]
    x, mine = laid_out(given[rank], form), slice(rank * count, (rank + 1) * count)
    call, how = getattr(comm, collective), {"atomic": atomic}
    out: Any = None
    if collective in ("all_reduce", "reduce", "reduce_scatter"):
        here = collective != "reduce" or rank == root
        if form == "inside":
            out = x[mine]
        elif form in ("out", "strided"):
            out = laid_out(np.zeros(count, x.dtype), form) if here else None
        arguments = (x, root, op) if collective == "reduce" else (x, op)
        info = await done(call(*arguments, out=out, **how))
        if not here:
            assert flat(x).tobytes() == given[rank].tobytes()
            return None
        result = flat(info.out if form == "made" else x if out is None else out)
        part = mine if collective == "reduce_scatter" else slice(None)
        oracle.check(op, DTYPES[dtype], [g[part] for g in given], result)
        assert form in ("in place", "list", "inside") or flat(x).tobytes() == given[rank].tobytes()
        same = collective == "all_reduce"
    elif collective in ("all_gather", "gather"):
        here = collective == "all_gather" or rank == root
        if form == "inside" and here:
            out = np.zeros(world * count, x.dtype)
            out[mine] = x
            x = out[mine]
        elif form in ("out", "strided") and here:
            out = laid_out(np.zeros(world * count, flat(x).dtype), form)
        info = await done(call(*((x,) if collective == "all_gather" else (x, root)), out=out, **how))
        if not here:
            return None
        result = flat(info.out if out is None else out)
        assert result.tobytes() == np.concatenate(given).tobytes()
        same = collective == "all_gather"
    elif collective == "broadcast":
        info = await done(call(x, root, **how))
        result, same = flat(x), True
        assert result.tobytes() == given[root].tobytes()
    elif collective == "scatter":
        x = given[root].copy()
        out = x[mine] if form == "inside" and rank == root else np.zeros(count, x.dtype)
        info = await done(call(out, x if rank == root else None, root, **how))
        result, same = out, False
        assert result.tobytes() == given[root][mine].tobytes()
    else:
        out = np.zeros_like(x) if form == "out" else None
        info = await done(call(x, out=out, **how))
        result, same = flat(info.out if out is None else out), False
        assert result.tobytes() == np.concatenate([g[mine] for g in given]).tobytes()
        assert x.tobytes() == given[rank].tobytes()
    assert info.algorithm == "local"
    return result.tobytes() if same else None


async def series(comm: Any, name: str, counts: list[int], retry: bool) -> list[dict[str, Any]]:
    """All_reduces, one after the other, whatever becomes of each; until the peer is out."""
    found: list[dict[str, Any]] = []
    for turn, count in enumerate(counts):
        in_place = turn % 2 == 0
        x = contribution(name, turn, count)
        before, out = x.tobytes(), None if in_place else np.zeros(count, np.float32)
        try:
            info = await done(comm.all_reduce(x, out=out, retry=retry))
        except pccl.PcclError as e:
            found.append({"error": Failure(type(e).__name__, str(e)), "intact": x.tobytes() == before})
            if isinstance(e, pccl.Evicted):
                return found
            continue
        members, result = [m.name for m in info.members], x if in_place else out
        assert result is not None
        right = bool((result[:-1] == total(members, turn, count)).all())
        found.append({"error": None, "right": right, "bits": hashlib.sha1(result).hexdigest(), "intact": in_place or x.tobytes() == before})
    return found


async def strike_at_word(comm: Any, after: int, late: bool, number: int = signal.SIGKILL) -> None:
    """Have the process send itself a signal just before or after the n-th phase that it says from now on."""
    publish, left = Lane.publish, [after]

    def struck(self: Lane, n: int, phase: int) -> None:
        left[0] -= 1
        if not left[0] and not late:
            signal.pthread_kill(threading.get_ident(), number)
        publish(self, n, phase)
        if not left[0] and late:
            signal.pthread_kill(threading.get_ident(), number)  # one for the process might be taken by another thread, later

    Lane.publish = struck  # type: ignore[method-assign]


async def traces(comm: Any) -> tuple[int, list[str]]:
    """The peer's number, and what its sockets are called."""
    transport = comm._runtime.engine._transport
    return os.getpid(), [name[1:].decode() for sock in transport._listeners if isinstance(name := sock.getsockname(), bytes)]


async def memory_use(comm: Any) -> tuple[bool, str]:
    """Whether the peers read each other's memory, and how they reduce."""
    lane = comm._runtime.engine.lanes.get(0)
    info = await done(comm.all_reduce(np.ones(3)))
    return bool(lane and lane.readable), info.algorithm
