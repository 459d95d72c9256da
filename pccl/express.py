"""A call whose caller has the engine to itself: nobody needs a record of it unless something happens before it ends.

It is small and has no commit, or goes through shared memory and commits there. Nearly always its data comes and goes, and that was all.
What operations are for (deadlines, epochs, losses, mismatches, callers that are interrupted) begins with a message of the master, a frame
of another call, or a silence: each of these first makes an operation of the call, which goes on as if it had been one from the beginning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from pccl.calls import Collective, Part, call_signature, is_local
from pccl.collectives.flow import CallKey, Moving
from pccl.collectives.lane import Lane
from pccl.collectives.volley import MOST
from pccl.core.errors import CollectiveAborted
from pccl.core.types import CallId, Epoch, Info
from pccl.route import Route

KEYWORDS = frozenset(("atomic", "retry", "timeout"))
"""Of a call that may be made like this"""


class Manner(NamedTuple):
    """How a call ends."""

    atomic: bool
    retry: bool


if TYPE_CHECKING:
    from pccl.engine import Engine
    from pccl.protocol.member import Membership


class Express:
    """One such call.

    Args:
        route: a short one, or through shared memory.
        lane: then.
        make: makes the operation, with somebody to tell how it ends.
    """

    announced = False

    def __init__(
        self,
        engine: Engine,
        membership: Membership,
        part: Part,
        how: Manner,
        route: Route,
        lane: Lane | None,
        make: Callable[[], Collective],
    ) -> None:
        self.settled = False
        """Nothing is left to do here: it is done, or an operation"""
        self.transfer: Moving | None = None
        self.op: Collective | None = None
        self._engine = engine
        self._membership = membership
        self._part = part
        self._how = how
        self._route = route
        self._lane = lane
        self._make = make
        self._view = membership.view
        self._index = membership.next_index
        self._began = engine.now()

    @classmethod
    def of(
        cls, engine: Engine, membership: Membership, part: Part, how: Manner, seen: Epoch, make: Callable[[], Collective]
    ) -> Express | None:
        """The call, if it can be made like this.

        Args:
            seen: the epoch that its caller knows.
        """
        if membership.epoch != seen or not membership.has_way:
            return None
        local = membership.near and is_local(part)
        lane = engine.lanes.get(membership.comm) if local else None
        if not lane and (how.atomic or part.nbytes > MOST):
            return None
        try:
            route = engine.route(membership, part, local=local)
        except CollectiveAborted:  # which is told to all
            return None
        return cls(engine, membership, part, how, route, lane, make) if lane or route.short else None

    def run(self, patience: float, at_most: float, index: int = -1) -> Info | None:
        """Make the call; None if it has become an operation, which may still be under way."""
        engine, part, view = self._engine, self._part, self._view
        if index < 0:
            self._membership.next_index += 1
        else:
            self._index = index
        key, how = CallKey(view.epoch, self._index, 0), self._how
        self.transfer = part.begin(engine, self._route, key, atomic=how.atomic, lane=self._lane, call=call_signature(part, *how))
        if index >= 0 and part.pull:
            part.pull.adopt()
        engine.executor.start(self.transfer)
        engine.poller.serve(self, patience, at_most)
        if not part.done:
            self.become_operation()
        if self.op:
            return None
        return part.commit(engine, view, self._began, 1)

    def transfer_done(self) -> None:
        """The result is here. Before anything else is heard, of a fence for example, a commit is noted."""
        self.settled = self._part.done = True
        pull = self._part.pull
        if pull and self._how.atomic:
            self._membership.committed(CallId(None, self._index), pull.waiting)

    def become_operation(self) -> None:
        """Have a record from now on."""
        if self.settled:
            return
        self.settled = True
        self.op = self._make()
        self.op.resume(self._engine, self._view, self._began)
        self._membership.resume(self.op.record, CallId(None, self._index), self._engine.time())
        self._engine.resume(self.op, self.transfer, self._membership)


def suits(part: Part, how: Mapping[str, object], *, near: bool) -> bool:
    """Whether a call may be of this kind.

    Args:
        near: the members share memory. Over links it has to be small, and without a commit.
    """
    if part.pair is not None or part.on_gpu or not KEYWORDS.issuperset(how):
        return False
    return near or (part.collective == "all_reduce" and part.nbytes <= MOST and not how.get("atomic", True))
