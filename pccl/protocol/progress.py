"""How far a member has come in the order of calls, or a group of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from pccl.core.messages import TagUse
from pccl.core.types import CallId, Pair, Tag


class Progress(NamedTuple):
    """A place in the order of untagged calls, and one in the order of each tag's."""

    untagged: int = 0
    """Index of the next one"""
    tagged: Mapping[tuple[Tag, Pair | None], int] = {}
    """Uses of each tag, in the communicator or between a pair of its members"""

    @classmethod
    def of(cls, untagged: int, tagged: Iterable[TagUse]) -> Progress:
        """As messages have it."""
        return cls(untagged, {(t.tag, t.pair): t.uses for t in tagged})

    def passed(self, call: CallId) -> bool:
        """Whether the call lies before it."""
        if call.tag is None and call.pair is None:
            return call.n < self.untagged
        return call.n < self.tagged.get((call.tag, call.pair), 0)
