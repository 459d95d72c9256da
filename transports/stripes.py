"""How many stripes a link is worth: more as long as they make it faster. Without input or output."""

from __future__ import annotations

from collections.abc import Sequence

from pccl.transports.wire import Account

FAR = 0.01
"""Seconds of round trip from which on a link begins with FAR_START stripes: there it takes seconds to find that one is not enough"""
FAR_START = 4
LEAST_SPAN = 0.5
"""Seconds of sending that are compared with another, at least"""
LEAST_TRIPS = 8
"""Round trips, likewise: a new stripe has to find its speed"""
GAIN = 1.1
"""What twice as many stripes have to be worth"""


class Growth:
    """Doubles the stripes of one direction of a link while its goodput rises with them."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._best = 0.0
        self._since: list[Account] = []

    def begin(self, first: Account | None) -> int:
        """What has become of the link's first wire so far -> how many stripes to begin with."""
        return min(self._most, FAR_START if first and first.rtt >= FAR else 1)

    def look(self, stripes: Sequence[Account | None]) -> int:
        """What has become of each stripe so far -> how many there should be."""
        accounts = [account for account in stripes if account is not None]
        if len(accounts) < len(stripes):
            return self._most  # nobody can tell
        count = len(accounts)
        if count != len(self._since):
            self._since = accounts
            return count
        busy = [now.busy - then.busy for now, then in zip(accounts, self._since, strict=True)]
        if max(busy, default=0.0) < max(LEAST_SPAN, LEAST_TRIPS * max((account.rtt for account in accounts), default=0.0)):
            return count
        held_back = sum(now.held_back - then.held_back for now, then in zip(accounts, self._since, strict=True))
        goodput = sum(now.acked - then.acked for now, then in zip(accounts, self._since, strict=True)) / max(busy)
        self._since = accounts
        if goodput <= GAIN * self._best:
            return count
        self._best = goodput
        return count if held_back > sum(busy) / 2 else min(self._most, 2 * count)
