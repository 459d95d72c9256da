"""All_reduce, broadcast and reduce over trees: up towards a root, down from it, or both. Interior nodes pass on slice by slice.

Each takes one or more trees over the same ranks and sends one part of the data along each: with two trees in which nobody is an
interior node twice (`topology.trees.two_trees`), all links are busy in both directions. A chain is a tree too, and so is a root
with everyone directly below. A tree's streams are a channel of their own; up and down never share one, as they go between the same
two ranks in opposite directions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pccl.collectives.schedules.steps import Program, last, program, rows, where
from pccl.core.step import Action, Ints, Schedule


def _up(rank: int, tree: int, parents: Ints) -> Program:
    """Combine with what comes from the children, in their order, and pass the sum to the parent."""
    children = np.flatnonzero(parents == rank)
    is_root = parents[rank] < 0
    return program(
        rows(Action.REDUCE, tree, peer=children, channel=tree, final=last(len(children)) & is_root),
        rows(Action.SEND, tree, peer=int(parents[rank]), channel=tree, blocks=0 if is_root else 1),
    )


def _down(rank: int, tree: int, parents: Ints) -> Program:
    """Pass on to the children what the parent sent."""
    children = np.flatnonzero(parents == rank)
    return program(
        rows(Action.RECEIVE, tree, peer=int(parents[rank]), channel=tree, blocks=0 if parents[rank] < 0 else 1),
        rows(Action.SEND, tree, peer=children, channel=tree),
    )


def all_reduce(name: str, trees: Sequence[Ints]) -> Schedule:
    """Up and down again. The trees may have different roots."""

    def steps(rank: int) -> Program:
        if len(trees[0]) == 1:
            return rows(Action.COPY, np.arange(len(trees)))
        return program(
            *(_up(rank, tree, parents) for tree, parents in enumerate(trees)),
            *(_down(rank, tree, parents) for tree, parents in enumerate(trees)),
        )

    return Schedule(
        "all_reduce",
        name,
        len(trees[0]),
        cuts=len(trees),
        blocks=len(trees),
        steps=steps,
        cut=lambda block: block,
        source=lambda rank, block: block,
        target=lambda rank, block: block,
    )


def broadcast(name: str, trees: Sequence[Ints]) -> Schedule:
    """Down from rank 0, the root of all trees."""

    def steps(rank: int) -> Program:
        return program(
            rows(Action.COPY, np.arange(len(trees) if rank == 0 else 0)),
            *(_down(rank, tree, parents) for tree, parents in enumerate(trees)),
        )

    return Schedule(
        "broadcast",
        name,
        len(trees[0]),
        cuts=len(trees),
        blocks=len(trees),
        steps=steps,
        cut=lambda block: block,
        source=lambda rank, block: block if rank == 0 else np.full(len(block), -1),
        target=lambda rank, block: block,
        root=0,
    )


def reduce(name: str, trees: Sequence[Ints]) -> Schedule:
    """Up to rank 0, the root of all trees. Partial results are scratch, but nothing goes in circles: any window will do."""

    def steps(rank: int) -> Program:
        if len(trees[0]) == 1:
            return rows(Action.COPY, np.arange(len(trees)))
        return program(*(_up(rank, tree, parents) for tree, parents in enumerate(trees)))

    return Schedule(
        "reduce",
        name,
        len(trees[0]),
        cuts=len(trees),
        blocks=len(trees),
        steps=steps,
        cut=lambda block: block,
        source=lambda rank, block: block,
        target=lambda rank, block: where(np.full(len(block), rank == 0), block),
        root=0,
    )
