"""Small calls of blocking callers on one host, made again and again: all there is to find out about them was found out before.

What is left are copies, a sum, and words in shared memory. Whatever is not as it was the last time (another epoch, calls in flight, a
member that is late) is left to `Express`, which goes on with the call as it is.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from pccl.calls import call_signature
from pccl.collectives.lane import DONE, IN, OUT, VOID, Lane, state
from pccl.core.types import LOCAL_CALLS, CallId, Info
from pccl.signals import SignalsHeld

if TYPE_CHECKING:
    from pccl.calls import Part, Reduction
    from pccl.express import Manner
    from pccl.protocol.member import Membership
    from pccl.route import Route
    from pccl.runtime import ThreadRuntime
    from pccl.sync import Work
    from pccl.transports.region import Words

Array = npt.NDArray[Any]

SPINS = 20
"""Looks at a member's word in a row, where every member of this host has a core to itself"""
YIELDS = 1000
"""Looks after that, each of which lets another process have its turn: the scheduler may have put the member on this core"""


class Repeat:
    """One kind of call in one epoch.

    Args:
        part: the first such call.
        route: through shared memory, for small calls.
        go_on: goes on with a call that is in the place of this index, and takes longer; its caller has the engine until it returns.
        give_up: has such a call end for all, since its caller was interrupted.
    """

    def __init__(
        self,
        runtime: ThreadRuntime,
        membership: Membership,
        lane: Lane,
        part: Part,
        manner: Manner,
        route: Route,
        arithmetic: Reduction,
        *,
        crowded: bool,
        go_on: Callable[[Any, Part | None, int], Info],
        give_up: Callable[[Any, Part | None, int], Work],
    ) -> None:
        errand, dtype = route.errand, part.dtype.numpy
        assert errand
        self.route = route
        self._runtime = runtime
        self._membership = membership
        self._lane = lane
        self._epoch = membership.epoch
        self._members = membership.view.members
        self._call = part.description
        self._commits = manner.atomic
        self._signature = call_signature(part, *manner)
        self._fold = arithmetic.fold
        self._quick = arithmetic.quick(dtype)
        self._spins = 0 if crowded else SPINS
        self._go_on = go_on
        self._give_up = give_up
        slots, world = range(LOCAL_CALLS), len(self._members)
        inputs = [[lane.room_of(rank, n).view(dtype) for rank in range(world)] for n in slots]
        count = part.given_count
        self._mine = [each[lane.rank][:count] for each in inputs]
        start, folded = errand.fold
        self._parts = [[x[start : start + folded] for x in each] for each in inputs] if folded else []
        self._folds = [lane.aside(n, folded * dtype.itemsize).view(dtype) for n in slots]
        to = errand.folded_to
        self._to = slice(to, to + folded) if folded and to >= 0 else None
        self._copies = [
            [(slice(p.to, p.to + p.elements), x[p.rank][p.start : p.start + p.elements]) for p in errand.copies] for x in inputs
        ]
        self._places = [lane.room_at(n) if errand.gives else 0 for n in slots]
        words = {rank: lane.words_of(rank) for rank in range(world) if rank != lane.rank}
        self._all_words = list(words.values())
        needed = {p.rank for p in errand.copies}
        self._needed = [at for rank, at in words.items() if self._commits or folded or rank in needed]
        elements = folded * (world - 1) + sum(p.elements for p in errand.copies if p.rank != lane.rank)
        self._moved = elements * dtype.itemsize

    def __call__(self, source: Array | None, target: Array | None, given: Any, part: Part | None = None) -> Info | None:
        """Make the call. None: nothing has happened.

        Args:
            source, target: the caller's memory, flat.
            given: what the caller gave for its result, or what that is put into.
            part: the call, if it was made already.
        """
        runtime, begun = self._runtime, -1
        try:
            if not runtime.take_turn():
                return None
            began = time.perf_counter()
            membership, lane = self._membership, self._lane
            n = membership.next_index
            if membership.epoch is not self._epoch or not membership.is_clear or not lane.is_free(n):
                runtime.give_back()
                return None
            slot = n % LOCAL_CALLS
            if source is not None:
                self._mine[slot][:] = source
            begun = n
            membership.next_index = n + 1
            lane.enter(n, self._signature, self._places[slot])
            if not self._all(self._needed, slot, IN, n):
                return self._go_on(given, part, n)
            if self._parts:
                if self._quick:
                    self._quick(*self._parts[slot], self._folds[slot])
                else:
                    self._fold(self._folds[slot], self._parts[slot], True)
            for where, what in self._copies[slot]:
                target[where] = what  # type: ignore[index]
            if not lane.stands():
                return self._go_on(given, part, n)
            if self._commits:
                lane.publish(n, DONE)
                if not self._all(self._all_words, slot, DONE, n) or not lane.stands():
                    return self._go_on(given, part, n)
                membership.committed(CallId(None, n), lane.anyone_waits(n))
            if self._to is not None:
                target[self._to] = self._folds[slot]  # type: ignore[index]
            lane.publish(n, OUT)
            begun = -1
            runtime.give_back()
        except BaseException:  # a signal's handler, between any two instructions
            self._rescue(given, part, begun)
            raise
        return Info(self._call, self._epoch, self._members, "local", 0, self._moved, time.perf_counter() - began, 1, given)

    def _rescue(self, given: Any, part: Part | None, begun: int) -> None:
        """Give the engine back, and end for all what was begun, however many signals come meanwhile."""
        works: list[Work] = []
        while self._runtime.has_turn:
            with contextlib.suppress(BaseException), SignalsHeld():
                try:
                    if begun >= 0:
                        index, begun = begun, -1
                        works.append(self._give_up(given, part, index))
                finally:
                    self._runtime.give_back()
        for work in works:
            work.outlast()

    def _all(self, members: list[tuple[Words, int]], slot: int, phase: int, n: int) -> bool:
        """Whether these have come to a phase of the same call; waits a little."""
        least, void, spins = state(n, phase), state(n, VOID), self._spins
        for words, at in members:
            i = at + 8 * slot
            while words[i] < least:
                spins -= 1
                if spins < 0:
                    if spins < -YIELDS:
                        return False
                    os.sched_yield()
            if words[i + 1] != self._signature or words[i] >= void:
                return False
        return True
