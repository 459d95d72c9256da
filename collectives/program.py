"""A schedule made ready to run on one rank: its steps taken apart into units of one block each, with what each unit has to wait for.

Everything here is independent of data; programs and layouts are made once and shared by all calls of the same kind and size.
"""

from __future__ import annotations

from collections import defaultdict
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from pccl.core.errors import InternalError
from pccl.core.step import Action, Schedule, part_sizes

StreamKey = tuple[int, int]
"""(rank of the peer, channel)"""


class Use(NamedTuple):
    """How a unit uses a block: it may begin on a slice when the slice has been written and read that often."""

    block: int
    """Index into `Program.blocks`."""
    writes: int
    reads: int
    """-1 if it does not matter"""
    first: bool
    """Nothing was written before: the content is the rank's source, if it has one."""


class Unit(NamedTuple):
    """One action on one block; a FOLD has several sources."""

    action: int
    use: Use
    """The block that is sent, or written."""
    final: bool = False
    sources: tuple[Use, ...] = ()
    """FOLD only"""


class Program:
    """One rank's part in a schedule.

    Attributes:
        blocks: the block numbers that this rank touches; units refer to them by index.
        outs, ins: the units of each stream, in stream order.
        local: COPY and FOLD units.
        uses: per block, how many units touch it; after the last, scratch is free.
        writes: per block, how many of them write to it, or are the last to read it.
    """

    def __init__(self, schedule: Schedule, rank: int) -> None:
        self.schedule = schedule
        self.rank = rank
        self.outs: dict[StreamKey, list[Unit]] = defaultdict(list)
        self.ins: dict[StreamKey, list[Unit]] = defaultdict(list)
        self.local: list[Unit] = []
        index: dict[int, int] = {}
        writes: list[int] = []
        reads: list[int] = []

        def use(block: int, *, write: bool) -> Use:
            i = index.setdefault(block, len(index))
            if i == len(writes):
                writes.append(0)
                reads.append(0)
            made = Use(i, writes[i], reads[i] if write else -1, writes[i] == 0)
            (writes if write else reads)[i] += 1
            return made

        for step in schedule.steps(rank):
            action, final, channel, peer, block, count, into = step.item()
            if action == Action.FOLD:
                sources = tuple(use(b, write=True) for b in range(block, block + count))
                self.local.append(Unit(action, use(into, write=True), final, sources))
                continue
            for b in range(block, block + count):
                unit = Unit(action, use(b, write=action != Action.SEND), final)
                if action == Action.SEND:
                    self.outs[peer, channel].append(unit)
                elif action == Action.COPY:
                    self.local.append(unit)
                else:
                    self.ins[peer, channel].append(unit)
        self.blocks = np.fromiter(index, np.int64, len(index))
        self.uses = [w + r for w, r in zip(writes, reads, strict=True)]
        self.writes = writes
        self.peers = tuple(dict.fromkeys(peer for peer, _ in (*self.outs, *self.ins)))
        """Ranks that this one exchanges data with"""
        self.waiters: list[list[Unit]] = [[] for _ in self.uses]
        """Per block, the local units that may go on when it changes."""
        for unit in self.local:
            for u in (unit.use, *unit.sources):
                self.waiters[u.block].append(unit)

        self.senders: list[list[StreamKey]] = [[] for _ in self.uses]
        """Per block, the streams that send it."""
        for key, units in self.outs.items():
            for block in dict.fromkeys(unit.use.block for unit in units):
                self.senders[block].append(key)


class Layout(NamedTuple):
    """Where a program's blocks lie in the caller's memory, and how they are cut into slices. All in elements."""

    sizes: list[int]
    slices: list[int]
    """Per block; 0 for an empty block, of which nothing is sent."""
    source: list[int]
    """Offset of the block in the input, or -1"""
    target: list[int]
    """Offset of the block in the output, or -1: it is scratch."""
    slice_size: int
    out_totals: dict[StreamKey, int]
    in_totals: dict[StreamKey, int]
    actions: int
    """How many slices all units have together: the work of the call."""


@lru_cache(maxsize=512)
def program(schedule: Schedule, rank: int) -> Program:
    """The program of a rank, shared."""
    return Program(schedule, rank)


@lru_cache(maxsize=512)
def layout(prog: Program, count: int, slice_size: int) -> Layout:
    """The layout of a program for segments of `count` elements, cut into slices of at most `slice_size` elements."""
    schedule = prog.schedule
    sizes_of_cut = part_sizes(count, schedule.cuts)
    starts_of_cut = np.concatenate(([0], np.cumsum(sizes_of_cut)[:-1]))
    sizes = sizes_of_cut[schedule.cut(prog.blocks)]

    def offsets(parts: np.ndarray[tuple[int], np.dtype[np.int64]]) -> list[int]:
        where = parts // schedule.cuts * count + starts_of_cut[parts % schedule.cuts]
        return [int(w) for w in np.where(parts < 0, -1, where)]

    slices = [-(-int(n) // slice_size) for n in sizes]

    def totals(streams: dict[StreamKey, list[Unit]]) -> dict[StreamKey, int]:
        return {key: sum(int(sizes[u.use.block]) for u in units) for key, units in streams.items()}

    units = [u for streams in (prog.outs, prog.ins) for s in streams.values() for u in s] + prog.local
    made = Layout(
        [int(n) for n in sizes],
        slices,
        offsets(schedule.source(prog.rank, prog.blocks)),
        offsets(schedule.target(prog.rank, prog.blocks)),
        slice_size,
        totals(prog.outs),
        totals(prog.ins),
        sum(slices[u.use.block] for u in units),
    )
    for unit in units:
        if unit.use.first and unit.action in (Action.SEND, Action.REDUCE, Action.COPY) and made.source[unit.use.block] < 0:
            raise InternalError(f"{schedule.algorithm} {schedule.collective}: rank {prog.rank} reads a block that it does not have")
    return made
