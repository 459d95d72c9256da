"""The algorithms by name, and `build`, which makes a schedule of one of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pccl.collectives.schedules import direct, halving, hierarchical, meaning, ring, spanning, star, tree
from pccl.collectives.schedules.steps import relabel, repeat
from pccl.core.errors import InvalidArgument
from pccl.core.step import Ints, Schedule
from pccl.topology import trees


@dataclass(frozen=True, slots=True)
class Job:
    """What a builder may want to know."""

    world: int
    root: int
    shape: trees.Preorder
    """The given tree; a chain where none was given."""
    hosts: Ints
    """Rank -> host; all different where none were given."""


@dataclass(frozen=True, slots=True)
class Algorithm:
    """One way to do one collective."""

    collective: str
    name: str
    make: Callable[[Job], Schedule]
    """In its natural form, over roles."""
    whole: Callable[[Job], Schedule] | None = None
    """Another form, for whole segments (1 cut)."""
    ordered: bool = True
    """Takes an `order`: neighbours in it exchange most."""
    hub: bool = False
    """Takes a `root`, as the rank that does the work, although the collective may have none; roles are ranks."""
    tree: bool = False
    """Needs `parents`; roles are places in preorder."""
    levels: bool = False
    """Takes `hosts`; roles are ranks."""
    cyclic: bool = False
    """Scratch goes round in a circle: a part must have fewer slices than a stream's window, and should have at most half as many.
    Where nothing goes round, any window will do.
    """
    powers_only: bool = False
    """Works only if the world size is a power of two."""

    def fits(self, world: int) -> bool:
        """Whether it works at this world size."""
        if self.collective == "sendrecv":
            return world == 2
        return not self.powers_only or world & (world - 1) == 0


_ALGORITHMS = (
    Algorithm("all_reduce", "ring", lambda job: ring.all_reduce(job.world)),
    Algorithm("all_reduce", "bidirectional_ring", lambda job: ring.bidirectional(job.world)),
    Algorithm("all_reduce", "tree", lambda job: tree.all_reduce("tree", trees.two_trees(job.world))),
    Algorithm("all_reduce", "star", lambda job: star.all_reduce(job.world, job.root), ordered=False, hub=True),
    Algorithm("all_reduce", "halving_doubling", lambda job: halving.halving_doubling(job.world)),
    Algorithm(
        "all_reduce", "direct", lambda job: direct.all_reduce(job.world), whole=lambda job: direct.one_shot(job.world), ordered=False
    ),
    Algorithm(
        "all_reduce",
        "hierarchical",
        lambda job: hierarchical.all_reduce(job.hosts),
        whole=lambda job: hierarchical.one_exchange(job.hosts),
        ordered=False,
        levels=True,
    ),
    Algorithm("reduce_scatter", "hierarchical", lambda job: hierarchical.reduce_scatter(job.hosts), ordered=False, levels=True),
    Algorithm("all_gather", "hierarchical", lambda job: hierarchical.all_gather(job.hosts), ordered=False, levels=True),
    Algorithm("broadcast", "hierarchical", lambda job: hierarchical.broadcast(job.hosts, job.root), ordered=False, levels=True),
    Algorithm("reduce_scatter", "direct", lambda job: direct.reduce_scatter(job.world), ordered=False),
    Algorithm("reduce_scatter", "ring", lambda job: ring.reduce_scatter(job.world), cyclic=True),
    Algorithm("reduce_scatter", "halving", lambda job: halving.halving(job.world), powers_only=True),
    Algorithm("all_gather", "direct", lambda job: direct.all_gather(job.world), ordered=False),
    Algorithm("all_gather", "ring", lambda job: ring.all_gather(job.world)),
    Algorithm("all_gather", "doubling", lambda job: halving.doubling(job.world)),
    Algorithm("broadcast", "direct", lambda job: tree.broadcast("direct", [trees.flat(job.world)]), ordered=False),
    Algorithm("broadcast", "tree", lambda job: tree.broadcast("tree", trees.two_trees_below(job.world))),
    Algorithm("broadcast", "ring", lambda job: tree.broadcast("ring", [trees.chain(job.world)])),
    Algorithm("reduce", "star", lambda job: star.reduce(job.world, job.root), ordered=False, hub=True),
    Algorithm("reduce", "tree", lambda job: tree.reduce("tree", trees.two_trees_below(job.world))),
    Algorithm("reduce", "ring", lambda job: tree.reduce("ring", [trees.chain(job.world)])),
    Algorithm("gather", "direct", lambda job: spanning.gather("direct", _flat(job.world)), ordered=False),
    Algorithm("gather", "tree", lambda job: spanning.gather("tree", _binomial(job.world))),
    Algorithm("scatter", "direct", lambda job: spanning.scatter("direct", _flat(job.world)), ordered=False),
    Algorithm("scatter", "tree", lambda job: spanning.scatter("tree", _binomial(job.world))),
    Algorithm("all_to_all", "direct", lambda job: direct.all_to_all(job.world), ordered=False),
    Algorithm("all_to_all", "ring", lambda job: ring.all_to_all(job.world), cyclic=True),
    Algorithm("sendrecv", "direct", lambda job: direct.sendrecv(job.world), ordered=False),
    *(
        Algorithm(collective, "spanning_tree", make, ordered=False, tree=True)
        for collective, make in (
            ("all_reduce", lambda job: tree.all_reduce("spanning_tree", [job.shape.parents])),
            ("broadcast", lambda job: tree.broadcast("spanning_tree", [job.shape.parents])),
            ("reduce", lambda job: tree.reduce("spanning_tree", [job.shape.parents])),
            ("reduce_scatter", lambda job: spanning.reduce_scatter("spanning_tree", job.shape)),
            ("all_gather", lambda job: spanning.all_gather("spanning_tree", job.shape)),
            ("gather", lambda job: spanning.gather("spanning_tree", job.shape)),
            ("scatter", lambda job: spanning.scatter("spanning_tree", job.shape)),
            ("all_to_all", lambda job: spanning.all_to_all("spanning_tree", job.shape)),
        )
    ),
)

_BY_NAME = {(algorithm.collective, algorithm.name): algorithm for algorithm in _ALGORITHMS}


def algorithms(collective: str, world: int | None = None) -> tuple[str, ...]:
    """Names of the algorithms for a collective; with a world size, of those that work there."""
    meaning.check(collective)
    return tuple(
        algorithm.name for algorithm in _ALGORITHMS if algorithm.collective == collective and (world is None or algorithm.fits(world))
    )


def find(collective: str, algorithm: str) -> Algorithm:
    """An algorithm's traits: what it takes, and when it works."""
    known = algorithms(collective)
    if algorithm not in known:
        raise InvalidArgument(f"no algorithm for {collective} is called {algorithm!r}; there are {', '.join(known)}")
    return _BY_NAME[collective, algorithm]


@lru_cache(maxsize=1024)
def natural_cuts(collective: str, algorithm: str, world: int, hosts: tuple[int, ...] | None = None) -> int:
    """The fewest parts per segment with which an algorithm works; `build` takes multiples of it. (All_reduce `direct` and
    `hierarchical` also take 1.)
    """
    found = find(collective, algorithm)
    _check_fit(found, world)
    return found.make(Job(world, 0, _chain(world), _hosts(f"{collective} by {algorithm}", found, world, hosts))).cuts


def build(
    collective: str,
    algorithm: str,
    world: int,
    *,
    root: int = -1,
    cuts: int = 0,
    order: Sequence[int] | Ints | None = None,
    parents: Sequence[int] | Ints | None = None,
    hosts: Sequence[int] | Ints | None = None,
) -> Schedule:
    """A schedule. Equal arguments give the same one.

    Args:
        collective: one of `meaning.COLLECTIVES`.
        algorithm: one of `algorithms(collective, world)`.
        world: number of ranks.
        root: for broadcast, reduce, gather and scatter, which need one; optional for `star` (the hub; default rank 0) and
            `spanning_tree`.
        cuts: parts per segment, a multiple k of `natural_cuts`: the program then runs in k waves, each over 1/k of every segment. 0
            is the natural number. For all_reduce `direct`, 1 gives the form with one hop, in which everyone sends everything to
            everyone; for `hierarchical`, the one in which that is so between hosts.
        order: position -> rank, for algorithms with `Algorithm.ordered`; the default is rank order. A root begins wherever it
            stands in it.
        parents: rank -> parent, -1 at the root, for `spanning_tree`. A tree with another root than `root` is turned round.
        hosts: rank -> a number for its host, for `hierarchical`; the default is that each rank has one of its own.

    Raises:
        InvalidArgument: there is no such schedule; says why.
    """
    found = find(collective, algorithm)
    return _build(found, world, root, cuts, _numbers(order), _numbers(parents), _numbers(hosts))


@lru_cache(maxsize=256)
def _build(
    found: Algorithm,
    world: int,
    root: int,
    cuts: int,
    order: tuple[int, ...] | None,
    parents: tuple[int, ...] | None,
    hosts: tuple[int, ...] | None,
) -> Schedule:
    name = f"{found.collective} by {found.name}"
    _check_fit(found, world)
    if found.collective in meaning.ROOTED and not 0 <= root < world:
        raise InvalidArgument(f"{name} needs a root among the ranks 0..{world - 1}, got {root}")
    if found.collective not in meaning.ROOTED and root >= 0 and not (found.hub or found.tree):
        raise InvalidArgument(f"{name} has no root, got {root}")
    if not -1 <= root < world:
        raise InvalidArgument(f"root {root} is none of the ranks 0..{world - 1}")
    shape = _shape(name, found, world, root, parents)
    roles = _roles(name, found, world, root, order, shape)

    job = Job(world, max(root, 0), shape, _hosts(name, found, world, hosts))
    base = found.whole(job) if found.whole and cuts == 1 else found.make(job)
    waves, rest = divmod(cuts or base.cuts, base.cuts)
    if rest or waves < 1:
        raise InvalidArgument(f"{name} in a world of {world} takes multiples of {base.cuts} cuts, got {cuts}")
    if np.any(roles != np.arange(world)):
        base = relabel(base, roles)
    return repeat(base, waves)


def _numbers(given: Sequence[int] | Ints | None) -> tuple[int, ...] | None:
    return None if given is None else tuple(np.asarray(given, np.int64).tolist())


def _check_fit(found: Algorithm, world: int) -> None:
    if world < 1:
        raise InvalidArgument(f"a world has at least 1 rank, got {world}")
    if not found.fits(world):
        raise InvalidArgument(
            f"{found.collective} by {found.name} does not work in a world of {world}; what does: "
            f"{', '.join(algorithms(found.collective, world)) or 'nothing'}"
        )


def _shape(name: str, found: Algorithm, world: int, root: int, parents: tuple[int, ...] | None) -> trees.Preorder:
    if not found.tree:
        if parents is not None:
            raise InvalidArgument(f"{name} takes no parents")
        return _chain(world)
    if parents is None or len(parents) != world:
        raise InvalidArgument(f"{name} needs the parents of {world} ranks, got {len(parents or ())}")
    shape = trees.preorder(parents)
    return trees.preorder(trees.rerooted(parents, root)) if root >= 0 else shape


def _hosts(name: str, found: Algorithm, world: int, hosts: tuple[int, ...] | None) -> Ints:
    if hosts is None:
        return np.arange(world)
    if not found.levels:
        raise InvalidArgument(f"{name} takes no hosts")
    if len(hosts) != world:
        raise InvalidArgument(f"{name} needs the hosts of {world} ranks, got {len(hosts)}")
    return np.array(hosts, np.int64)


def _roles(name: str, found: Algorithm, world: int, root: int, order: tuple[int, ...] | None, shape: trees.Preorder) -> Ints:
    """Role -> rank."""
    roles = np.arange(world)
    if order is not None:
        if not found.ordered:
            raise InvalidArgument(f"{name} takes no order")
        if sorted(order) != roles.tolist():
            raise InvalidArgument(f"an order of {world} ranks has each of them once, got {order[:16]}")
        roles = np.array(order, np.int64)
    if found.tree:
        return shape.nodes
    if root >= 0 and not (found.hub or found.levels):
        return np.roll(roles, -int(np.flatnonzero(roles == root)[0]))
    return roles


def _chain(world: int) -> trees.Preorder:
    return trees.Preorder(np.arange(world), trees.chain(world), np.arange(world, 0, -1))


def _flat(world: int) -> trees.Preorder:
    return trees.preorder(trees.flat(world))


def _binomial(world: int) -> trees.Preorder:
    return trees.preorder(trees.binomial(world))
