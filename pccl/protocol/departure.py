"""Which calls a member that leaves has made: those that it has not made cannot run with it."""

from __future__ import annotations

from collections.abc import Iterable

from pccl.core.messages import TagUse
from pccl.core.types import CallId


class Departure:
    """What a member that leaves has done until then.

    Args:
        index: of the update in whose place it leaves.
    """

    def __init__(self, index: int, uses: Iterable[TagUse]) -> None:
        self.index = index
        self._uses = {(u.tag, u.pair): u.uses for u in uses}

    def made(self, call: CallId) -> bool:
        """Whether the call was among its calls."""
        if call.tag is None and call.pair is None:
            return call.n < self.index
        return call.n < self._uses.get((call.tag, call.pair), 0)
