"""What the layers speak of: epochs, members, views, call ids, and the records that calls return."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import xxhash

Tag = int | str | None
"""Names a sequence of calls of its own; None is the untagged order of the program text."""


class Epoch(NamedTuple):
    """One membership of a communicator. Numbers rise within a term; a term is one life of the master."""

    term: int
    rid: int
    """Random, so that two masters that never heard of each other cannot give the same term."""
    number: int

    def __str__(self) -> str:
        return f"{self.term}.{self.number}"


class Member(NamedTuple):
    """A peer as its group knows it."""

    uid: int
    """Given at admission, rising, never given twice in a run."""
    name: str
    """``host:pid`` unless it was given to connect."""
    host: str
    """Identifies the machine (and network namespace); equal on peers of one host."""


class Pair(NamedTuple):
    """Sender and receiver (uids) of a point-to-point call."""

    source: int
    target: int


class CallId(NamedTuple):
    """A logical call: the same on every member that makes it."""

    tag: Tag
    n: int
    """The index in the untagged order, or the n-th use of the tag, from 0."""
    pair: Pair | None = None

    def __str__(self) -> str:
        where = f" {self.pair.source}->{self.pair.target}" if self.pair else ""
        return f"#{self.n}{where}" if self.tag is None else f"{self.tag!r}#{self.n}{where}"

    @property
    def key(self) -> int:
        """The id in 64 bits, for frames: the index itself, or a hash with the top bit set."""
        if self.tag is None and self.pair is None:
            return self.n
        return xxhash.xxh3_64_intdigest(repr(self).encode()) | 1 << 63


LOCAL_CALLS = 16
"""Calls of a communicator that may run in shared memory at a time: who is in one, knows that everyone has ended those so far back."""


@dataclass(frozen=True, slots=True)
class View:
    """A membership as a caller sees it: immutable; it changes only when a call returns or raises."""

    epoch: Epoch
    rank: int
    members: tuple[Member, ...]
    """In rank order."""
    min_world_size: int = 1
    joined: tuple[Member, ...] = ()
    """Who came in since the view before."""
    left: tuple[Member, ...] = ()
    """Who left of their own will."""
    lost: tuple[Member, ...] = ()
    """Whom the failure detector found dead."""

    @property
    def world_size(self) -> int:
        """Number of members."""
        return len(self.members)

    @property
    def changed(self) -> bool:
        """Whether the members differ from those of the view before."""
        return bool(self.joined or self.left or self.lost)

    def __str__(self) -> str:
        return f"epoch {self.epoch}, rank {self.rank} of {self.world_size}"


class Info(NamedTuple):
    """What a collective did."""

    call: str
    """The call, for example ``all_reduce(float32[1024], sum)``."""
    epoch: Epoch
    """The epoch whose members contributed."""
    members: tuple[Member, ...]
    """They, in rank order."""
    algorithm: str
    bytes_sent: int
    """Payload bytes that this peer sent in the last attempt."""
    bytes_received: int
    seconds: float
    """From the call to its end, all attempts."""
    attempts: int
    out: Any = None
    """The result: what was given as ``out``, or the tensor itself where it was reduced in place, or a new array."""

    @property
    def world_size(self) -> int:
        """Number of members that contributed."""
        return len(self.members)

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in zip(self._fields[:-1], self, strict=False))
        return f"Info({shown})"  # without the result, which may be large


@dataclass(frozen=True, slots=True)
class RoundInfo:
    """What a round did: one entry per call, in the order in which the body made them."""

    epoch: Epoch
    members: tuple[Member, ...]
    calls: tuple[Info, ...]
    seconds: float
    attempts: int


@dataclass(frozen=True, slots=True)
class StateInfo:
    """What ``sync_state`` did."""

    revision: int
    """The revision that everyone now has."""
    digest: str
    """xxh3-128 of the shared state, equal on every member."""
    bytes_sent: int
    bytes_received: int
    sources: tuple[str, ...]
    """Names of the members from which this peer fetched."""
    seconds: float
    attempts: int
    state: dict[str, Any] = field(repr=False, default_factory=dict)
    """The whole state: the tensors that were given, and new ones for keys that this peer lacked."""
