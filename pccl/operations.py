"""What an engine runs: one object per call, from the caller's thread to its end.

Those that move tensors are in `pccl.calls`, sync_state in `pccl.state`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import xxhash

from pccl.collectives.flow import Moving
from pccl.core import codec
from pccl.core.errors import CollectiveAborted, CollectiveMismatch, CollectiveTimeout, PcclError, StateConflict, TooFewPeers
from pccl.core.messages import Reason, SplitAsk, SplitResult
from pccl.core.types import Pair, Tag, View
from pccl.protocol.record import Outcome, Record

if TYPE_CHECKING:
    from pccl.engine import Engine


def signature(text: str) -> int:
    """64 bits of a call's description: equal on all members that make the same call."""
    return xxhash.xxh3_64_intdigest(text.encode()) or 1


class Operation:
    """A call. The engine fills in what concerns its run.

    Args:
        comm: number of the communicator.
        description: the call as errors and logs show it.
    """

    is_update = False
    local = False
    exposed = False
    decided = False
    waiting = False

    def __init__(
        self,
        comm: int,
        description: str,
        *,
        signature: int,
        timeout: float | None,
        tag: Tag = None,
        pair: Pair | None = None,
        atomic: bool = True,
        retry: bool = False,
    ) -> None:
        self.comm = comm
        self.description = description
        self.signature = signature
        self.timeout = timeout
        self.tag = tag
        self.pair = pair
        self.atomic = atomic
        self.retry = retry
        self.sealed = True
        self.small = False
        """It takes no longer than a hand-over between threads"""
        self.settled = False
        self.reason: PcclError | None = None
        """What the caller gets if the call fails by its own word, where that says more"""
        self.began = 0.0
        self.deadline: asyncio.TimerHandle | None = None
        self.record = Record(self)
        self.engine: Engine
        self.view: View | None = None
        """The membership when the call ended"""
        self.on_settled: Callable[[Any], None] = lambda result: None
        """Called once, on the engine's loop, with the result or the exception"""

    @property
    def announced(self) -> bool:
        """Whether the master has heard of the call."""
        return self.record.announced

    def settle(self, result: Any) -> None:
        """The caller's result, or an exception."""
        if not self.settled:
            self.settled = True
            self.engine.ended(self)
            tell = self.on_settled
            self.forget()
            tell(result)

    def forget(self) -> None:
        """It is over: what it knows of its caller goes. In a circle of references it would stay until the collector comes."""
        if self.deadline:
            self.deadline.cancel()
        self.deadline = None
        del self.on_settled

    def hand_over(self) -> None:
        """The caller's thread makes the call now."""

    def payload(self) -> bytes:
        """What this member gives to the call."""
        return b""

    def can_retry(self, view: View) -> bool:
        """Whether the call has a meaning in this membership."""
        return True

    def begin(self, view: View, record: Record) -> None:
        """Start an attempt."""

    def complete(self) -> None:
        """Nothing more comes of what is under way, and the call is committed."""

    def is_complete(self) -> bool:
        """Whether this member has its result."""
        return True

    def transfer_done(self, transfer: Moving) -> None:
        """One of the call's transfers is complete."""

    def halt(self) -> None:
        """The attempt is over."""

    def restore(self) -> None:
        """Make the caller's inputs what they were."""

    def agreed(self, answer: Any) -> None:
        """What the master made of everyone's payloads."""

    def result(self, outcome: Outcome, record: Record) -> Any:
        """The call is committed: what its caller gets."""
        return outcome.view


class Update(Operation):
    """Let newcomers in."""

    is_update = True

    def __init__(self, comm: int, *, timeout: float | None) -> None:
        super().__init__(comm, "update()", signature=signature("update()"), timeout=timeout, retry=True)
        self.small = True

    def payload(self) -> bytes:
        """How often each tag was used."""
        return self.engine.membership(self.comm).update_ask()

    def is_complete(self) -> bool:
        """The membership knows."""
        return False


class Split(Operation):
    """Make sub-communicators. The result is this member's (a communicator's number and view), or None."""

    def __init__(self, comm: int, description: str, *, color: int | None, order: int, timeout: float | None) -> None:
        super().__init__(comm, description, signature=signature(description), timeout=timeout, retry=True)
        self._ask = codec.encode(SplitAsk(color, order))

    def payload(self) -> bytes:
        """Which communicator this member wants to be in."""
        return self._ask

    def result(self, outcome: Outcome, record: Record) -> Any:
        """The new communicator."""
        found = codec.decode(outcome.payload or record.payload)
        assert isinstance(found, SplitResult)
        made = self.engine.adopt(self.comm, found)
        return (made.comm, made.view) if made else None


def failure(op: Operation, record: Record, outcome: Outcome) -> PcclError:
    """The exception that tells a caller how its call failed, what is left, and what to do."""
    view, epoch = outcome.view, str(outcome.view.epoch)
    names = {m.uid: m.name for m in (*view.members, *view.left, *view.lost)}
    who = names.get(outcome.by, "a member")
    what = f"{op.description} {record.id} in epoch {epoch}"
    state = "inputs are as they were" if op.atomic else "buffers are undefined (atomic=False)"
    if outcome.reason == Reason.TOO_FEW:
        text = f"{what}: the group has {view.world_size} members, min_world_size is {view.min_world_size}; update() waits for more; {state}"
        return TooFewPeers(text, call=op.description, epoch=epoch)
    if outcome.reason == Reason.MISMATCH:
        calls = {names.get(c.uid, str(c.uid)): c.description for c in outcome.claims}
        sides = "; ".join(f"{name}: {call}" for name, call in calls.items())
        text = f"{what}: the members' calls in this place do not match ({sides or outcome.detail}); {state}"
        return CollectiveMismatch(text, calls=calls, call=op.description, epoch=epoch)
    if outcome.reason == Reason.DEADLINE:
        if op.is_update and view.world_size < view.min_world_size:
            text = f"{what}: {view.world_size} members after the deadline, min_world_size is {view.min_world_size}"
            return TooFewPeers(text, call=op.description, epoch=epoch)
        missing = tuple(names.get(u, str(u)) for u in outcome.missing)
        late = f"{', '.join(missing)} had not made the call" if missing else "every member had made the call"
        text = f"{what}: {outcome.detail} on {who}; {late}; {state}"
        return CollectiveTimeout(text, missing=missing, call=op.description, epoch=epoch)
    if outcome.reason == Reason.CONFLICT:
        return StateConflict(f"{what}: {outcome.detail}; no tensor was changed", theirs=outcome.detail)
    lost, left = tuple(m.name for m in view.lost), tuple(m.name for m in view.left)
    reasons = {
        Reason.LOSS: "a peer was lost" if lost else "a peer left",
        Reason.CANCELLED: f"{who} cancelled it",
        Reason.EXCEPTION: f"{who} could not go on with it ({outcome.detail})",
    }
    reason = reasons.get(Reason(outcome.reason), outcome.detail)
    if outcome.reason not in (Reason.LOSS, Reason.LINK, Reason.STALL, Reason.TAKEOVER):
        lost = left = ()
    gone = "".join([f"; lost: {', '.join(lost)}" if lost else "", f"; left: {', '.join(left)}" if left else ""])
    survivors = tuple(m.name for m in view.members)
    again = outcome.reason in (Reason.LOSS, Reason.LINK, Reason.STALL, Reason.TAKEOVER)
    advice = "; make the call again, or pass retry=True" if again else ""
    text = f"{what} was aborted: {reason}{gone}; survivors: {', '.join(survivors)}; {state}{advice}"
    return CollectiveAborted(text, call=op.description, epoch=epoch, reason=reason, lost=lost, left=left, survivors=survivors)
