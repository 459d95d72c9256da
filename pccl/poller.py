"""Receiving by hand, in a thread that has an engine to itself while its loop stands still."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable, Iterable
from typing import Protocol

from pccl.transports.base import Source

SPIN = 50e-6
"""Seconds of asking again and again before it sleeps, where every member of this host has a core to itself."""


class Awaited(Protocol):
    """A call."""

    @property
    def settled(self) -> bool:
        """Whether it is over."""

    @property
    def announced(self) -> bool:
        """Whether the master has heard of it, and will answer."""


class Poller:
    """Polls the descriptors of all that an engine receives from.

    Args:
        master: the control client.
        links: finds all links.
        alone: tells whether every member of this host can have a core to itself.
        report: hears of what a source raises.
    """

    def __init__(
        self, master: Source, links: Callable[[], Iterable[Source]], alone: Callable[[], bool], report: Callable[[Exception], None]
    ) -> None:
        self._master = master
        self._links = links
        self._alone = alone
        self._report = report
        self._receivers: dict[int, Callable[[], None]] = {}
        """descriptor -> what receives from it"""
        self._poll = select.poll()
        self._spin = 0.0

    def forget(self) -> None:
        """Links or members have come or gone: look for them again before the next call; the present one is left to the loop."""
        self._receivers = {}

    def serve(self, call: Awaited, patience: float, at_most: float) -> None:
        """Receive until the call is over, nothing has come for `patience` seconds, or `at_most` seconds are over: what comes may be of
        other calls, and the loop has timers, and sends what did not fit.
        """
        if not self._receivers:
            self._look()
        poll, receivers, clock = self._poll, self._receivers, time.perf_counter
        began = heard = clock()
        while not call.settled and receivers is self._receivers:
            now = clock()
            idle = now - heard
            if idle > patience or now - began > at_most:
                return
            if call.announced:
                self._master.receive()  # a message that was sent may have taken the wake-up of one that comes
            spin = call.settled or idle < self._spin
            ready = poll.poll(0 if spin else 1)
            if spin and not ready:
                os.sched_yield()  # to the peer, if it has been put on the same core
            for fd, events in ready:
                if events & select.POLLNVAL:
                    return
                try:
                    receivers[fd]()
                except Exception as e:
                    self._report(e)
            if ready:
                heard = clock()

    def _look(self) -> None:
        sources = [self._master, *self._links()]
        self._receivers = {s.fileno(): s.receive for s in sources if s.fileno() >= 0}
        self._poll = select.poll()
        for fd in self._receivers:
            self._poll.register(fd, select.POLLIN)
        self._spin = SPIN if self._alone() else 0.0
