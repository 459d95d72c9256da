"""With whom this peer shares memory: the neighbours that its links have brought, and the lanes of every communicator, new and old.

A lane outlives its epoch by one, since members that are late may still fetch there what was committed, and after that until all of
them are out of its calls or have said that they are. A neighbour stays for as long as there is a link or a lane with it.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping

from pccl.collectives.flow import Flow
from pccl.collectives.lane import Commons, Lane
from pccl.protocol.member import Membership
from pccl.transports.region import OtherShared, OwnShared

logger = logging.getLogger("pccl")

TRIM_AFTER = 10.0
"""Seconds without a need for it after which shared memory is given back to the system."""


class Lanes:
    """All of one peer.

    Args:
        region: one's own, if there is one.
        flows: uid -> what goes to and comes from that peer.
    """

    def __init__(self, region: OwnShared | None, flows: Mapping[int, Flow]) -> None:
        self._commons = Commons(region) if region else None
        self._flows = flows
        self._now: dict[int, Lane] = {}
        """Of the communicators whose members all share memory"""
        self._past: dict[int, Lane] = {}
        """Those of their last epochs"""
        self._left: list[Lane] = []
        """Those of epochs before, and of communicators that this peer has left"""
        self._neighbours: dict[OtherShared, int] = {}
        """Each with its peer's uid"""

    def get(self, comm: int) -> Lane | None:
        """That of a communicator's present epoch, if its members all share memory."""
        return self._now.get(comm)

    def met(self, uid: int, near: OtherShared) -> None:
        """A link has brought a neighbour."""
        self._neighbours[near] = uid
        near.kept = True

    def open(self, membership: Membership, here: Collection[int]) -> None:
        """A communicator is in a new epoch: have a place for that, if all its members share memory.

        Args:
            here: as for `sweep`, which is made.

        Raises:
            InvalidArgument: too many have one. The others would wait for this member.
        """
        comm = membership.comm
        past, last = self._past.pop(comm, None), self._now.pop(comm, None)
        if past:
            self._left.append(past)
        if last:
            self._past[comm] = last
            last.past = True
        self.sweep(here)
        if not membership.near or self._commons is None:
            return
        mine = membership.view.rank
        links = {r: self._flows[m.uid].link for r, m in enumerate(membership.view.members) if r != mine and m.uid in self._flows}
        others = {r: link.near for r, link in links.items() if link and link.near}
        if len(others) == len(membership.view.members) - 1:
            self._now[comm] = lane = Lane(self._commons, membership.epoch, mine, others)
            logger.info("communicator %d: all %d members are on this host: %s", comm, len(others) + 1, lane.manner)

    def leave(self, comm: int) -> None:
        """This peer has left a communicator."""
        self._left += [lane for lane in (self._now.pop(comm, None), self._past.pop(comm, None)) if lane]

    def sweep(self, here: Collection[int]) -> None:
        """Let go of lanes that nobody will read any more, and of neighbours with whom there is nothing left.

        Args:
            here: uids of the members. Who is none, and reads on, finds out by itself (`Lane.stands`).
        """
        for lane in (*self._past.values(), *self._left):
            lane.retire()
        for lane in [lane for lane in self._left if lane.is_over(lambda other: self._neighbours[other] in here)]:
            self._left.remove(lane)
            lane.close()
        needed = {flow.link.near for flow in self._flows.values() if flow.link}
        for lane in self._all():
            needed.update(lane.others.values())
        for gone in [other for other in self._neighbours if other not in needed]:
            del self._neighbours[gone]
            gone.close()

    def trim(self, now: float) -> None:
        """Give memory that no call has needed for a while back to the system."""
        if self._commons and self._commons.unused_for(now) >= TRIM_AFTER:
            for lane in self._all():
                lane.reap()
            self._commons.trim()

    def close(self) -> None:
        """The end."""
        self._now, self._past, self._left = {}, {}, []
        self.sweep(())

    def _all(self) -> Iterator[Lane]:
        yield from (*self._now.values(), *self._past.values(), *self._left)
