"""How far the members of one host are in each call: words in the memory that they share, each written by one member and read by all.

Every member has, for each epoch of a communicator, a lane in its own region: RING slots, of which a call uses the one that its index says,
behind a line whose first word says, once the epoch is over, that this member will read nothing more there.
A slot's first word holds call, phase and whether newcomers wait; the words behind it (the call's signature, where its data lies) are
written before the first one is, and stay until the slot is used again. Processors of x86 keep the order of stores and of loads; others
are not supported.

What the phases promise, and what a member may conclude from them (design section 7):

- IN: the input is there to be read, and belongs to a call of this signature.
- DONE: this member's share of the work is done and lies in shared memory, and it will not read inputs again. Of an atomic call all DONE is
  the commit: the first who sees them all has decided for all.
- OUT: this member reads nothing more of the others' for this call. Its slot may be used again when everyone is OUT; until then it may still
  become VOID, if the call has no commit.
- VOID: the call failed here, and the input is withdrawn: what was read of it is worthless.
- GONE: this member is in a later call. Who has been in this one, and is out, knows that it was, too. Whoever still is in it knows that it
  never was, since its slot would have waited: the call failed there.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from pccl.core.errors import InvalidArgument
from pccl.core.types import LOCAL_CALLS as RING
from pccl.core.types import Epoch
from pccl.transports.region import ASLEEP, FIRST, OtherShared, OwnShared, Words, full_fence

IN, DONE, OUT, VOID, GONE = 1, 2, 3, 7, 8
"""Phases, in their order; GONE is none that is written"""
_WAITING = 1
"""Bit of a state that says that newcomers wait, as far as this member knows"""
_PHASE = 1
"""Bits behind the phase"""
_CALL = 4
"""Bits behind the call"""

SMALL = 256 << 10
"""Bytes of input that fit into a slot."""
LANES = 1024
"""Epochs of communicators that have a place at a time; each has two, its present one and the one before"""

_LINE = 64
"""Bytes of a slot's words: a cache line of its own"""
_WORDS_BYTES = -(-_LINE * (RING + 1) // mmap.PAGESIZE) * mmap.PAGESIZE
_LANE_BYTES = _WORDS_BYTES + RING * SMALL
_TABLE = FIRST
"""Offset of two words for each lane that say whose it is: close together, since to look at a page makes it exist"""
_LANES_AT = _TABLE + -(-16 * LANES // mmap.PAGESIZE) * mmap.PAGESIZE
ROOM = _LANES_AT + LANES * _LANE_BYTES
"""Bytes of a region in front of what `Commons.take` gives out"""
_CLOSED = 1 << 63
"""Bit of a lane's name that says that it was closed"""
_SIGNATURE, _INPUT, _RESULT = 1, 2, 3
"""Words of a slot, besides its first"""
HERE = 1 << 63
"""Marks a place in the region, not in the process's own memory."""


def state(n: int, phase: int) -> int:
    """A slot's first word, without what it says of newcomers; they grow with the call, and in it with the phase."""
    return (n + 1) << _CALL | phase << _PHASE


def phase_in(word: int) -> int:
    """The phase that a slot's first word says."""
    return word >> _PHASE & 7


class Commons:
    """One's own region, divided up: lanes, and memory for what has to be shared and is too large for a slot."""

    def __init__(self, region: OwnShared) -> None:
        self.region = region
        self._turn = 0
        self._lanes: set[int] = set()
        """Numbers of those that are open"""
        self._taken: dict[int, int] = {}
        """offset -> bytes"""
        self._dirty = False
        self._idle_since: float | None = None

    def open_lane(self, epoch: Epoch) -> int:
        """The offset of a lane for an epoch, from now on to be found by the others. The place of one that is closed is used again late.

        Raises:
            InvalidArgument: too many are open.
        """
        number = next((k for k in (*range(self._turn, LANES), *range(self._turn)) if k not in self._lanes), None)
        if number is None:
            raise InvalidArgument(f"too many communicators share memory here ({LANES // 2} can): leave those that are not needed any more")
        self._lanes.add(number)
        self._turn = (number + 1) % LANES
        words, at = self.region.words, _entry(number)
        offset: int = _LANES_AT + number * _LANE_BYTES
        words[at] = 0
        self.region.view(offset, _LINE * (RING + 1))[:] = 0
        words[at + 1] = epoch.rid
        words[at] = _name(epoch)
        return offset

    def close_lane(self, offset: int) -> None:
        """Nobody looks for it, or reads there, any more."""
        number = _number(offset)
        self.region.words[_entry(number)] |= _CLOSED
        self._lanes.discard(number)
        self.region.release(offset + _WORDS_BYTES, RING * SMALL)

    def take(self, nbytes: int) -> int:
        """The offset of free memory, in whole cache lines.

        Raises:
            MemoryError: there is none.
        """
        size = max(_LINE, -(-nbytes // _LINE) * _LINE)
        start = -(-ROOM // mmap.PAGESIZE) * mmap.PAGESIZE
        for offset in sorted(self._taken):
            if offset - start >= size:
                break
            start = offset + self._taken[offset]
        if start + size > len(self.region.memory):
            raise MemoryError(f"no {nbytes} bytes of shared memory are left")
        self._taken[start] = size
        self._dirty, self._idle_since = True, None
        return start

    def give(self, offset: int) -> None:
        """It is not needed any more."""
        del self._taken[offset]

    def unused_for(self, now: float) -> float:
        """Seconds since this was first asked after the last `take`; 0 where nothing was taken since the last `trim`."""
        if not self._dirty:
            return 0.0
        if self._idle_since is None:
            self._idle_since = now
        return now - self._idle_since

    def trim(self) -> None:
        """Give memory that was taken once, and is not now, back to the system."""
        if not self._taken:
            self._dirty = False
            self.region.release(ROOM, len(self.region.memory) - ROOM)


def _entry(number: int) -> int:
    """Index of the words that say whose a lane is."""
    return _TABLE // 8 + 2 * number


def _number(offset: int) -> int:
    """That of the lane that is there."""
    return (offset - _LANES_AT) // _LANE_BYTES


def _name(epoch: Epoch) -> int:
    return epoch.term << 32 | epoch.number


class Lane:
    """The words of all members for one epoch of a communicator.

    Args:
        others: rank -> neighbour, of all but this member.
    """

    def __init__(self, commons: Commons, epoch: Epoch, rank: int, others: Mapping[int, OtherShared]) -> None:
        self.commons = commons
        self.epoch = epoch
        self.rank = rank
        self.waiting = False
        """Newcomers wait, as far as this member knows."""
        self.past = False
        """The epoch is over: who has no lane of it yet will have none."""
        self.others = others
        self._bells = [(other.words, other.ring) for other in others.values()]
        self.readable = all(other.readable for other in others.values())
        """Every member can read every other one's own memory."""
        self._offset = commons.open_lane(epoch)
        self._own = commons.region.words
        self._at = self._offset // 8
        self._found: dict[int, int] = {}
        """rank -> offset of its lane"""
        self._entries: list[tuple[Words, int]] = []
        """Of those that were found: the words that say whose it is"""
        self._name = _name(epoch)
        self._last = [0] * RING
        """The last state of each of one's own slots"""
        self._kept: list[list[int]] = [[] for _ in range(RING)]
        """Memory taken for the call in each slot"""
        self._lines: list[list[int]] = [[] for _ in range(RING)]
        """Of each slot: this member's calls that want it, the one that has it first"""
        self._asides: dict[int, npt.NDArray[np.uint8]] = {}

    # --- one's own words ----------------------------------------------------------------------------------------------

    def line_up(self, n: int) -> None:
        """Call n wants its slot. One's own calls have it in their order: the others' have."""
        self._lines[n % RING].append(n)

    def step_out(self, n: int) -> None:
        """Call n does not want it any more."""
        line = self._lines[n % RING]
        if n in line:
            line.remove(n)

    def is_free(self, n: int) -> bool:
        """Whether the slot for call n may be used: everyone is out of the call that used it before. Calls get it in their order; one that
        has not lined up, if nobody has.
        """
        slot = n % RING
        line = self._lines[slot]
        if (line and line[0] != n) or (self._last[slot] and not self._is_over(slot)):
            return False
        self._give(slot)
        return True

    def enter(self, n: int, signature: int, source: int) -> None:
        """This member is in call n; its input lies there."""
        at = self._line(n)
        self._own[at + _SIGNATURE] = signature
        self._own[at + _INPUT] = source
        self.publish(n, IN)

    def is_done(self, n: int) -> bool:
        """Whether this member has published DONE for call n."""
        return self._last[n % RING] >= state(n, DONE)

    def place_result(self, n: int, where: int) -> None:
        """Say where the result will lie, before DONE."""
        self._own[self._line(n) + _RESULT] = where

    def publish(self, n: int, phase: int) -> None:
        """A phase of call n is reached. From DONE on the word says whether newcomers wait, and goes on saying the same."""
        slot = n % RING
        last = self._last[slot]
        waiting = last & _WAITING if last >= state(n, DONE) else self.waiting
        self._last[slot] = self._own[self._at + 8 * (slot + 1)] = state(n, phase) | waiting
        full_fence()
        for words, ring in self._bells:
            if words[ASLEEP]:
                ring()

    def room(self, n: int) -> npt.NDArray[np.uint8]:
        """The slot's own memory."""
        return self.commons.region.view(self._room(self._offset, n), SMALL)

    def room_of(self, rank: int, n: int) -> npt.NDArray[np.uint8]:
        """The same of any member, once it has been seen in this epoch; only one's own can be written to."""
        if rank == self.rank:
            return self.room(n)
        return self.others[rank].view(self._room(self._found[rank], n), SMALL)

    def words_of(self, rank: int) -> tuple[Words, int]:
        """The words of another member, once it has been seen in this epoch, and the index of those of its first slot. A slot has 8: its
        state, the signature, and what concerns nobody here.
        """
        return self.others[rank].words, self._found[rank] // 8 + 8

    def room_at(self, n: int) -> int:
        """Where that is, for `enter`."""
        return self._room(self._offset, n) | HERE

    def take(self, n: int, nbytes: int) -> tuple[npt.NDArray[np.uint8], int]:
        """Shared memory until the slot is used again, and where it is, for `enter` or `place_result`."""
        self.reap()
        offset = self.commons.take(nbytes)
        self._kept[n % RING].append(offset)
        return self.commons.region.view(offset, nbytes), offset | HERE

    def reap(self) -> None:
        """Give back what was taken for calls that everyone is out of."""
        for slot, kept in enumerate(self._kept):
            if kept and self._is_over(slot):
                self._give(slot)

    def aside(self, n: int, nbytes: int) -> npt.NDArray[np.uint8]:
        """Private memory for what becomes of a small call, in a whole cache line."""
        slot = n % RING
        if slot not in self._asides:
            memory = np.empty(SMALL + _LINE, np.uint8)
            start = -memory.__array_interface__["data"][0] % _LINE
            self._asides[slot] = memory[start : start + SMALL]
        return self._asides[slot][:nbytes]

    def close(self) -> None:
        """No member will read anything of this epoch any more. Who is none now, and reads on, finds that it `stands` no longer."""
        self.commons.close_lane(self._offset)
        for slot in range(RING):
            self._give(slot)

    @property
    def manner(self) -> str:
        """In words, how data goes."""
        return "reading each other's memory" if self.readable else "copying into shared memory, since the system forbids to read others'"

    @property
    def complete(self) -> bool:
        """Every member has been seen in this epoch."""
        return len(self._found) == len(self.others)

    def retire(self) -> None:
        """The epoch is over: once this member is in no call of it any more, say that it will read nothing there."""
        if not any(self._lines):
            self._own[self._at] = 1

    def is_over(self, counts: Callable[[OtherShared], bool]) -> bool:
        """Whether this member has retired, and none of the others who count will read anything of it: each is out of all its calls, or has
        retired.
        """
        if not self._own[self._at]:
            return False
        readers = [rank for rank, other in self.others.items() if counts(other) and not self._has_retired(rank)]
        return all(self._is_out(rank, last, slot) for rank in readers for slot, last in enumerate(self._last) if last)

    # --- the others' --------------------------------------------------------------------------------------------------

    def phase(self, rank: int, n: int) -> int:
        """How far a member is in call n: 0 if it has not come there; OUT if it has gone on, GONE if it has done so without this member."""
        now = self._state(rank, n % RING)
        call = now >> _CALL
        if call == n + 1:
            return phase_in(now)
        if call < n + 1:
            return 0
        return OUT if self._last[n % RING] >= state(n, OUT) else GONE

    def stands(self) -> bool:
        """Whether all that was read up to now was of this epoch: no other member has closed its lane."""
        return all(words[at] == self._name for words, at in self._entries)

    def anyone_waits(self, n: int) -> bool:
        """Whether any member said, when it was DONE, that newcomers wait; once all are. All members find the same."""
        slot = n % RING
        return bool(self._last[slot] & _WAITING) or any(self._state(rank, slot) & _WAITING for rank in self.others)

    def signature(self, rank: int, n: int) -> int:
        """What its call is; once it is IN."""
        return self.others[rank].words[self._their_line(rank, n) + _SIGNATURE]

    def source(self, rank: int, n: int) -> int:
        """Where its input lies; once it is IN."""
        return self.others[rank].words[self._their_line(rank, n) + _INPUT]

    def result(self, rank: int, n: int) -> int:
        """Where its result lies; once it is DONE."""
        return self.others[rank].words[self._their_line(rank, n) + _RESULT]

    # --- inside -------------------------------------------------------------------------------------------------------

    def _state(self, rank: int, slot: int) -> int:
        offset = self._found.get(rank) or self._find(rank)
        return self.others[rank].words[offset // 8 + 8 * (slot + 1)] if offset else 0

    def _is_over(self, slot: int) -> bool:
        """Whether everyone is out of the call that one's own slot was used for last, this member included."""
        last = self._last[slot]
        return phase_in(last) >= OUT and all(self._is_out(rank, last, slot) for rank in self.others)

    def _is_out(self, rank: int, last: int, slot: int) -> bool:
        """Whether another member is out of the call for which this one's slot was used last."""
        now = self._state(rank, slot)
        return now >> _CALL > last >> _CALL or (now >> _CALL == last >> _CALL and phase_in(now) >= OUT)

    def _has_retired(self, rank: int) -> bool:
        """Whether another member is in no call of this epoch any more: it says so, has closed its lane, or will never have one."""
        offset = self._found.get(rank) or self._find(rank)
        words = self.others[rank].words
        if offset:
            return words[offset // 8] != 0 or words[_entry(_number(offset))] != self._name
        return self.past or self._look_up(rank, self._name | _CLOSED) >= 0

    def _find(self, rank: int) -> int:
        """The offset of a member's lane; 0 as long as it is not in this epoch."""
        number = self._look_up(rank, self._name)
        if number < 0:
            return 0
        self._found[rank] = _LANES_AT + number * _LANE_BYTES
        self._entries.append((self.others[rank].words, _entry(number)))
        return self._found[rank]

    def _look_up(self, rank: int, name: int) -> int:
        """The number of a member's lane of this name; -1 if there is none."""
        words, rid = self.others[rank].words, self.epoch.rid
        return next((k for k in range(LANES) if words[_entry(k)] == name and words[_entry(k) + 1] == rid), -1)

    def _line(self, n: int) -> int:
        return self._at + 8 * (n % RING + 1)

    def _their_line(self, rank: int, n: int) -> int:
        return self._found[rank] // 8 + 8 * (n % RING + 1)

    @staticmethod
    def _room(offset: int, n: int) -> int:
        return offset + _WORDS_BYTES + n % RING * SMALL

    def _give(self, slot: int) -> None:
        while self._kept[slot]:
            self.commons.give(self._kept[slot].pop())
