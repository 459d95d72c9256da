"""Runs a schedule on arrays: every rank step by step in program order, with no regard to speed. An oracle for the executor."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pccl.collectives.schedules import meaning
from pccl.collectives.schedules.unroll import ScheduleError
from pccl.core.errors import InvalidArgument
from pccl.core.step import Action, Schedule, part_sizes

Array = npt.NDArray[Any]


def interpret(
    schedule: Schedule,
    inputs: Sequence[Array | None],
    op: Callable[[Array, Array], Array] = np.add,
    in_place: bool = False,
    *,
    finish: Callable[[Array], Array] | None = None,
) -> list[Array | None]:
    """Run a schedule on arrays, and return what each rank gets: None where it gets nothing.

    Args:
        schedule: the schedule.
        inputs: what each rank gives, flat: its segments one after the other; None where it gives nothing. They are not changed.
        op: combines two arrays.
        in_place: let outputs be (copies of) the inputs' own memory, where the collective can do that.
        finish: applied to results once all contributions are in; divides for an average.

    Raises:
        ScheduleError: the programs cannot be run rank by rank in program order.
    """
    machine = _Interpreter(schedule, inputs, op, in_place, finish)
    machine.run()
    return machine.outputs()


class _Interpreter:
    def __init__(
        self,
        schedule: Schedule,
        inputs: Sequence[Array | None],
        op: Callable[[Array, Array], Array],
        in_place: bool,
        finish: Callable[[Array], Array] | None,
    ) -> None:
        given = [one for one in inputs if one is not None]
        segments = meaning.segments(schedule.collective, schedule.world)
        if len(inputs) != schedule.world or not given or len(given[0]) % segments.source:
            raise InvalidArgument(f"{schedule.collective} needs inputs of {schedule.world} ranks in {segments.source} segments")
        self.schedule, self.op, self.finish = schedule, op, finish or (lambda array: array)
        self.dtype = given[0].dtype
        self.sizes = part_sizes(len(given[0]) // segments.source, schedule.cuts)
        self.cut = schedule.cut(np.arange(schedule.blocks))
        self.streams: dict[tuple[int, int, int], deque[Array]] = {}
        self.held: list[dict[int, Array]] = [{} for _ in inputs]
        self.given = [self._parts(one.copy(), segments.source) if one is not None else [] for one in inputs]
        self.got = [self._output(rank, segments.target, in_place) for rank in range(schedule.world)]
        blocks = np.arange(schedule.blocks)
        self.source = [schedule.source(rank, blocks) for rank in range(schedule.world)]
        self.target = [schedule.target(rank, blocks) for rank in range(schedule.world)]

    def _parts(self, whole: Array, segments: int) -> list[Array]:
        return np.split(whole, np.cumsum(np.tile(self.sizes, segments))[:-1])

    def _output(self, rank: int, segments: int, in_place: bool) -> list[Array]:
        schedule = self.schedule
        if not meaning.has_output(schedule.collective, rank, schedule.root):
            return []
        parts = self._parts(np.zeros(int(self.sizes.sum()) * segments, self.dtype), segments)
        if in_place:
            alias = meaning.in_place(schedule.collective, schedule.root, schedule.cuts, rank, np.arange(len(parts)))
            parts = [part if same < 0 else self.given[rank][same] for part, same in zip(parts, alias, strict=True)]
        return parts

    def run(self) -> None:
        programs = [deque(self.schedule.steps(rank).tolist()) for rank in range(self.schedule.world)]
        moved = True
        while moved:
            moved = False
            for rank, program in enumerate(programs):
                while program and self._step(rank, *program[0]):
                    program.popleft()
                    moved = True
        if any(programs):
            stuck = next(rank for rank, program in enumerate(programs) if program)
            raise ScheduleError(f"rank {stuck} waits for a message that is never sent: {programs[stuck][0]}")

    def outputs(self) -> list[Array | None]:
        return [np.concatenate(parts) if parts else None for parts in self.got]

    def _step(self, rank: int, action: int, final: bool, channel: int, peer: int, block: int, blocks: int, into: int) -> bool:
        """Run a step; False if what it is to receive has not all been sent."""
        which = range(block, block + blocks)
        finish = self.finish if final else lambda array: array
        if action == Action.SEND:
            stream = self.streams.setdefault((rank, peer, channel), deque())
            stream.extend(self._read(rank, one).copy() for one in which)
        elif action == Action.COPY:
            for one in which:
                self._write(rank, one, self.given[rank][self.source[rank][one]])
        elif action == Action.FOLD:
            folded = self._read(rank, block)
            for one in which[1:]:
                folded = self.op(folded, self._read(rank, one))
            self._write(rank, into, finish(folded))
        else:
            stream = self.streams.setdefault((peer, rank, channel), deque())
            if len(stream) < blocks:
                return False
            for one in which:
                came = stream.popleft()
                self._write(rank, one, finish(self.op(self._read(rank, one), came)) if action == Action.REDUCE else came)
        return True

    def _read(self, rank: int, block: int) -> Array:
        held = self.held[rank].get(block)
        return self.given[rank][self.source[rank][block]] if held is None else held

    def _write(self, rank: int, block: int, value: Array) -> None:
        part = self.target[rank][block]
        home = np.empty(self.sizes[self.cut[block]], self.dtype) if part < 0 else self.got[rank][part]
        home[...] = value
        self.held[rank][block] = home
