"""Receiving by hand, in a thread that has an engine to itself while its loop stands still."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable, Iterable
from typing import Protocol

from pccl.transports.base import Source
from pccl.transports.region import OwnShared

SPIN = 50e-6
"""Seconds of asking again and again before it sleeps, where every member of this host has a core to itself."""
SHARED_SPIN = 300e-6
"""Seconds of looking into shared memory again and again; each time others get their turn, so it does not need a core to itself."""
LOOK = 50e-6
"""Seconds between two looks at everything else, while there is something to do in shared memory."""


class Stepper(Protocol):
    """The executor."""

    @property
    def pulls(self) -> bool:
        """Whether anything goes through shared memory now."""

    def step(self) -> bool:
        """Take it further; returns whether anything has moved."""


class Awaited(Protocol):
    """A call."""

    @property
    def settled(self) -> bool:
        """Whether it is over."""

    @property
    def announced(self) -> bool:
        """Whether the master has heard of it, and will answer."""


class Poller:
    """Polls the descriptors of all that an engine receives from, and looks into shared memory.

    Args:
        master: the control client.
        links: finds all links.
        alone: tells whether every member of this host can have a core to itself.
        report: hears of what a source raises.
        stepper: what goes through shared memory.
        region: where neighbours ring.
    """

    def __init__(
        self,
        master: Source,
        links: Callable[[], Iterable[Source]],
        alone: Callable[[], bool],
        report: Callable[[Exception], None],
        stepper: Stepper,
        region: OwnShared | None,
    ) -> None:
        self._master = master
        self._links = links
        self._alone = alone
        self._report = report
        self._stepper = stepper
        self._region = region
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
        receivers, clock, stepper = self._receivers, time.perf_counter, self._stepper
        began = heard = looked = clock()
        while not call.settled and receivers is self._receivers:
            moved = stepper.step()
            now = clock()
            if moved:
                heard = now
            idle = now - heard
            if idle > patience or now - began > at_most:
                return
            spin = moved or idle < (SHARED_SPIN if stepper.pulls else self._spin)
            if stepper.pulls and spin and now - looked < LOOK:
                if not moved:
                    os.sched_yield()  # to the peer, if it is on the same core
                continue
            looked = now
            if call.announced:
                self._master.receive()  # a message that was sent may have taken the wake-up of one that comes
            if self._receive(0 if spin else 1):
                heard = clock()
            elif spin:
                os.sched_yield()

    def _receive(self, patience: int) -> bool:
        """Take in what comes within so many milliseconds."""
        region, receivers = self._region if patience and self._stepper.pulls else None, self._receivers
        if region:
            region.sleeping(True)
            patience = 0 if self._stepper.step() else patience
        ready = self._poll.poll(patience)
        if region:
            region.sleeping(False)
        for fd, events in ready:
            if events & select.POLLNVAL:
                self.forget()
                return True
            try:
                receivers[fd]()
            except Exception as e:
                self._report(e)
        return bool(ready)

    def _look(self) -> None:
        sources = [self._master, *self._links(), *([self._region] if self._region else [])]
        self._receivers = {s.fileno(): s.receive for s in sources if s.fileno() >= 0}
        self._poll = select.poll()
        for fd in self._receivers:
            self._poll.register(fd, select.POLLIN)
        self._spin = SPIN if self._alone() else 0.0
