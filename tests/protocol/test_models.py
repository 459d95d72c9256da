"""The counterexamples of the state-space models of the protocol, replayed on the real machines.

Before there was code, three models (M1 verdicts, M2 takeover, M4 joins) were searched state by state; for each of their rules
that was switched off the search gave a shortest trace to a broken promise. Each test here walks the real master and members
through such a trace, in the model's order of events, sees that nothing bad comes of it, then switches the same rule off in
the real code and sees that it does.

Two rules have no trace of their own: without `late` (a call that all survivors are done with commits) more calls fail than
need to, without breaking a promise; `any_commit` alone hides behind `remember`: when one member has seen a commit, all others
are done. It is needed by the third model, of the commit in shared memory, and in `decide`, see test_decide.py.

What differs from the models: a member's `Enter` goes out when the call has taken a while (`announce`), so it is never what
decides; a call that is made while the member is stopped waits in a queue; a commit for a call that runs is an InternalError
at the member.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from pccl.core.errors import InternalError
from pccl.core.messages import Decision, NewEpoch, Reason, Verdict
from pccl.core.types import CallId, Epoch
from pccl.protocol import decide as decide_module
from pccl.protocol import ledger as ledger_module
from pccl.protocol.decide import Ruling
from pccl.protocol.group import Group
from pccl.protocol.ledger import Ledger, Phase
from pccl.protocol.member import Membership
from pccl.protocol.peer import Peer
from pccl.protocol.record import OPEN, Outcome, State
from tests.protocol.cluster import Call, Cluster

Plant = Callable[[pytest.MonkeyPatch], None]


@contextmanager
def without(*rules: Plant) -> Iterator[None]:
    """Rules are switched off in the real code."""
    with pytest.MonkeyPatch.context() as m:
        for rule in rules:
            rule(m)
        yield


# --- steps of a trace ---------------------------------------------------------------------------------------------------


def hears(c: Cluster, *names: str) -> None:
    """These nodes hear all that the master has sent."""
    for name in names:
        while c.to_node(c[name]):
            pass


def master_hears(c: Cluster, *names: str) -> None:
    for name in names:
        while c.to_master(c[name]):
            pass


def announce(c: Cluster) -> None:
    """Calls take so long that members tell the master of them."""
    c.tick(0.02)


def settle(c: Cluster, seconds: float = 12.0) -> None:
    """No more faults: everything that can happen happens, and time passes."""
    c.run()
    for _ in range(int(seconds * 2)):
        c.tick(0.5)
        c.run()


def end(call: Call) -> str:
    """How a call ended."""
    if call.outcome is None:
        return "hangs"
    return "committed" if call.outcome.committed else Reason(call.outcome.reason).name


def ends(*calls: Call) -> list[str]:
    return [end(x) for x in calls]


def one_verdict(c: Cluster) -> bool:
    """P1 among members of one epoch."""
    try:
        c.check()
    except AssertionError:
        return False
    return True


# --- M1: verdicts, with a master that lives ------------------------------------------------------------------------------


def no_fence(m: pytest.MonkeyPatch) -> None:
    """At a loss the master fails the calls whose `Enter` it has, else the next one, and stops nobody; members fail what they have open."""

    def drop(self: Ledger, uid: int, *, left: bool, detail: str) -> None:
        if uid not in self.members:
            return
        self._remove(uid, self.lost)
        calls = [x.id for x in self.calls.values() if not x.verdict] or [CallId(None, 1 + max((k.n for k in self.calls), default=-1))]
        decisions = tuple(Decision(k, "R", -1, False, b"", Reason.LOSS, detail) for k in calls)
        self.host._install(self, ruling=Ruling(decisions, False, 0, ()))  # type: ignore[attr-defined]

    original = Membership._new_epoch

    def new_epoch(self: Membership, message: NewEpoch, now: float) -> None:
        for record in [r for r in self._records.values() if r.state in OPEN]:
            self._learn(record, Outcome(False, self.view, Reason.LOSS), -1, message.seq, now)
        original(self, message, now)

    m.setattr(Ledger, "drop", drop)
    m.setattr(Membership, "_new_epoch", new_epoch)


def test_m1_fence() -> None:
    """A is lost before anyone has called. B hears of it, and makes calls 0 and 1; C makes both before it hears. Without the
    fence the master can only fail call 0: C, who hears late, gives both of them up, and B waits in call 1 for ever.
    """

    def replay() -> list[str]:
        c = Cluster("ABC")
        c["A"].die()
        c.notice(c["A"])
        hears(c, "B")
        b = [c["B"].call(Call()) for _ in range(2)]
        announce(c)
        master_hears(c, "B")
        x = [c["C"].call(Call()) for _ in range(2)]
        announce(c)
        master_hears(c, "C")
        hears(c, "C")
        settle(c)
        return ends(*b, *x)

    assert replay() == ["LOSS"] * 4
    with without(no_fence):
        assert replay() == ["LOSS", "hangs", "LOSS", "LOSS"]


def no_overdue(m: pytest.MonkeyPatch) -> None:
    m.setattr(Membership, "_overdue", lambda self, record: setattr(record, "state", State.OVERDUE))


@pytest.mark.parametrize("reason", [Reason.DEADLINE, Reason.CANCELLED])
def test_m1_overdue(reason: Reason) -> None:
    """All are in call 0, A is done and the master knows. A's deadline passes, or its caller cancels. If it only waited, a
    healthy member would have to leave under a healthy master: no verdict can come, for the others are not done.
    """

    def replay() -> tuple[list[str], str | None]:
        c = Cluster("ABC")
        calls = [n.call(Call()) for n in c.nodes]
        c["A"].complete(calls[0])
        master_hears(c, "A")
        c["A"].expire(calls[0], reason)
        c.pump()
        for _ in range(40):  # nobody else gets its data
            c.tick(0.5)
            c.pump()
        return ends(*calls), c["A"].ended

    assert replay() == ([reason.name] * 3, None)
    with without(no_overdue):
        (a, b, d), ended = replay()
        assert ended == "no verdict"
        assert (a, b, d) == ("NONE", "hangs", "hangs")


def no_final(m: pytest.MonkeyPatch) -> None:
    original = decide_module._is
    m.setattr(decide_module, "_is", lambda report, states: states != "A" and original(report, states))


@pytest.mark.parametrize("reason", [Reason.DEADLINE, Reason.CANCELLED])
def test_m1_final(reason: Reason) -> None:
    """A is lost. B makes call 0 (with retry), stops and reports it as running. C makes it, too, and its deadline passes before
    it hears of the loss. If the others ran again what C has ended, they would wait for it for ever.
    """

    def replay() -> list[str]:
        c = Cluster("ABC")
        c["A"].die()
        c.notice(c["A"])
        b = c["B"].call(Call(retry=True))
        hears(c, "B")
        master_hears(c, "B")
        x = c["C"].call(Call(retry=True))
        c["C"].expire(x, reason)
        hears(c, "C")
        master_hears(c, "C")
        hears(c, "C", "B")
        settle(c)
        return ends(b, x)

    b, x = replay()
    assert x == reason.name
    assert b == reason.name
    with without(no_final):
        assert replay()[0] == "hangs"


def no_attempt(m: pytest.MonkeyPatch) -> None:
    m.setattr(Ledger, "_current", lambda self, uid, epoch: self.phase is Phase.RUN and uid in self.members)


def test_m1_attempt_named() -> None:
    """A makes call 0 and is lost. B makes it and reports it as running. C makes it and is done with it, then stops, too; its
    `done` arrives twice (a request repeated on a new connection). The call runs again without A. B is done; the second `done`
    of C's first attempt comes in. If it named the call only, the master would commit a call that C still runs.
    """

    def replay() -> tuple[Cluster, list[Call]]:
        c = Cluster("ABC")
        c["A"].call(Call(retry=True))
        c["A"].die()
        c.notice(c["A"])
        b = c["B"].call(Call(retry=True))
        hears(c, "B")
        master_hears(c, "B")
        x = c["C"].call(Call(retry=True))
        assert c["C"].can_complete(x)
        c["C"].complete(x)
        done = c["C"].outbox[-1]
        hears(c, "C")
        c["C"].outbox.append(done)
        for _ in range(2):
            c.to_master(c["C"])  # done, report
        hears(c, "B", "C")
        assert c["B"].can_complete(b)
        c["B"].complete(b)
        master_hears(c, "B", "C")
        hears(c, "C")
        return c, [b, x]

    c, calls = replay()
    assert ends(*calls) == ["hangs"] * 2  # not yet: C has not got its result
    settle(c)
    assert ends(*calls) == ["committed"] * 2
    assert {x.record.number for x in calls} == {2}
    with without(no_attempt), pytest.raises(InternalError, match="a commit met a call that is running"):
        replay()


# --- M2: the master is lost and another one starts at its address --------------------------------------------------------


def no_remember(m: pytest.MonkeyPatch) -> None:
    original = Membership.stop

    def stop(self: Membership) -> Any:
        report = original(self)
        return report._replace(calls=tuple(x for x in report.calls if x.state not in "CA"))

    m.setattr(Membership, "stop", stop)


@pytest.mark.parametrize("retry", [False, True])
def test_m2_remember(retry: bool) -> None:
    """All are done with call 0, the master commits, A hears that and returns; the master is lost. If A did not report how the
    call ended, the next master would abort it for B and C.
    """

    def replay() -> tuple[list[str], bool]:
        c = Cluster("ABC")
        calls = [n.call(Call(retry=retry)) for n in c.nodes]
        c.finish_data()
        master_hears(c, "A", "B", "C")
        hears(c, "A")
        assert end(calls[0]) == "committed"
        c.restart()
        settle(c)
        return ends(*calls), one_verdict(c)

    assert replay() == (["committed"] * 3, True)
    with without(no_remember):
        assert replay() == (["committed", "TAKEOVER", "TAKEOVER"], False)


def no_one_message(m: pytest.MonkeyPatch) -> None:
    """The commits of an epoch change are told before its member list."""
    original = Ledger.install

    def install(self: Ledger, epoch: Epoch, *, ruling: Ruling | None = None, **how: Any) -> None:
        for d in ruling.decisions if ruling else ():
            if d.verdict == "C":
                verdict = Verdict(self.host.rid, self.comm, self.epoch, d.call, "C", -1, d.payload, 0, "", -1, (), (), self._seq + 1, 0)
                self.host.send(self.members, verdict)
        original(self, epoch, ruling=ruling, **how)

    m.setattr(Ledger, "install", install)


def no_any_commit(m: pytest.MonkeyPatch) -> None:
    original = decide_module._is
    m.setattr(decide_module, "_is", lambda report, states: states != "C" and original(report, states))


def one_message() -> tuple[list[str], str | None]:
    """All make call 0, A and B are done. The master is lost; A and B report to the next one, C is silent and is put out: the
    call is committed for A and B. A has heard the first message of that when this master is lost, too. All three report to
    the third master.
    """
    c = Cluster("ABC")
    calls = [n.call(Call(retry=True)) for n in c.nodes]
    for name, call in zip("AB", calls, strict=False):
        assert c[name].can_complete(call)
        c[name].complete(call)
    c.restart(reconnect=False)
    for name in "AB":
        c[name].connect()
    c.pump()
    c.now += c.options.heartbeat_timeout + 0.1
    c.group.tick(c.now)
    c.collect()
    c.to_node(c["A"])  # one message
    c.restart()
    for _ in range(2):  # C is the first to answer: it hears the question, and its report is in before the others'
        master_hears(c, "C")
        hears(c, "C")
    settle(c)
    return ends(*calls), c["C"].ended


def test_m2_one_message() -> None:
    """If the commit came before the member list, the third master would have A in the epoch of all three and the commit with it,
    and C still runs the call.
    """
    (a, b, _), out = one_message()
    assert (a, b) == ("committed", "committed")
    assert out == "the group had gone on without it before its master was replaced"
    with without(no_one_message), pytest.raises(InternalError, match="a commit met a call that is running"):
        one_message()


def test_m2_one_message_and_any_commit() -> None:
    """The letter of the first design: nor does one commit decide for all. Then B and C run again what A has returned from."""
    with without(no_one_message, no_any_commit):
        (a, *others), out = one_message()
        assert a == "committed"
        assert out is None
        assert others == ["TAKEOVER", "TAKEOVER"] or "hangs" in others


def no_new_terms(m: pytest.MonkeyPatch) -> None:
    """Terms only count up from what was reported: no random part."""

    def next_epoch(self: Group) -> Epoch:
        self._number += 1
        return Epoch(self._term, 0, self._number)

    m.setattr(Group, "_next_epoch", next_epoch)


def test_m2_bind_terms_are_never_given_twice() -> None:
    """A is done with call 0 when the master is lost. All report to the next one, which aborts it; only B hears that. This master
    is lost, too. A reports to the third, B and C are silent: A is alone, done, and commits. B and A must not take themselves
    for members of one epoch.
    """

    def replay() -> list[str]:
        c = Cluster("ABC")
        calls = [n.call(Call()) for n in c.nodes]
        c["A"].complete(calls[0])
        c.restart()
        for name in "ABC":
            master_hears(c, name)
            hears(c, name)
        master_hears(c, "A", "B", "C")
        hears(c, "B")
        c.restart(reconnect=False)
        c["A"].connect()
        c.pump()
        c.tick(c.options.heartbeat_timeout + 0.1)
        c.pump()
        return ends(*calls)

    assert replay() == ["committed", "TAKEOVER", "hangs"]
    with without(no_new_terms), pytest.raises(AssertionError, match=r"epoch 2\.2 of 0 was given twice"):
        replay()


def no_obedience(m: pytest.MonkeyPatch) -> None:
    """A member does what any master says."""
    original = Peer.receive

    def receive(self: Peer, message: Any, now: float) -> None:
        self._rid = getattr(message, "rid", self._rid)
        original(self, message, now)

    m.setattr(Peer, "receive", receive)


def test_m2_bind_a_member_obeys_the_master_it_answered() -> None:
    """A and B are done with call 0, C runs it. The master takes C for lost and commits for A and B; its messages are late. It is
    replaced; all three report to the next master, which aborts the call for all. Then B hears the old one, and then the new
    one.
    """

    def replay() -> tuple[list[str], bool]:
        c = Cluster("ABC")
        calls = [n.call(Call()) for n in c.nodes]
        for name, call in zip("AB", calls, strict=False):
            c[name].complete(call)
        c.notice(c["C"])
        for name in "AB":
            c.to_node(c[name])
        master_hears(c, "A", "B")
        late = list(c["B"].inbox)
        assert len(late) == 1
        c.restart()
        for name in "ABC":
            master_hears(c, name)
            c.to_node(c[name])
        c["B"].inbox.extend(late)
        settle(c)
        return ends(*calls), one_verdict(c)

    assert replay() == (["TAKEOVER"] * 3, True)
    with without(no_obedience):
        assert replay() == (["TAKEOVER", "committed", "TAKEOVER"], False)


# --- M4: newcomers, updates and the order of calls ------------------------------------------------------------------------


def no_ask(m: pytest.MonkeyPatch) -> None:
    """An update is skipped also where no verdict says that nobody waits."""
    original = Membership._check_update

    def check(self: Membership, now: float) -> None:
        if self._update and not self._update.announced:
            self._bits.setdefault(self._update.id.n - 1, 0)
        original(self, now)

    m.setattr(Membership, "_check_update", check)


def test_m4_ask() -> None:
    """Two incumbents update until they are three (`while comm.world_size < 3: update()`), and a newcomer waits. If they skipped
    updates that come after updates, it would wait for ever.
    """

    def replay() -> int:
        c = Cluster("AB")
        first = [n.update() for n in c.nodes]
        c.run()
        assert ends(*first) == ["committed"] * 2
        c.add("J")
        c.run()
        for _ in range(20):
            if c["J"].member:
                break
            again = [c[name].update() for name in "AB"]
            c.run()
            assert ends(*again) == ["committed"] * 2
        return c["A"].peer.root.view.world_size

    assert replay() == 3
    with without(no_ask):
        assert replay() == 2


def no_fresh_all(m: pytest.MonkeyPatch) -> None:
    """Only newcomers return at once from the first update after their admission."""
    original = Membership._new_epoch

    def new_epoch(self: Membership, message: NewEpoch, now: float) -> None:
        fresh = self.fresh
        original(self, message, now)
        self.fresh = fresh

    m.setattr(Membership, "_new_epoch", new_epoch)


def test_m4_fresh_all() -> None:
    """A newcomer comes in at an update of `while comm.world_size < 3: update()`; then all run `update(); all_reduce()`. The
    newcomer's update returns at once; if the incumbents' did not, they would meet its collective.
    """

    def replay() -> list[str]:
        c = Cluster("AB")
        c.add("J")
        c.run()
        for name in "AB":
            c[name].update()
        c.run()
        assert c["J"].member
        for n in c.nodes:
            n.update()
        c.run()
        calls = [n.call(Call()) for n in c.nodes if n.calls[-1].outcome]
        announce(c)
        settle(c)
        return ends(*calls)

    assert replay() == ["committed"] * 3
    with without(no_fresh_all):
        assert replay() == ["MISMATCH"]


def no_report(m: pytest.MonkeyPatch) -> None:
    """The master names the next call from its own verdicts: what a survivor has passed without it does not count."""
    original = decide_module.decide

    def decide(reports: Any, *, verdicts: Any, **how: Any) -> Ruling:
        known = 1 + max((k.n for k in verdicts if k.tag is None), default=-1)
        poor = {u: r._replace(next_index=known, calls=tuple(x for x in r.calls if x.state != "U")) for u, r in reports.items()}
        return original(poor, verdicts=verdicts, **how)

    m.setattr(ledger_module, "decide", decide)


def test_m4_report() -> None:
    """Text `all_reduce(); update()`. Call 0 is committed, nobody waits. B's update (1) is skipped; C has not come to it. A is
    lost. If the master took call 1 for the next one, C's update would tell of the loss, which B has passed: B would never
    hear of it.
    """

    def replay() -> tuple[State, list[str]]:
        c = Cluster("ABC")
        calls = [n.call(Call()) for n in c.nodes]
        c.run()
        assert ends(*calls) == ["committed"] * 3
        assert c["B"].update().record.state is State.SKIPPED
        c["A"].die()
        c.notice(c["A"])
        c.run()
        update = c["C"].update()
        c.run()
        after = [c[name].call(Call()) for name in "BC"]
        c.run()
        return update.record.state, ends(*after)

    assert replay() == (State.SKIPPED, ["LOSS", "LOSS"])
    with without(no_report):
        assert replay() == (State.COMMITTED, ["committed", "committed"])  # C heard it from its update, B went on without a word


def claims(call: Call) -> set[str]:
    return {x.description for x in call.outcome.claims} if call.outcome else set()


def test_m4_limit_two_updates_per_iteration() -> None:
    """A limit of the design, not a rule: a newcomer begins at the top of its text. In `update(); update(); all_reduce()` the
    incumbents may be at another update by then; the calls do not match, and all sides are told so.
    """
    c = Cluster("AB")
    c.add("J")
    c.run()
    for name in "AB":
        c[name].update()  # the second of an iteration
    c.run()
    calls = [c[name].call(Call()) for name in "AB"]
    c["J"].update()  # at once
    calls.append(c["J"].update())
    announce(c)
    settle(c)
    assert ends(*calls) == ["MISMATCH"] * 3
    assert all(claims(x) == {Call().description, "update()"} for x in calls)
    again = [n.call(Call()) for n in c.nodes]
    c.run()
    assert ends(*again) == ["committed"] * 3


def test_m4_limit_a_collective_before_the_loop() -> None:
    """Text `all_reduce()`, then `update(); all_reduce(); all_reduce()` for ever. The newcomer skips its first update, where the
    incumbents make a collective; the master hears of that with the newcomer's next call.
    """
    c = Cluster("AB")
    c.add("J")
    first = [c[name].call(Call()) for name in "AB"]
    c.run()
    updates = [c[name].update() for name in "AB"]
    c.run()
    second = [n.call(Call()) for n in c.nodes]
    c.run()
    assert ends(*first, *updates, *second) == ["committed"] * 7
    third = [c[name].call(Call()) for name in "AB"]
    assert c["J"].update().record.state is State.SKIPPED
    c["J"].call(Call())
    announce(c)
    settle(c)
    assert ends(*third) == ["MISMATCH"] * 2
    assert all(claims(x) == {Call().description, "update()"} for x in third)


def test_m4_limit_the_survivors_were_further() -> None:
    """Text `while comm.world_size < 3: update()`, then `update(); all_reduce()` for ever. J comes in as the third, A and B are
    lost, K comes in as the second: J is in its loop, K still waits for three.
    """
    c = Cluster("AB")
    c.add("J")
    c.run()
    for name in "AB":
        c[name].update()
    c.run()
    j = c["J"]
    for name in "AB":
        c[name].die()
        c.notice(c[name])
    j.update()
    failed = j.call(Call())
    c.add("K")
    c.run()
    assert end(failed) == "LOSS"
    j.update()
    c.run()
    k = c["K"]
    assert k.member
    calls = [j.call(Call())]
    k.update()  # at once
    calls.append(k.update())
    announce(c)
    settle(c)
    assert ends(*calls) == ["MISMATCH"] * 2
    assert all(claims(x) == {Call().description, "update()"} for x in calls)
