"""The master's group: who comes in and when, who goes, and what a master that stands in for a lost one makes of its members' reports."""

from __future__ import annotations

from pccl.core.messages import Reason
from pccl.protocol.record import State
from tests.protocol.cluster import Call, Cluster, Node


def names(node: Node) -> str:
    return "".join(m.name for m in node.peer.root.view.members)


def committed(*calls: Call) -> list[bool | None]:
    return [x.outcome.committed if x.outcome else None for x in calls]


def collective(c: Cluster, *members: str) -> list[bool | None]:
    """One more call, of these nodes."""
    calls = [c[name].call(Call()) for name in members]
    c.run()
    return committed(*calls)


def pass_time(c: Cluster, seconds: float) -> None:
    for _ in range(int(seconds * 2)):
        c.tick(0.5)
        for n in c.nodes:
            if n.member:
                n.peer.beat(0)
        c.run()


# --- how newcomers come in ------------------------------------------------------------------------------------------------


def test_a_group_begins_when_those_who_wait_are_enough_for_each_of_them() -> None:
    c = Cluster()
    for name, least in (("A", 3), ("B", 2)):
        c.add(name, min_world_size=least)
        c.run()
    assert not any(n.member for n in c.nodes)
    c.add("C", min_world_size=1)
    c.run()
    assert [names(n) for n in c.nodes] == ["ABC"] * 3
    assert [n.peer.root.view.min_world_size for n in c.nodes] == [3] * 3


def test_one_that_wants_more_than_there_are_is_left_waiting() -> None:
    c = Cluster()
    c.add("A", min_world_size=2)
    c.add("B", min_world_size=5)
    c.add("D", min_world_size=2)
    c.run()
    assert [n.member for n in c.nodes] == [True, False, True]
    assert names(c["A"]) == "AD"


def test_too_few_are_told_at_the_next_call_and_an_update_waits() -> None:
    c = Cluster()
    for name in "AB":
        c.add(name, min_world_size=2)
    c.run()
    for name in "AB":
        c[name].update()
    c["B"].die()
    c.notice(c["B"])
    c.run()
    a = c["A"]
    told = a.call(Call(retry=True))
    c.run()
    assert told.outcome
    assert told.outcome.reason == Reason.TOO_FEW
    u = a.update()
    c.run()
    if committed(u) == [True]:  # it told of the loss
        u = a.update()
        c.run()
    assert committed(u) == [None]
    c.add("N")
    c.run()
    assert committed(u) == [True]
    assert names(c["N"]) == "AN"
    for n in c.nodes:
        n.update()
    assert collective(c, "A", "N") == [True, True]


def test_an_update_that_is_cancelled_while_a_newcomer_comes_in_keeps_it_waiting() -> None:
    """The update has ended for all, so nothing may come of it any more; the next one lets the newcomer in."""
    c = Cluster("AB")
    c.add("J")
    c.run()
    updates = [c[name].update() for name in "AB"]
    for name in "AB":
        while c.to_master(c[name]):
            pass
    assert c.group._admission  # links are being made
    c["A"].expire(updates[0], Reason.CANCELLED)
    c.to_master(c["A"])
    while c.to_node(c["A"]):
        pass
    assert committed(*updates) == [False, None]
    early = c["A"].call(Call())  # it goes on before the links are made
    c.run()
    assert committed(*updates) == [False, False]
    assert not c["J"].member
    late = c["B"].call(Call())
    c.run()
    assert committed(early, late) == [True, True]
    again = [c[name].update() for name in "AB"]
    c.run()
    assert committed(*again) == [True, True]
    assert [names(n) for n in c.nodes] == ["ABJ"] * 3


def test_a_tag_is_free_again_when_its_call_was_cancelled_in_the_queue() -> None:
    c = Cluster("AB")
    a = c["A"]
    update = a.update()  # not skipped: no verdict before it; calls after it wait in a queue
    waits = a.call(Call("t", tag="t"))
    assert waits.record.state is State.QUEUED
    a.expire(waits, Reason.CANCELLED)
    assert committed(waits) == [False]
    again = a.call(Call("t", tag="t"))
    c["B"].update()
    c.run()
    assert committed(update) == [True]
    b = [c["B"].call(Call("t", tag="t")) for _ in range(1)]
    c.run()
    assert committed(*b) == [False]  # A's first use, cancelled
    b.append(c["B"].call(Call("t", tag="t")))
    c.run()
    assert committed(again, b[1]) == [True, True]
