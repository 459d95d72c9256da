"""Small all-reduces of blocking callers on one host, made again and again: all there is to find out about them was found out before.

What is left are copies, a sum, and words in shared memory. Whatever is not as it was the last time (another epoch, calls in flight, a
member that is late) is left to `Express`, which goes on with the call as it is.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pccl.calls import call_signature
from pccl.collectives.lane import DONE, IN, OUT, VOID, Lane, state
from pccl.core.types import LOCAL_CALLS, CallId, Info
from pccl.signals import SignalsHeld

if TYPE_CHECKING:
    from pccl.calls import Part, Reduction
    from pccl.express import Manner
    from pccl.protocol.member import Membership
    from pccl.runtime import ThreadRuntime

Array = npt.NDArray[Any]

SPINS = 20
"""Looks at a member's word in a row, where every member of this host has a core to itself"""
YIELDS = 100
"""Looks after that, each of which lets another process have its turn: the scheduler may have put the member on this core"""


class Repeat:
    """One kind of call in one epoch.

    Args:
        part: the first such call.
        shape: of its tensor.
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
        arithmetic: Reduction,
        shape: tuple[int, ...],
        *,
        crowded: bool,
        go_on: Callable[[Array, int], Info],
        give_up: Callable[[Array, int], None],
    ) -> None:
        self._runtime = runtime
        self._membership = membership
        self._lane = lane
        self._epoch = membership.epoch
        self._members = membership.view.members
        self._call = part.description
        self._commits = manner.atomic
        self._signature = call_signature(part, *manner)
        self._fold = arithmetic.fold
        self._quick = arithmetic.quick(part.dtype.numpy)
        self._spins = 0 if crowded else SPINS
        self._go_on = go_on
        self._give_up = give_up
        numpy = part.dtype.numpy

        def tensor(memory: npt.NDArray[np.uint8]) -> Array:
            return memory[: part.nbytes].view(numpy).reshape(shape)

        slots, world = range(LOCAL_CALLS), len(self._members)
        self._inputs = [[tensor(lane.room_of(rank, n)) for rank in range(world)] for n in slots]
        self._mine = [tensors[lane.rank] for tensors in self._inputs]
        self._places = [lane.room_at(n) for n in slots]
        self._results = [tensor(lane.aside(n, part.nbytes)) for n in slots]
        self._words = [lane.words_of(rank) for rank in range(world) if rank != lane.rank]

    def __call__(self, x: Array) -> Info | None:
        """Make the call in place. None: nothing has happened."""
        runtime, flags = self._runtime, x.flags
        if not (flags.c_contiguous and flags.writeable):
            return None
        begun = -1
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
            self._mine[slot][...] = x
            begun = n
            membership.next_index = n + 1
            lane.enter(n, self._signature, self._places[slot])
            if not self._all(slot, IN, n):
                return self._go_on(x, n)
            result = self._results[slot]
            if self._quick:
                self._quick(*self._inputs[slot], result)
            else:
                self._fold(result, self._inputs[slot], True)
            if self._commits:
                lane.publish(n, DONE)
                if not self._all(slot, DONE, n):
                    return self._go_on(x, n)
                membership.committed(CallId(None, n), lane.anyone_waits(n))
            x[...] = result
            lane.publish(n, OUT)
            begun = -1
            runtime.give_back()
        except BaseException:  # a signal's handler, between any two instructions
            if runtime.has_turn:
                with SignalsHeld():
                    if begun >= 0:
                        self._give_up(x, begun)
                    runtime.give_back()
            raise
        nbytes = x.nbytes * len(self._words)
        return Info(self._call, self._epoch, self._members, "local", nbytes, nbytes, time.perf_counter() - began, 1, x)

    def _all(self, slot: int, phase: int, n: int) -> bool:
        """Whether all others have come to a phase of the same call; waits a little."""
        least, void = state(n, phase), state(n, VOID)
        for words, at in self._words:
            i = at + 8 * slot
            spins = self._spins
            while words[i] < least:
                spins -= 1
                if spins < 0:
                    if spins < -YIELDS:
                        return False
                    os.sched_yield()
            if words[i + 1] != self._signature or words[i] >= void:
                return False
        return True
