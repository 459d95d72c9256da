"""Trees over ranks, as arrays of parents: ``parents[rank]`` is the rank above, -1 at the root.

The shapes (`chain`, `flat`, `binomial`, `binary`, `two_trees`) are over positions 0..count-1, and whoever uses them says which rank
plays which position. `spanning_tree` is over the ranks themselves: it makes do with the links that there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pccl.core.errors import InvalidArgument
from pccl.core.step import Ints


def chain(count: int) -> Ints:
    """0 <- 1 <- 2 <- ..."""
    return np.arange(-1, count - 1, dtype=np.int64)


def flat(count: int) -> Ints:
    """Everyone directly below 0."""
    parents = np.zeros(count, np.int64)
    parents[:1] = -1
    return parents


def binomial(count: int) -> Ints:
    """The binomial tree with root 0: the parent lacks the lowest bit that is set. Subtrees are contiguous, so it is in preorder.

    Thakur, Rabenseifner, Gropp: Optimization of collective communication operations in MPICH (IJHPCA 19(1), 2005), section 4.2.
    """
    position = np.arange(count, dtype=np.int64)
    parents = position & (position - 1)
    parents[:1] = -1
    return parents


def binary(count: int) -> Ints:
    """A binary tree over positions in order, in which every second position, from 0, is a leaf.

    Numbered from 1, a position's lowest set bit tells its height, and both children differ from it in the bit below. Where the
    right child does not exist, the top of what remains to the right takes its place, so the depth is floor(log2(count)). This is
    the tree of Sanders, Speck and Traeff (see `two_trees`), computed with bits as in NCCL's src/graph/trees.cc, but without NCCL's
    extra root.
    """
    position = np.arange(1, count + 1, dtype=np.int64)
    bit = position & -position
    below = position ^ bit
    above = below | bit << 1
    return np.where(above <= count, above, below) - 1


def two_trees(count: int) -> tuple[Ints, Ints]:
    """Two binary trees over the same positions; no position is an interior node of both, so two halves of the data load every node
    alike.

    The second is the first one mirrored, or shifted by one if the count is odd. Sanders, Speck, Traeff: Two-tree algorithms for
    full bandwidth broadcast, reduction and scan (Parallel Computing 35, 2009); used by NCCL since 2.4.
    """
    first = binary(count)
    position = np.arange(count, dtype=np.int64)
    return first, renamed(first, position[::-1] if count % 2 == 0 else (position + 1) % count)


def two_trees_below(count: int) -> tuple[Ints, Ints]:
    """`two_trees` over positions 1..count-1, with position 0 as the parent of both roots: for operations that have a root (same
    source).
    """
    if count == 1:
        return chain(1), chain(1)
    first, second = (np.concatenate([[-1], parents + 1]) for parents in two_trees(count - 1))
    return first, second


def renamed(parents: Ints, names: Ints) -> Ints:
    """The same tree with node i called ``names[i]``."""
    other = np.empty_like(parents)
    other[names] = np.where(parents < 0, -1, names[parents])
    return other


class Preorder(NamedTuple):
    """A tree with its nodes numbered depth first: a node comes before its subtree, and every subtree is contiguous."""

    nodes: Ints
    """Number -> node of the original tree."""
    parents: Ints
    """Number -> the parent's number."""
    sizes: Ints
    """Number -> nodes in its subtree, itself included."""


def preorder(parents: Sequence[int] | Ints) -> Preorder:
    """Number the nodes of a tree depth first, children in rising order.

    Raises:
        InvalidArgument: these are not the parents of one tree.
    """
    above = [int(parent) for parent in parents]
    count = len(above)
    if above.count(-1) != 1 or min(above) < -1 or max(above) >= count:
        raise InvalidArgument(f"parents of a tree over {count} ranks name ranks, and one of them is -1; got {_short(above)}")
    children: list[list[int]] = [[] for _ in range(count)]
    for node in reversed(range(count)):
        if above[node] >= 0:
            children[above[node]].append(node)
    nodes: list[int] = []
    stack = [above.index(-1)]
    while stack:
        nodes.append(stack.pop())
        stack.extend(children[nodes[-1]])
    if len(nodes) < count:
        raise InvalidArgument(f"parents must form one tree, but some ranks only lead in a circle: {_short(above)}")
    number = np.empty(count, np.int64)
    number[nodes] = np.arange(count)
    sizes = np.ones(count, np.int64)
    for node in reversed(nodes[1:]):
        sizes[number[above[node]]] += sizes[number[node]]
    order = np.array(nodes, np.int64)
    return Preorder(order, renamed(np.array(above, np.int64), number), sizes)


def rerooted(parents: Sequence[int] | Ints, root: int) -> Ints:
    """The same edges with another root: the links on the way from it to the old root turn round."""
    turned = np.array(parents, np.int64)
    node, above = root, -1
    for _ in range(len(turned)):
        up = int(parents[node])
        turned[node] = above
        if up < 0:
            return turned
        node, above = up, node
    raise InvalidArgument(f"parents must form one tree, but rank {root} does not lead to its root: {_short(list(map(int, parents)))}")


def depths(parents: Ints) -> Ints:
    """Hops from each node to the root."""
    depth = np.zeros(len(parents), np.int64)
    at = np.array(parents)
    while np.any(at >= 0):
        depth += at >= 0
        at = np.where(at >= 0, parents[at], -1)
    return depth


def spanning_tree(links: npt.NDArray[np.bool_], root: int = -1, *, fanout: int = 2) -> Ints:
    """A tree that uses only links that exist, found breadth first from the root.

    Nobody gets more than `fanout` children while that reaches everyone, since on an almost complete graph an unbounded search would
    hang the world on one rank; where it does not, the bound rises.

    Args:
        links: ``links[i, j]`` says whether i reaches j; a tree uses a link both ways, so it needs both.
        root: its root; -1 for a rank with most links.
        fanout: children per rank.

    Raises:
        InvalidArgument: the links do not connect all ranks.
    """
    both = links & links.T
    count = len(both)
    if root < 0:
        root = int(both.sum(axis=1).argmax())
    parents = np.full(count, -1, np.int64)
    missing = np.ones(count, np.bool_)
    missing[root] = False
    found = [root]
    grown = np.zeros(count, np.int64)
    for most in range(min(fanout, count), count + 1):
        for node in found:  # grows while we walk it
            adopted = np.flatnonzero(both[node] & missing)[: max(0, most - grown[node])]
            parents[adopted] = node
            missing[adopted] = False
            grown[node] += len(adopted)
            found.extend(adopted.tolist())
        if not missing.any():
            break
    if missing.any():
        raise InvalidArgument(f"no links lead from rank {root} to ranks {_short(np.flatnonzero(missing).tolist())}")
    return parents


def _short(items: list[int]) -> str:
    return f"[{', '.join(map(str, items[:16]))}{', ...' if len(items) > 16 else ''}]"
