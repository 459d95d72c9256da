"""The master's state of one group: who is a member, who waits, how newcomers come in, and how the group goes on after a loss.

A group owns one ledger per communicator; number 0 is the group's own. Its states follow from its data: empty (no root ledger),
running, making links (an `Admission` under way: for an update, or again after complaints), or being taken over from a lost master
(`_takeover_ends` is set).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from pccl.core import codec
from pccl.core.messages import (
    PROTOCOL_VERSION,
    Ask,
    Beat,
    Complaint,
    Contact,
    Decision,
    Done,
    Enter,
    Failed,
    Gone,
    Hello,
    Knock,
    Leave,
    Link,
    Offer,
    Overdue,
    PeerInfo,
    Prepare,
    Ready,
    Reason,
    Refused,
    Report,
    SplitAsk,
    SplitResult,
    SubComm,
    Truth,
    UpdateAsk,
    Welcome,
)
from pccl.core.options import Options
from pccl.core.types import CallId, Epoch, Member
from pccl.protocol.admission import Admission, Dial
from pccl.protocol.election import Conflict, elect
from pccl.protocol.ledger import Call, Ledger, Phase
from pccl.protocol.near import Near
from pccl.protocol.reach import gaps, outcasts
from pccl.protocol.takeover import newest_epoch, rebuild

logger = logging.getLogger("pccl.master")

ROOT = 0
"""Number of the communicator that is the whole group."""


@dataclass(slots=True, eq=False)
class Peer:
    """A process that said hello. `conn` is whatever the shell knows its connection by."""

    conn: object
    info: PeerInfo
    uid: int = -1
    last_beat: float = 0.0
    held: bool = False
    """Its engine has been silent, its connection is alive."""
    progress: int = -1

    @property
    def member(self) -> Member:
        """What its fellow members know of it."""
        return Member(self.uid, self.info.name, self.info.host)


class Group:
    """All methods take the time; what is to be sent is appended to `outbox` as (connections, message)."""

    def __init__(self, name: str, rid: int, options: Options, random_bytes: Callable[[int], bytes], *, recover_until: float) -> None:
        self.name = name
        self.rid = rid
        self.outbox: list[tuple[list[object], object]] = []
        self.ledgers: dict[int, Ledger] = {}
        self.peers: dict[int, Peer] = {}
        """Members, and newcomers of the admission under way, by uid."""
        self.pending: list[Peer] = []
        self.broken: set[Link] = set()
        """Pairs of members that go on without a link."""
        self.near = Near()
        self._options = options
        self._random_bytes = random_bytes
        self._recover_until = recover_until
        self._by_conn: dict[object, Peer] = {}
        self._term = 1
        self._number = 0
        self._next_uid = 0
        self._admissions = 0
        self._admission: Admission[Peer, Call] | None = None
        self._takeover_ends: float | None = None
        """Until when members may report to this master, who does not know the group."""
        self._reports: dict[Member, tuple[Peer, Report]] = {}
        """The reports of a takeover. A uid is not enough to tell members: some may be of an older group that the last master never knew."""
        self._resting: Call | None = None
        """An update that waits for the group to be large enough."""
        self._relink: set[Link] = set()
        """Links that were complained of."""
        self._knocked = False
        """What the members were told of newcomers"""
        self._moved_at = 0.0
        self._ticked: float | None = None
        self._now = 0.0

    @property
    def root(self) -> Ledger | None:
        """The ledger of the whole group, if it has members."""
        return self.ledgers.get(ROOT)

    # --- events -----------------------------------------------------------------------------------------------------

    def receive(self, conn: object, m: object, now: float) -> None:
        """A message of a connection."""
        self._now = now
        if isinstance(m, Hello):
            self._hello(conn, m)
            self._knock()
            return
        peer = self._by_conn.get(conn)
        if peer is None:
            return
        if isinstance(m, Beat):
            peer.last_beat, peer.held = now, False
            if peer.progress != m.progress:
                peer.progress, self._moved_at = m.progress, now
            for s in m.standings:
                if s.comm in self.ledgers:
                    self.ledgers[s.comm].standing(peer.uid, s, now)
        elif isinstance(m, Report):
            self._report(peer, m)
        elif isinstance(m, Ready):
            self._ready(peer, m)
        elif isinstance(m, Complaint):
            self._complaint(peer, m)
        elif isinstance(m, (Enter, Done, Failed, Overdue, Leave)) and m.comm in self.ledgers:
            ledger = self.ledgers[m.comm]
            if isinstance(m, Enter):
                ledger.enter(peer.uid, m, now)
            elif isinstance(m, Done):
                ledger.done(peer.uid, m, now)
            elif isinstance(m, Failed):
                ledger.failed(peer.uid, m, now)
            elif isinstance(m, Overdue):
                ledger.overdue(peer.uid, m, now)
            else:
                self._leave(peer, ledger, m)
            if self._admission and self._admission.call and self._admission.call.verdict:
                self._give_up_links()  # a member has ended the update: the newcomers wait for the next
                self._stop_for_links()  # that broke meanwhile
        self._knock()

    def disconnect(self, conn: object, now: float) -> None:
        """A connection closed, or fell silent."""
        self._now = now
        peer = self._by_conn.pop(conn, None)
        if peer is None:
            return
        peer.conn = None
        if peer in self.pending:
            self.pending.remove(peer)
        elif self._takeover_ends is not None:
            if self._reports.get(peer.member, (None,))[0] is peer:
                del self._reports[peer.member]
        elif self.peers.get(peer.uid) is peer:
            self._lose(peer.uid, f"the control connection of {peer.info.name} closed")

    def tick(self, now: float) -> None:
        """Time has passed; call this every heartbeat interval or so."""
        self._now = now
        if self._ticked is not None:
            self._forgive(now - self._ticked - 2 * self._options.heartbeat_interval)
        self._ticked = now
        if self._takeover_ends is not None:
            if now >= self._takeover_ends:
                self._conclude_takeover()
            return
        self._form()
        for ledger in list(self.ledgers.values()):
            ledger.tick(now, self._options.log_waiting)
        self._check_alive()
        self._check_stalls()
        self._check_newcomers()
        self._knock()

    # --- ledgers call back ------------------------------------------------------------------------------------------

    def send(self, uids: Iterable[int], message: object) -> None:
        """Queue a message for members."""
        conns = [self.peers[u].conn for u in uids if u in self.peers and self.peers[u].conn is not None]
        if conns:
            self.outbox.append((conns, message))

    def peers_waiting(self, ledger: Ledger) -> bool:
        """Whether newcomers wait to come in; they do so to the group, not to its sub-communicators."""
        return ledger.comm == ROOT and bool(self._admissible())

    def _knock(self) -> None:
        """Tell members that commit without this master whether newcomers wait."""
        root = self.root
        if (self.pending or self._knocked) and root and root.near and root.phase is Phase.RUN:
            waiting = self.peers_waiting(root)
            if waiting != self._knocked:
                self._knocked = waiting
                self.send(root.members, Knock(self.rid, ROOT, waiting))

    def all_rest(self, ledger: Ledger, call: Call) -> None:
        """Everyone is at rest in an update: let newcomers in and leavers go, or say that nothing changes."""
        newcomers = self._admissible()
        enough = len(self._staying()) + len(newcomers) >= ledger.min_world_size
        if newcomers and enough:
            self._admit(newcomers, call)
        elif ledger.leaving and (gaps := self._gaps()):
            self._begin_links([], call, gaps)
        elif ledger.leaving:
            self._end_update(call, [])
        elif enough:
            ledger.commit(call)
        else:
            self._resting = call

    def all_given(self, ledger: Ledger, call: Call) -> None:
        """Everyone has entered sync_state."""
        offers = {uid: codec.decode(p) for uid, p in call.payloads.items() if uid in ledger.members}
        if not all(isinstance(o, Offer) for o in offers.values()):
            return
        result = elect({uid: (o, ledger.members[uid].name) for uid, o in offers.items()})
        if isinstance(result, Truth):
            ledger.agree(call, result)
        elif isinstance(result, Conflict):
            ledger.abort(call, Reason.CONFLICT, result.detail)
        else:
            for uid, detail in result.items():
                self._evict(uid, Reason.CONFLICT, detail)

    def conflict(self, ledger: Ledger, uid: int, detail: str) -> None:
        """A member cannot take over the truth that the others have: it has to leave."""
        self._evict(uid, Reason.CONFLICT, detail)

    def result(self, ledger: Ledger, call: CallId, payloads: Mapping[int, bytes]) -> bytes:
        """The payload of a commit: the communicators of a split, the truth of a sync_state; nothing otherwise."""
        asks = {uid: codec.decode(p) for uid, p in payloads.items() if p and uid in ledger.members}
        truth = next((a for a in asks.values() if isinstance(a, Truth)), None)
        if truth:
            return codec.encode(truth)
        splits = {uid: a for uid, a in asks.items() if isinstance(a, SplitAsk)}
        if not splits:
            return b""
        ranks = {uid: rank for rank, uid in enumerate(ledger.members)}
        made = []
        for color in sorted({a.color for a in splits.values() if a.color is not None}):
            uids = sorted((u for u, a in splits.items() if a.color == color), key=lambda u: (splits[u].order, ranks[u]))
            epoch = self._next_epoch()
            self.ledgers[epoch.number] = sub = Ledger(self, epoch.number, epoch, [ledger.members[u] for u in uids])
            sub.broken = ledger.broken
            made.append(SubComm(epoch.number, epoch, tuple(uids), self.near.all_met(uids)))
        return codec.encode(SplitResult(tuple(made)))

    def stopped(self, ledger: Ledger) -> None:
        """All survivors of a communicator have stopped: decide, once links that broke have been tried again."""
        root = self.root
        if ledger.comm != ROOT:
            if root is None or root.phase is Phase.RUN:
                self._resume(ledger)
            return
        again = {(link.high, link.low) for link in self._relink if link.low in ledger.members and link.high in ledger.members}
        self._relink.clear()
        dials = sorted(again.union(self._gaps()))
        if dials:
            self._begin_links([], None, dials)
        else:
            self._resume(ledger)

    # --- hello, leave, loss -----------------------------------------------------------------------------------------

    def _hello(self, conn: object, m: Hello) -> None:
        peer = Peer(conn, m.peer, last_beat=self._now)
        if m.version != PROTOCOL_VERSION:
            detail = f"the master speaks protocol version {PROTOCOL_VERSION}, this peer {m.version}; install the same pccl on both"
            self.outbox.append(([conn], Refused(self.rid, Reason.REFUSED, detail)))
        elif not m.member:
            self._by_conn[conn] = peer
            self.pending.append(peer)
            self.outbox.append(([conn], Welcome(self.rid, self._options.heartbeat_interval)))
            logger.info("group %r: %s waits to come in", self.name, peer.info.name)
            self._form()
            if self._resting and self.root and not self._resting.verdict:
                self.all_rest(self.root, self._resting)
        elif self._number == 0:  # a member of a group that this master has never had: it stands in for another one
            self._give_up_links(peer)
            self._by_conn[conn] = peer
            if self._takeover_ends is None:
                self._takeover_ends = self._now + self._options.heartbeat_timeout
            self.outbox.append(([conn], Ask(self.rid, ())))
        else:
            detail = "its control connection was lost, and the group has gone on"
            self.outbox.append(([conn], Gone(self.rid, Reason.LOSS, detail)))

    def _leave(self, peer: Peer, ledger: Ledger, m: Leave) -> None:
        if peer.uid not in ledger.members or m.epoch.term != ledger.epoch.term:
            return
        if ledger.comm == ROOT:
            logger.info("group %r: %s leaves", self.name, peer.info.name)
            self.send([peer.uid], Gone(self.rid, Reason.LEFT, "it left"))
            self._by_conn.pop(peer.conn, None)
            peer.conn = None
            for sub in [x for x in self.ledgers.values() if x is not ledger]:
                self._leave_sub(sub, peer.uid, Leave(sub.comm, sub.epoch, -1, ()))
            ledger.leave(peer.uid, m)
            if ledger.phase is not Phase.RUN:  # it will not report any more
                self._lose(peer.uid, f"{peer.info.name} left", left=True)
        else:
            self._leave_sub(ledger, peer.uid, m)
        self._forget_empty()

    def _leave_sub(self, ledger: Ledger, uid: int, m: Leave) -> None:
        ledger.leave(uid, m)
        if ledger.phase is not Phase.RUN:  # it will not report any more
            ledger.drop(uid, left=True, detail="a member left")

    def _lose(self, uid: int, detail: str, *, left: bool = False) -> None:
        """A member, or a newcomer on its way in, is no more."""
        peer = self.peers.pop(uid, None)
        if peer is None:
            return
        if peer.conn is not None:
            self._by_conn.pop(peer.conn, None)
        admission = self._give_up_links(peer)
        root = self.root
        if root is None or uid not in root.members:
            self._stop_for_links()  # that broke meanwhile
            if admission and admission.call and root and root.phase is Phase.RUN and not admission.call.verdict:
                self.all_rest(root, admission.call)
            self._form()
            return
        (logger.info if left else logger.warning)("group %r: %s is %s: %s", self.name, peer.info.name, "out" if left else "lost", detail)
        for ledger in list(self.ledgers.values()):
            ledger.drop(uid, left=left, detail=detail)
        self._forget_empty()
        if root.phase is Phase.STOPPED and self._admission is None and self.root is root:
            self.stopped(root)  # links were being made again

    def _evict(self, uid: int, reason: int, detail: str, *, left: bool = True) -> None:
        """The group goes on without a member that is alive."""
        self.send([uid], Gone(self.rid, reason, detail))
        self._lose(uid, detail, left=left)

    def _forget_empty(self) -> None:
        """Communicators without members are over; a group that all have left begins anew with whoever waits."""
        for comm, ledger in list(self.ledgers.items()):
            if all(u in ledger.leaving for u in ledger.members):
                del self.ledgers[comm]
        if self.root is None:
            for uid in [u for u, p in self.peers.items() if self._admission is None or p not in self._admission.newcomers]:
                del self.peers[uid]
            self.ledgers.clear()
            self.broken.clear()
            self._relink.clear()
            self._resting = None
            self._form()

    def _complaint(self, peer: Peer, m: Complaint) -> None:
        root = self.root
        if root is None or m.epoch != root.epoch or peer.uid not in root.members or m.uid not in root.members:
            return
        if peer.uid in root.leaving:
            return
        if m.uid in root.leaving:
            if m.lacking:  # that will not come: a leaver stays until the next update, but not then
                self._lose(m.uid, f"{self.peers[m.uid].info.name} left, and its link broke before its data had come", left=True)
            return
        link = Link(min(peer.uid, m.uid), max(peer.uid, m.uid))
        if self._admission and any({link.low, link.high} == set(pair) for pair in self._admission.dials):
            return  # it is just being made again
        logger.info("group %r: %s complains of its link to %s: %s", self.name, peer.info.name, root.members[m.uid].name, m.detail)
        self._relink.add(link)
        if self._admission is None:
            self._stop_for_links()

    def _stop_for_links(self) -> None:
        for ledger in list(self.ledgers.values()):
            if any(link.low in ledger.members and link.high in ledger.members for link in self._relink):
                ledger.stop(Reason.LINK, "a link between two members broke")

    # --- links and epochs -------------------------------------------------------------------------------------------

    def _form(self) -> None:
        """An empty group begins when enough wait; not while members of an earlier master's group may still report."""
        busy = self.root is not None or self._admission is not None or self._takeover_ends is not None
        newcomers = self._admissible()
        if newcomers and not busy and self._now >= self._recover_until:
            self._admit(newcomers, None)

    def _admissible(self) -> list[Peer]:
        """Those who wait and would be in a group that is large enough for them."""
        here, found = len(self._staying()), self.pending
        while found and (most := max(p.info.min_world_size for p in found)) > here + len(found):
            found = [p for p in found if p.info.min_world_size < most]
        return found

    def _admit(self, newcomers: list[Peer], call: Call | None) -> None:
        """Begin to let in these."""
        self.pending = [p for p in self.pending if p not in newcomers]
        self._resting = None
        for peer in newcomers:
            if peer.uid < 0:
                peer.uid, self._next_uid = self._next_uid, self._next_uid + 1
            self.peers[peer.uid] = peer
        present = self._staying()
        fresh = sorted(p.uid for p in newcomers)
        dials = [(a, b) for a in fresh for b in (*present, *fresh) if b in present or b < a]
        self._begin_links(newcomers, call, [*dials, *self._gaps()])

    def _staying(self) -> list[int]:
        root = self.root
        return [u for u in root.members if u not in root.leaving] if root else []

    def _gaps(self) -> list[Dial]:
        """Links to make again when those through whom members reached each other are gone."""
        return [(link.high, link.low) for link in gaps(self._staying(), self.broken)]

    def _begin_links(self, newcomers: list[Peer], call: Call | None, dials: list[Dial]) -> None:
        self._admissions += 1
        self._admission = Admission(self._admissions, self._random_bytes(32), newcomers, call, dials, self._now)
        self._dial()

    def _dial(self) -> None:
        """Tell everyone who is to be a member which links to make."""
        admission = self._admission
        assert admission
        uids = [*self._staying(), *(p.uid for p in admission.newcomers)]
        contacts = tuple(Contact(u, self.peers[u].info.endpoints) for u in uids)
        for uid in uids:
            dial = tuple(other for dialer, other in admission.dials if dialer == uid)
            accept = tuple(dialer for dialer, other in admission.dials if other == uid)
            self.send([uid], Prepare(self.rid, admission.number, admission.secret, uid, contacts, dial, accept))
        if not admission.waiting:
            self._conclude_links()

    def _ready(self, peer: Peer, m: Ready) -> None:
        admission = self._admission
        if not admission or m.admission != admission.number:
            return
        self.near.met(peer.uid, [other for dialer, other in admission.dials if dialer == peer.uid], m.near)
        if admission.ready(peer.uid, m.failed):
            if admission.turn(self._now):
                self._dial()
            else:
                self._conclude_links()

    def _conclude_links(self) -> None:
        """Go on with the links that there are."""
        admission = self._admission
        assert admission
        broken = admission.broken(self.broken)
        uids = [*self._staying(), *(p.uid for p in admission.newcomers)]
        out = outcasts(uids, broken)
        if out:
            self.broken = {link for link in broken if not out & set(link)}
            for uid in sorted(out):
                self._evict(uid, Reason.LINK, "it can reach too few members of the group", left=False)
            return  # each loss has set in motion what follows
        self.broken, self._admission = broken, None
        if admission.call:
            self._end_update(admission.call, admission.newcomers)
        elif self.root:
            self._resume(self.root)
        else:
            self._found(admission.newcomers)

    def _give_up_links(self, lost: Peer | None = None) -> Admission[Peer, Call] | None:
        """Those on their way in wait again, first in line; links that were to be made again, still are."""
        admission, self._admission = self._admission, None
        if admission:
            newcomers = [p for p in admission.newcomers if p is not lost]
            for peer in newcomers:
                del self.peers[peer.uid]
            self.pending = [*newcomers, *self.pending]
            if not admission.newcomers and not admission.call:
                self._relink |= {Link(min(pair), max(pair)) for pair in admission.dials}
        return admission

    def _found(self, newcomers: list[Peer]) -> None:
        """The first epoch of an empty group."""
        least = max(p.info.min_world_size for p in newcomers)
        self.ledgers[ROOT] = root = Ledger(self, ROOT, Epoch(self._term, self.rid, 0), (), min_world_size=least)
        self._install(root, joined=tuple(p.member for p in newcomers))

    def _end_update(self, call: Call, newcomers: list[Peer]) -> None:
        """A new epoch at an update: newcomers are in, leavers are out. The update is over, or goes on since the group is too small."""
        root = self.root
        assert root
        over = len(self._staying()) + len(newcomers) >= root.min_world_size
        for member in root.dismiss():
            for ledger in [x for x in self.ledgers.values() if x is not root]:
                ledger.drop(member.uid, left=True, detail=f"{member.name} left")
        asks = [a for a in (codec.decode(p) for p in call.payloads.values()) if isinstance(a, UpdateAsk)]
        root.min_world_size = max([root.min_world_size, *(p.info.min_world_size for p in newcomers)])
        decision = Decision(call.id, "C" if over else "R", -1, bool(newcomers), b"", Reason.NONE, "")
        self._install(
            root,
            decisions=(decision,),
            joined=tuple(p.member for p in newcomers),
            tags=asks[0].tags if asks else (),
            next_index=call.id.n + 1,
        )

    def _resume(self, ledger: Ledger) -> None:
        """A stopped communicator goes on."""
        self._install(ledger, ruling=ledger.ruling())

    def _install(self, ledger: Ledger, **how: object) -> None:
        broken = tuple(sorted(link for link in self.broken if link.low in self.peers and link.high in self.peers))
        self.broken = set(broken)
        self.near.keep(self.peers)
        here = {*ledger.members, *(m.uid for m in how.get("joined", ()))}  # type: ignore[attr-defined]
        near = self.near.all_met(here)
        ledger.install(self._next_epoch(), broken=broken, next_uid=self._next_uid, near=near, **how)  # type: ignore[arg-type]
        logger.info("group %r: epoch %s of communicator %d has %d members", self.name, ledger.epoch, ledger.comm, len(ledger.members))
        if ledger.comm == ROOT:
            self.peers = {uid: self.peers[uid] for uid in ledger.members}
            self._resting, self._knocked = None, False
            for other in [x for x in self.ledgers.values() if x.phase is Phase.STOPPED]:
                self._resume(other)
            self._stop_for_links()
            for other in list(self.ledgers.values()):
                if any(link.low in other.members and link.high in other.members for link in set(other.broken) - self.broken):
                    other.stop(Reason.LINK, "a link between two members is there again")

    def _next_epoch(self) -> Epoch:
        self._number += 1
        return Epoch(self._term, self.rid, self._number)

    # --- time -------------------------------------------------------------------------------------------------------

    def _forgive(self, gap: float) -> None:
        """This process was held itself for so long: what it did not hear meanwhile tells nothing."""
        if gap <= 0:
            return
        for peer in [*self.peers.values(), *self.pending]:
            peer.last_beat += gap
        self._moved_at += gap
        if self._takeover_ends is not None:
            self._takeover_ends += gap

    def _check_alive(self) -> None:
        """The shell watches connections; this is for engines that are silent on a live connection."""
        for peer in [*self.peers.values(), *self.pending]:
            silence = self._now - peer.last_beat
            if peer.conn is None:
                continue
            if silence >= self._options.stall_timeout:
                detail = f"its interpreter was held for {silence:.0f} s"
                self.outbox.append(([peer.conn], Gone(self.rid, Reason.STALL, detail)))
                if peer in self.pending:
                    self.pending.remove(peer)
                    self._by_conn.pop(peer.conn, None)
                else:
                    self._lose(peer.uid, detail)
            elif silence >= self._options.heartbeat_timeout and not peer.held:
                peer.held = True
                text = "group %r: the interpreter of %s is held: its connection is alive, its engine has said nothing for %.1f s"
                logger.warning(text, self.name, peer.info.name, silence)

    def _check_stalls(self) -> None:
        """A call that everyone is in must move."""
        limit = self._options.stall_timeout
        for ledger in list(self.ledgers.values()):
            stuck = [c for c in ledger.in_motion() if self._now - max(c.opened, self._moved_at) >= limit]
            if stuck and ledger.phase is Phase.RUN:
                self._moved_at = self._now
                text = next(iter(stuck[0].claims.values()))[1]
                ledger.stop(Reason.STALL, f"{text} did not move for {limit:.0f} s although every member had made the call")

    def _check_newcomers(self) -> None:
        """Newcomers that do not say how their dials went are taken to have failed: the members wait for nobody who is not one of them."""
        admission = self._admission
        limit = self._options.dial_timeout + 2 * self._options.heartbeat_timeout
        if admission and self._now >= admission.began + limit:
            for uid, dials in admission.overdue([p.uid for p in admission.newcomers]):
                if self._admission is admission:
                    self._ready(self.peers[uid], Ready(admission.number, dials))

    # --- takeover ---------------------------------------------------------------------------------------------------

    def _report(self, peer: Peer, m: Report) -> None:
        if m.rid != self.rid:
            return
        for payload in (c.payload for r in m.comms for c in r.calls if c.payload):
            codec.decode(payload)  # raises here, where the sender is known
        if self._takeover_ends is not None:
            peer.uid, peer.info, peer.last_beat = m.uid, m.peer, self._now
            self._reports[peer.member] = peer, m
            newest = newest_epoch((r for _, r in self._reports.values()), ROOT)
            if newest and all(member in self._reports for member in newest.members):
                self._conclude_takeover()
        elif self.peers.get(peer.uid) is not peer:
            self.outbox.append(([peer.conn], Gone(self.rid, Reason.TAKEOVER, "it was silent while its master was replaced")))
        else:
            for r in m.comms:
                if r.comm in self.ledgers:
                    self.ledgers[r.comm].report(peer.uid, r)

    def _conclude_takeover(self) -> None:
        """Go on with those who reported, as this group's master."""
        found, self._takeover_ends, self._reports = self._reports, None, {}
        newest = newest_epoch((r for _, r in found.values()), ROOT)
        if newest is None:
            self._form()
            return
        comms = rebuild({m.uid: found[m][1] for m in newest.members if m in found}, ROOT)
        everyone = [r for _, m in found.values() for r in m.comms]
        self._term = 1 + max(r.epoch.term for r in everyone)
        self._number = max(r.epoch.number for r in everyone)
        self._next_uid = max(r.next_uid for r in everyone)
        self.broken = set(comms[0].newest.broken)
        for member, (_, m) in found.items():
            self.near.met(member.uid, m.near, m.near)
        self.peers = {m.uid: found[m][0] for m in comms[0].survivors}
        stale = [peer.conn for m, (peer, _) in found.items() if self.peers.get(m.uid) is not peer]
        self.outbox.append((stale, Gone(self.rid, Reason.TAKEOVER, "the group had gone on without it before its master was replaced")))
        for c in comms:
            ledger = Ledger(self, c.comm, c.epoch, c.survivors, min_world_size=c.newest.min_world_size)
            ledger.resurrect(c.reports, lost=c.lost, left=c.left, synced=c.newest.synced)
            self.ledgers[c.comm] = ledger
        logger.warning("group %r: taken over with %d members, %d lost", self.name, len(comms[0].survivors), len(comms[0].lost))
        self.stopped(self.ledgers[ROOT])
