"""How a collective runs in one membership: who has which rank, which schedule, over which links. Calls that are alike share it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from pccl.collectives.flow import Flow
from pccl.collectives.planner import Unreachable, plan
from pccl.collectives.program import Layout, Program, layout, program
from pccl.collectives.pull import LOCAL, Errand, errand
from pccl.collectives.schedules.meaning import has_input, has_output, segments
from pccl.collectives.volley import MOST
from pccl.core.errors import CollectiveAborted
from pccl.core.messages import Link
from pccl.core.types import Epoch, Pair, View

KEPT = 1024
"""Routes; more than any program has kinds of calls."""


class Ask(NamedTuple):
    """What of a call its route depends on."""

    collective: str
    algorithm: str
    given: int
    """Elements of the input that the caller gave, -1 without one"""
    got: int
    """Elements of the output, likewise"""
    itemsize: int
    """Of what travels"""
    block: int
    """Elements that make an item of it; 0 if they travel as they are, one by one"""
    root: int
    """Uid, -1 without one"""
    pair: Pair | None


class Route(NamedTuple):
    """What begins an attempt."""

    rank: int
    world: int
    gives: bool
    """This member has an input"""
    gets: bool
    """This member has an output"""
    given_segments: int
    """Of an input"""
    got_segments: int
    """Of an output"""
    algorithm: str
    everywhere: bool
    """Each member folds for itself."""
    program: Program | None
    layout: Layout | None
    segment: int
    """Its elements"""
    flows: Mapping[int, Flow]
    """Rank -> the traffic with it, of those with whom there is any"""
    short: bool
    """One frame each way will do"""
    hub: int | None
    """Then: who folds for all"""
    uids: tuple[int, ...]
    """By rank"""
    errand: Errand | None
    """Through shared memory, without a program"""


class Routes:
    """All routes of a peer, found once per membership.

    Args:
        flow: the traffic with the peer of a uid.
    """

    def __init__(self, flow: Callable[[int], Flow]) -> None:
        self._flow = flow
        self._found: dict[tuple[Epoch, Ask, bool], Route] = {}

    def clear(self) -> None:
        """Memberships have changed."""
        self._found.clear()

    def find(self, ask: Ask, view: View, uid: int, broken: tuple[Link, ...], call: str, *, local: bool) -> Route:
        """The route of a call.

        Args:
            uid: this peer's.
            local: through shared memory.
            broken: pairs of members without a link.
            call: its description, for errors.

        Raises:
            CollectiveAborted: the call does not fit the membership, or there are too few links.
        """
        route = self._found.get((view.epoch, ask, local))
        if route is None:
            if len(self._found) >= KEPT:
                self._found.clear()
            route = self._found[view.epoch, ask, local] = self._make(ask, view, uid, broken, call, local)
        return route

    def _make(self, ask: Ask, view: View, uid: int, links: tuple[Link, ...], call: str, local: bool) -> Route:
        reason = misfit(ask, view)
        if reason:
            raise _aborted(call, reason, view)
        uids = tuple(ask.pair) if ask.pair else tuple(m.uid for m in view.members)
        ranks = {u: r for r, u in enumerate(uids)}
        rank, world, root = ranks[uid], len(uids), ranks.get(ask.root, -1)
        gives, gets = has_input(ask.collective, rank, root), has_output(ask.collective, rank, root)
        many = segments(ask.collective, world)
        count = ask.given // many.source if gives and ask.given >= 0 else ask.got // many.target
        if local:
            todo = errand(ask.collective, world, rank, root, count, ask.itemsize)
            return Route(rank, world, gives, gets, many.source, many.target, LOCAL, False, None, None, count, {}, False, None, uids, todo)
        if ask.algorithm == LOCAL:
            raise _aborted(call, "algorithm='local' is for untagged calls outside of rounds, among members that share memory", view)
        items = -(-count // ask.block) if ask.block else count
        broken = tuple((min(ranks[a], ranks[b]), max(ranks[a], ranks[b])) for a, b in links if a in ranks and b in ranks)
        where = {m.uid: m.host for m in view.members}
        hosts = _numbered([where[u] for u in uids])
        try:
            planned = plan(
                ask.collective, ask.algorithm, world, items, ask.itemsize, root=root, broken=broken, hosts=hosts, block=ask.block
            )
        except Unreachable as e:
            raise _aborted(call, str(e), view) from None
        schedule = planned.schedule
        direct = schedule.algorithm == "direct"
        one_cut = ask.collective == "all_reduce" and schedule.cuts == 1 and (direct or schedule.algorithm == "star")
        prog = program(schedule, rank)
        return Route(
            rank,
            world,
            gives,
            gets,
            many.source,
            many.target,
            schedule.algorithm,
            schedule.cuts == 1 and schedule.algorithm in ("direct", "hierarchical"),
            prog,
            layout(prog, items, planned.slice_size),
            count,
            {r: self._flow(uids[r]) for r in prog.peers},
            one_cut and not ask.block and world > 1 and 0 < count * ask.itemsize <= MOST,
            None if direct else schedule.root,
            uids,
            None,
        )


def _numbered(names: list[str]) -> tuple[int, ...]:
    """Names as numbers, in the order in which they first come."""
    numbers = {name: k for k, name in enumerate(dict.fromkeys(names))}
    return tuple(numbers[name] for name in names)


def misfit(ask: Ask, view: View) -> str:
    """Why a call has no meaning in this membership; empty if it has one."""
    world, uids = view.world_size, [m.uid for m in view.members]
    if ask.pair and not set(ask.pair) <= set(uids):
        return "the other side of it is no longer a member"
    if ask.pair:
        return ""
    if ask.root >= 0 and ask.root not in uids:
        return "its root is no longer a member"
    many, given, got = segments(ask.collective, 2), ask.given, ask.got
    if many.source > 1 and given >= 0 and given % world:
        return f"its input of {given} elements cannot be shared out among {world} members"
    if many.source > many.target and given >= 0 and got >= 0 and given != got * world:
        return f"its input of {given} elements is not {world} times its output of {got}"
    if many.target > many.source and given >= 0 and got >= 0 and got < given * world:
        return f"its output of {got} elements has no room for {world} times {given}"
    return ""


def _aborted(call: str, reason: str, view: View) -> CollectiveAborted:
    lost, left, survivors = (tuple(m.name for m in who) for who in (view.lost, view.left, view.members))
    return CollectiveAborted(f"{call}: {reason}", call=call, reason=reason, lost=lost, left=left, survivors=survivors)
