"""The control messages between a peer and its master. Protocol rules: docs/protocol.md.

A call is named by communicator, epoch (the attempt) and call id. Whatever a master says carries its `rid`: a member obeys only the master
whose `Ask` it answered last.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from pccl.core.codec import message
from pccl.core.types import CallId, Epoch, Member, Pair, Tag

PROTOCOL_VERSION = 2


class Reason(IntEnum):
    """Why a call or a membership ended."""

    NONE = 0
    LOSS = 1
    """A member was lost or left; who, is in the new epoch."""
    DEADLINE = 2
    CANCELLED = 3
    MISMATCH = 4
    EXCEPTION = 5
    """The body of a round raised."""
    LINK = 6
    STALL = 7
    TAKEOVER = 8
    CONFLICT = 9
    """sync_state found no common truth."""
    TOO_FEW = 10
    LEFT = 11
    REFUSED = 12


class PeerInfo(NamedTuple):
    """What a peer says of itself."""

    key: bytes
    """16 random bytes; identify the peer before it has a uid, and after the master has forgotten."""
    name: str
    host: str
    endpoints: tuple[str, ...]
    min_world_size: int


class Contact(NamedTuple):
    """Where to find a member."""

    uid: int
    endpoints: tuple[str, ...]


class Link(NamedTuple):
    """A pair of members (the lower uid first) that cannot reach each other."""

    low: int
    high: int


class TagUse(NamedTuple):
    """How often a tag was used, in the communicator or between a pair of its members."""

    tag: Tag
    pair: Pair | None
    uses: int


class CallReport(NamedTuple):
    """A call in a member's report to a fence or takeover."""

    call: CallId
    state: str
    """R running, D done (or overdue), C committed, A aborted, U an update that was skipped."""
    number: int
    """The epoch of the attempt (for C: that of the result)."""
    waiting: int
    """For C and A: whether peers were waiting, 1 or 0, or -1 where no verdict said."""
    admitted: bool
    """For C: an update that let newcomers in."""
    payload: bytes
    """For D: what the member gave to the call; for C: its result."""


class CommReport(NamedTuple):
    """What a member knows of one communicator."""

    comm: int
    epoch: Epoch
    members: tuple[Member, ...]
    min_world_size: int
    next_index: int
    tags: tuple[TagUse, ...]
    calls: tuple[CallReport, ...]
    broken: tuple[Link, ...]
    next_uid: int
    synced: int
    """Number of the communicator's last sync_state, whether or not this member took part."""


class Decision(NamedTuple):
    """How an epoch change decided a call."""

    call: CallId
    verdict: str
    """C committed, A aborted for good, R aborted and run again where the caller asked for it."""
    waiting: int
    admitted: bool
    payload: bytes
    reason: int
    detail: str


class Standing(NamedTuple):
    """How far a member is in a communicator: the last verdict that it has, the index of its next untagged call, and that of the last update
    that it skipped, or -1.
    """

    comm: int
    ack: int
    next_index: int
    skipped: int


class Claim(NamedTuple):
    """A call as one member made it."""

    uid: int
    description: str


# --- peer to master -------------------------------------------------------------------------------------------------


@message(1)
class Hello:
    """First word on a connection. `member`: this peer has an epoch already and its master may have been replaced."""

    version: int
    group: str
    peer: PeerInfo
    member: bool


@message(2)
class Beat:
    """The engine is alive. Progress counts what it moves and hashes; standings say how far it is in each communicator."""

    progress: int
    standings: tuple[Standing, ...]


class Flag(IntEnum):
    """Bits of `Enter.flags`."""

    RETRY = 1
    """The call runs again after a loss."""
    SEALED = 2
    """All of the call is known: false for a round whose body still runs, and which therefore has no signature yet."""
    PLAIN = 4
    """``atomic=False``, or it commits in shared memory: no verdict comes unless it fails, and `Done` only ends what `Enter` announced."""
    AFTER_SKIP = 8
    """In the place just before it the member has skipped an update, of which it told nobody."""


@message(3)
class Enter:
    """The member has made this call. Not answered; sent at once where the master takes part in the call, else when it takes a while."""

    comm: int
    epoch: Epoch
    call: CallId
    signature: int
    description: str
    payload: bytes
    flags: int


@message(4)
class Done:
    """The member has the call's result and holds no memory of it; what it gives to the call is the payload."""

    comm: int
    epoch: Epoch
    call: CallId
    signature: int
    description: str
    payload: bytes
    ack: int
    flags: int = 0
    """Of a call that was not announced: `Flag.AFTER_SKIP`, or nothing."""


@message(5)
class Failed:
    """The member ended the call before it was done; so it ends for all."""

    comm: int
    epoch: Epoch
    call: CallId
    signature: int
    description: str
    reason: int
    detail: str


@message(6)
class Overdue:
    """The member's deadline passed, or its caller cancelled, after `Done`: the master is to end the call."""

    comm: int
    epoch: Epoch
    call: CallId
    reason: int
    detail: str


@message(7)
class Report:
    """The answer to an `Ask`: the member has stopped."""

    rid: int
    peer: PeerInfo
    uid: int
    comms: tuple[CommReport, ...]
    near: tuple[int, ...] = ()
    """With whom it shares memory"""


@message(8)
class Ready:
    """The links of an admission that this member was to dial are made, but for `failed`."""

    admission: int
    failed: tuple[int, ...]
    near: tuple[int, ...] = ()
    """Uids of those with whom this member shares memory"""


@message(9)
class Leave:
    """The member leaves the communicator in the place of its update `index`; all calls that it has made are over for it."""

    comm: int
    epoch: Epoch
    index: int
    uses: tuple[TagUse, ...]
    """Of the tags, and with the members, that it has made calls with"""
    commits: tuple[int, ...] = ()
    """Indices of calls that it has committed in shared memory: others may not be so far"""


@message(10)
class Complaint:
    """The link to a member is broken. Evidence, not a verdict."""

    epoch: Epoch
    uid: int
    detail: str
    lacking: bool
    """Data of that member has yet to come in a call."""


# --- master to peer -------------------------------------------------------------------------------------------------


@message(32)
class Welcome:
    """The newcomer is known and waits for its admission."""

    rid: int
    heartbeat_interval: float


@message(33)
class Refused:
    """The newcomer cannot come in."""

    rid: int
    reason: int
    detail: str


@message(34)
class Prepare:
    """Make links, of an admission or again: those that there are to these members are given up, for new ones."""

    rid: int
    admission: int
    secret: bytes
    uid: int
    """The receiver's own."""
    contacts: tuple[Contact, ...]
    dial: tuple[int, ...]
    accept: tuple[int, ...]
    """They will dial."""


@message(35)
class NewEpoch:
    """A communicator's next epoch, with every decision that goes with it."""

    rid: int
    comm: int
    epoch: Epoch
    members: tuple[Member, ...]
    min_world_size: int
    decisions: tuple[Decision, ...]
    joined: tuple[Member, ...]
    left: tuple[Member, ...]
    lost: tuple[Member, ...]
    news: bool
    """No call failed: the next one that a survivor enters at or beyond `floor` carries the news of the loss."""
    floor: int
    next_index: int
    """Where newcomers begin."""
    tags: tuple[TagUse, ...]
    """Likewise."""
    broken: tuple[Link, ...]
    next_uid: int
    synced: int
    """Number of the communicator's last sync_state."""
    reason: int
    detail: str
    seq: int
    """Counts as a verdict, see `Verdict.seq`."""
    near: bool = False
    """Every two members share memory: their untagged collectives go through it, and commit there."""


@message(36)
class Verdict:
    """How a call ended, the same for all."""

    rid: int
    comm: int
    epoch: Epoch
    call: CallId
    verdict: str
    """C, A as in `Decision`; N: nobody fails for the news of a loss, since this call asks to be retried; it may begin."""
    waiting: int
    payload: bytes
    reason: int
    detail: str
    by: int
    """Uid of the member that ended it, or -1."""
    missing: tuple[int, ...]
    claims: tuple[Claim, ...]
    seq: int
    low: int
    """Verdicts up to this number have reached every member."""


@message(37)
class Ask:
    """Stop the communicators and report; none named means all, and a master that took over."""

    rid: int
    comms: tuple[int, ...]


@message(38)
class Agreed:
    """Everyone has entered a call that the master takes part in; what follows from what they gave."""

    rid: int
    comm: int
    epoch: Epoch
    call: CallId
    payload: bytes


@message(39)
class Leaving:
    """A member leaves in the place of this index; calls that it has not made cannot run with it."""

    rid: int
    comm: int
    epoch: Epoch
    uid: int
    index: int
    uses: tuple[TagUse, ...]


@message(40)
class Waiting:
    """For the log: a call that you entered waits for these members."""

    rid: int
    comm: int
    epoch: Epoch
    call: CallId
    missing: tuple[int, ...]


@message(42)
class Knock:
    """Newcomers wait to come in, or nobody does any more: members that commit without the master have to know."""

    rid: int
    comm: int
    waiting: bool


@message(41)
class Gone:
    """The group goes on without you."""

    rid: int
    reason: int
    detail: str


# --- what members give to calls in which the master takes part, and what comes of it ----------------------------------


@message(64)
class UpdateAsk:
    """Payload of an update, in `Enter`; and in `Done` when the member's earlier calls have ended. The uses of tags are for newcomers."""

    tags: tuple[TagUse, ...]


@message(65)
class SplitAsk:
    """Payload of a split. No color: the member will be in none of the new communicators."""

    color: int | None
    order: int


class SubComm(NamedTuple):
    """A new communicator: its number, its first epoch, and its members' uids in rank order."""

    comm: int
    epoch: Epoch
    uids: tuple[int, ...]
    near: bool
    """As in `NewEpoch`"""


@message(66)
class SplitResult:
    """All communicators that came of a split."""

    comms: tuple[SubComm, ...]


@message(67)
class Offer:
    """Payload of sync_state."""

    revision: int
    digest: bytes
    """Of the manifest: names, dtypes, shapes, values and block hashes."""
    shape: bytes
    """Of the names, dtypes and shapes alone."""
    strategy: str
    declare: bool
    manifest_bytes: int
    synced: int
    """Number of the last sync that this member took part in, 0 if none."""
    known: int
    """Number of the communicator's last sync, as far as this member knows."""


@message(68)
class Truth:
    """What sync_state agreed on."""

    revision: int
    digest: bytes
    manifest_bytes: int
    holders: tuple[int, ...]
    """Uids of the members that have it."""
    sync: int
    """Number of this sync."""
