"""The executor's rules, unrolled: a schedule as a graph of atoms, one per step, block and slice, with everything that an atom waits
for.

An atom waits for

- the atoms of its own rank that the ordering rule names (`pccl.core.step`);
- the one before it in its stream, at the sender and at the receiver;
- if it receives, for the atom that sends what it gets;
- if it sends, for room in the receiver's window: of that, the graph says which atom gives back whose place.

Which memory an atom reads and writes is settled here too, since the ordering rule leaves no choice. A *cell* is the memory of one
slice: of an input part, or of a block's home (its output part, or scratch).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pccl.collectives.schedules import meaning
from pccl.core.errors import InternalError
from pccl.core.step import STEP, Action, Schedule

_ACTIONS = frozenset(Action)
_COMBINES = (Action.REDUCE, Action.FOLD)
_RECEIVES = (Action.RECEIVE, Action.REDUCE)


class ScheduleError(InternalError):
    """A schedule breaks a rule. The text says which, and where."""


@dataclass(slots=True)
class Stream:
    """What goes from one rank to another on one channel."""

    sends: list[int] = field(default_factory=list)
    """Atoms, in order."""
    receives: list[int] = field(default_factory=list)


@dataclass(slots=True)
class _Slice:
    """One slice of a block at one rank, as far as its program has been read."""

    home: int
    source: int
    """Cell of the input, or -1."""
    holds: bool
    """Whether there is anything in it to read."""
    written: bool = False
    writer: int = -1
    readers: list[int] = field(default_factory=list)
    owed: list[tuple[int, int, int]] = field(default_factory=list)
    """Streams whose windows it has a place in until nothing uses it any more."""


@dataclass(slots=True)
class Graph:
    """Lists indexed by atom, except where the name says otherwise."""

    schedule: Schedule
    slices: Sequence[int]
    """Slices of each cut."""
    action: list[int] = field(default_factory=list)
    place: list[tuple[int, int, int, int]] = field(default_factory=list)
    """(rank, step, block, slice)."""
    final: list[bool] = field(default_factory=list)
    reads: list[tuple[int, ...]] = field(default_factory=list)
    """Cells."""
    writes: list[int] = field(default_factory=list)
    """A cell, or -1."""
    after: list[list[int]] = field(default_factory=list)
    """Atoms of the same rank that wait for this one by the ordering rule."""
    stream: list[tuple[int, int, int]] = field(default_factory=list)
    """(sender, receiver, channel); sender -1 for COPY and FOLD."""
    frees: list[list[tuple[int, int, int]]] = field(default_factory=list)
    """Streams in whose windows this atom gives back a place."""
    shared_frees: list[tuple[list[int], list[tuple[int, int, int]]]] = field(default_factory=list)
    """Streams in whose windows several atoms give back a place once all of them are done. (Not indexed by atom.)"""
    streams: dict[tuple[int, int, int], Stream] = field(default_factory=dict)
    cells: int = 0
    inputs: dict[tuple[int, int, int], int] = field(default_factory=dict)
    """(rank, input part, slice) -> cell."""
    outputs: dict[tuple[int, int, int], int] = field(default_factory=dict)
    """(rank, output part, slice) -> cell."""
    shared: dict[int, int] = field(default_factory=dict)
    """Cell of an output -> cell of the input that is the same memory in a call in place."""
    input_readers: dict[int, list[int]] = field(default_factory=dict)
    """Cell of an input -> atoms."""
    first_writer: dict[int, int] = field(default_factory=dict)
    """Cell of a home -> atom."""

    def describe(self, atom: int) -> str:
        """An atom in words."""
        rank, step, block, piece = self.place[atom]
        action = Action(self.action[atom])
        where = f"rank {rank}, step {step}: {action.name} block {block} slice {piece}"
        sender, receiver, channel = self.stream[atom]
        if action == Action.SEND:
            return f"{where} to rank {receiver} on channel {channel}"
        return f"{where} from rank {sender} on channel {channel}" if action in _RECEIVES else where


def unroll(schedule: Schedule, slices: int | Sequence[int]) -> Graph:
    """Unroll a schedule whose blocks have that many slices each; a sequence says it for each cut (0: the part is empty).

    Raises:
        ScheduleError: a program is not well formed, reads what is not there, or does not fit the programs of its peers.
    """
    if isinstance(slices, int):
        slices = [slices] * schedule.cuts
    graph = Graph(schedule, slices)
    for rank in range(schedule.world):
        _Reader(graph, rank).read()
    for (sender, receiver, channel), stream in graph.streams.items():
        _check_stream(graph, sender, receiver, channel, stream)
    return graph


def _check_stream(graph: Graph, sender: int, receiver: int, channel: int, stream: Stream) -> None:
    cut = graph.schedule.cut
    for sent, received in zip(stream.sends, stream.receives, strict=False):
        pieces = [graph.place[sent][2:], graph.place[received][2:]]
        if pieces[0] != pieces[1]:
            cuts = cut(np.array([pieces[0][0], pieces[1][0]]))
            if cuts[0] != cuts[1] or pieces[0][1] != pieces[1][1]:
                raise ScheduleError(f"{graph.describe(sent)} meets a receiver that expects another part: {graph.describe(received)}")
    there, here = len(stream.sends), len(stream.receives)
    if there != here:
        spare = graph.describe(stream.sends[here] if there > here else stream.receives[there])
        raise ScheduleError(
            f"rank {sender} sends {there} slices to rank {receiver} on channel {channel}, which receives {here}; one too many: {spare}"
        )


class _Reader:
    """Reads one rank's program into the graph."""

    def __init__(self, graph: Graph, rank: int) -> None:
        schedule = graph.schedule
        blocks = np.arange(schedule.blocks)
        self.graph = graph
        self.rank = rank
        self.program = schedule.steps(rank)
        self.cut = schedule.cut(blocks).tolist()
        self.source = schedule.source(rank, blocks).tolist()
        self.target = schedule.target(rank, blocks).tolist()
        self.known: dict[tuple[int, int], _Slice] = {}
        segments = meaning.segments(schedule.collective, schedule.world)
        self.parts_in = segments.source * schedule.cuts * meaning.has_input(schedule.collective, rank, schedule.root)
        self.parts_out = segments.target * schedule.cuts * meaning.has_output(schedule.collective, rank, schedule.root)
        alias = meaning.in_place(schedule.collective, schedule.root, schedule.cuts, rank, np.arange(self.parts_out))
        self.alias = alias.tolist()

    def read(self) -> None:
        self._check_parts()
        if self.program.dtype != STEP:
            raise ScheduleError(f"rank {self.rank}: the program is not an array of STEP")
        for number, (action, final, channel, peer, block, blocks, into) in enumerate(self.program.tolist()):
            self._check_step(number, action, final, peer, block, blocks, into)
            if action == Action.FOLD:
                for piece in range(self.graph.slices[self.cut[into]]):
                    self._fold(number, final, block, blocks, into, piece)
                continue
            for one in range(block, block + blocks):
                for piece in range(self.graph.slices[self.cut[one]]):
                    self._step(number, action, final, channel, peer, one, piece)
        self._finish()

    def _check_parts(self) -> None:
        for name, parts, count in (("source", self.source, self.parts_in), ("target", self.target, self.parts_out)):
            wrong = [part for part in parts if not -1 <= part < count]
            if wrong:
                raise ScheduleError(f"rank {self.rank}: {name} part {wrong[0]} is none of the {count} that this rank has")
        homes = [part for part in self.target if part >= 0]
        if len(set(homes)) < len(homes):
            raise ScheduleError(f"rank {self.rank}: two blocks have the same target")
        if any(not 0 <= cut < self.graph.schedule.cuts for cut in self.cut):
            raise ScheduleError(f"a block is none of the {self.graph.schedule.cuts} cuts")

    def _check_step(self, number: int, action: int, final: bool, peer: int, block: int, blocks: int, into: int) -> None:
        schedule = self.graph.schedule
        local = action in (Action.COPY, Action.FOLD)
        wrong = ""
        if action not in _ACTIONS:
            wrong = f"there is no action {action}"
        elif not (blocks >= 1 and block >= 0 and block + blocks <= schedule.blocks):
            wrong = f"blocks {block} to {block + blocks - 1} are not within the {schedule.blocks} blocks"
        elif local and peer != -1:
            wrong = f"names a peer, {peer}, but talks to nobody"
        elif not local and (not 0 <= peer < schedule.world or peer == self.rank):
            wrong = f"peer {peer} is no other rank"
        elif (action == Action.FOLD) != (into >= 0):
            wrong = f"into is {into}"
        elif final and action not in _COMBINES:
            wrong = "is marked as final, but combines nothing"
        elif action == Action.FOLD:
            if into >= schedule.blocks or block <= into < block + blocks:
                wrong = f"folds into block {into}"
            elif len({self.cut[one] for one in [*range(block, block + blocks), into]}) > 1:
                wrong = "folds blocks of different cuts"
        if wrong:
            raise ScheduleError(f"rank {self.rank}, step {number}: {wrong}")

    def _input(self, part: int, piece: int) -> int:
        name = (self.rank, part, piece)
        if name not in self.graph.inputs:
            self.graph.inputs[name] = self._cell()
        return self.graph.inputs[name]

    def _cell(self) -> int:
        self.graph.cells += 1
        return self.graph.cells - 1

    def _slice(self, block: int, piece: int) -> _Slice:
        known = self.known.get((block, piece))
        if known is None:
            part = self.source[block]
            source = self._input(part, piece) if part >= 0 else -1
            known = self.known[block, piece] = _Slice(self._cell(), source, holds=part >= 0)
        return known

    def _atom(self, number: int, action: int, final: bool, block: int, piece: int, stream: tuple[int, int, int]) -> int:
        graph = self.graph
        graph.action.append(action)
        graph.place.append((self.rank, number, block, piece))
        graph.final.append(final)
        graph.reads.append(())
        graph.writes.append(-1)
        graph.after.append([])
        graph.stream.append(stream)
        graph.frees.append([])
        return len(graph.action) - 1

    def _order(self, atom: int, used: _Slice, *, writes: bool) -> None:
        """The ordering rule."""
        after = self.graph.after
        if writes:
            for reader in used.readers:
                after[reader].append(atom)
            if not used.readers and used.writer >= 0:
                after[used.writer].append(atom)  # readers, if any, wait for it already
            used.writer, used.readers = atom, []
        else:
            if used.writer >= 0:
                after[used.writer].append(atom)
            used.readers.append(atom)

    def _read(self, atom: int, used: _Slice) -> int:
        if not used.holds:
            raise ScheduleError(f"{self.graph.describe(atom)} reads a block that holds nothing")
        if not used.written:
            self.graph.input_readers.setdefault(used.source, []).append(atom)
        return used.home if used.written else used.source

    def _write(self, atom: int, used: _Slice) -> None:
        if not used.written:
            self.graph.first_writer[used.home] = atom
        used.written = used.holds = True
        self.graph.writes[atom] = used.home

    def _step(self, number: int, action: int, final: bool, channel: int, peer: int, block: int, piece: int) -> None:
        graph, rank, used = self.graph, self.rank, self._slice(block, piece)
        if action == Action.COPY:
            atom = self._atom(number, action, final, block, piece, (-1, -1, 0))
            if used.source < 0 or self.target[block] < 0:
                raise ScheduleError(f"{graph.describe(atom)} needs a source and a target")
            graph.input_readers.setdefault(used.source, []).append(atom)
            graph.reads[atom] = (used.source,)
            self._order(atom, used, writes=True)
            self._write(atom, used)
            return
        name = (rank, peer, channel) if action == Action.SEND else (peer, rank, channel)
        atom = self._atom(number, action, final, block, piece, name)
        stream = graph.streams.setdefault(name, Stream())
        if action == Action.SEND:
            stream.sends.append(atom)
            graph.reads[atom] = (self._read(atom, used),)
            self._order(atom, used, writes=False)
            return
        stream.receives.append(atom)
        if action == Action.REDUCE:
            graph.reads[atom] = (self._read(atom, used),)
        self._order(atom, used, writes=True)
        self._write(atom, used)
        if self.target[block] >= 0:
            graph.frees[atom].append(name)
        else:
            used.owed.append(name)

    def _fold(self, number: int, final: bool, block: int, blocks: int, into: int, piece: int) -> None:
        atom = self._atom(number, Action.FOLD, final, into, piece, (-1, -1, 0))
        folded = [self._slice(one, piece) for one in range(block, block + blocks)]
        self.graph.reads[atom] = tuple([self._read(atom, used) for used in folded])
        for used in folded:
            self._order(atom, used, writes=True)
            used.holds = False
        result = self._slice(into, piece)
        self._order(atom, result, writes=True)
        self._write(atom, result)

    def _finish(self) -> None:
        graph, rank = self.graph, self.rank
        for used in self.known.values():
            if not used.owed:
                continue
            if not used.readers and graph.writes[used.writer] == used.home:
                raise ScheduleError(f"{graph.describe(used.writer)} ends in scratch that nothing uses")
            if len(used.readers) > 1:
                graph.shared_frees.append((used.readers, used.owed))
            else:
                graph.frees[used.readers[0] if used.readers else used.writer].extend(used.owed)
        home = {part: block for block, part in enumerate(self.target) if part >= 0}
        for part in range(self.parts_out):
            for piece in range(graph.slices[part % graph.schedule.cuts]):
                result = self.known.get((home.get(part, -1), piece))
                if result is None or not result.written:
                    raise ScheduleError(f"rank {rank}: no step writes output part {part}")
                graph.outputs[rank, part, piece] = result.home
                if self.alias[part] >= 0:
                    graph.shared[result.home] = self._input(self.alias[part], piece)
