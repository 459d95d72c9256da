"""What processes of the fault checks do: reduce, look closely at their inputs, and come back."""

from __future__ import annotations

from typing import Any

import numpy as np

import pccl
from tests.checks.processes import Failure
from tests.checks.support import join

_again: dict[str, Any] = {}
"""The communicator of a peer that has come back"""


def contribution(name: str, turn: int, count: int) -> np.ndarray[Any, Any]:
    """What a peer gives: small integers, so that sums are exact, and garbage in the bits of a NaN at the end."""
    k = int(name.removeprefix("P"))
    x = ((np.arange(count) * 3 + 17 * k + turn) % 101).astype(np.float32)
    x[-1:].view(np.uint32)[:] = 0x7FA00001 + 16 * k  # a NaN that arithmetic would not leave as it is
    return x


def total(names: list[str], turn: int, count: int) -> np.ndarray[Any, Any]:
    """The sum over these peers, but for the last element."""
    return sum([contribution(name, turn, count)[:-1] for name in names], np.zeros(count - 1, np.float32))


async def reduce(
    comm: Any, name: str, turn: int, count: int, in_place: bool, retry: bool = False, quantize: str | None = None
) -> dict[str, Any]:
    """One all_reduce, and what came of it. In float16 the sums are exact, too."""
    comm = _again.get("comm", comm)
    x = contribution(name, turn, count)
    before = x.tobytes()
    out = None if in_place else np.full(count, -1, np.float32)
    try:
        info = await comm.all_reduce(x, out=out, retry=retry, quantize=quantize)
    except pccl.PcclError as e:
        data = {k: v for k, v in vars(e).items() if isinstance(v, (str, tuple))}
        return {"error": Failure(type(e).__name__, str(e), data), "intact": x.tobytes() == before}
    members = [m.name for m in info.members]
    result = x if out is None else out
    right = bool((result[:-1] == total(members, turn, count)).all() and np.isnan(result[-1]))
    return {"error": None, "members": members, "right": right, "bits": result.tobytes(), "intact": in_place or x.tobytes() == before}


async def update_to(comm: Any, world: int) -> list[str]:
    """Update until the group has so many members."""
    comm = _again.get("comm", comm)
    while comm.world_size < world:
        await comm.update()
    return [m.name for m in comm.view.members]


async def rejoin(comm: Any, address: str, name: str, world: int) -> int:
    """Connect again, after an eviction."""
    await comm.close()
    _again["comm"] = await join(address, name, world)
    return int(_again["comm"].world_size)
