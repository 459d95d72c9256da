"""Which algorithm a call gets, by its size and by who is where."""

from __future__ import annotations

import pytest

from pccl.collectives.planner import plan

KIB, MIB = 1 << 10, 1 << 20
TWO_BY_TWO, EIGHT_BY_FOUR, MANY_HOSTS = (0, 0, 1, 1), tuple(k // 4 for k in range(32)), tuple(k // 2 for k in range(64))


@pytest.mark.parametrize(
    ("hosts", "nbytes", "algorithm", "cuts"),
    [
        (TWO_BY_TWO, 4, "direct", 1),
        (TWO_BY_TWO, 16 * KIB, "direct", 1),
        (TWO_BY_TWO, 64 * KIB, "hierarchical", 1),
        (TWO_BY_TWO, 65 * KIB, "hierarchical", 4),
        (TWO_BY_TWO, 64 * MIB, "hierarchical", 4),
        ((0, 1, 0, 2, 1), MIB, "hierarchical", 6),
        (EIGHT_BY_FOUR, 4, "hierarchical", 1),
        (EIGHT_BY_FOUR, 100 * KIB, "hierarchical", 32),
        (MANY_HOSTS, 4, "tree", 2),
        (MANY_HOSTS, 100 * KIB, "halving_doubling", 64),
        (MANY_HOSTS, MIB, "hierarchical", 64),
        ((0, 0, 0, 0), 4, "star", 1),
        ((0, 0, 0, 0), MIB, "ring", 4),
        ((0, 1, 2, 3), 64 * KIB, "direct", 1),
        ((0, 1, 2, 3), MIB, "ring", 4),
        (None, MIB, "ring", 64),
    ],
)
def test_all_reduce(hosts, nbytes, algorithm, cuts):
    schedule = plan("all_reduce", "auto", len(hosts or range(64)), nbytes // 4, 4, hosts=hosts).schedule
    assert (schedule.algorithm, schedule.cuts) == (algorithm, cuts)


@pytest.mark.parametrize(("collective", "otherwise"), [("broadcast", "tree"), ("all_gather", "direct"), ("reduce_scatter", "direct")])
def test_the_others_that_know_hosts(collective, otherwise):
    root = 1 if collective == "broadcast" else -1
    for hosts, nbytes, algorithm in [
        (TWO_BY_TWO, KIB, "direct"),
        (TWO_BY_TWO, MIB, "hierarchical"),
        ((0, 1, 2, 3), MIB, otherwise),
        ((0, 0, 0, 0), MIB, otherwise),
    ]:
        assert plan(collective, "auto", 4, nbytes, 1, root=root, hosts=hosts).schedule.algorithm == algorithm


def test_what_travels_quantized_is_not_encoded_at_every_level():
    for collective, algorithm in (("all_reduce", "direct"), ("reduce_scatter", "direct"), ("all_gather", "hierarchical")):
        assert plan(collective, "auto", 4, MIB, 65, hosts=TWO_BY_TWO, block=64).schedule.algorithm == algorithm


def test_without_a_link_hosts_do_not_count():
    made = plan("all_reduce", "auto", 4, MIB, 4, hosts=TWO_BY_TWO, broken=((0, 2),))
    assert made.schedule.algorithm == "spanning_tree"
