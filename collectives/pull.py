"""A collective among members of one host, who take what they need from each other's memory; nothing is sent.

Who reads what from whom is as in the `direct` schedules. Inputs are folded in the order of ranks: small ones by everyone, large ones
part by part, each part by one rank, whose result the others then read. With `commits`, results stay in shared memory until all members
are DONE, which is the commit (design section 7, One-host commit): inputs are untouched until then, and a member that dies does not take
its part of the result with it.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Generator, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from pccl.collectives.flow import CallKey, Flow, Moving
from pccl.collectives.lane import DONE, GONE, HERE, OUT, SMALL, VOID, Lane
from pccl.collectives.supply import Supply
from pccl.collectives.transfer import Arithmetic
from pccl.core.errors import Evicted
from pccl.core.frames import Header

Array = npt.NDArray[Any]

SLICE = 512 << 10
"""Bytes that are read and folded at a time, of each member: with those of a few members they stay in a processor's own cache."""
LEAST_SLICE = 32 << 10
ALIGN = 64
"""Bytes at which parts of a large reduction begin"""


LOCAL = "local"
"""Name of the algorithm"""


class Piece(NamedTuple):
    """A run of elements to copy."""

    rank: int
    """From whom"""
    start: int
    """There"""
    elements: int
    to: int
    """In the output here"""


class Errand(NamedTuple):
    """What one rank does in a call, in elements."""

    small: bool
    """The input fits into a slot."""
    gives: bool
    """This rank has an input."""
    copies: tuple[Piece, ...]
    """Of inputs"""
    fold: tuple[int, int]
    """Start and length of the part of all inputs that this rank folds"""
    folded_to: int
    """Where that goes in the output; -1: nowhere"""
    gathers: tuple[Piece, ...]
    """Of others' folded parts"""
    parted: bool
    """Each rank folds a part, for others to read"""


def errand(collective: str, world: int, rank: int, root: int, count: int, itemsize: int) -> Errand:
    """What a rank does.

    Args:
        count: elements per segment (see `pccl.collectives.schedules.meaning`).
    """
    ranks = [(rank + k) % world for k in range(world)]  # not all from the same one at a time
    small = count * itemsize * (world if collective in ("reduce_scatter", "scatter", "all_to_all") else 1) <= SMALL
    copies: tuple[Piece, ...] = ()
    gathers: tuple[Piece, ...] = ()
    fold, to, parted, gives = (0, 0), -1, False, True
    if collective in ("all_reduce", "reduce"):
        gets = collective == "all_reduce" or rank == root
        parted = not small
        if small:
            fold, to = ((0, count), 0) if gets else ((0, 0), -1)
        else:
            bounds = _bounds(count, world, itemsize)
            fold, to = (bounds[rank], bounds[rank + 1] - bounds[rank]), bounds[rank] if gets else -1
            if gets:
                gathers = tuple(Piece(r, 0, bounds[r + 1] - bounds[r], bounds[r]) for r in ranks[1:] if bounds[r + 1] > bounds[r])
    elif collective == "reduce_scatter":
        fold, to = (rank * count, count), 0
    elif collective == "all_gather":
        copies = tuple(Piece(r, 0, count, r * count) for r in ranks)
    elif collective == "all_to_all":
        copies = tuple(Piece(r, rank * count, count, r * count) for r in ranks)
    elif collective == "broadcast":
        gives = rank == root
        copies = () if gives else (Piece(root, 0, count, 0),)
    elif collective == "scatter":
        gives = rank == root
        copies = (Piece(root, rank * count, count, 0),)
    elif collective == "gather":
        copies = tuple(Piece(r, 0, count, r * count) for r in ranks) if rank == root else ()
    return Errand(small, gives, copies if count else (), fold, to, gathers, parted)


def _bounds(count: int, world: int, itemsize: int) -> list[int]:
    unit = max(1, ALIGN // itemsize)
    units = -(-count // unit)
    return [min(count, units * r // world * unit) for r in range(world + 1)]


class PullHost(Protocol):
    """The executor."""

    def done(self, transfer: Moving) -> None:
        """The result is there, and the transfer holds no memory."""

    def mismatch(self, transfer: Moving, uid: int) -> None:
        """A peer's call is another one."""

    def unreadable(self, transfer: Moving, uid: int, error: OSError) -> None:
        """A peer's memory cannot be read, though it lives."""

    def moved(self, n: int) -> None:
        """So many payload bytes were read."""

    def step_soon(self) -> None:
        """There may be something to go on with."""

    def take_scratch(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """Memory for one slice."""

    def give_scratch(self, scratch: npt.NDArray[np.uint8]) -> None:
        """It is no longer needed."""


class Pull:
    """One attempt. Implements `Moving`; whoever drives it calls `step` again and again.

    Args:
        key: of an untagged call: `call` is its index.
        uids: of all members, by rank.
        source, target: flat arrays of one dtype, perhaps the same memory; None where this rank has none.
        commits: the call commits in shared memory; else it has no commit.
        supply: which of the source is there, if it is still on its way; `supplied` tells of more.
    """

    def __init__(
        self,
        host: PullHost,
        key: CallKey,
        signature: int,
        lane: Lane,
        uids: Sequence[int],
        errand: Errand,
        source: Array | None,
        target: Array | None,
        arithmetic: Arithmetic,
        *,
        commits: bool,
        supply: Supply | None = None,
    ) -> None:
        self.key = key
        self.signature = signature
        self.commits = commits
        self.halted = False
        self.ready = False
        """DONE is published: the others may have committed it."""
        self.committed = False
        """This member has seen that all are DONE."""
        self.waiting = False
        """Then: whether newcomers wait, the same on all members"""
        self.bytes_sent = 0
        self.bytes_received = 0
        self._host = host
        self._n = key.call
        self._lane = lane
        self._uids = uids
        self._errand = errand
        self._source = source
        self._target = target
        self._arithmetic = arithmetic
        some = source if source is not None else target
        assert some is not None
        self._dtype = some.dtype
        self._item = some.dtype.itemsize
        self._supply = supply
        self._entered = False
        """The others may read what this member shows."""
        self._peeked = False
        """Something was read from a member's own memory."""
        self._folded: Array | None = None
        """This rank's part of the result, if it is not in its place yet"""
        self._scratch: list[npt.NDArray[np.uint8]] = []
        self._stranger = -1
        """Uid of a member whose call is another one"""
        self._course = self._run()
        lane.line_up(self._n)

    # --- Moving -------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Nothing: `step` does everything."""

    def adopt(self) -> None:
        """The input has been shown already, in this member's slot, and perhaps it was DONE."""
        self._entered = True
        self.ready = self.commits and self._lane.is_done(self._n)

    def supplied(self, start: int, stop: int) -> None:
        """These elements of the source are there now."""
        self._host.step_soon()

    def halt(self) -> None:
        """Stop. Nobody uses this member's input any more, unless the others may have committed the call: then `conclude` or `withdraw`."""
        self.halted = True
        self._give_scratch()
        if self.committed:
            with contextlib.suppress(Evicted):  # said when the caller is to have the result
                self.conclude()
        elif not self.ready:
            self.withdraw()

    def withdraw(self) -> None:
        """The call has failed: this member's memory is its own again."""
        if self._entered:
            self._entered = False
            self._lane.publish(self._n, VOID)
        self._lane.step_out(self._n)
        self._host.step_soon()  # calls of this member may wait for the slot

    def conclude(self) -> None:
        """The call is committed: bring the result to its place.

        Raises:
            Evicted: it cannot be read, since the others have gone on without this member.
        """
        if self._entered:
            if not (self._lane.stands() and all(self._deliver()) and self._lane.stands()):
                raise Evicted(
                    "the others have gone on, and the result that they have committed cannot be had any more: buffers are undefined"
                )
            self._leave()
            self._entered = False
            self._lane.step_out(self._n)
            self._host.step_soon()  # calls of this member may wait for the slot

    def lacks(self, flow: Flow) -> bool:
        """No: who has made the call has left what the others need in memory that outlives it."""
        return False

    def is_due_credit(self, flow: Flow) -> bool:
        """There are none."""
        return False

    def in_stream(self, flow: Flow, header: Header) -> None:
        """Nothing is sent in this call: the peer is in another one."""
        self._host.mismatch(self, flow.uid)

    def credited(self, flow: Flow, header: Header) -> None:
        """Likewise."""
        self._host.mismatch(self, flow.uid)

    def sent(self, block: int, s: int) -> None:
        """Nothing is."""

    def forget(self) -> None:
        """It is over, and knows no tensors any more."""
        self._give_scratch()
        self._course.close()
        self._lane.step_out(self._n)
        self._source = self._target = self._folded = None

    # --- progress -----------------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """Go on, by a slice at most; returns False if it waits for others, or is over."""
        if self.halted:
            return False
        try:
            progress = next(self._course)
        except StopIteration:
            self.halted = True
            self._host.done(self)
            return True
        except Exception:
            self.halted = True  # it has not ended: it was given up
            raise
        if self._stranger >= 0:
            uid, self._stranger = self._stranger, -1
            self._host.mismatch(self, uid)
        return progress

    def _run(self) -> Generator[bool]:
        lane, n, errand = self._lane, self._n, self._errand
        while (self._supply and not self._supply.complete) or not (self._entered or lane.is_free(n)):
            yield False
        if not self._entered:
            self._enter()
        whole = self.commits or errand.fold[1]
        pending = [rank for rank in lane.others if whole or any(piece.rank == rank for piece in errand.copies)]
        while pending := [rank for rank in pending if not self._has_met(rank)]:
            yield False
        yield from self._work()
        if self.commits:
            self.ready = True
            lane.publish(n, DONE)
            pending = list(lane.others)
            while pending := [rank for rank in pending if lane.phase(rank, n) not in (DONE, OUT)]:
                yield False
            while not lane.stands():  # the others have gone on: what it saw may be of another call
                yield False
            self.committed, self.waiting = True, lane.anyone_waits(n)
            yield from self._deliver()
        elif errand.parted:
            lane.publish(n, DONE)
            yield from self._gather()
        elif self._folded is not None and self._target is not None:
            self._target[:] = self._folded
        while not lane.stands():  # the others have gone on without this member: what it has read may be of later calls
            yield False
        self._leave()
        if not self.commits and not errand.small and lane.readable:  # others read this member's own memory
            pending = list(lane.others)
            while pending := [rank for rank in pending if lane.phase(rank, n) != OUT]:
                yield False
        self._entered = False

    def _enter(self) -> None:
        """Show the input."""
        lane, n, where = self._lane, self._n, 0
        if self._errand.gives:
            assert self._source is not None
            data = self._source.view(np.uint8)
            if self._errand.small:
                lane.room(n)[: len(data)] = data
                where = lane.room_at(n)
            elif lane.readable:
                where = _address(data)
            else:
                copy, where = lane.take(n, len(data))
                copy[:] = data
        self._entered = True
        lane.enter(n, self.signature, where)

    def _has_met(self, rank: int) -> bool:
        """Whether a member is in the call, and not in another one."""
        phase = self._lane.phase(rank, self._n)
        if phase in (0, GONE):
            return False
        if self._lane.signature(rank, self._n) != self.signature:
            self._stranger = self._uids[rank]
            return False
        return phase != VOID

    def _leave(self) -> None:
        """Read nothing more."""
        self._folded = None
        self._lane.publish(self._n, OUT)

    def _work(self) -> Iterator[bool]:
        """This rank's own share."""
        lane, n, errand = self._lane, self._n, self._errand
        size = max(LEAST_SLICE, min(SLICE, 2 * SLICE // (len(lane.others) + 1))) // self._item
        for piece in errand.copies:
            for low in range(0, piece.elements, size):
                m = min(size, piece.elements - low)
                to = self._result_place(piece.to + low, m)
                if piece.rank == lane.rank:
                    assert self._source is not None
                    to[:] = self._source[piece.start + low : piece.start + low + m]
                else:
                    yield from self._read(piece.rank, lane.source(piece.rank, n), piece.start + low, to)
                if not errand.small:
                    yield True
        start, count = errand.fold
        if count:
            result = self._fold_place(count)
            for low in range(0, count, size):
                m = min(size, count - low)
                parts = []
                for rank in range(len(lane.others) + 1):
                    part = yield from self._part(rank, start + low, m)
                    parts.append(part)
                self._arithmetic.fold(result[low : low + m], parts, True)
                if not errand.small:
                    yield True
        yield from self._confirm()
        self._give_scratch()

    def _fold_place(self, count: int) -> Array:
        """Where this rank's part of the result goes."""
        lane, n, errand = self._lane, self._n, self._errand
        nbytes = count * self._item
        if errand.parted and (self.commits or not lane.readable or errand.folded_to < 0):
            memory, where = lane.take(n, nbytes)
            lane.place_result(n, where)
            self._folded = memory.view(self._dtype)
            return self._folded
        if errand.small:
            # all ranks fold, in memory that is aligned alike: so even their NaNs have the same bits
            self._folded = lane.aside(n, nbytes).view(self._dtype)
            return self._folded
        place = self._result_place(errand.folded_to, count)
        if errand.parted:
            lane.place_result(n, _address(place))
        return place

    def _deliver(self) -> Iterator[bool]:
        """Bring the result of a committed call to its place."""
        errand = self._errand
        if self._folded is not None and errand.folded_to >= 0:
            self._result_place(errand.folded_to, len(self._folded))[:] = self._folded
            yield True
        if errand.parted:
            yield from self._gather()

    def _gather(self) -> Iterator[bool]:
        """Read the others' parts of the result as they are done."""
        lane, n, errand = self._lane, self._n, self._errand
        if self._folded is not None and not self.commits and errand.folded_to >= 0:
            self._result_place(errand.folded_to, len(self._folded))[:] = self._folded
        size = 2 * SLICE // self._item
        left = list(errand.gathers)
        while left:
            piece = next((p for p in left if self.commits or lane.phase(p.rank, n) in (DONE, OUT)), None)
            if piece is None:
                yield False
                continue
            left.remove(piece)
            where = lane.result(piece.rank, n)
            for low in range(0, piece.elements, size):
                m = min(size, piece.elements - low)
                yield from self._read(piece.rank, where, low, self._result_place(piece.to + low, m))
                yield True
        if not self.commits:  # else all of it lay in shared memory
            yield from self._confirm()

    # --- others' memory -----------------------------------------------------------------------------------------------

    def _result_place(self, start: int, count: int) -> Array:
        assert self._target is not None
        return self._target[start : start + count]

    def _part(self, rank: int, start: int, count: int) -> Generator[bool, None, Array]:
        """A run of a member's input."""
        lane = self._lane
        if rank == lane.rank:
            assert self._source is not None
            if self._errand.small:  # everyone's lies aligned alike
                return lane.room(self._n)[start * self._item : (start + count) * self._item].view(self._dtype)
            return self._source[start : start + count]
        where, nbytes = lane.source(rank, self._n), count * self._item
        if where & HERE:
            while not lane.stands():
                yield False
            return lane.others[rank].view((where ^ HERE) + start * self._item, nbytes).view(self._dtype)
        k = rank if rank < lane.rank else rank - 1
        while len(self._scratch) <= k:
            self._scratch.append(self._host.take_scratch(max(SLICE, nbytes)))
        into = self._scratch[k][:nbytes].view(self._dtype)
        yield from self._read(rank, where, start, into)
        return into

    def _read(self, rank: int, where: int, start: int, into: Array) -> Iterator[bool]:
        """Copy a run of what lies at `where` of a member. It does not end if that cannot be read: a verdict comes."""
        other, offset = self._lane.others[rank], start * self._item
        while not self._lane.stands():  # `where` may be anything
            yield False
        if where & HERE:
            into[:] = other.view((where ^ HERE) + offset, into.nbytes).view(self._dtype)
        else:
            try:
                other.read(where + offset, into)
            except OSError as e:
                if e.errno != errno.ESRCH and self._lane.phase(rank, self._n) != VOID and other.is_alive():
                    self._host.unreadable(self, self._uids[rank], e)
                while True:
                    yield False
            self._peeked = True
        self.bytes_received += into.nbytes
        self._host.moved(into.nbytes)

    def _confirm(self) -> Iterator[bool]:
        """What was read is what it was taken for: nobody has withdrawn it or ended meanwhile, and no other process has its number."""
        lane = self._lane
        while self._peeked and any(lane.phase(rank, self._n) == VOID or not other.is_alive() for rank, other in lane.others.items()):
            yield False

    def _give_scratch(self) -> None:
        while self._scratch:
            self._host.give_scratch(self._scratch.pop())


def _address(data: Array) -> int:
    return int(data.__array_interface__["data"][0])
