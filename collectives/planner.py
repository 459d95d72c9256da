"""Which algorithm a call uses, cut into slices of what size.

A pure function of what all members know alike (collective, size, world, plan), so that they need not talk about it.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from pccl.collectives.pull import LOCAL
from pccl.collectives.schedules import algorithms, build, find, natural_cuts
from pccl.collectives.schedules.meaning import REDUCING, ROOTED
from pccl.core.errors import InvalidArgument
from pccl.core.step import Schedule
from pccl.topology import trees

WINDOW = 32 << 20
"""Bytes of slices that may lie in scratch or wait for their turn, per call. They also bound what is under way: 1 Gbit/s over 100 ms."""
ONE_SHOT = 64 << 10
"""All-reduces up to this size go to everyone at once: one hop instead of two or more."""
SLICE = 1 << 20
"""Slices of large calls: small enough to keep the arithmetic busy while data comes in, large enough to cost little each."""
CODED_SLICE = 128 << 10
"""Elements of a slice that travels quantized: it is the arithmetic that takes time."""
LEAST_SLICE = 64 << 10

_SMALL = {
    "all_reduce": "direct",
    "reduce_scatter": "direct",
    "all_gather": "direct",
    "broadcast": "direct",
    "reduce": "star",
    "gather": "direct",
    "scatter": "direct",
    "all_to_all": "direct",
    "sendrecv": "direct",
}
_LARGE = {**_SMALL, "all_reduce": "ring", "broadcast": "tree", "reduce": "tree"}
"""What suits: the fewest hops for small calls, an even load for large ones."""
MANY = 16
"""From this world size on, small rooted calls and all-reduces go by trees: a root that serves all others takes as long as they are many."""


class Unreachable(Exception):
    """There is no way to do it with the links that there are."""


class Plan(NamedTuple):
    """How a call runs."""

    schedule: Schedule
    slice_size: int
    """Elements"""


@lru_cache(maxsize=1024)
def plan(
    collective: str,
    algorithm: str,
    world: int,
    count: int,
    itemsize: int,
    *,
    root: int = -1,
    broken: tuple[tuple[int, int], ...] = (),
    hosts: tuple[int, ...] | None = None,
    block: int = 0,
) -> Plan:
    """The plan for a call.

    Args:
        algorithm: "auto", or a name of `algorithms(collective, world)`.
        count: elements per segment (see `pccl.core.step`).
        hosts: rank -> a number for its host; None if that is not known.
        block: what an element that travels stands for, if it is a record of so many quantized ones; else 0. Of records the fewest
            encodings are best, and no result may be encoded by more than one rank.
        broken: pairs of ranks without a link between them; then every algorithm but a spanning tree's is out of the question.

    Raises:
        InvalidArgument: no such algorithm.
        Unreachable: the links that are left do not connect all ranks.
    """
    if algorithm != "auto":
        found = find(collective, algorithm)
        if not found.fits(world):
            known = ", ".join(("auto", *algorithms(collective, world)))
            raise InvalidArgument(f"algorithm: {algorithm!r} does not work with {world} peers; there are {known}")
    nbytes = count * itemsize
    slice_size = _slice(world, itemsize, block)
    if broken and collective == "sendrecv":
        raise Unreachable("there is no link between the two members, and nobody relays for them")
    if broken or (algorithm == "spanning_tree" and collective != "sendrecv"):
        try:
            parents = tuple(int(p) for p in trees.spanning_tree(_links(world, broken), root=root))
        except InvalidArgument as e:
            raise Unreachable(f"the members are not connected by links, and nobody else relays for them: {e}") from None
        return Plan(build(collective, "spanning_tree", world, root=root, parents=parents), slice_size)
    if algorithm == "auto":
        algorithm = "direct" if block and collective in REDUCING else _choose(collective, nbytes, world, hosts)
    cuts = 0
    if collective == "all_reduce" and algorithm in ("direct", "hierarchical") and nbytes <= ONE_SHOT and not block:
        cuts = 1
    if find(collective, algorithm).cyclic:
        # scratch goes round in a circle: a part must stay well below a stream's window
        natural = natural_cuts(collective, algorithm, world)
        cuts = natural * max(1, -(-nbytes // natural // (WINDOW // 8)))
    needs_root = collective in ROOTED or algorithm == "star"
    where = hosts if find(collective, algorithm).levels else None
    return Plan(build(collective, algorithm, world, root=max(root, 0) if needs_root else -1, cuts=cuts, hosts=where), slice_size)


def check_algorithm(collective: str, algorithm: str) -> None:
    """Raise InvalidArgument unless the name is known."""
    if algorithm != "auto":
        known = ("auto", *(() if collective == "sendrecv" else (LOCAL,)), *algorithms(collective))
        if algorithm not in known:
            raise InvalidArgument(f"algorithm: {algorithm!r} is not known for {collective}; there are {', '.join(known)}")


def _choose(collective: str, nbytes: int, world: int, hosts: tuple[int, ...] | None) -> str:
    count = len(set(hosts)) if hosts else world
    near, mixed = count == 1, 1 < count < world
    if collective == "all_reduce":
        if nbytes <= ONE_SHOT:
            if mixed and count < MANY and (world >= MANY or nbytes * world > ONE_SHOT):
                return "hierarchical"  # one hop between hosts, too, and a message for each two of them
            if world >= MANY:
                return "tree"
            return "star" if near and world > 2 else "direct"
        if mixed and (nbytes >= (1 << 20) or count < MANY):
            return "hierarchical"
        return "ring" if nbytes >= (1 << 20) or world < MANY else "halving_doubling"
    if nbytes <= ONE_SHOT:
        return "tree" if world >= MANY and collective in ("broadcast", "reduce", "gather", "scatter") else _SMALL[collective]
    return "hierarchical" if mixed and "hierarchical" in algorithms(collective) else _LARGE[collective]


def _slice(world: int, itemsize: int, block: int) -> int:
    """Elements per slice: four from every peer have to fit into the window."""
    largest = CODED_SLICE // block * itemsize if block else SLICE
    return max(1, min(largest, max(LEAST_SLICE, WINDOW // (4 * world))) // itemsize)


def _links(world: int, broken: Collection[tuple[int, int]]) -> np.ndarray[tuple[int, int], np.dtype[np.bool_]]:
    links = ~np.eye(world, dtype=np.bool_)
    for a, b in broken:
        links[a, b] = links[b, a] = False
    return links
