"""Collectives with a segment per rank over one tree, whichever it is: for peers of whom some pairs have no link, and for few hops
(binomial).

Ranks are numbered in preorder (`topology.trees.preorder`), so that the segments of a subtree are contiguous: what crosses a link of
the tree is a range of blocks one way and the rest the other way, and a program has a few steps per neighbour instead of a few per
rank.

No bound on slices, although relays keep blocks as scratch: every stream carries its blocks in rising order. Take the lowest slice
that has yet to arrive: all before it are gone from the windows, it is next in each stream on its way, and its way has no circle; so
it can go on.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pccl.collectives.schedules.steps import Program, program, rows, where, zero
from pccl.core.step import Action, Ints, Schedule
from pccl.topology.trees import Preorder


class _Node:
    """A rank's place in the tree: its parent (-1 at the root), its children, and where its subtree and theirs end."""

    def __init__(self, tree: Preorder, rank: int) -> None:
        self.rank = rank
        self.world = len(tree.parents)
        self.parent = int(tree.parents[rank])
        self.end = rank + int(tree.sizes[rank])
        self.children = [(int(child), int(child + tree.sizes[child])) for child in np.flatnonzero(tree.parents == rank)]

    def inside(self, action: Action, peer: int, low: int, high: int) -> Program:
        """A step on the blocks of a subtree."""
        return rows(action, low, peer=peer, blocks=high - low)

    def outside(self, action: Action, peer: int, low: int, high: int) -> Program:
        """Steps on all blocks but those of a subtree."""
        return rows(action, np.array([0, high]), peer=peer, blocks=np.array([low, self.world - high]))


def gather(name: str, tree: Preorder) -> Schedule:
    """Each subtree's segments go to its parent. With a binomial tree, this is how MPICH gathers."""

    def steps(rank: int) -> Program:
        node = _Node(tree, rank)
        made = [node.inside(Action.RECEIVE, child, child, end) for child, end in node.children]
        if node.parent < 0:
            return program(rows(Action.COPY, 0), *made)
        return program(*made, node.inside(Action.SEND, node.parent, rank, node.end))

    return _schedule(
        "gather",
        name,
        tree,
        steps,
        source=lambda rank, block: where(block == rank, 0),
        target=lambda rank, block: where(np.full(len(block), rank == 0), block),
        root=0,
    )


def scatter(name: str, tree: Preorder) -> Schedule:
    """A gather backwards. Larger subtrees come first, as they have further to go."""

    def steps(rank: int) -> Program:
        node = _Node(tree, rank)
        made = [node.inside(Action.SEND, child, child, end) for child, end in sorted(node.children, key=_largest)]
        if node.parent < 0:
            return program(*made, rows(Action.COPY, 0))
        return program(node.inside(Action.RECEIVE, node.parent, rank, node.end), *made)

    return _schedule(
        "scatter",
        name,
        tree,
        steps,
        source=lambda rank, block: where(np.full(len(block), rank == 0), block),
        target=lambda rank, block: where(block == rank, 0),
        root=0,
    )


def all_gather(name: str, tree: Preorder) -> Schedule:
    """Every segment floods the tree: over each link go the segments of one side, and back those of the other."""

    def steps(rank: int) -> Program:
        node = _Node(tree, rank)
        made = [rows(Action.COPY, rank)]
        made += [node.inside(Action.RECEIVE, child, child, end) for child, end in node.children]
        if node.parent >= 0:
            made.append(node.inside(Action.SEND, node.parent, rank, node.end))
            made.append(node.outside(Action.RECEIVE, node.parent, rank, node.end))
        made += [node.outside(Action.SEND, child, child, end) for child, end in node.children]
        return program(*made)

    return _schedule(
        "all_gather",
        name,
        tree,
        steps,
        source=lambda rank, block: where(block == rank, 0),
        target=lambda rank, block: block,
    )


def reduce_scatter(name: str, tree: Preorder) -> Schedule:
    """An all_gather backwards: over each link go partial results for the segments beyond it, combined from all that lies on this
    side.
    """

    def steps(rank: int) -> Program:
        node = _Node(tree, rank)
        if node.world == 1:
            return rows(Action.COPY, 0)
        made = [node.outside(Action.REDUCE, child, child, end) for child, end in node.children]
        if node.parent >= 0:
            made.append(node.outside(Action.SEND, node.parent, rank, node.end))
            made.append(node.inside(Action.REDUCE, node.parent, rank, node.end))
        made[-1] = _finish(made[-1], rank)
        made += [node.inside(Action.SEND, child, child, end) for child, end in node.children]
        return program(*made)

    return _schedule(
        "reduce_scatter",
        name,
        tree,
        steps,
        source=lambda rank, block: block,
        target=lambda rank, block: where(block == rank, 0),
    )


def all_to_all(name: str, tree: Preorder) -> Schedule:
    """Block ``s * world + d`` goes from s to d the way the tree leads. The steps of a rank are as many as the rows that pass it:
    whatever crosses a link is a range or two of each source's blocks.
    """
    world = len(tree.parents)

    def leaving(action: Action, peer: int, low: int, high: int) -> Program:
        """From sources in a subtree to all beyond it."""
        first = np.arange(low, high)[:, None] * world + np.array([0, high])
        return rows(action, first.ravel(), peer=peer, blocks=np.tile([low, world - high], high - low))

    def entering(action: Action, peer: int, low: int, high: int) -> Program:
        """From all beyond a subtree to those in it."""
        sources = np.delete(np.arange(world), np.s_[low:high])
        return rows(action, sources * world + low, peer=peer, blocks=high - low)

    def steps(rank: int) -> Program:
        node = _Node(tree, rank)
        made = [rows(Action.COPY, rank * world + rank)]
        made += [leaving(Action.RECEIVE, child, child, end) for child, end in node.children]
        if node.parent >= 0:
            made.append(leaving(Action.SEND, node.parent, rank, node.end))
            made.append(entering(Action.RECEIVE, node.parent, rank, node.end))
        made += [entering(Action.SEND, child, child, end) for child, end in node.children]
        return program(*made)

    return Schedule(
        "all_to_all",
        name,
        world,
        cuts=1,
        blocks=world * world,
        steps=steps,
        cut=zero,
        source=lambda rank, block: where(block // world == rank, block % world),
        target=lambda rank, block: where(block % world == rank, block // world),
    )


def _largest(child: tuple[int, int]) -> int:
    return child[0] - child[1]


def _finish(steps: Program, rank: int) -> Program:
    """Split off the rank's own block, with which its result is complete."""
    steps = program(steps)
    at = int(np.flatnonzero((steps["block"] <= rank) & (rank < steps["block"] + steps["blocks"]))[0])
    before, own, after = steps[at : at + 1].copy(), steps[at : at + 1].copy(), steps[at : at + 1].copy()
    before["blocks"] = rank - before["block"]
    own["block"], own["blocks"], own["final"] = rank, 1, True
    after["blocks"] -= before["blocks"] + 1
    after["block"] = rank + 1
    return program(steps[:at], before, own, after, steps[at + 1 :])


def _schedule(
    collective: str,
    name: str,
    tree: Preorder,
    steps: Callable[[int], Program],
    *,
    source: Callable[[int, Ints], Ints],
    target: Callable[[int, Ints], Ints],
    root: int = -1,
) -> Schedule:
    world = len(tree.parents)
    return Schedule(
        collective,
        name,
        world,
        cuts=1,
        blocks=world,
        steps=steps,
        cut=zero,
        source=source,
        target=target,
        root=root,
    )
