"""Which members share memory: pairs on one host that have met, and whether all members of a communicator have."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from pccl.core.messages import Link


class Near:
    """The pairs that share memory, as those who dialled have said."""

    def __init__(self) -> None:
        self._pairs: set[Link] = set()

    def met(self, uid: int, dialled: Iterable[int], near: Collection[int]) -> None:
        """A member has made links anew; to some of those it dialled it is near."""
        for other in dialled:
            pair = Link(min(uid, other), max(uid, other))
            (self._pairs.add if other in near else self._pairs.discard)(pair)

    def keep(self, uids: Collection[int]) -> None:
        """Only these are members now."""
        self._pairs = {pair for pair in self._pairs if pair.low in uids and pair.high in uids}

    def all_met(self, uids: Collection[int]) -> bool:
        """Whether every two of these, of two or more, share memory."""
        n = len(uids)
        if n < 2 or len(self._pairs) < n * (n - 1) // 2:
            return False
        return sum(pair.low in uids and pair.high in uids for pair in self._pairs) == n * (n - 1) // 2
