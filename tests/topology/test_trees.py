from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pccl.core.errors import InvalidArgument
from pccl.core.step import Ints
from pccl.topology import trees

WORLDS = [*range(1, 70), 127, 128, 129, 1000]


def children(parents: Ints) -> Ints:
    """How many each node has."""
    return np.bincount(parents[parents >= 0], minlength=len(parents))


def is_tree(parents: Ints) -> bool:
    return sorted(trees.preorder(parents).nodes.tolist()) == list(range(len(parents)))


@st.composite
def random_trees(draw: st.DrawFn) -> Ints:
    """Any tree, its ranks in any order."""
    count = draw(st.integers(1, 40))
    above = [draw(st.integers(0, node - 1)) if node else -1 for node in range(count)]
    names = draw(st.permutations(range(count)))
    return trees.renamed(np.array(above), np.array(names))


@pytest.mark.parametrize("shape", [trees.chain, trees.flat, trees.binomial, trees.binary])
def test_shapes_are_trees(shape):
    assert all(is_tree(shape(world)) for world in WORLDS)


@pytest.mark.parametrize("shape", [trees.chain, trees.flat, trees.binomial])
def test_rooted_shapes_are_in_preorder_with_root_0(shape):
    assert all(np.array_equal(trees.preorder(shape(world)).nodes, np.arange(world)) for world in WORLDS)


def test_binomial_depth_counts_bits():
    assert trees.depths(trees.binomial(64)).tolist() == [node.bit_count() for node in range(64)]


def test_binary_tree_of_13():
    # numbered from 1: 8 on top of 4 and 12, every odd number a leaf, and 13 in place of the missing 14
    assert (trees.binary(13) + 1).tolist() == [2, 4, 2, 8, 6, 4, 6, 0, 10, 12, 10, 8, 12]


@pytest.mark.parametrize("world", WORLDS)
def test_two_trees_are_shallow_binary_and_share_no_interior_node(world):
    for pair, count in ((trees.two_trees(world), world), (trees.two_trees_below(world), world - 1)):
        inner = np.zeros(world, int)
        for parents in pair:
            assert is_tree(parents)
            assert trees.depths(parents).max() <= count.bit_length() - (count == world)
            below = children(parents)
            assert below.max() <= 2
            inner += below > 0
        if count < world:
            inner = inner[1:]  # the root of a broadcast sends to both trees
        assert inner.max(initial=0) <= 1


def test_the_root_of_two_trees_below_has_one_child_in_each():
    for parents in trees.two_trees_below(17):
        assert parents[0] == -1
        assert children(parents)[0] == 1


@given(random_trees())
def test_preorder_numbers_subtrees_contiguously(parents):
    nodes, above, sizes = trees.preorder(parents)
    assert above[0] == -1
    assert np.array_equal(trees.renamed(above, nodes), parents)
    for number in range(1, len(nodes)):
        assert above[number] < number < above[number] + sizes[above[number]]
    assert sizes.tolist() == [1 + sum(sizes[above == number]) for number in range(len(nodes))]


@given(random_trees(), st.data())
def test_rerooted_keeps_the_edges(parents, data):
    root = data.draw(st.integers(0, len(parents) - 1))
    turned = trees.rerooted(parents, root)

    def edges(tree):
        return {frozenset((node, above)) for node, above in enumerate(tree.tolist()) if above >= 0}

    assert turned[root] == -1
    assert is_tree(turned)
    assert edges(turned) == edges(parents)


@pytest.mark.parametrize("parents", [[], [0], [-1, -1], [1, 0], [-1, 2, 1], [-1, 5], [-1, -2]])
def test_what_is_no_tree_is_refused(parents):
    with pytest.raises(InvalidArgument, match="parents"):
        trees.preorder(parents)


def test_rerooting_a_circle_is_refused():
    with pytest.raises(InvalidArgument, match="does not lead to its root"):
        trees.rerooted([-1, 2, 1], 1)


def links(world: int, seed: int, density: float) -> np.ndarray:
    """A connected graph."""
    random = np.random.default_rng(seed)
    made = np.triu(random.random((world, world)) < density, 1)
    for node in range(1, world):
        made[random.integers(node), node] = True
    shuffle = random.permutation(world)
    return (made | made.T)[np.ix_(shuffle, shuffle)]


@pytest.mark.parametrize("seed", range(20))
def test_spanning_tree_uses_only_links(seed):
    world = 1 + seed * 3
    graph = links(world, seed, 0.1)
    for root in (-1, 0, world - 1):
        parents = trees.spanning_tree(graph, root)
        assert is_tree(parents)
        assert root < 0 or parents[root] == -1
        assert all(graph[node, above] for node, above in enumerate(parents.tolist()) if above >= 0)


def test_spanning_tree_is_binary_on_an_almost_complete_graph():
    graph = ~np.eye(64, dtype=bool)
    graph[3, 40] = False  # one direction is enough to make a link useless
    parents = trees.spanning_tree(graph, 3)
    assert children(parents).max() <= 2
    assert trees.depths(parents).max() == 6
    assert trees.spanning_tree(graph, 3, fanout=99).tolist().count(3) == 62


def test_spanning_tree_raises_the_fanout_where_it_must():
    star = np.zeros((9, 9), bool)
    star[4] = star[:, 4] = True
    assert trees.spanning_tree(star, 0).tolist() == [-1, 4, 4, 4, 0, 4, 4, 4, 4]
    assert trees.spanning_tree(star)[4] == -1, "the best connected rank is the root"


def test_spanning_tree_names_who_cannot_be_reached():
    graph = np.ones((5, 5), bool)
    graph[3:, :3] = False
    with pytest.raises(InvalidArgument, match=r"no links lead from rank 0 to ranks \[3, 4\]"):
        trees.spanning_tree(graph, 0)
