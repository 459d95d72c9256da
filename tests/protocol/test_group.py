"""The master's group: who comes in and when, who goes, and what a master that stands in for a lost one makes of its members' reports."""

from __future__ import annotations

import pytest

from pccl.core import codec
from pccl.core.messages import PROTOCOL_VERSION, CallReport, Complaint, Hello, Leave, Link, PeerInfo, Reason, Refused, Report, SplitAsk
from pccl.core.options import Options
from pccl.core.types import CallId, Epoch, View
from pccl.protocol.admission import Admission
from pccl.protocol.peer import ROOT, Standpoint
from pccl.protocol.reach import gaps, outcasts
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
    assert committed(u) == [True]  # the loss is its news
    assert u.outcome
    assert [m.name for m in u.outcome.view.lost] == ["B"]
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


def test_those_who_wait_when_the_group_is_gone_begin_a_new_one() -> None:
    c = Cluster("AB")
    c.add("J")
    c.run()
    for name in "AB":
        c[name].die()
        c.notice(c[name])
    c.run()
    assert names(c["J"]) == "J"
    assert c["J"].peer.root.epoch > Epoch(1, 1, 1)
    assert c["J"].peer.uid == 2


def test_a_newcomer_that_cannot_be_reached_by_either_side_stays_out() -> None:
    c = Cluster("AB")
    c.add("J")
    c.run()
    c.unreachable = {(2, 0), (0, 2), (2, 1), (1, 2)}
    updates = [c[name].update() for name in "AB"]
    c.run()
    assert committed(*updates) == [True, True]
    assert names(c["A"]) == "AB"
    assert c["J"].ended == "it can reach too few members of the group"


def test_where_the_newcomer_cannot_dial_the_incumbent_does() -> None:
    c = Cluster("AB")
    c.add("J")
    c.run()
    c.unreachable = {(2, 0), (2, 1)}
    for name in "AB":
        c[name].update()
    c.run()
    assert names(c["J"]) == "ABJ"
    assert [p.dial for p in c["A"].links[-1:]] == [(2,)]
    assert c["J"].peer.root.broken == ()


def test_a_pair_without_a_link_is_written_down_for_all() -> None:
    c = Cluster("AB")
    c.add("J")
    c.run()
    c.unreachable = {(2, 0), (0, 2)}
    for name in "AB":
        c[name].update()
    c.run()
    assert [n.peer.root.broken for n in c.nodes] == [((0, 2),)] * 3
    c.restart()
    c.run()
    assert [n.peer.root.broken for n in c.nodes] == [((0, 2),)] * 3  # the next master has it from them


def test_a_peer_of_another_protocol_version_is_refused() -> None:
    c = Cluster()
    info = PeerInfo(b"x" * 16, "X", "host", ("x",), 1)
    c.group.receive("conn", Hello(PROTOCOL_VERSION + 1, "g", info, False), 0.0)
    ((to, answer),) = c.group.outbox
    assert to == ["conn"]
    assert isinstance(answer, Refused)
    assert "install the same pccl on both" in answer.detail
    assert not c.group.pending


# --- how members go -------------------------------------------------------------------------------------------------------


def test_one_taken_for_lost_hears_so_when_it_is_back() -> None:
    c = Cluster("ABC")
    open_ = c["C"].call(Call(retry=True))
    c.notice(c["C"])
    c.run()
    c["C"].connect()
    c.run()
    assert c["C"].peer.standpoint is Standpoint.GONE
    assert c["C"].ended == "its control connection was lost, and the group has gone on"
    assert committed(open_) == [False]
    again = [c[name].call(Call(retry=True)) for name in "AB"]
    c.run()
    assert committed(*again) == [True, True]


def test_a_held_interpreter_is_named_and_later_lost(caplog: pytest.LogCaptureFixture) -> None:
    c = Cluster("ABC", options=Options(stall_timeout=10.0))

    def beat_all_but_c(seconds: float) -> None:
        for _ in range(int(seconds * 2)):
            c.now += 0.5
            c["A"].peer.beat(0)
            c["B"].peer.beat(0)
            c.run()
            c.group.tick(c.now)
            c.collect()

    beat_all_but_c(9.0)
    assert "the interpreter of C is held" in caplog.text
    assert len(c.group.root.members) == 3  # type: ignore[union-attr]
    c["C"].peer.beat(0)
    beat_all_but_c(9.0)
    assert len(c.group.root.members) == 3  # type: ignore[union-attr]
    beat_all_but_c(2.0)
    c.run()
    assert names(c["A"]) == "AB"
    assert c["C"].ended == "its interpreter was held for 10 s"


def test_a_master_that_was_held_itself_blames_nobody() -> None:
    c = Cluster("ABC")
    pass_time(c, 1.0)
    c.now += 100.0
    c.group.tick(c.now)
    c.collect()
    pass_time(c, 5.0)
    assert [n.member for n in c.nodes] == [True] * 3
    assert collective(c, "A", "B", "C") == [True] * 3


def test_a_call_that_all_are_in_has_to_move() -> None:
    c = Cluster("AB", options=Options(stall_timeout=5.0))
    calls = [n.call(Call()) for n in c.nodes]
    progress = 0

    def beat(seconds: float, moves: bool) -> None:
        nonlocal progress
        for _ in range(int(seconds * 2)):
            progress += moves
            c.tick(0.5)
            for n in c.nodes:
                n.peer.beat(progress)
            c.pump()

    beat(20.0, moves=True)
    assert committed(*calls) == [None, None]
    beat(6.0, moves=False)
    assert committed(*calls) == [False, False]
    assert calls[0].outcome
    assert calls[0].outcome.reason == Reason.STALL
    assert "although every member had made the call" in calls[0].outcome.detail
    assert collective(c, "A", "B") == [True, True]


def test_a_complaint_has_the_link_made_again_and_the_call_ends() -> None:
    c = Cluster("ABC")
    calls = [n.call(Call(retry=n.name == "A")) for n in c.nodes[:1]] + [c[name].call(Call(retry=True)) for name in "BC"]
    before = len(c["A"].links)
    c["A"].peer.link_lost(1, "broken pipe", lacking=False)
    c.run()
    assert len(c["A"].links) == before + 1
    assert c["A"].links[-1].accept == (1,)  # the younger dials
    assert committed(*calls) == [True] * 3
    assert {x.record.number for x in calls} == {2}
    assert names(c["A"]) == "ABC"


@pytest.mark.parametrize("heals", [True, False], ids=["link heals", "link stays broken"])
@pytest.mark.parametrize("goes", ["dies", "dies with the master", "leaves", "leaves, a newcomer waits"])
def test_when_the_one_between_two_others_goes_their_link_is_made_again(goes: str, heals: bool) -> None:
    c = Cluster("AB")
    c.add("J")
    c.run()
    c.unreachable = {(2, 0), (0, 2)}
    for name in "AB":
        c[name].update()
    c.run()
    assert list(c["J"].peer.root.broken) == [(0, 2)]
    if goes.endswith("waits"):
        c.add("K")
        c.unreachable |= {(3, 2), (2, 3)}
    if heals:
        c.unreachable.clear()
    if goes.startswith("dies"):
        c["B"].die()
        if goes == "dies":
            c.notice(c["B"])
        else:
            c.restart()
            c.run()
            pass_time(c, 4)
    else:
        for name in "ABJ":
            c[name].update()  # the first after an admission returns at once
        c["B"].leave()
        updates = [c[name].update() for name in "AJ"]
        c.run()
        assert committed(*updates) == [True, heals]
    c.run()
    assert names(c["A"]) == "A" + "J" * heals + "K" * (heals and goes.endswith("waits"))
    assert not c["A"].peer.root.broken
    assert c["J"].ended == (None if heals else "it can reach too few members of the group")
    calls = [c[name].call(Call(retry=True)) for name in names(c["A"])]
    c.run()
    assert all(committed(*calls))


def test_one_that_reaches_nobody_any_more_has_to_go() -> None:
    c = Cluster("ABC")
    c.unreachable = {(a, b) for a in range(3) for b in range(3) if 2 in (a, b)}
    c["A"].peer.link_lost(2, "broken pipe", lacking=False)
    c["B"].peer.link_lost(2, "broken pipe", lacking=False)
    c.run()
    assert [n.member for n in c.nodes] == [True, True, False]
    assert c["C"].ended == "it can reach too few members of the group"
    calls = [c[name].call(Call(retry=True)) for name in "AB"]
    c.run()
    assert committed(*calls) == [True, True]


def test_complaints_of_another_epoch_or_about_strangers_change_nothing() -> None:
    c = Cluster("AB")
    for m in (Complaint(Epoch(1, 1, 0), 1, "late", False), Complaint(Epoch(1, 1, 1), 9, "who?", False)):
        c.group.receive(c["A"].conn, m, c.now)
    assert not c.group.outbox
    assert collective(c, "A", "B") == [True, True]


def test_a_leave_takes_effect_although_it_makes_the_group_too_small() -> None:
    c = Cluster()
    for name in "ABC":
        c.add(name, min_world_size=3)
    c.run()
    for n in c.nodes:
        n.update()
    c["C"].leave()
    c.run()
    assert c["C"].ended == "it left"
    updates = [c[name].update() for name in "AB"]
    c.run()
    assert committed(*updates) == [None, None]
    assert [m.name for m in c["A"].peer.root.view.left] == ["C"]
    assert names(c["A"]) == "AB"
    c.add("N")
    c.run()
    assert committed(*updates) == [True, True]
    assert names(c["N"]) == "ABN"


def test_a_collective_after_a_leave_that_makes_the_group_too_small() -> None:
    c = Cluster()
    for name in "ABC":
        c.add(name, min_world_size=3)
    c.run()
    for n in c.nodes:
        n.update()
    c["C"].leave()
    c.run()
    calls = [c[name].call(Call(retry=True)) for name in "AB"]
    c.run()
    assert committed(*calls) == [False, False]
    assert {x.outcome.reason for x in calls if x.outcome} == {Reason.TOO_FEW}
    again = c["A"].call(Call(retry=True))
    c.run()
    assert again.outcome
    assert again.outcome.reason == Reason.TOO_FEW


def test_what_a_leaver_has_committed_in_shared_memory_is_committed_for_those_who_stay() -> None:
    """B is done with the call, and has not looked whether the others are when C is lost."""
    c = Cluster("ABC")
    for n in c.nodes:
        n.peer.root.near = True
    a, b, _ = [n.call(Call(local=True)) for n in c.nodes]
    b.exposed = True
    c["A"].complete(a)
    for n in c.nodes:
        n.moving.clear()
    c["A"].leave()
    c.run()
    assert committed(a, b) == [True, None]
    c["C"].die()
    c.notice(c["C"])
    c.run()
    assert committed(a, b) == [True, True]
    assert names(c["B"]) == "B"


def test_a_leave_of_another_term_is_nobodys() -> None:
    c = Cluster("AB")
    c.group.receive(c["A"].conn, Leave(ROOT, Epoch(7, 7, 7), 0, ()), c.now)
    assert not c.group.outbox
    assert collective(c, "A", "B") == [True, True]


@pytest.mark.parametrize("others", ["", "B"])
@pytest.mark.parametrize("first", ["leave", "call"])
def test_a_call_that_may_begin_in_spite_of_a_loss_still_meets_a_leaver(first: str, others: str) -> None:
    """The call is held for two reasons: nobody was told of the loss of C yet, and D leaves."""
    c = Cluster("ACD" + others)
    c["C"].die()
    c.notice(c["C"])
    c.run()
    if first == "leave":
        c["D"].leave()
        c.run()
    calls = [c[name].call(Call(retry=True)) for name in "A" + others]
    c.run()
    if first == "call":
        c["D"].leave()
        c.run()
    assert committed(*calls) == [True] * len(calls)
    assert names(c["A"]) == "A" + others


# --- a master that stands in for another ----------------------------------------------------------------------------------


def test_numbers_go_on_where_the_last_master_was() -> None:
    c = Cluster("AB")
    c.add("J")
    c.run()
    for name in "AB":
        c[name].update()
    c.run()
    before = c["A"].peer.root.epoch
    c.restart()
    c.run()
    after = c["A"].peer.root.epoch
    assert after > before
    assert (after.term, after.number) == (before.term + 1, before.number + 1)
    c.add("K")
    c.run()
    for _ in range(2):  # the first is the one after J's admission
        for name in "ABJ":
            c[name].update()
        c.run()
    assert names(c["K"]) == "ABJK"
    assert c["K"].peer.uid == 3


def test_calls_that_nobody_is_in_are_not_touched() -> None:
    c = Cluster("AB")
    assert collective(c, "A", "B") == [True, True]
    c.restart()
    c.run()
    assert collective(c, "A", "B") == [True, True]
    assert not c["A"].peer.root.view.lost


def test_an_update_that_waits_for_newcomers_returns_under_the_next_master_and_the_next_one_waits() -> None:
    c = Cluster()
    for name in "AB":
        c.add(name, min_world_size=2)
    c.run()
    for name in "AB":
        c[name].update()
    c["B"].die()
    c.notice(c["B"])
    c.run()
    told = c["A"].update()
    c.run()
    assert committed(told) == [True]
    waits = c["A"].update()
    c.run()
    c.restart()
    c.run()
    assert committed(waits) == [True]
    waits = c["A"].update()
    c.run()
    assert committed(waits) == [None]
    c.add("N")
    c.run()
    assert committed(waits) == [True]
    assert names(c["N"]) == "AN"


def test_newcomers_on_their_way_in_come_in_under_the_next_master() -> None:
    c = Cluster("AB")
    c.add("J")
    c.run()
    updates = [c[name].update() for name in "AB"]
    for name in "AB":
        while c.to_master(c[name]):
            pass
    while c.to_node(c["J"]):
        pass
    assert c["J"].links
    c.restart()
    c.run()
    for _ in range(3):
        if c["J"].member:
            break
        updates = [c[name].update() for name in "AB"]
        c.run()
        assert committed(*updates) == [True, True]
    assert names(c["J"]) == "ABJ"
    for n in c.nodes:
        n.update()
    assert collective(c, "A", "B", "J") == [True] * 3


def test_a_loss_that_the_last_master_did_not_finish_telling() -> None:
    """A has heard of the epoch without C, B has not; the next master puts B into it, and C out."""
    c = Cluster("ABC")
    calls = [n.call(Call(retry=True)) for n in c.nodes]
    c.notice(c["C"])
    for name in "AB":
        c.to_node(c[name])
        c.to_master(c[name])
    c.to_node(c["A"])
    assert c["A"].peer.root.epoch > c["B"].peer.root.epoch
    c.restart()
    c.run()
    assert names(c["A"]) == names(c["B"]) == "AB"
    assert committed(*calls) == [True, True, False]
    assert c["C"].peer.standpoint is Standpoint.GONE
    c.check()


def test_a_split_whose_commit_the_master_took_with_it() -> None:
    """A has heard of the new communicator, B has not: the next master gives it to both."""
    c = Cluster("AB")
    splits = [n.call(Call("split", body=codec.encode(SplitAsk(0, 0)))) for n in c.nodes]
    c.pump()  # a split moves no data: both are done
    assert committed(*splits) == [True, True]

    c = Cluster("AB")
    splits = [n.call(Call("split", body=codec.encode(SplitAsk(0, 0)))) for n in c.nodes]
    for name in "AB":
        while c.to_master(c[name]):
            pass
    while c.to_node(c["A"]):
        pass
    assert committed(*splits) == [True, None]
    c.restart()
    c.run()
    assert committed(*splits) == [True, True]
    subs = [n.subs[0] for n in c.nodes]
    assert subs[0].comm == subs[1].comm
    calls = [n.call(Call(comm=subs[0].comm)) for n in c.nodes]
    c.run()
    assert committed(*calls) == [True, True]
    assert subs[0].epoch == subs[1].epoch


def test_a_call_of_a_communicator_that_was_learned_of_at_a_takeover_waits_for_its_epoch() -> None:
    """B hears of the split with the new master's epoch of the group; the next message tells the epoch of what the split made."""
    c = Cluster("AB")
    splits = [n.call(Call("split", body=codec.encode(SplitAsk(0, 0)))) for n in c.nodes]
    for name in "AB":
        while c.to_master(c[name]):
            pass
    while c.to_node(c["A"]):
        pass
    assert committed(*splits) == [True, None]
    c.restart()
    while not c["B"].subs:
        assert any([c.to_master(n) or c.to_node(n) for n in c.nodes])  # noqa: C419 - each of them
    early = c["B"].call(Call(comm=c["B"].subs[0].comm))
    c.run()
    other = c["A"].call(Call(comm=c["A"].subs[0].comm))
    c.run()
    assert committed(early, other) == [True, True]


def test_a_sub_communicator_outlives_its_master_and_its_members() -> None:
    c = Cluster("ABC")
    splits = [n.call(Call("split", body=codec.encode(SplitAsk(int(n.name == "C"), 0)))) for n in c.nodes]
    c.run()
    assert committed(*splits) == [True] * 3
    sub = c["A"].subs[0].comm
    assert [m.name for m in c["A"].subs[0].view.members] == ["A", "B"]
    assert [m.name for m in c["C"].subs[0].view.members] == ["C"]
    c.restart()
    c.run()
    calls = [c[name].call(Call(comm=sub)) for name in "AB"]
    c.run()
    assert committed(*calls) == [True, True]
    c["C"].die()
    c.notice(c["C"])
    c.run()
    calls = [c[name].call(Call(comm=sub)) for name in "AB"]
    c.run()
    assert committed(*calls) == [True, True]  # not its member
    alone = c["A"].call(Call(comm=sub, retry=True))
    c["B"].die()
    c.notice(c["B"])
    c.run()
    assert committed(alone) == [True]
    assert [m.name for m in c["A"].subs[0].view.lost] == ["B"]


def test_a_leave_that_the_master_took_with_it_is_said_again() -> None:
    c = Cluster("AB")
    c["B"].leave()
    c.restart()
    c.run()
    assert c["B"].ended == "it left"
    calls = [c["A"].call(Call(retry=True))]
    c.run()
    assert committed(*calls) == [True]
    assert names(c["A"]) == "A"
    assert not c["A"].peer.root.view.lost


def test_a_member_that_is_lost_again_while_it_reports_is_waited_for_until_the_timeout() -> None:
    c = Cluster("ABC")
    calls = [n.call(Call(retry=True)) for n in c.nodes]
    c.restart(reconnect=False)
    c["C"].connect()
    c.pump()
    c.notice(c["C"])  # its connection closes after it has reported
    for name in "AB":
        c[name].connect()
    c.run()
    assert committed(*calls) == [None] * 3
    c.tick(c.options.heartbeat_timeout + 0.1)
    c.run()
    assert committed(*calls) == [True, True, None]
    assert names(c["A"]) == "AB"


def test_garbage_in_a_report_is_found_when_it_comes() -> None:
    c = Cluster("AB")
    c.restart(reconnect=False)
    c["A"].connect()
    while c.to_master(c["A"]):
        pass
    while c.to_node(c["A"]):
        pass
    conn, data = c["A"].outbox.pop()
    report = codec.decode(data)
    assert isinstance(report, Report)
    call = CallReport(CallId(None, 0), "D", 1, -1, False, b"\xc1")
    bad = Report(report.rid, report.peer, report.uid, (report.comms[0]._replace(calls=(call,)),))
    with pytest.raises(codec.WireError):
        c.group.receive(conn, bad, c.now)
    c["A"].outbox.append((conn, data))  # nothing of it was kept: the master goes on with what is good
    c["B"].connect()
    c.run()
    assert names(c["A"]) == names(c["B"]) == "AB"


def test_who_was_lost_with_the_master_is_named() -> None:
    c = Cluster("ABC")
    c["C"].die()
    c.restart()
    c.run()
    c.tick(c.options.heartbeat_timeout + 0.1)
    c.run()
    calls = [c[name].call(Call()) for name in "AB"]
    c.run()
    assert committed(*calls) == [False, False]
    assert [[m.name for m in x.outcome.view.lost] for x in calls if x.outcome] == [["C"], ["C"]]


def test_who_had_closed_a_sub_communicator_has_left_it_when_the_master_is_replaced() -> None:
    c = Cluster("AB")
    for n in c.nodes:
        n.call(Call("split", body=codec.encode(SplitAsk(0, 0))))
    c.run()
    sub = c["A"].subs[0].comm
    del c["B"].peer.comms[sub]
    c.restart()
    c.run()
    view = c["A"].peer.comms[sub].view
    assert [m.name for m in view.members] == ["A"]
    assert [m.name for m in view.left] == ["B"]
    assert not view.lost


def test_an_update_whose_members_used_a_tag_differently_is_a_mismatch() -> None:
    """A newcomer could not know how often it was used."""
    c = Cluster("AB")
    c["A"].call(Call("t", tag="t", atomic=False))
    updates = [n.update() for n in c.nodes]
    c["A"].expire(c["A"].calls[0], Reason.CANCELLED)
    c.tick(0.02)
    c.pump()
    c.tick(0.2)
    c.pump()
    assert [x.outcome.reason for x in updates if x.outcome] == [Reason.MISMATCH] * 2


def test_a_links_round_ends_when_each_dialler_has_spoken_once() -> None:
    made: Admission[str, str] = Admission(1, b"", [], None, [(2, 0), (1, 0)], began=0.0)
    assert not made.ready(2, (0, 7))  # it was not to dial 7
    assert not made.ready(2, ())
    assert not made.ready(9, ())
    assert made.ready(1, ())
    assert not made.ready(1, ())
    assert made.turn(1.0)
    assert made.dials == [(0, 2)]
    assert made.ready(0, (2,))
    assert not made.turn(1.0)
    assert made.broken({Link(1, 3), Link(0, 1)}) == {(0, 2), (1, 3)}  # 0 and 1 have their link again


def test_of_two_that_cannot_reach_each_other_the_younger_goes() -> None:
    assert outcasts([3, 5], {Link(3, 5)}) == {5}
    assert outcasts([0, 1, 2], {Link(0, 1)}) == set()  # they reach each other through 2
    assert outcasts([0, 1, 2, 3], {Link(0, 2), Link(0, 3), Link(1, 2), Link(1, 3)}) == {2, 3}


def test_links_to_make_again_are_those_between_members_that_cannot_reach_each_other() -> None:
    broken = {Link(0, 2), Link(1, 3), Link(4, 5)}
    assert gaps([0, 1, 2, 3], broken) == []
    assert gaps([0, 2], broken) == [(0, 2)]
    assert gaps([0, 2, 4, 5], broken) == []
    assert gaps([4, 5], broken) == [(4, 5)]
    assert gaps([0, 1, 3], {Link(0, 1), Link(0, 3)}) == [(0, 1), (0, 3)]


@pytest.mark.parametrize(
    ("order", "winners", "losers"), [("AKJB", "JK", "AB"), ("KABJ", "JK", "AB"), ("ABJK", "AB", "JK"), ("KBJA", "JK", "AB")]
)
def test_members_of_a_group_that_the_last_master_never_knew(order: str, winners: str, losers: str) -> None:
    """A and B are cut off while their master is replaced. The next one hears of nobody and begins anew with J and K, who get the
    same uids. When it is replaced, too, all four report: the newer group goes on, or the first that is complete, and the other
    is told.
    """
    c = Cluster("AB")
    calls = {name: c[name].call(Call(retry=True)) for name in "AB"}
    c.restart(reconnect=False)
    c.tick(c.options.heartbeat_timeout + 0.1)
    for name in "JK":
        c.add(name, min_world_size=2)
    c.run()
    assert names(c["J"]) == "JK"
    assert [c[name].peer.uid for name in "ABJK"] == [0, 1, 0, 1]
    calls |= {name: c[name].call(Call(retry=True)) for name in "JK"}
    c.restart(reconnect=False)
    for name in order:
        c[name].connect()
        for _ in range(2):  # it says hello, hears the question, reports
            while c.to_node(c[name]) or c.to_master(c[name]):
                pass
    c.run()
    assert committed(*(calls[name] for name in winners)) == [True, True]
    assert [names(c[name]) for name in winners] == [winners] * 2
    assert committed(*(calls[name] for name in losers)) == [False, False]
    assert [c[name].peer.standpoint for name in losers] == [Standpoint.GONE] * 2


# --- links, while an update is open ---------------------------------------------------------------------------------------


def with_a_gap() -> Cluster:
    """A, B and J, of whom A and J reach each other through B only, past the update that every member makes after an admission."""
    c = Cluster("AB")
    c.add("J")
    c.run()
    c.unreachable = {(2, 0), (0, 2)}
    for name in "AB":
        c[name].update()
    c.run()
    assert list(c["J"].peer.root.broken) == [(0, 2)]
    for name in "ABJ":
        c[name].update()
    c.unreachable.clear()
    return c


def until_links_are_made(c: Cluster) -> None:
    while not c.group._admission:
        heard = [c.to_master(n) for n in c.nodes]
        if not any(heard):
            for n in c.nodes:
                c.to_node(n)


def cancel(c: Cluster, node: Node, call: Call) -> None:
    """The master hears of it before anything else."""
    node.expire(call, Reason.CANCELLED, "cancel")
    while c.to_master(node):
        pass


def test_an_update_that_was_cancelled_while_a_link_was_made_again_leaves_nothing_behind() -> None:
    c = with_a_gap()
    c["B"].leave()
    first = [c[name].update() for name in "AJ"]
    until_links_are_made(c)
    cancel(c, c["A"], first[0])
    c.run()
    assert committed(*first) == [False, False]
    before = c["A"].peer.root.epoch
    updates = [c[name].update() for name in "AJ"]
    calls = [c[name].call(Call()) for name in "AJ"]
    c.run()
    assert committed(*updates, *calls) == [True] * 4
    assert c["A"].peer.root.epoch.number == before.number + 1
    assert not c["A"].peer.root.broken


def test_a_link_that_is_there_again_is_used_by_sub_communicators_too() -> None:
    c = with_a_gap()
    asks = {name: codec.encode(SplitAsk(None if name == "B" else 0, 0)) for name in "ABJ"}
    splits = [c[name].call(Call("split()", retry=True, body=body)) for name, body in asks.items()]
    c.run()
    assert committed(*splits) == [True] * 3
    (sub,) = c["A"].subs
    assert list(sub.broken) == [(0, 2)]
    c["B"].leave()
    for _ in range(2):
        for name in "AJ":
            c[name].update()
        c.run()
    assert not c["A"].peer.root.broken
    assert not sub.broken


def a_link_breaks_while_a_newcomer_comes_in() -> tuple[Cluster, list[Call]]:
    """A, B and C let J in; the master has heard that A lost its link to B."""
    c = Cluster("ABC")
    c.add("J")
    c.run()
    updates = [c[name].update() for name in "ABC"]
    until_links_are_made(c)
    c["A"].peer.link_lost(1, "broken pipe", lacking=False)
    while c.to_master(c["A"]):
        pass
    return c, updates


def test_a_link_that_breaks_while_newcomers_come_in_is_made_again_although_the_update_is_cancelled() -> None:
    c, updates = a_link_breaks_while_a_newcomer_comes_in()
    before = len(c["A"].links)
    cancel(c, c["B"], updates[1])
    c.run()
    assert (1,) in [p.accept for p in c["A"].links[before:]]
    assert collective(c, *"ABC") == [True] * 3


def test_an_update_that_waited_for_more_members_lets_nobody_in_once_it_has_ended() -> None:
    c = Cluster("ABC")
    assert c.group.root
    c.group.root.min_world_size = 3
    c["C"].die()
    c.notice(c["C"])
    c.run()
    for _ in range(2):
        updates = [c[name].update() for name in "AB"]
        c.run()
    assert committed(*updates) == [None, None]
    c["B"].die()
    c.notice(c["B"])
    c.run()
    assert committed(updates[0]) == [True]  # it tells of the loss
    too_few = c["A"].call(Call())
    c.run()
    assert too_few.outcome
    assert too_few.outcome.reason == Reason.TOO_FEW
    for name in "XY":
        c.add(name)
    c.run()
    assert names(c["A"]) == "A"
    for _ in range(2):  # the first one tells of the loss
        c["A"].update()
        c.run()
    assert names(c["A"]) == "AXY"
    assert collective(c, *"AXY") == [True] * 3


def test_a_call_in_the_place_of_an_update_that_others_skipped_is_a_mismatch_also_after_a_loss() -> None:
    c = Cluster("ABC")
    assert collective(c, *"ABC") == [True] * 3
    c["A"].update()  # skipped: nobody waits
    other = c["B"].call(Call())
    c["C"].die()
    c.notice(c["C"])
    c.run()
    assert other.outcome
    assert other.outcome.reason == Reason.MISMATCH
    assert "skipped an update" in other.outcome.detail
    calls = [c[name].call(Call(retry=True)) for name in "AB"]
    c.run()
    assert committed(*calls) == [True, True]


def with_a_sub(c: Cluster, *inside: str) -> int:
    """The number of a sub-communicator of these members; the others ask for none."""
    for n in [n for n in c.nodes if n.member]:
        n.call(Call("split()", retry=True, body=codec.encode(SplitAsk(0 if n.name in inside else None, 0))))
    c.run()
    return c[inside[0]].subs[0].comm


def leave_sub(node: Node, sub: int) -> None:
    """As the engine does."""
    node.peer.comms.pop(sub).leave()


def test_a_sub_communicator_that_is_left_while_it_stops_goes_on() -> None:
    c = Cluster("ABCD")
    sub = with_a_sub(c, *"ABCD")
    c["D"].die()
    c.notice(c["D"])
    leave_sub(c["C"], sub)  # before it hears that it should stop
    c.run()
    calls = [c[name].call(Call(comm=sub, retry=True)) for name in "AB"]
    c.run()
    assert committed(*calls) == [True] * 2
    assert collective(c, *"ABC")[0] is not None


def test_a_member_that_leaves_the_group_while_a_sub_communicator_stops() -> None:
    c = Cluster("ABC")
    sub = with_a_sub(c, *"ABC")
    leave_sub(c["A"], sub)
    c.run()
    stopped = c["B"].call(Call(comm=sub))  # cannot run with A
    while c.to_master(c["B"]):
        pass
    c["C"].peer.comms[sub].leave()
    c["C"].leave()
    c.run()
    assert committed(stopped) == [False]
    alone = c["B"].call(Call(comm=sub))
    c.run()
    assert committed(alone) == [True]


def test_a_link_that_breaks_while_newcomers_come_in_is_made_again_although_they_die() -> None:
    c, updates = a_link_breaks_while_a_newcomer_comes_in()
    before = len(c["A"].links)
    c["J"].die()
    c.notice(c["J"])
    c.run()
    assert (1,) in [p.accept for p in c["A"].links[before:]]
    assert None not in committed(*updates)


def test_a_sub_communicator_hears_of_its_link_although_others_were_cast_out_for_theirs() -> None:
    c = Cluster("AB")
    c.add("J")
    c.add("K")
    c.run()
    apart = {(a, b) for a in (0, 2, 3) for b in (0, 2, 3) if a != b}
    c.unreachable = set(apart)
    for name in "AB":
        c[name].update()
    c.run()
    for name in "ABJK":
        c[name].update()
    with_a_sub(c, *"AJ")
    (sub,) = c["A"].subs
    assert Link(0, 2) in sub.broken
    c.unreachable = {pair for pair in apart if 3 in pair}
    c["B"].leave()
    for _ in range(3):
        for name in "AJK":
            if c[name].member:
                c[name].update()
        c.run()
    assert names(c["A"]) == "AJ"
    assert Link(0, 2) not in sub.broken


def test_a_sub_communicator_that_was_stopped_with_its_group_is_not_stopped_again_for_a_link() -> None:
    c = with_a_gap()
    comm = with_a_sub(c, *"ABJ")
    (sub,) = c["A"].subs
    epochs = []
    changed = c["A"].epoch_changed

    def noting(which: int, old: View, new: View) -> None:
        if which == comm:
            epochs.append((new.epoch, list(sub.broken)))
        changed(which, old, new)

    c["A"].epoch_changed = noting  # type: ignore[method-assign]
    c["B"].die()
    c.notice(c["B"])
    c.run()
    assert [broken for _, broken in epochs] == [[]]
