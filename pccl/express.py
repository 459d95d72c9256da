"""A small call whose caller has the engine to itself: nobody needs a record of it unless something happens before it ends.

Nearly always its frames come and go, and that was all. What operations are for (deadlines, epochs, losses, mismatches, callers that are
interrupted) begins with a message of the master, a frame of another call, or a silence: each of these first makes an operation of the
call, which goes on as if it had been one from the beginning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from pccl.calls import Collective, Part
from pccl.collectives.flow import CallKey, Moving
from pccl.collectives.volley import MOST
from pccl.core.errors import CollectiveAborted
from pccl.core.types import CallId, Epoch, Info
from pccl.route import Route

PLAIN = {"atomic": False}
"""Keywords of a call that may be made like this"""

if TYPE_CHECKING:
    from pccl.engine import Engine
    from pccl.protocol.member import Membership


class Express:
    """One such call, with ``atomic=False``.

    Args:
        route: a short one.
        make: makes the operation, with somebody to tell how it ends.
    """

    announced = False

    def __init__(self, engine: Engine, membership: Membership, part: Part, route: Route, make: Callable[[], Collective]) -> None:
        self.settled = False
        """Nothing is left to do here: it is done, or an operation"""
        self.transfer: Moving | None = None
        self.op: Collective | None = None
        self._engine = engine
        self._membership = membership
        self._part = part
        self._route = route
        self._make = make
        self._view = membership.view
        self._index = membership.next_index
        self._began = engine.now()

    @classmethod
    def of(cls, engine: Engine, membership: Membership, part: Part, seen: Epoch, make: Callable[[], Collective]) -> Express | None:
        """The call, if it can be made like this.

        Args:
            seen: the epoch that its caller knows.
        """
        if membership.epoch != seen or not membership.has_way:
            return None
        try:
            route = engine.routes.find(part.ask, membership.view, membership.uid, membership.broken, part.description)
        except CollectiveAborted:  # which is told to all
            return None
        return cls(engine, membership, part, route, make) if route.short else None

    def run(self, patience: float, at_most: float) -> Info | None:
        """Make the call; None if it has become an operation, which may still be under way."""
        engine, part, view = self._engine, self._part, self._view
        self._membership.next_index += 1
        self.transfer = part.begin(engine, self._route, CallKey(view.epoch, self._index, 0), atomic=False)
        engine.executor.start(self.transfer)
        engine.poller.serve(self, patience, at_most)
        if not part.done:
            self.become_operation()
        return None if self.op else part.commit(engine, view, self._began, 1)

    def transfer_done(self) -> None:
        """The result is here."""
        self.settled = self._part.done = True

    def become_operation(self) -> None:
        """Have a record from now on."""
        if self.settled:
            return
        self.settled = True
        self.op = self._make()
        self.op.resume(self._engine, self._view, self._began)
        self._membership.resume(self.op.record, CallId(None, self._index), self._engine.time())
        self._engine.resume(self.op, self.transfer, self._membership)


def suits(part: Part, how: Mapping[str, object]) -> bool:
    """Whether a call may be of this kind."""
    return how == PLAIN and part.collective == "all_reduce" and part.nbytes <= MOST and not part.on_gpu
