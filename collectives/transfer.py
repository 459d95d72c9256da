"""One attempt to move one collective's data: a program running slice by slice on the caller's memory.

Slices are sent from where they lie and received where they belong, or into scratch when they have to be combined or come before their turn.
A transfer knows no task, no clock and no lock: it reacts to slices that arrive and slices that are out, and says when all is done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pccl.collectives.flow import UNCREDITED_PER_CALL, CallKey, Flow, Moving
from pccl.collectives.program import Layout, Program, Unit, Use
from pccl.collectives.supply import Supply
from pccl.core.frames import Header, Kind
from pccl.core.step import Action
from pccl.transports.base import OutFrame

Array = npt.NDArray[np.generic]

GRANTS = 8
"""In so many parts a window is granted again: a sender can use all of it but one part per round trip."""


class Arithmetic(Protocol):
    """The reduction of one call."""

    def combine(self, out: Array, a: Array, b: Array) -> None:
        """out = a op b"""

    def fold(self, out: Array, parts: list[Array], final: bool) -> None:
        """out = parts[0] op parts[1] op ..., finished if final."""

    def finish(self, x: Array) -> None:
        """Every contribution is in."""


class TransferHost(Protocol):
    """The executor."""

    def done(self, transfer: Moving) -> None:
        """The result is there, everything is out, and the transfer holds no memory."""

    def mismatch(self, transfer: Moving, uid: int) -> None:
        """A peer's frames are not of the same call."""

    def take_scratch(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """Memory for one slice."""

    def give_scratch(self, scratch: npt.NDArray[np.uint8]) -> None:
        """It is no longer needed."""


class Undo:
    """What an in-place collective overwrites, so that it can be put back."""

    def __init__(self, memory: npt.NDArray[np.uint8], spare: npt.NDArray[np.uint8]) -> None:
        self._memory = memory
        self._spare = spare
        self._saved: list[tuple[int, int]] = []

    def save(self, start: int, stop: int) -> None:
        """These bytes are about to be overwritten for the first time."""
        self._spare[start:stop] = self._memory[start:stop]
        self._saved.append((start, stop))

    def restore(self) -> None:
        """Put everything back, bit for bit."""
        for start, stop in self._saved:
            self._memory[start:stop] = self._spare[start:stop]
        self._saved.clear()


class Arrival:
    """A slice that comes in. Implements `Incoming`."""

    __slots__ = ("_nbytes", "_s", "_scratch", "_stream", "_unit")

    def __init__(self, stream: InStream, unit: Unit, s: int, nbytes: int) -> None:
        self._stream = stream
        self._unit = unit
        self._s = s
        self._nbytes = nbytes
        self._scratch: npt.NDArray[np.uint8] | None = None

    def place(self) -> memoryview:
        """Where it goes: to its place if it is due there."""
        unit, t = self._unit, self._stream.transfer
        if unit.action == Action.RECEIVE and t.lies_as_sent(unit.use) and t.is_due(unit.use, self._s):
            return t.writable_bytes(unit.use, self._s)
        self._scratch = t.host.take_scratch(self._nbytes)
        return self._scratch.data[: self._nbytes]

    def arrived(self) -> None:
        """It is there."""
        stream = self._stream
        stream.arrived += self._nbytes
        stream.transfer.bytes_received += self._nbytes
        stream.transfer.received(stream, self._unit, self._s, self._scratch, self._nbytes)

    def voided(self) -> None:
        """It was given up by its sender, or is not waited for any more."""
        if self._scratch is not None:
            self._stream.transfer.host.give_scratch(self._scratch)
            self._scratch = None


class InStream:
    """What comes from one peer on one channel: sent in order, and taken as it comes."""

    __slots__ = (
        "_begun",
        "_overtaken",
        "_slice",
        "_unit",
        "arrived",
        "channel",
        "flow",
        "limit",
        "released",
        "total",
        "transfer",
        "units",
        "window",
    )

    def __init__(self, transfer: Transfer, flow: Flow, channel: int, units: list[Unit], total: int, window: int) -> None:
        self.transfer = transfer
        self.flow = flow
        self.channel = channel
        self.units = units
        self.total = total
        self.window = window
        self.arrived = 0
        """Bytes that are here"""
        self.released = 0
        """Bytes whose memory is free again"""
        self.limit = min(total, window)
        self._begun = 0
        """Where the next slice begins that is neither here nor overtaken"""
        self._overtaken: dict[int, tuple[Unit, int, int]] = {}
        """Where a slice begins that has yet to come after later ones -> it, and its length"""
        self._unit = 0
        self._slice = 0
        self._skip_empty()

    def take(self, position: int, nbytes: int) -> Arrival | None:
        """The slice that is at this place in the stream; None if no such slice has yet to come."""
        while self._begun <= position and self._unit < len(self.units):
            unit, s = self.units[self._unit], self._slice
            length = self.transfer.slice_bytes(unit.use.block, s)
            if self._begun == position and length == nbytes:
                self._advance(length)
                return Arrival(self, unit, s, nbytes)
            self._overtaken[self._begun] = unit, s, length
            self._advance(length)
        late = self._overtaken.get(position)
        if late is None or late[2] != nbytes:
            return None
        del self._overtaken[position]
        return Arrival(self, *late)

    def release(self, n: int) -> None:
        """The memory of so many bytes is free again."""
        self.released += n
        room = min(self.total, self.released + self.window)
        if self.limit < room and (room == self.total or (room - self.limit) * GRANTS >= self.window):
            self.limit = room
            self.flow.grant(self.transfer.key, self.channel, room, self.transfer.signature, lazy=False)

    def _advance(self, length: int) -> None:
        self._begun += length
        self._slice += 1
        self._skip_empty()

    def _skip_empty(self) -> None:
        slices = self.transfer.layout.slices
        while self._unit < len(self.units) and self._slice >= slices[self.units[self._unit].use.block]:
            self._unit += 1
            self._slice = 0


class OutStream:
    """What goes to one peer on one channel, in order."""

    __slots__ = ("_slice", "_unit", "channel", "flow", "limit", "position", "queued", "transfer", "units")

    def __init__(self, transfer: Transfer, flow: Flow, channel: int, units: list[Unit]) -> None:
        self.transfer = transfer
        self.flow = flow
        self.channel = channel
        self.units = units
        self.position = 0
        self.limit = 0
        """Bytes that have a place at the peer"""
        self.queued = False
        self._unit = 0
        self._slice = 0
        self._skip_empty()

    def is_ready(self) -> bool:
        """Whether the next slice may be sent, credit apart."""
        return self._unit < len(self.units) and self.transfer.is_due(self.units[self._unit].use, self._slice)

    def head_bytes(self) -> int:
        """Length of the next slice."""
        return self.transfer.slice_bytes(self.units[self._unit].use.block, self._slice)

    def pull(self) -> OutFrame:
        """The next slice, which is ready, as a frame."""
        unit, s, t = self.units[self._unit], self._slice, self.transfer
        payload = t.readable_bytes(unit.use, s)
        n = len(payload)
        header = Header(Kind.DATA, t.key.epoch, t.key.call, t.key.sub, self.channel, self.position, n, t.signature)
        self.position += n
        t.bytes_sent += n
        self._slice += 1
        self._skip_empty()
        return OutFrame(header, payload, t, (unit.use.block, s))

    def _skip_empty(self) -> None:
        slices = self.transfer.layout.slices
        while self._unit < len(self.units) and self._slice >= slices[self.units[self._unit].use.block]:
            self._unit += 1
            self._slice = 0


class Transfer:
    """A running program.

    Args:
        source, target: the caller's input and output as flat arrays of one dtype; the same memory where it works in place; None where the
            rank has none.
        undo: saves what is overwritten, if the call may have to give its inputs back.
        flows: rank -> the flow to that peer.
        window: bytes of scratch and early slices that all peers together may occupy.
        wire: the dtype of what travels and lies in scratch, and in whose items the layout counts; the caller's where it is None.
        supply: which of the source is there, if it is still on its way; `supplied` tells of more.
        final: hears of elements of the target that will not change any more; perhaps not of all.
    """

    def __init__(
        self,
        host: TransferHost,
        key: CallKey,
        signature: int,
        prog: Program,
        lay: Layout,
        source: Array | None,
        target: Array | None,
        arithmetic: Arithmetic,
        flows: Mapping[int, Flow],
        *,
        undo: Undo | None,
        window: int,
        wire: np.dtype[Any] | None = None,
        supply: Supply | None = None,
        final: Callable[[int, int], None] | None = None,
    ) -> None:
        self.host = host
        self.key = key
        self.signature = signature
        self.program = prog
        self.layout = lay
        self.bytes_sent = 0
        self.bytes_received = 0
        self.halted = False
        some = source if source is not None else target
        assert some is not None
        self._dtype = some.dtype if wire is None else wire
        self._item = self._dtype.itemsize
        self._source = source
        self._target = target
        self._source_bytes = source.view(np.uint8).data if source is not None else memoryview(b"")
        self._target_bytes = target.view(np.uint8).data if target is not None else memoryview(b"")
        self._arithmetic = arithmetic
        self._undo = undo
        self._supply = supply
        self._final = final
        self._left = lay.actions
        self._writes = [[0] * n for n in lay.slices]
        self._reads = [[0] * n for n in lay.slices]
        self._scratch: dict[tuple[int, int], tuple[npt.NDArray[np.uint8], InStream | None, int]] = {}
        """(block, slice) of a block without a target -> its memory, and the stream and bytes that it counts against"""
        self._parked: dict[tuple[int, int], list[tuple[InStream, Unit, npt.NDArray[np.uint8], int]]] = {}
        """Slices that came before their turn"""
        slice_bytes = lay.slice_size * self._item
        share = max(2 * slice_bytes, window // max(1, len(prog.ins)))
        self._ins = {
            key: InStream(self, flows[key[0]], key[1], units, lay.in_totals[key] * self._item, share) for key, units in prog.ins.items()
        }
        self._outs = {key: OutStream(self, flows[key[0]], key[1], units) for key, units in prog.outs.items()}
        self._flows = {flows[rank]: rank for rank in prog.peers}
        self._flow_of = {rank: flow for flow, rank in self._flows.items()}
        self._met: set[int] = set()
        """Ranks of which data has come: they have entered"""

    # --- life -------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin: grant credits, take what came early, and offer what can be sent."""
        totals = dict.fromkeys(self.program.peers, 0)
        for (rank, _), stream in self._ins.items():
            totals[rank] += stream.total
        for (rank, channel), stream in self._ins.items():
            if stream.total:  # what a peer may send without being asked, it does not wait for
                lazy = totals[rank] <= UNCREDITED_PER_CALL
                self._flow_of[rank].grant(self.key, channel, stream.limit, self.signature, lazy=lazy)
        for flow in self._flows:
            flow.deliver_early(self)
            if self.halted:  # what came early was not of this call
                return
        for unit in self.program.local:
            for s in range(self.layout.slices[unit.use.block]):
                self._try(unit, s)
        for out in self._outs.values():
            if out.is_ready():
                out.flow.offer(out)
        self._check_done()

    def halt(self) -> None:
        """Stop, and hold no memory."""
        self.halted = True
        for flow in self._flows:
            flow.halt(self)
        for scratch, _, _ in self._scratch.values():
            self.host.give_scratch(scratch)
        for waiting in self._parked.values():
            for _, _, scratch, _ in waiting:
                self.host.give_scratch(scratch)
        self._scratch.clear()
        self._parked.clear()

    def forget(self) -> None:
        """It is over. It and its streams know each other: without this, its buffers would wait for the garbage collector."""
        self._ins.clear()
        self._outs.clear()
        self._final = None

    def supplied(self, start: int, stop: int) -> None:
        """These elements of the source are there now."""
        if self._supply and self._supply.complete:
            self._supply = None
        size = self.layout.slice_size
        for block, where in enumerate(self.layout.source):
            low, high = max(start - where, 0), min(stop - where, self.layout.sizes[block])
            if where >= 0 and low < high and not self.halted:
                for s in range(low // size, -(-high // size)):
                    self._changed(block, s)
        self._check_done()

    # --- what flows ask ---------------------------------------------------------------------------------------------

    def lacks(self, flow: Flow) -> bool:
        """The end of a stream."""
        return any(stream.flow is flow and stream.arrived < stream.total for stream in self._ins.values())

    def in_stream(self, flow: Flow, header: Header) -> Arrival | None:
        """The slice that a frame brings; None if it is not of the same call."""
        stream = self._ins.get((self._flows[flow], header.channel)) if flow in self._flows else None
        if self.halted:
            return None
        arrival = stream.take(header.position, header.length) if stream and header.signature == self.signature else None
        if arrival is None:
            self.host.mismatch(self, flow.uid)
            return None
        rank = self._flows[flow]
        if rank not in self._met:  # it grants no more what it grants lazily, so what is sent from now on must not count as a share
            self._met.add(rank)
            if not self.is_due_credit(flow):
                for key, total in self._out_totals(rank).items():
                    self._outs[key].limit = total
        return arrival

    def is_due_credit(self, flow: Flow) -> bool:
        """If this rank sends it more than may go without."""
        rank = self._flows.get(flow)
        return rank is not None and sum(self._out_totals(rank).values()) > UNCREDITED_PER_CALL

    def _out_totals(self, rank: int) -> dict[tuple[int, int], int]:
        """What goes to a peer, in bytes by stream."""
        return {key: self.layout.out_totals[key] * self._item for key in self._outs if key[0] == rank}

    def credited(self, flow: Flow, header: Header) -> None:
        """A peer has a place for more of a stream."""
        stream = self._outs.get((self._flows[flow], header.channel)) if flow in self._flows else None
        if stream is None or header.signature != self.signature:
            if not self.halted:
                self.host.mismatch(self, flow.uid)
        elif header.position > stream.limit:
            stream.limit = header.position
            if stream.is_ready():
                flow.offer(stream)

    def sent(self, block: int, s: int) -> None:
        """A slice is out."""
        if self.halted:
            return
        self._reads[block][s] += 1
        self._left -= 1
        self._changed(block, s)
        self._check_done()

    def received(self, stream: InStream, unit: Unit, s: int, scratch: npt.NDArray[np.uint8] | None, n: int) -> None:
        """A slice has come: into its place (no scratch), or to be combined, or to wait for its turn."""
        if scratch is None:
            self._wrote(unit.use, s, stream, n)
        elif self.is_due(unit.use, s):
            self._apply(stream, unit, s, scratch, n)
        else:
            self._parked.setdefault((unit.use.block, s), []).append((stream, unit, scratch, n))
        self._check_done()

    # --- memory -----------------------------------------------------------------------------------------------------

    def slice_bytes(self, block: int, s: int) -> int:
        """Length of a slice."""
        size = self.layout.slice_size
        return min(size, self.layout.sizes[block] - s * size) * self._item

    def is_due(self, use: Use, s: int) -> bool:
        """Whether everything that a unit has to wait for has happened to the slice, and it has not run yet."""
        if use.first and self._supply and not self._is_supplied(use.block, s):
            return False
        writes = self._writes[use.block][s]
        if use.reads < 0:
            return writes >= use.writes
        return writes == use.writes and self._reads[use.block][s] >= use.reads

    def lies_as_sent(self, use: Use) -> bool:
        """Whether what a unit receives can go straight to where it belongs."""
        return True

    def _is_supplied(self, block: int, s: int) -> bool:
        """Whether a slice of the source, if it is of that, is there."""
        assert self._supply
        where, start = self.layout.source[block], s * self.layout.slice_size
        stop = min(start + self.layout.slice_size, self.layout.sizes[block])
        return where < 0 or self._supply.has(where + start, where + stop)

    def readable_bytes(self, use: Use, s: int) -> memoryview:
        """The slice's present content."""
        start, n = s * self.layout.slice_size * self._item, self.slice_bytes(use.block, s)
        if use.first:
            start += self.layout.source[use.block] * self._item
            return self._source_bytes[start : start + n]
        where = self.layout.target[use.block]
        if where < 0:
            return self._scratch[use.block, s][0].data[:n]
        start += where * self._item
        return self._target_bytes[start : start + n]

    def writable_bytes(self, use: Use, s: int) -> memoryview:
        """Where the slice's new content goes, made ready to be overwritten."""
        n, where = self.slice_bytes(use.block, s), self.layout.target[use.block]
        if where < 0:
            return self._scratch_for(use, s).data[:n]
        start = (where + s * self.layout.slice_size) * self._item
        if use.first and self._undo:
            self._undo.save(start, start + n)
        return self._target_bytes[start : start + n]

    def _content(self, use: Use, s: int) -> Array:
        """The slice's present content."""
        start = s * self.layout.slice_size
        size = min(self.layout.slice_size, self.layout.sizes[use.block] - start)
        if use.first:
            assert self._source is not None
            start += self.layout.source[use.block]
            return self._source[start : start + size]
        return self._home(use, s)

    def _home(self, use: Use, s: int) -> Array:
        """Where the slice's new content goes."""
        start = s * self.layout.slice_size
        size = min(self.layout.slice_size, self.layout.sizes[use.block] - start)
        where = self.layout.target[use.block]
        if where < 0:
            return self._scratch_for(use, s)[: size * self._item].view(self._dtype)
        assert self._target is not None
        start += where
        return self._target[start : start + size]

    def _fresh_home(self, use: Use, s: int) -> Array:
        """Where the slice's new content goes, made ready to be overwritten."""
        home = self._home(use, s)
        if use.first and self._undo and self.layout.target[use.block] >= 0:
            start = (self.layout.target[use.block] + s * self.layout.slice_size) * self._item
            self._undo.save(start, start + home.nbytes)
        return home

    def _scratch_for(self, use: Use, s: int) -> npt.NDArray[np.uint8]:
        known = self._scratch.get((use.block, s))
        if known is None:
            known = self._scratch[use.block, s] = (self.host.take_scratch(self.slice_bytes(use.block, s)), None, 0)
        return known[0]

    # --- progress ---------------------------------------------------------------------------------------------------

    def _apply(self, stream: InStream, unit: Unit, s: int, scratch: npt.NDArray[np.uint8], n: int) -> None:
        """Use a slice that lies in scratch."""
        came = scratch[:n].view(self._dtype)
        if unit.action == Action.RECEIVE:
            self._assign(unit.use, s, came)
        else:
            self._combine(unit, s, came)
        self.host.give_scratch(scratch)
        self._wrote(unit.use, s, stream, n)

    def _try(self, unit: Unit, s: int) -> None:
        """Run a local unit on a slice if it is due."""
        if not self.is_due(unit.use, s):
            return
        if unit.action == Action.COPY:
            self._assign(unit.use, s, self._content(unit.use, s))
            self._wrote(unit.use, s)
            return
        for u in unit.sources:
            if not self.is_due(u, s):
                return
        self._fold(unit, s, [self._content(u, s) for u in unit.sources])
        for u in unit.sources:
            self._writes[u.block][s] += 1
            self._free_scratch(u.block, s)
        self._wrote(unit.use, s)

    def _assign(self, use: Use, s: int, content: Array) -> None:
        """RECEIVE, COPY"""
        home = self._fresh_home(use, s)
        if content.ctypes.data != home.ctypes.data:
            home[:] = content

    def _combine(self, unit: Unit, s: int, came: Array) -> None:
        """REDUCE"""
        home = self._fresh_home(unit.use, s)
        self._arithmetic.combine(home, self._content(unit.use, s), came)
        if unit.final:
            self._arithmetic.finish(home)

    def _fold(self, unit: Unit, s: int, parts: list[Array]) -> None:
        """FOLD"""
        self._arithmetic.fold(self._fresh_home(unit.use, s), parts, unit.final)

    def _wrote(self, use: Use, s: int, stream: InStream | None = None, n: int = 0) -> None:
        """A slice has new content; `stream` brought it, and gets its room back when no scratch holds it that lacks a place of its own."""
        block = use.block
        self._writes[block][s] += 1
        self._left -= 1
        if self._final and self._writes[block][s] == self.program.writes[block] and self.layout.target[block] >= 0:
            start = self.layout.target[block] + s * self.layout.slice_size
            self._final(start, start + self.slice_bytes(block, s) // self._item)
        if stream:
            known = self._scratch.get((block, s))
            if known and known[1] is None and use.first and self.layout.target[block] < 0:
                self._scratch[block, s] = (known[0], stream, n)
            else:
                stream.release(n)
        self._changed(block, s)

    def _changed(self, block: int, s: int) -> None:
        """Go on with whatever waited for this."""
        self._free_scratch(block, s)
        parked = self._parked.pop((block, s), None)
        if parked:
            for i, (stream, unit, scratch, n) in enumerate(parked):
                if self.is_due(unit.use, s):
                    rest = parked[:i] + parked[i + 1 :]
                    if rest:
                        self._parked[block, s] = rest
                    self._apply(stream, unit, s, scratch, n)
                    return  # which has come back here for the others
            self._parked[block, s] = parked
        for unit in self.program.waiters[block]:
            self._try(unit, s)
        for key in self.program.senders[block]:
            out = self._outs[key]
            if not out.queued and out.is_ready():
                out.flow.offer(out)

    def _free_scratch(self, block: int, s: int) -> None:
        if self._writes[block][s] + self._reads[block][s] == self.program.uses[block]:
            known = self._scratch.pop((block, s), None)
            if known:
                self.host.give_scratch(known[0])
                if known[1]:
                    known[1].release(known[2])

    def _check_done(self) -> None:
        if not self._left and not self.halted:
            self._left = -1
            self.host.done(self)
