"""Links in the making: for newcomers, or again where they broke. The younger of a pair dials; where that fails, the older does."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from pccl.core.messages import Link

Dial = tuple[int, int]
"""(uid that dials, uid of the other)"""

N = TypeVar("N")
C = TypeVar("C")


@dataclass(slots=True)
class Admission(Generic[N, C]):
    """One attempt to make a set of links, in up to two rounds. `newcomers` and `call` are the group's own notes."""

    number: int
    secret: bytes
    newcomers: list[N]
    call: C | None
    """The update that lets the newcomers in; None where links are made again, or the group was empty."""
    dials: list[Dial]
    began: float
    """When the present round began"""
    waiting: set[int] = field(default_factory=set)
    """Uids that have not yet said which of their dials failed."""
    tried: frozenset[Link] = frozenset()
    """All pairs that were to be linked"""
    failed: list[Dial] = field(default_factory=list)
    reversed: bool = False

    def __post_init__(self) -> None:
        self.waiting = {dialer for dialer, _ in self.dials}
        self.tried = frozenset(_links(self.dials))

    def ready(self, uid: int, failed: tuple[int, ...]) -> bool:
        """A member has dialled all of its share; returns whether that was the last of the round."""
        if uid not in self.waiting:
            return False
        self.waiting.discard(uid)
        self.failed += [(uid, other) for other in failed if (uid, other) in self.dials]
        return not self.waiting

    def overdue(self, uids: Iterable[int]) -> list[tuple[int, tuple[int, ...]]]:
        """Those of these members who have not said how their dials went, and whom they were to dial."""
        return [(u, tuple(other for dialer, other in self.dials if dialer == u)) for u in uids if u in self.waiting]

    def turn(self, now: float) -> bool:
        """Begin the second round if one is due: each failed pair the other way round."""
        if self.reversed or not self.failed:
            return False
        self.dials, self.failed, self.reversed = [(other, dialer) for dialer, other in self.failed], [], True
        self.began = now
        self.waiting = {dialer for dialer, _ in self.dials}
        return True

    def broken(self, before: set[Link]) -> set[Link]:
        """Pairs without a link, once all rounds are over."""
        return before - self.tried | _links(self.failed)


def _links(pairs: Iterable[Dial]) -> set[Link]:
    return {Link(min(pair), max(pair)) for pair in pairs}
