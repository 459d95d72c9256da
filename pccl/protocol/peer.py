"""A peer's side of its run: how it comes into a group, which master it obeys, and what it owes to it."""

from __future__ import annotations

from enum import Enum
from typing import Protocol

from pccl.core.messages import (
    PROTOCOL_VERSION,
    Agreed,
    Ask,
    Beat,
    Complaint,
    Gone,
    Hello,
    Knock,
    Leaving,
    NewEpoch,
    PeerInfo,
    Prepare,
    Ready,
    Refused,
    Report,
    SplitResult,
    Standing,
    Verdict,
    Waiting,
    Welcome,
)
from pccl.core.options import Options
from pccl.core.types import Epoch, View
from pccl.protocol.member import Membership, view_of
from pccl.protocol.record import Host

ROOT = 0
"""Number of the communicator that is the whole group."""


class Standpoint(Enum):
    """Where a peer stands."""

    NEW = "new"
    PENDING = "pending"
    """The master knows it; the members have to let it in."""
    MEMBER = "member"
    GONE = "gone"


class PeerHost(Host, Protocol):
    """The engine of this peer, as its protocol sees it."""

    def make_links(self, m: Prepare) -> None:
        """Dial and accept links; `Peer.links_made` when every dial has ended."""

    def admitted(self, view: View) -> None:
        """This peer is a member."""

    def refused(self, reason: int, detail: str) -> None:
        """This peer cannot come in."""

    def gone(self, reason: int, detail: str) -> None:
        """This peer is out of its group, or has left it as it wished."""

    def newcomers_wait(self, comm: int, waiting: bool) -> None:
        """As long as it is so, calls that commit in shared memory say so."""

    def waits_for(self, comm: int, m: Waiting) -> None:
        """For the log."""


class Peer:
    """The protocol of one connection to one group. Messages of masters other than the one obeyed are ignored."""

    def __init__(self, host: PeerHost, group: str, info: PeerInfo, options: Options) -> None:
        self.host = host
        self.group = group
        self.info = info
        self.options = options
        self.standpoint = Standpoint.NEW
        self.uid = -1
        self.comms: dict[int, Membership] = {}
        self.near: set[int] = set()
        """Uids of those with whom this peer shares memory"""
        self._rid = 0

    @property
    def root(self) -> Membership:
        """The group's own communicator; only once admitted."""
        return self.comms[ROOT]

    def connected(self) -> None:
        """The control connection is up, for the first time or again: say who this is."""
        if self.standpoint is not Standpoint.GONE:
            self.host.send(Hello(PROTOCOL_VERSION, self.group, self.info, self.standpoint is Standpoint.MEMBER))

    def beat(self, progress: int) -> None:
        """The heartbeat interval has passed."""
        if self.standpoint in (Standpoint.PENDING, Standpoint.MEMBER):
            self.host.send(Beat(progress, tuple(Standing(c.comm, c.ack, c.next_index, c.last_skip) for c in self.comms.values())))

    def links_made(self, admission: int, failed: tuple[int, ...]) -> None:
        """Every link of an admission that was to be dialled is made, but for those to `failed`."""
        self.host.send(Ready(admission, failed, tuple(self.near)))

    def link_lost(self, uid: int, detail: str, *, lacking: bool) -> None:
        """A link broke, or is missing; in a call that is under way data of that member may have yet to come."""
        if self.standpoint is Standpoint.MEMBER and any(m.uid == uid for m in self.root.view.members):
            self.host.send(Complaint(self.root.epoch, uid, detail, lacking))

    def receive(self, m: object, now: float) -> None:
        """A message from the master."""
        if self.standpoint is Standpoint.GONE:
            return
        if isinstance(m, Ask):
            self._ask(m)
        elif isinstance(m, Gone):
            self.standpoint = Standpoint.GONE
            self.host.gone(m.reason, m.detail)
        elif self.standpoint is not Standpoint.MEMBER:
            self._receive_outside(m, now)
        elif getattr(m, "rid", None) != self._rid:
            pass  # of a master that is no more
        elif isinstance(m, Prepare):
            self.host.make_links(m)
        elif isinstance(m, (Verdict, NewEpoch, Agreed, Leaving)) and m.comm in self.comms:
            self.comms[m.comm].receive(m, now)
        elif isinstance(m, Knock) and m.comm in self.comms:
            self.host.newcomers_wait(m.comm, m.waiting)
        elif isinstance(m, Waiting):
            self.host.waits_for(m.comm, m)

    def _receive_outside(self, m: object, now: float) -> None:
        """This peer is no member yet; any master that answers will do."""
        if isinstance(m, Welcome):
            self.standpoint = Standpoint.PENDING
        elif isinstance(m, Refused):
            self.standpoint = Standpoint.GONE
            self.host.refused(m.reason, m.detail)
        elif isinstance(m, Prepare):
            self.uid = m.uid
            self.host.make_links(m)
        elif isinstance(m, NewEpoch) and m.comm == ROOT:
            self._rid = m.rid
            root = self._membership(ROOT, view_of(m, self.uid), m)
            root.broken, root.next_uid, root.synced, root.near = m.broken, m.next_uid, m.synced, m.near
            self.standpoint = Standpoint.MEMBER
            self.host.admitted(root.view)

    def _ask(self, m: Ask) -> None:
        """Stop and report. The master who asks about everything is a new one, and is obeyed from now on."""
        if self.standpoint is not Standpoint.MEMBER:
            return
        if not m.comms:
            self._rid = m.rid
        elif m.rid != self._rid:
            return
        asked = [c for n, c in self.comms.items() if n in m.comms or not m.comms]
        self.host.send(Report(m.rid, self.info, self.uid, tuple(c.stop() for c in asked), tuple(self.near)))

    def _membership(self, comm: int, view: View, m: NewEpoch | None = None) -> Membership:
        self.comms[comm] = made = Membership(
            self.host,
            comm,
            view,
            uid=self.uid,
            fresh=m is not None,
            next_index=m.next_index if m else 0,
            tags=m.tags if m else (),
            ack=m.seq if m else 0,
            max_in_flight=self.options.max_in_flight,
            grace=self.options.heartbeat_timeout,
            takeover_timeout=self.options.takeover_timeout,
        )
        return made

    def adopt(self, parent: Membership, result: SplitResult) -> Membership | None:
        """The communicator that a split made for this peer, if any."""
        known = {m.uid: m for m in parent.view.members}
        for sub in result.comms:
            if self.uid in sub.uids and sub.comm not in self.comms:
                members = tuple(known[u] for u in sub.uids if u in known)
                made = self._membership(sub.comm, View(Epoch(*sub.epoch), [m.uid for m in members].index(self.uid), members))
                made.broken, made.next_uid, made.near = parent.broken, parent.next_uid, sub.near
                made.stopped = made.epoch[:2] != parent.epoch[:2]  # an earlier master made it; its successor is about to tell its epoch
                return made
        return None
