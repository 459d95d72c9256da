"""The low-water mark, below which nobody needs a verdict any more, across masters."""

from __future__ import annotations

from tests.protocol.cluster import Call, Cluster


def commit(c: Cluster, calls: int) -> None:
    for _ in range(calls):
        for node in c.nodes:
            node.call(Call())
        c.run()


def test_members_forget_calls_under_a_new_master_as_under_the_first() -> None:
    c = Cluster("abc")
    commit(c, 40)
    before = {node.name: len(node.peer.root._records) for node in c.nodes}
    c.restart()
    c.run()
    commit(c, 20)
    assert {node.name: len(node.peer.root._records) for node in c.nodes} == before


def test_what_was_collected_under_one_master_does_not_count_under_the_next() -> None:
    c = Cluster("abc")
    commit(c, 40)
    c.restart()
    c.run()
    commit(c, 2)
    for node in c.nodes:
        node.call(Call())
    while any(c.to_master(n) for n in c.nodes):
        pass
    c.finish_data()
    while any(c.to_master(n) for n in c.nodes):
        pass
    assert all(node.inbox for node in c.nodes)
    ledger = c.group.root
    assert ledger
    assert ledger._low() < ledger._seq
    c.run()
    commit(c, 1)
    assert len(ledger.calls) <= 2
