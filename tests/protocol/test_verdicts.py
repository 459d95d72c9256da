"""Calls, verdicts, losses and takeovers on the real machines."""

from __future__ import annotations

import pytest

from pccl.core.messages import Reason
from pccl.protocol.record import State
from tests.protocol.cluster import Call, Cluster


def test_a_group_forms_when_enough_wait() -> None:
    c = Cluster()
    c.add("A", min_world_size=2)
    c.run()
    assert not c["A"].member
    c.add("B", min_world_size=2)
    c.run()
    assert [m.name for m in c["A"].peer.root.view.members] == ["A", "B"]
    assert c["A"].peer.root.epoch == c["B"].peer.root.epoch


@pytest.mark.parametrize("retry", [False, True])
def test_all_done_is_a_commit(retry: bool) -> None:
    c = Cluster("ABC")
    calls = [n.call(Call(retry=retry)) for n in c.nodes]
    c.run()
    assert all(x.outcome and x.outcome.committed for x in calls)
    c.check()


def test_nobody_commits_before_all_are_done() -> None:
    c = Cluster("ABC")
    calls = [n.call(Call()) for n in c.nodes]
    for node, call in zip(c.nodes[:2], calls[:2], strict=True):
        node.complete(call)
    c.pump()
    assert [x.outcome for x in calls] == [None] * 3
    assert calls[0].record.state is State.DONE


@pytest.mark.parametrize("retry", [False, True])
def test_a_loss_aborts_or_retries(retry: bool) -> None:
    c = Cluster("ABC")
    calls = [n.call(Call(retry=retry)) for n in c.nodes]
    c.pump()
    c["C"].die()
    c.notice(c["C"])
    c.run()
    a, b, _ = calls
    assert a.outcome
    assert b.outcome
    assert a.outcome.committed == b.outcome.committed == retry
    assert [m.name for m in a.outcome.view.lost] == ["C"]
    assert a.outcome.view.world_size == 2
    assert a.restored == int(retry)
    if not retry:
        assert a.outcome.reason == Reason.LOSS
    c.check()


def test_a_loss_after_all_were_done_commits() -> None:
    c = Cluster("ABC")
    calls = [n.call(Call()) for n in c.nodes]
    c.finish_data()
    c["C"].die()
    c["C"].outbox.clear()
    c.notice(c["C"])
    c.run()
    assert calls[0].outcome
    assert calls[0].outcome.committed
    assert calls[1].outcome
    assert calls[1].outcome.committed


def test_an_idle_loss_is_told_by_the_next_call() -> None:
    c = Cluster("ABC")
    c["C"].die()
    c.notice(c["C"])
    c.run()
    a = c["A"].call(Call())
    c.run()
    assert a.outcome
    assert not a.outcome.committed
    b = c["B"].call(Call())
    c.run()
    assert b.outcome
    assert b.outcome.reason == Reason.LOSS
    again = [c[n].call(Call()) for n in "AB"]
    c.run()
    assert all(x.outcome and x.outcome.committed for x in again)


def test_an_idle_loss_is_told_by_an_update_that_returns() -> None:
    c = Cluster("ABC")
    c["C"].die()
    c.notice(c["C"])
    c.run()
    updates = [c[n].update() for n in "AB"]
    c.run()
    assert all(x.outcome and x.outcome.committed for x in updates)
    assert updates[0].outcome
    assert [m.name for m in updates[0].outcome.view.lost] == ["C"]
    again = [c[n].call(Call()) for n in "AB"]
    c.run()
    assert all(x.outcome and x.outcome.committed for x in again)


def test_an_idle_loss_and_a_call_that_retries() -> None:
    c = Cluster("ABC")
    c["C"].die()
    c.notice(c["C"])
    c.run()
    calls = [c[n].call(Call(retry=True)) for n in "AB"]
    c.run()
    assert all(x.outcome and x.outcome.committed for x in calls)


def test_a_deadline_before_done_is_final_for_all() -> None:
    c = Cluster("ABC")
    a = c["A"].call(Call(retry=True))
    b = c["B"].call(Call(retry=True))
    c["A"].expire(a, Reason.DEADLINE)
    c.run()
    assert a.outcome
    assert a.outcome.reason == Reason.DEADLINE
    assert c["C"].peer.uid in a.outcome.missing
    assert b.outcome
    assert b.outcome.reason == Reason.DEADLINE
    late = c["C"].call(Call(retry=True))
    c.run()
    assert late.outcome
    assert late.outcome.reason == Reason.DEADLINE
    again = [n.call(Call()) for n in c.nodes]
    c.run()
    assert all(x.outcome and x.outcome.committed for x in again)


def test_after_done_the_master_ends_the_call() -> None:
    c = Cluster("ABC")
    calls = [n.call(Call()) for n in c.nodes]
    c["A"].complete(calls[0])
    c["A"].expire(calls[0], Reason.CANCELLED)
    assert calls[0].outcome is None
    c.pump()
    assert all(x.outcome and not x.outcome.committed for x in calls)
    c.check()


def test_mismatch_names_both_sides() -> None:
    c = Cluster("AB")
    a = c["A"].call(Call("all_reduce(float32[4], sum)"))
    b = c["B"].call(Call("broadcast(float32[4], root=0)"))
    c.tick(0.02)
    c.pump()
    c.tick(0.02)
    c.pump()
    for x in (a, b):
        assert x.outcome
        assert x.outcome.reason == Reason.MISMATCH
        assert {claim.description for claim in x.outcome.claims} == {a.description, b.description}


def test_takeover_with_calls_in_flight() -> None:
    c = Cluster("ABC")
    done = [n.call(Call()) for n in c.nodes]
    open_ = [n.call(Call(retry=True)) for n in c.nodes[:2]]
    for node, call in zip(c.nodes, done, strict=True):
        node.complete(call)
    c.restart()
    c.pump()
    assert all(x.outcome and x.outcome.committed for x in done)
    assert c["A"].peer.root.epoch.term == 2
    open_.append(c["C"].call(Call(retry=True)))
    c.run()
    assert all(x.outcome and x.outcome.committed for x in open_)
    c.check()


def test_takeover_evicts_the_silent() -> None:
    c = Cluster("ABC")
    c.restart(reconnect=False)
    for name in "AB":
        c[name].connect()
    c.pump()
    assert c["A"].peer.root.epoch.term == 1
    c.tick(c.options.heartbeat_timeout + 0.1)
    c.run()
    assert c["A"].peer.root.view.world_size == 2
    c["C"].connect()
    c.run()
    assert c["C"].ended


def test_a_newcomer_enters_in_update() -> None:
    c = Cluster("AB")
    c.add("J")
    c.run()
    assert not c["J"].member
    u = [c[n].update() for n in "AB"]
    c.run()
    assert c["J"].member
    assert all(x.outcome and x.outcome.committed for x in u)
    assert u[0].outcome
    assert [m.name for m in u[0].outcome.view.joined] == ["J"]
    again = [n.update() for n in c.nodes]  # at once, on all
    assert all(x.outcome and x.outcome.committed for x in again)
    calls = [n.call(Call()) for n in c.nodes]
    c.run()
    assert all(x.outcome and x.outcome.committed for x in calls)


def test_update_is_skipped_when_nobody_waits() -> None:
    c = Cluster("AB")
    calls = [n.call(Call()) for n in c.nodes]
    c.run()
    updates = [n.update() for n in c.nodes]
    assert all(x.record.state is State.SKIPPED for x in updates)
    assert all(x.outcome and x.outcome.committed for x in (*calls, *updates))


def test_a_joiner_that_dies_on_its_way_disturbs_nobody() -> None:
    c = Cluster("AB")
    c.add("J")
    c.run()
    u = [c[n].update() for n in "AB"]
    for n in c.nodes:
        while c.to_master(n):
            pass
    c["J"].die()
    c.notice(c["J"])
    c.run()
    assert all(x.outcome and x.outcome.committed for x in u)
    assert c["A"].peer.root.view.world_size == 2


def test_leave_takes_the_place_of_an_update() -> None:
    c = Cluster("ABC")
    c["C"].leave()
    c.run()
    assert c["C"].ended == "it left"
    u = [c[n].update() for n in "AB"]
    c.run()
    assert all(x.outcome and x.outcome.committed for x in u)
    assert [m.name for m in c["A"].peer.root.view.left] == ["C"]


@pytest.mark.parametrize("retry", [False, True])
def test_a_collective_meets_a_leaver(retry: bool) -> None:
    c = Cluster("ABC")
    c["C"].leave()
    c.run()
    calls = [c[n].call(Call(retry=retry)) for n in "AB"]
    c.run()
    assert all(x.outcome and x.outcome.committed == retry for x in calls)
    assert calls[0].outcome
    assert [m.name for m in calls[0].outcome.view.left] == ["C"]
    assert not calls[0].outcome.view.lost


def test_everyone_leaves() -> None:
    c = Cluster("AB")
    for n in c.nodes:
        n.leave()
    c.run()
    assert all(n.ended == "it left" for n in c.nodes)
    c.add("N")
    c.run()
    assert c["N"].member


def test_a_skipped_update_does_not_hide_a_mismatch() -> None:
    """A collective before the loop (``c | u c c``): a newcomer comes a place early, and skips an update where the others make a call."""
    c = Cluster("AB")
    before = [n.call(Call()) for n in c.nodes]
    c.add("J")
    c.run()
    updates = [n.update() for n in c.nodes[:2]]
    c.run()
    calls = [n.call(Call()) for n in c.nodes]
    c.run()
    assert all(x.outcome and x.outcome.committed for x in (*before, *updates, *calls))
    others = [n.call(Call()) for n in c.nodes[:2]]
    skipped = c["J"].update()
    assert skipped.record.state is State.SKIPPED
    c["J"].call(Call())
    for _ in range(2):
        c.tick(0.2)
        c.run()
    for call in others:
        assert call.outcome
        assert call.outcome.reason == Reason.MISMATCH
        assert {claim.description for claim in call.outcome.claims} == {"update()", call.description}


def test_a_newcomer_that_is_alive_but_makes_no_links_is_not_waited_for() -> None:
    c = Cluster("AB")
    c.run()
    c.add("J")
    for n in c.nodes:
        n.make_links = lambda m, n=n: n.name != "J" and n.peer.links_made(m.admission, m.dial)  # type: ignore[method-assign]
    c.pump()
    updates = [n.update() for n in c.nodes[:2]]
    for _ in range(60):
        c.tick(0.5)
        for n in c.nodes:
            if n.ended is None:
                n.peer.beat(1)
        c.run()
    assert all(x.outcome and x.outcome.committed for x in updates)
    assert [m.name for m in c["A"].peer.root.view.members] == ["A", "B"]
    assert not c["J"].member
    assert c["J"].ended
    call = [n.call(Call()) for n in c.nodes[:2]]
    c.run()
    assert all(x.outcome and x.outcome.committed for x in call)


@pytest.mark.parametrize("lacking", [False, True])
def test_who_lacks_a_leavers_data_in_a_call_without_commit_does_not_wait_for_it(lacking: bool) -> None:
    """Who has all of it goes on: the call may still need that of others."""
    c = Cluster("ABC")
    c.run()
    calls = [n.call(Call(atomic=False)) for n in c.nodes]
    c["A"].complete(calls[0])
    c["C"].complete(calls[2])
    c["C"].leave()
    c.pump()
    c.tick(0.02)  # the call takes so long that B announces it
    c.pump()
    c["B"].peer.link_lost(2, "it broke", lacking=lacking)
    c.pump()
    if lacking:
        assert calls[1].outcome
        assert not calls[1].outcome.committed
        assert [m.name for m in calls[1].outcome.view.left] == ["C"]
        assert not calls[1].outcome.view.lost
    else:
        assert calls[1].outcome is None
        c["B"].complete(calls[1])
        assert calls[1].outcome
        assert calls[1].outcome.committed
    updates = [c[name].update() for name in "AB"]
    c.run()
    assert all(update.outcome and update.outcome.committed for update in updates)
    assert [m.name for m in c["A"].peer.root.view.members] == ["A", "B"]


@pytest.mark.parametrize("tag", [None, "t"])
@pytest.mark.parametrize("made", [False, True])
def test_a_leaver_is_in_the_calls_that_it_has_made_and_in_no_others(tag: str | None, made: bool) -> None:
    """Without commit it may go while others are still in a call."""
    c = Cluster("ABC")
    c.run()
    for _ in range(2):
        for n in c.nodes:
            n.call(Call(tag="t"))
        c.run()
    if made:
        c["C"].complete(c["C"].call(Call(tag=tag, atomic=False)))
    c["C"].leave()
    c.pump()
    calls = [c[name].call(Call(tag=tag, atomic=False)) for name in "AB"]
    c.pump()
    c.tick(0.02)
    c.pump()
    if made:
        assert [x.record.state for x in calls] == [State.RUNNING] * 2
        for name, call in zip("AB", calls, strict=True):
            c[name].complete(call)
        assert all(x.outcome and x.outcome.committed for x in calls)
    else:
        c.run()
        assert [x.outcome.reason for x in calls if x.outcome] == [Reason.LOSS] * 2
