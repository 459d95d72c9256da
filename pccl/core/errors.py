"""Every exception that pccl raises, in one tree.

PcclError
├── InvalidArgument (also a ValueError)    the caller's fault; nothing happened
├── ConnectError                           not a member yet
│   ├── MasterUnreachable
│   ├── AuthenticationError
│   └── VersionMismatch
├── CollectiveError                        this call failed; the communicator goes on
│   ├── CollectiveAborted                  a peer was lost or left, a link failed, or another member ended the call
│   ├── CollectiveMismatch                 the members' calls do not match
│   ├── CollectiveTimeout (also a TimeoutError)
│   └── TooFewPeers
├── StateConflict                          sync_state found no truth that all can follow
├── Evicted                                this communicator is over; connect again
└── InternalError                          a bug in pccl; please report it

Whatever of a CollectiveError's buffers is defined afterwards is said in the docstring of the call: with ``atomic=True``
(the default) the inputs are as they were, bit for bit, and ``out`` is undefined; with ``atomic=False`` both are undefined.
``asyncio.CancelledError`` and ``KeyboardInterrupt`` are never wrapped.
"""

from __future__ import annotations

from collections.abc import Mapping


class PcclError(Exception):
    """Base of everything that pccl raises."""


class InvalidArgument(PcclError, ValueError):
    """An argument is not allowed. The call took no place in the order of calls, and the communicator is as before."""


class ConnectError(PcclError):
    """A master could not be served, or this process could not become a member of its group."""


class MasterUnreachable(ConnectError):
    """Nobody answered at the master's address within the timeout."""


class AuthenticationError(ConnectError):
    """The keys of master and peer do not fit: the address lacks a key, has the wrong one, or this peer is not allowed."""


class VersionMismatch(ConnectError):
    """Master and peer speak different versions of the protocol."""


class CollectiveError(PcclError):
    """A call failed on every member that goes on. The communicator is usable.

    Attributes:
        call: the call as this peer made it, for example ``all_reduce(float32[1024], sum)``.
        epoch: the epoch in which it failed, as text (``term.number``).
    """

    def __init__(self, message: str, *, call: str = "", epoch: str = "") -> None:
        super().__init__(message)
        self.call = call
        self.epoch = epoch


class CollectiveAborted(CollectiveError):
    """The call was ended for all: a peer was lost or left, a link failed, or a member cancelled it.

    Attributes:
        lost: names of the peers that the failure detector found dead.
        left: names of the peers that left of their own will.
        survivors: names of the members that go on, in rank order.
        reason: why, in a sentence.
    """

    def __init__(
        self,
        message: str,
        *,
        call: str = "",
        epoch: str = "",
        reason: str = "",
        lost: tuple[str, ...] = (),
        left: tuple[str, ...] = (),
        survivors: tuple[str, ...] = (),
    ) -> None:
        super().__init__(message, call=call, epoch=epoch)
        self.reason = reason
        self.lost = lost
        self.left = left
        self.survivors = survivors


class CollectiveMismatch(CollectiveError):
    """Members made different calls in the same place of the order.

    Attributes:
        calls: member's name -> the call it made.
    """

    def __init__(self, message: str, *, calls: Mapping[str, str], call: str = "", epoch: str = "") -> None:
        super().__init__(message, call=call, epoch=epoch)
        self.calls = dict(calls)


class CollectiveTimeout(CollectiveError, TimeoutError):
    """The call's deadline passed on some member.

    Attributes:
        missing: names of the members that had not made the call.
    """

    def __init__(self, message: str, *, missing: tuple[str, ...] = (), call: str = "", epoch: str = "") -> None:
        super().__init__(message, call=call, epoch=epoch)
        self.missing = missing


class TooFewPeers(CollectiveError):
    """The group is smaller than its ``min_world_size``. ``update()`` waits until it is not."""


class StateConflict(PcclError):
    """``sync_state`` found no truth that every member can follow. No tensor was changed.

    Attributes:
        mine: this member's revision and content hash, as text.
        theirs: what it conflicts with.
    """

    def __init__(self, message: str, *, mine: str = "", theirs: str = "") -> None:
        super().__init__(message)
        self.mine = mine
        self.theirs = theirs


class Evicted(PcclError):
    """The group goes on without this peer. Connect again to come back as a newcomer.

    Attributes:
        reason: why, in a sentence.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"this peer is no longer in its group: {reason}; connect again to come back as a newcomer")
        self.reason = reason


class InternalError(PcclError):
    """Something that cannot happen, happened. Please report it with the log."""
