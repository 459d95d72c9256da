"""The master's book of one communicator: which calls its members are in, and how they end.

In RUN it gives verdicts: commit when all are done, abort when one failed. When members are lost, leave or cannot reach each other it is
stopped: every survivor stops and reports, `decide` rules, and `install` tells all of them the new epoch with every decision in one message.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from pccl.core import codec
from pccl.core.messages import (
    Agreed,
    Ask,
    Claim,
    CommReport,
    Decision,
    Done,
    Enter,
    Failed,
    Flag,
    Leave,
    Leaving,
    Link,
    NewEpoch,
    Offer,
    Overdue,
    Reason,
    Standing,
    TagUse,
    Truth,
    UpdateAsk,
    Verdict,
    Waiting,
)
from pccl.core.types import CallId, Epoch, Member
from pccl.protocol.decide import Failure, Ruling, decide
from pccl.protocol.progress import Progress

MISMATCH_LINGER = 0.1
"""Seconds that a mismatch waits for the other members' claims, so that the error can name all sides."""
TERM_BITS = 32
"""The verdicts of a master are numbered from its term times 2**32: members remember the last number of the one before."""
SKIPPED = (1, "update()")
"""The claim of a member that skipped an update where others made something else."""


class Phase(Enum):
    """Whether members may go on."""

    RUN = "run"
    STOPPING = "stopping"
    """Asked to stop; survivors' reports are coming in."""
    STOPPED = "stopped"
    """All reports are in; `install` is due."""


@dataclass(slots=True)
class Call:
    """A call that is open, or whose verdict has not reached everyone."""

    id: CallId
    opened: float
    claims: dict[int, tuple[int, str]] = field(default_factory=dict)
    """uid -> (signature, description), of those who announced it"""
    payloads: dict[int, bytes] = field(default_factory=dict)
    asks: type | None = None
    """What kind of answer the members want of the master: UpdateAsk, SplitAsk, Offer, or none"""
    done: set[int] = field(default_factory=set)
    flags: int = 0
    verdict: str = ""
    seq: int = 0
    failure: Failure | None = None
    truth: Truth | None = None
    """What sync_state agreed on"""
    ends: bool = False
    """A member will not wait for it any longer, though others may have committed it: it is aborted if nobody has."""
    warned: bool = False
    mismatch_at: float | None = None

    @property
    def untagged(self) -> bool:
        """Whether it has its place in the order of the program text."""
        return self.id.tag is None and self.id.pair is None


class Host(Protocol):
    """The group that a ledger belongs to."""

    rid: int

    def send(self, uids: Iterable[int], message: object) -> None:
        """Queue a message for members."""

    def peers_waiting(self, ledger: Ledger) -> bool:
        """Whether newcomers wait to come in."""

    def all_rest(self, ledger: Ledger, call: Call) -> None:
        """Everyone is at rest in an update; end it now or later."""

    def all_given(self, ledger: Ledger, call: Call) -> None:
        """Everyone has entered a call with a payload that the master has to answer (sync_state)."""

    def result(self, ledger: Ledger, call: CallId, payloads: Mapping[int, bytes]) -> bytes:
        """The payload of the commit of a call on which everyone is done."""

    def stopped(self, ledger: Ledger) -> None:
        """The reports of all survivors are in."""

    def conflict(self, ledger: Ledger, uid: int, detail: str) -> None:
        """A member cannot take over the truth that sync_state agreed on."""


class Ledger:
    """One communicator's calls. `members` are in rank order; all methods take the uid of the member that the event comes from."""

    def __init__(self, host: Host, comm: int, epoch: Epoch, members: Iterable[Member], *, min_world_size: int = 1) -> None:
        self.host = host
        self.comm = comm
        self.epoch = epoch
        self.members = {m.uid: m for m in members}
        self.min_world_size = min_world_size
        self.phase = Phase.RUN
        self.calls: dict[CallId, Call] = {}
        self.broken: tuple[Link, ...] = ()
        """What the members were told of pairs without a link"""
        self.near = False
        """Every two members share memory."""
        self.leaving: dict[int, Progress] = {}
        """Which calls those have made who leave in the place of the next update"""
        self.lost: dict[int, Member] = {}
        self.left: dict[int, Member] = {}
        self.reports: dict[int, CommReport] = {}
        self.cause: Failure = (Reason.NONE, "")
        self.synced = 0
        """Number of the last sync_state"""
        self.standings = dict.fromkeys(self.members, 0)
        """uid -> index of its next untagged call, as last heard"""
        self._seq = 0
        self._acks = dict.fromkeys(self.members, 0)
        self._sent = dict.fromkeys(self.members, 0)
        self._ruled: deque[CallId] = deque()
        self._news: set[int] = set()
        """Members whose next call is to tell them of a loss"""
        self._entered_before = Progress()
        """The survivors', when the epoch began"""
        self._skipped: dict[int, int] = {}
        """uid -> index of the last update that it is known to have skipped"""

    # --- what members say -------------------------------------------------------------------------------------------

    def enter(self, uid: int, m: Enter, now: float) -> None:
        """A member has made a call."""
        if self._current(uid, m.epoch):
            if m.flags & Flag.AFTER_SKIP:
                self._note_skip(uid, m.call.n - 1, now)
            call = self._claim(uid, m.call, m.signature, m.description, m.payload, now, m.flags)
            if call:
                self._entered(uid, call)

    def done(self, uid: int, m: Done, now: float) -> None:
        """A member has a call's result, or is at rest in an update."""
        if not self._current(uid, m.epoch):
            return
        self._acks[uid] = m.ack
        if m.flags & Flag.AFTER_SKIP:
            self._note_skip(uid, m.call.n - 1, now)
        call = self.calls.get(m.call)
        if call and call.flags & Flag.PLAIN and m.signature in (signature for signature, _ in call.claims.values()):
            call.done.add(uid)
            if not call.verdict and call.done >= call.claims.keys():
                del self.calls[m.call]
            return
        call = self._claim(uid, m.call, m.signature, m.description, m.payload, now, Flag.SEALED)
        if call and not call.verdict:
            call.done.add(uid)
            self._check_done(call)

    def _check_done(self, call: Call) -> None:
        if self.phase is Phase.RUN and not call.verdict and call.mismatch_at is None and call.done >= self.participants(call).keys():
            if call.asks is UpdateAsk:
                self.host.all_rest(self, call)
            else:
                self.commit(call, self.host.result(self, call.id, call.payloads))

    def failed(self, uid: int, m: Failed, now: float) -> None:
        """A member ended a call before it was done."""
        if uid not in self.members or m.epoch != self.epoch:
            return
        call = self._claim(uid, m.call, m.signature, m.description, b"", now, Flag.SEALED)
        if not call or call.verdict:
            return
        if call.failure is None:
            call.failure = (m.reason, m.detail)
        if self.phase is not Phase.RUN:
            return  # its report says so, too
        if m.reason == Reason.CONFLICT:
            self.host.conflict(self, uid, m.detail)
        elif m.reason == Reason.MISMATCH:
            call.mismatch_at = now if call.mismatch_at is None else call.mismatch_at
        else:
            self.abort(call, m.reason, m.detail, by=uid)

    def overdue(self, uid: int, m: Overdue, now: float) -> None:
        """A member that is done with a call will not wait any longer."""
        if self._current(uid, m.epoch):
            call = self.calls.get(m.call)
            if call and not call.verdict and call.flags & Flag.PLAIN:  # it commits without the master: only all members together know
                call.failure, call.ends = call.failure or (m.reason, m.detail), True
                self.stop(m.reason, m.detail)
            elif call and not call.verdict:
                self.abort(call, m.reason, m.detail, by=uid)

    def leave(self, uid: int, m: Leave) -> None:
        """A member leaves in the place of its update `m.index`."""
        if uid not in self.members or uid in self.leaving:
            return
        self.leaving[uid] = Progress.of(m.index, m.uses)
        for n in m.commits if m.epoch == self.epoch else ():  # until the epoch that its leaving begins
            call = self.calls.setdefault(CallId(None, n), Call(CallId(None, n), 0.0))
            call.verdict = call.verdict or "C"
        others = [u for u in self.members if u not in self.leaving]
        self.host.send(others, Leaving(self.host.rid, self.comm, self.epoch, uid, m.index, m.uses))
        if self.phase is Phase.RUN:
            for call in [c for c in self.calls.values() if not c.verdict]:
                for claimant in [u for u in call.claims if u in self.members]:
                    self._entered(claimant, call)
                self._check_done(call)

    def standing(self, uid: int, s: Standing, now: float) -> None:
        """A heartbeat says how far the member is."""
        if uid in self.members:
            self._acks[uid] = max(self._acks[uid], s.ack)
            self.standings[uid] = s.next_index
            if s.skipped >= 0:
                self._note_skip(uid, s.skipped, now)

    def report(self, uid: int, r: CommReport) -> None:
        """A survivor has stopped, and says what it knows."""
        if self.phase is Phase.STOPPING and uid in self.members and uid not in self.reports:
            self.reports[uid] = r
            self._check_stopped()

    # --- how calls end ----------------------------------------------------------------------------------------------

    def commit(self, call: Call, payload: bytes = b"") -> None:
        """All have the result."""
        if call.truth:
            self.synced = call.truth.sync
        self._rule(call, "C", payload=payload)

    def agree(self, call: Call, truth: Truth) -> None:
        """Everyone has entered sync_state, and this is the truth."""
        call.truth = truth
        self.host.send(self.participants(call), Agreed(self.host.rid, self.comm, self.epoch, call.id, codec.encode(truth)))

    def abort(self, call: Call, reason: int, detail: str, *, by: int = -1) -> None:
        """The call ends for all; it is final."""
        missing = []
        if reason == Reason.DEADLINE:
            missing = [u for u in self.participants(call) if u not in call.claims and not (call.untagged and self.standings[u] > call.id.n)]
        claims = tuple(Claim(u, text) for u, (_, text) in call.claims.items()) if reason == Reason.MISMATCH else ()
        call.failure = (reason, detail)
        self._rule(call, "A", reason=reason, detail=detail, by=by, missing=tuple(missing), claims=claims)

    def _rule(
        self,
        call: Call,
        verdict: str,
        *,
        payload: bytes = b"",
        reason: int = Reason.NONE,
        detail: str = "",
        by: int = -1,
        missing: tuple[int, ...] = (),
        claims: tuple[Claim, ...] = (),
    ) -> None:
        to = list(self.participants(call))
        low = self._low()
        self._seq += 1
        waiting = int(self.host.peers_waiting(self))
        for uid in to:
            self._sent[uid] = self._seq
        self.host.send(
            to,
            Verdict(
                self.host.rid,
                self.comm,
                self.epoch,
                call.id,
                verdict,
                waiting,
                payload,
                reason,
                detail,
                by,
                missing,
                claims,
                self._seq,
                low,
            ),
        )
        if verdict == "N":
            return
        call.verdict, call.seq = verdict, self._seq
        self._ruled.append(call.id)
        self._prune(low)

    def _low(self) -> int:
        """The last verdict that everyone whom it concerned has."""
        return min((self._acks[u] if self._acks[u] < self._sent[u] else self._seq for u in self.members), default=self._seq)

    def _prune(self, low: int) -> None:
        while self._ruled:
            call = self.calls.get(self._ruled[0])
            if call and call.seq > low:
                break
            if call:
                del self.calls[call.id]
            self._ruled.popleft()

    # --- epoch changes ----------------------------------------------------------------------------------------------

    def stop(self, reason: int, detail: str) -> None:
        """Ask every member to stop and report."""
        if self.phase is Phase.RUN:
            self.phase = Phase.STOPPING
            self.cause = (reason, detail)
            self.reports = {}
            self.dismiss()
            self.host.send(self.members, Ask(self.host.rid, (self.comm,)))
        elif reason == Reason.LOSS:
            self.cause = (reason, detail)

    def dismiss(self) -> list[Member]:
        """Members that wanted to leave are no longer in it; returns them."""
        gone = [self._remove(uid, self.left) for uid in list(self.leaving) if uid in self.members]
        self.leaving.clear()
        return gone

    def _remove(self, uid: int, where: dict[int, Member]) -> Member:
        where[uid] = self.members.pop(uid)
        for table in (self.reports, self._acks, self._sent, self.standings, self.leaving):
            table.pop(uid, None)
        return where[uid]

    def drop(self, uid: int, *, left: bool, detail: str) -> None:
        """A member is no more; the others are stopped."""
        if uid in self.members:
            self._remove(uid, self.left if left else self.lost)
            self.stop(Reason.LOSS, detail)
            self._check_stopped()

    def _check_stopped(self) -> None:
        if self.phase is Phase.STOPPING and self.members and self.reports.keys() >= self.members.keys():
            self.phase = Phase.STOPPED
            self.host.stopped(self)

    def resurrect(self, reports: dict[int, CommReport], *, lost: Iterable[Member], left: Iterable[Member], synced: int) -> None:
        """The communicator of a lost master: stopped, with the reports of those who are left."""
        self.phase = Phase.STOPPED
        self.reports = reports
        self.lost = {m.uid: m for m in lost}
        self.left = {m.uid: m for m in left}
        self.synced = synced
        self.cause = (Reason.TAKEOVER, "the master was replaced")

    def ruling(self) -> Ruling:
        """What the reports come to."""
        ruling = decide(
            self.reports,
            verdicts={c.id: c.verdict or "A" for c in self.calls.values() if c.verdict or c.ends},
            failures={c.id: c.failure for c in self.calls.values() if c.failure},
            cause=self.cause,
            loss=bool(self.lost or self.left),
            resolve=lambda call, payloads: self.host.result(self, call, payloads),
        )
        truths = [codec.decode(d.payload) for d in ruling.decisions if d.verdict == "C" and d.payload]
        self.synced = max([self.synced, *(t.sync for t in truths if isinstance(t, Truth))])
        return ruling

    def install(
        self,
        epoch: Epoch,
        *,
        decisions: tuple[Decision, ...] = (),
        ruling: Ruling | None = None,
        joined: tuple[Member, ...] = (),
        tags: tuple[TagUse, ...] = (),
        next_index: int = 0,
        broken: tuple[Link, ...] = (),
        next_uid: int = 0,
        near: bool = False,
    ) -> None:
        """Begin a new epoch: tell every member, newcomers included, who is in it and how calls were decided."""
        before = dict(self.members)
        self.members.update({m.uid: m for m in joined})
        self._seq = max(self._seq, epoch.term << TERM_BITS) + 1
        news = bool(ruling and ruling.news)
        if ruling:
            decisions = ruling.decisions
        message = NewEpoch(
            self.host.rid,
            self.comm,
            epoch,
            tuple(self.members.values()),
            self.min_world_size,
            decisions,
            joined,
            tuple(self.left.values()),
            tuple(self.lost.values()),
            news,
            ruling.floor if ruling else 0,
            next_index,
            tags,
            broken,
            next_uid,
            self.synced,
            self.cause[0],
            self.cause[1],
            self._seq,
            near,
        )
        self.host.send(self.members, message)
        self.epoch, self.broken, self.near = epoch, broken, near
        self.phase = Phase.RUN
        self.calls = {d.call: self._kept(d) for d in decisions if d.verdict != "R"}
        self._ruled = deque(self.calls)
        self._news = set(self.members) if news else set()
        self._entered_before = Progress.of(ruling.floor, ruling.tags) if ruling else Progress()
        self._acks = {uid: self._acks.get(uid, 0) for uid in self.members}
        self._sent = dict.fromkeys(self.members, self._seq)
        self._skipped = {}
        self.standings = {uid: self.standings.get(uid, 0 if uid in before else next_index) for uid in self.members}
        self.reports, self.lost, self.left, self.cause = {}, {}, {}, (Reason.NONE, "")

    def _kept(self, d: Decision) -> Call:
        """A decision stays in the book until everyone has it."""
        return Call(d.call, 0.0, verdict=d.verdict, seq=self._seq, failure=(d.reason, d.detail) if d.verdict == "A" else None)

    # --- time -------------------------------------------------------------------------------------------------------

    def tick(self, now: float, log_waiting: float) -> None:
        """Ends mismatched calls once all sides are known, and tells who waits for whom."""
        if self.phase is not Phase.RUN:
            return
        for call in list(self.calls.values()):
            if call.verdict:
                continue
            missing = [u for u in self.participants(call) if u not in call.claims]
            if call.mismatch_at is not None and (not missing or now >= call.mismatch_at + MISMATCH_LINGER):
                self.abort(call, Reason.MISMATCH, "the members' calls do not match")
            elif now - call.opened >= log_waiting and not call.warned and missing:
                call.warned = True
                to = [u for u in call.claims if u in self.members]
                self.host.send(to, Waiting(self.host.rid, self.comm, self.epoch, call.id, tuple(missing)))

    def in_motion(self) -> list[Call]:
        """Calls that everyone has made and that only data holds up."""
        return [
            c
            for c in self.calls.values()
            if not c.verdict and not c.payloads and c.flags & Flag.SEALED and c.claims.keys() >= self.participants(c).keys()
        ]

    def participants(self, call: Call) -> dict[int, Member]:
        """The members that take part in a call."""
        if call.id.pair:
            return {u: self.members[u] for u in call.id.pair if u in self.members}
        if self.leaving:
            return {
                u: m for u, m in self.members.items() if not (u in self.leaving and call.untagged and not self.leaving[u].passed(call.id))
            }
        return self.members

    # --- inside -----------------------------------------------------------------------------------------------------

    def _current(self, uid: int, epoch: Epoch) -> bool:
        return self.phase is Phase.RUN and uid in self.members and epoch == self.epoch

    def _claim(self, uid: int, call_id: CallId, signature: int, text: str, payload: bytes, now: float, flags: int) -> Call | None:
        """Note that a member has made a call; None if the member does not belong to it."""
        if call_id.pair and uid not in call_id.pair:
            return None
        call = self.calls.get(call_id)
        if call is None:
            call = self.calls[call_id] = Call(call_id, now)
        call.flags |= flags
        if flags & Flag.SEALED or uid not in call.claims:
            call.claims[uid] = (signature, text)
        if payload:
            call.payloads[uid] = payload
            call.asks = type(codec.decode(payload))
        self._compare(call, now)
        return call

    def _note_skip(self, uid: int, index: int, now: float) -> None:
        """The member has skipped the update of this index: others may have made something else in its place."""
        self._skipped[uid] = index
        call = self.calls.get(CallId(None, index))
        if call and not call.verdict:
            self._compare(call, now)

    def _compare(self, call: Call, now: float) -> None:
        """Find out whether the members' calls in one place match."""
        if call.untagged and call.asks is not UpdateAsk:
            call.claims.update({u: SKIPPED for u, n in self._skipped.items() if n == call.id.n and u in self.members})
        if call.mismatch_at is None and len({s for s, _ in call.claims.values() if s}) > 1:
            call.mismatch_at = now

    def _entered(self, uid: int, call: Call) -> None:
        """A call was announced: it may be the one that carries news, or one that cannot run with a leaver."""
        if call.verdict or uid in self.leaving:
            return
        if uid in self._news and self._is_new(call.id):
            self._news -= self.participants(call).keys()
            if call.asks is UpdateAsk:
                self.commit(call)
                return
            if not call.flags & Flag.RETRY:
                self.abort(call, Reason.LOSS, "a peer was lost or left before this call")
                return
            self._rule(call, "N")
        late = [u for u, progress in self.leaving.items() if u in (call.id.pair or self.members) and not progress.passed(call.id)]
        if late and call.asks is not UpdateAsk:
            for leaver in late:
                self.drop(leaver, left=True, detail="a member left")
        elif call.asks is Offer and not call.truth and call.mismatch_at is None and call.payloads.keys() >= self.participants(call).keys():
            self.host.all_given(self, call)

    def _is_new(self, call: CallId) -> bool:
        """Whether no survivor had entered the call when the epoch began."""
        return not self._entered_before.passed(call)
