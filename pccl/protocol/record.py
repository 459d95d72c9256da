"""One call at one member: what the caller wants, where it stands, how it ended; and what a communicator needs of its engine."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol

from pccl.core.messages import Claim, Reason
from pccl.core.types import CallId, Epoch, Pair, Tag, View


class State(Enum):
    """Of a call at this member."""

    QUEUED = "queued"
    """Made while the member is stopped or an update is open; has no place in the order yet."""
    HELD = "held"
    """Has its place; must not move data before the master has said what a loss or a leaver means for it."""
    RUNNING = "running"
    DONE = "done"
    OVERDUE = "overdue"
    """Done, and past its deadline or cancelled: the master was asked to end it."""
    COMMITTED = "committed"
    ABORTED = "aborted"
    ENDED = "ended"
    """Ended without a verdict: ``atomic=False``, or it never began."""
    SKIPPED = "skipped"
    """An update that did not ask, since nobody waited."""


NO_ID = CallId(None, -1)
OPEN = frozenset((State.HELD, State.RUNNING, State.DONE, State.OVERDUE))
MOVING = OPEN - {State.HELD}
"""A member that is done may still serve those who are not."""


class Op(Protocol):
    """What the caller wants, as far as the order of calls cares."""

    tag: Tag
    pair: Pair | None
    atomic: bool
    retry: bool
    is_update: bool
    sealed: bool
    """All of it is known; false while the body of a round runs."""
    local: bool
    """Among members that share memory it goes through that, and commits there."""
    exposed: bool
    """Of such a call: the other members may have committed it. Its end is no longer this member's alone to say."""
    decided: bool
    """Likewise: this member has committed it."""
    waiting: bool
    """Then: newcomers wait"""
    signature: int
    description: str

    def payload(self) -> bytes:
        """What it gives to a call in which the master takes part."""

    def can_retry(self, view: View) -> bool:
        """Whether it has a meaning in this membership; the same answer on every member."""


class Outcome(NamedTuple):
    """How a call ended for its caller."""

    committed: bool
    view: View
    reason: int = Reason.NONE
    detail: str = ""
    payload: bytes = b""
    by: int = -1
    missing: tuple[int, ...] = ()
    claims: tuple[Claim, ...] = ()


class Stored(NamedTuple):
    """What is known of a call that this member has not made yet."""

    verdict: str
    """C or A: how it ended. R: others run it again after a loss. N: nothing but that it may begin."""
    outcome: Outcome
    waiting: int
    seq: int


@dataclass(slots=True, eq=False)
class Record:
    """One call of this member."""

    op: Op
    state: State = State.QUEUED
    id: CallId = NO_ID
    number: int = -1
    """Epoch number of the attempt."""
    waiting: int = -1
    """What its verdict said of newcomers."""
    admitted: bool = False
    payload: bytes = b""
    """Its result, or what was agreed on."""
    seq: int = -1
    """Of its verdict; -1 where there is none yet."""
    began: float = 0.0
    announced: bool = False
    expired: tuple[int, str] | None = None
    """Deadline or cancellation, once it has come."""
    expired_at: float = 0.0
    owes_finish: bool = False
    """Ended by this member; the caller hears of it with the verdict, which knows more, or a little later without."""
    told: bool = False
    attempts: int = 0

    @property
    def untagged(self) -> bool:
        """Whether it has its place in the order of the program text."""
        return self.id.tag is None and self.id.pair is None


class Host(Protocol):
    """The engine of this peer."""

    def send(self, message: object) -> None:
        """To the master."""

    def start(self, comm: int, record: Record) -> None:
        """Begin to move data, or the next attempt to; the inputs are as the caller gave them. `Membership.complete` when it is done."""

    def halt(self, comm: int, record: Record) -> None:
        """Stop moving data and hold none of the call's memory when this returns."""

    def discard(self, comm: int, epoch: Epoch, call: CallId) -> None:
        """A call was aborted, whether or not it was made here: keep nothing of it, and tell its members so."""

    def agreed(self, comm: int, record: Record, payload: bytes) -> None:
        """The master has answered what all members gave to the call."""

    def finish(self, comm: int, record: Record, outcome: Outcome) -> None:
        """The call is over (already halted). If it is not committed, give the caller its inputs back."""

    def restore(self, comm: int, record: Record) -> None:
        """Make the inputs what they were before the attempt that just ended; another one begins."""

    def epoch_changed(self, comm: int, old: View, new: View) -> None:
        """The communicator is in a new epoch; its calls are about to be decided and to go on in it."""

    def give_up(self, detail: str) -> None:
        """There is no verdict and no master: this peer is out of its group."""
