"""Proof that a schedule does what its collective means, whatever the executor's timing.

`verify` unrolls the programs of all ranks into atoms (`schedules.unroll`) and runs them on symbols instead of numbers, under
several schedulers and with bounded windows. An atom that may run stays allowed to until it does (streams have one sender and are in
order, windows only count), so all schedulers get equally far: if one reaches the end, no timing can deadlock; and since more room
never forbids anything, a window that will do makes every larger one do. What atoms read is fixed by the ordering rule, save where
input and output are the same memory: for that, every write into an input's memory is proved to come after every read of it, by a
chain of waiting.

A place in a window is given back when an atom has written a block that has a target, or, where the block is scratch, when nothing in
the rank's program uses it any more. At a receiver, what came is written in the order of its stream; an executor that is less strict
can only get further. `interpret` runs a schedule on arrays.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from itertools import pairwise
from random import Random

import numpy as np
import numpy.typing as npt

from pccl.collectives.schedules import meaning
from pccl.collectives.schedules.interpret import interpret
from pccl.collectives.schedules.unroll import Graph, ScheduleError, unroll
from pccl.core.step import Action, Ints, Schedule

__all__ = ["ScheduleError", "interpret", "verify"]


def verify(
    schedule: Schedule,
    *,
    slices: int | Sequence[int] = 1,
    window: int = 2,
    timings: Iterable[str | int] = ("eager", "lazy", 0),
) -> None:
    """Prove a schedule.

    Args:
        schedule: the schedule.
        slices: how many slices a block has; a sequence says it for each cut (0: the part is empty).
        window: slices that a stream's receiver has room for.
        timings: schedulers: ``eager`` receives before it sends, so that windows are as empty as they can be; ``lazy`` sends until
            all windows are full before it receives anything; a number seeds a random one. Every other one runs in place.

    Raises:
        ScheduleError: it breaks a rule; says which, at which rank, step and block.
    """
    graph = unroll(schedule, slices)
    _check_hazards(graph)
    if schedule.rotates:
        _check_rotation(schedule)
    symbols = _Symbols(schedule.world)
    for number, timing in enumerate(timings):
        memory = _run(graph, symbols, window, timing, in_place=number % 2 == 1)
        _check_results(graph, symbols, memory)


class _Symbols:
    """Values as expressions, each a number: equal expressions are equal numbers."""

    def __init__(self, world: int) -> None:
        self.everyone = (1 << world) - 1
        self.parts: list[tuple[int, int]] = []
        """(input part, slice) that the contributions are of."""
        self.ranks: list[int] = []
        """Whose contributions are in it: a bit for each rank."""
        self._known: dict[tuple[int, int] | tuple[int, int, int], int] = {}

    def leaf(self, rank: int, part: int, piece: int) -> int:
        return self._number((rank, part, piece), (part, piece), 1 << rank)

    def join(self, left: int, right: int) -> int:
        if self.parts[left] != self.parts[right]:
            raise ScheduleError(f"combines input part {self.parts[left][0]} with input part {self.parts[right][0]}")
        twice = self.ranks[left] & self.ranks[right]
        if twice:
            raise ScheduleError(f"adds the contribution of rank {twice.bit_length() - 1} a second time")
        return self._number((left, right), self.parts[left], self.ranks[left] | self.ranks[right])

    def _number(self, key: tuple[int, int] | tuple[int, int, int], part: tuple[int, int], ranks: int) -> int:
        known = self._known.setdefault(key, len(self.parts))
        if known == len(self.parts):
            self.parts.append(part)
            self.ranks.append(ranks)
        return known


class _Ready:
    """Atoms that may run, and which one does."""

    def __init__(self, timing: str | int) -> None:
        self.random = None if isinstance(timing, str) else Random(timing)
        self.sends_first = timing == "lazy"
        self.sends: deque[int] = deque()
        self.others: deque[int] = deque()

    def __bool__(self) -> bool:
        return bool(self.sends or self.others)

    def push(self, atom: int, action: int) -> None:
        (self.sends if action == Action.SEND else self.others).append(atom)

    def pop(self) -> int:
        if self.random is None:
            first, then = (self.sends, self.others) if self.sends_first else (self.others, self.sends)
            return (first or then).popleft()
        pool = self.sends if self.sends and (not self.others or self.random.random() < 0.5) else self.others
        pool.rotate(self.random.randrange(min(len(pool), 64)))
        return pool.pop()


def _run(graph: Graph, symbols: _Symbols, window: int, timing: str | int, *, in_place: bool) -> list[int]:
    """Run all atoms; returns what the cells hold in the end."""
    memory, cell = _memory(graph, symbols, in_place)
    action, after, stream, frees = graph.action, graph.after, graph.stream, graph.frees
    missing, next_sent, next_received = _waits(graph)
    partner = {sent: received for line in graph.streams.values() for sent, received in zip(line.sends, line.receives, strict=True)}
    room = dict.fromkeys(graph.streams, window)
    parked: dict[tuple[int, int, int], int] = {}
    users = [len(atoms) for atoms, _ in graph.shared_frees]
    uses: dict[int, list[int]] = {}
    for number, (atoms, _) in enumerate(graph.shared_frees):
        for atom in atoms:
            uses.setdefault(atom, []).append(number)
    inbox: dict[int, int] = {}
    ready = _Ready(timing)
    left = len(action)
    for atom, count in enumerate(missing):
        if count == 0:
            ready.push(atom, action[atom])

    while ready:
        atom = ready.pop()
        kind = action[atom]
        then = after[atom]
        if kind == Action.SEND:
            name = stream[atom]
            if room[name] == 0:
                parked[name] = atom
                continue
            room[name] -= 1
            inbox[partner[atom]] = memory[cell[graph.reads[atom][0]]]
            then = [*then, partner[atom], *next_sent.get(atom, ())]
        else:
            memory[cell[graph.writes[atom]]] = _value(graph, symbols, memory, cell, atom, inbox.pop(atom, -1))
            then = [*then, *next_received.get(atom, ())]
        left -= 1
        for other in then:
            missing[other] -= 1
            if missing[other] == 0:
                ready.push(other, action[other])
        freed = frees[atom]
        for number in uses.get(atom, ()):
            users[number] -= 1
            if users[number] == 0:
                freed = freed + graph.shared_frees[number][1]
        for name in freed:
            room[name] += 1
            if name in parked:
                ready.push(parked.pop(name), Action.SEND)
    if left:
        _explain(graph, window, missing, parked)
    return [memory[cell[home]] for home in range(graph.cells)]


def _memory(graph: Graph, symbols: _Symbols, in_place: bool) -> tuple[list[int], list[int]]:
    """What cells hold at first, -1 for nothing, and which cell to use for a cell."""
    cell = list(range(graph.cells))
    if in_place:
        for output, source in graph.shared.items():
            cell[output] = source
    memory = [-1] * graph.cells
    for (rank, part, piece), source in graph.inputs.items():
        memory[source] = symbols.leaf(rank, part, piece)
    return memory, cell


def _waits(graph: Graph) -> tuple[list[int], dict[int, tuple[int]], dict[int, tuple[int]]]:
    """How many others an atom waits for, and which atom comes next in its stream, at the sender and at the receiver."""
    missing = [0] * len(graph.action)
    for others in graph.after:
        for other in others:
            missing[other] += 1
    following: list[dict[int, tuple[int]]] = []
    for lines in ([line.sends for line in graph.streams.values()], [line.receives for line in graph.streams.values()]):
        following.append({one: (other,) for line in lines for one, other in pairwise(line)})
        for (other,) in following[-1].values():
            missing[other] += 1
    for line in graph.streams.values():
        for received in line.receives:
            missing[received] += 1
    return missing, following[0], following[1]


def _value(graph: Graph, symbols: _Symbols, memory: list[int], cell: list[int], atom: int, received: int) -> int:
    """What an atom writes."""
    kind = graph.action[atom]
    if kind == Action.RECEIVE:
        return received
    operands = [memory[cell[read]] for read in graph.reads[atom]]
    if kind == Action.COPY:
        return operands[0]
    if kind == Action.REDUCE:
        operands.append(received)
    value = operands[0]
    try:
        for operand in operands[1:]:
            value = symbols.join(value, operand)
    except ScheduleError as error:
        raise ScheduleError(f"{graph.describe(atom)} {error}") from None
    complete = symbols.ranks[value] == symbols.everyone
    if complete and not graph.final[atom]:
        raise ScheduleError(f"{graph.describe(atom)} completes the result, but is not marked as final")
    if graph.final[atom] and not complete:
        raise ScheduleError(f"{graph.describe(atom)} is marked as final, but contributions are missing")
    return value


def _explain(graph: Graph, window: int, missing: list[int], parked: dict[tuple[int, int, int], int]) -> None:
    """Raise, with the sends that wait for room, or else whatever waits for a message."""
    stuck = [f"{graph.describe(atom)} waits for room in a window of {window}" for atom in list(parked.values())[:3]]
    if not stuck:
        stuck = [f"{graph.describe(atom)} never gets to run" for atom, count in enumerate(missing) if count > 0][:3]
    raise ScheduleError(f"deadlock: {'; '.join(stuck)}{'; ...' if len(parked) > 3 else ''}")


def _check_results(graph: Graph, symbols: _Symbols, memory: list[int]) -> None:
    """Every output part holds what the collective means, and reduced ones the same expression everywhere."""
    schedule = graph.schedule
    seen: dict[tuple[int, int], tuple[int, int]] = {}
    by_rank: dict[int, list[tuple[int, int, int]]] = {}
    for (rank, part, piece), home in graph.outputs.items():
        by_rank.setdefault(rank, []).append((part, piece, home))
    for rank, outputs in by_rank.items():
        parts = np.array([part for part, _, _ in outputs])
        origin = meaning.origin(schedule.collective, schedule.world, schedule.root, schedule.cuts, rank, parts)
        for (part, piece, home), whose, what in zip(outputs, origin.rank.tolist(), origin.part.tolist(), strict=True):
            value = memory[home]
            ranks = symbols.everyone if whose < 0 else 1 << whose
            if symbols.parts[value] != (what, piece) or symbols.ranks[value] != ranks:
                raise ScheduleError(f"rank {rank}: output part {part} is not what {schedule.collective} means")
            other, theirs = seen.setdefault((what, piece), (rank, value)) if whose < 0 else (rank, value)
            if theirs != value:
                raise ScheduleError(f"ranks {other} and {rank} combine part {what} in different orders")


def _check_hazards(graph: Graph) -> None:
    """In place, nothing may be written over an input that has yet to be read: the first write waits for every reader, however
    indirectly.
    """
    pairs = [
        (reader, graph.first_writer[output])
        for output, source in graph.shared.items()
        for reader in graph.input_readers.get(source, ())
        if reader != graph.first_writer[output] and graph.first_writer[output] not in graph.after[reader]
    ]
    if not pairs:
        return
    before: list[list[int]] = [[] for _ in graph.action]
    for atom, others in enumerate(graph.after):
        for other in others:
            before[other].append(atom)
    for line in graph.streams.values():
        for one, other in pairwise(line.sends):
            before[other].append(one)
        for sent, received in zip(line.sends, line.receives, strict=True):
            before[received].append(sent)  # but receiving does not wait for what was received before it to be written
    for reader, writer in pairs:
        if not _reaches(before, writer, reader):
            raise ScheduleError(
                f"in place, {graph.describe(writer)} may overwrite an input that is yet to be read by {graph.describe(reader)}"
            )


def _reaches(edges: list[list[int]], start: int, goal: int) -> bool:
    seen = {start}
    queue = deque(seen)
    while queue:
        for other in edges[queue.popleft()]:
            if other == goal:
                return True
            if other not in seen:
                seen.add(other)
                queue.append(other)
    return False


def _check_rotation(schedule: Schedule) -> None:
    """Rank r's program is rank 0's, with r added to the peers, and blocks renamed one to one. A FOLD may name its blocks in another
    order.
    """
    world = schedule.world
    blocks = np.arange(schedule.blocks)
    first = schedule.steps(0)
    for rank in range(1, world):
        program = schedule.steps(rank)
        fields = ["action", "final", "channel", "blocks"]
        peers = np.where(first["peer"] < 0, -1, (first["peer"] + rank) % world)
        if len(program) != len(first) or not (np.array_equal(program[fields], first[fields]) and np.array_equal(program["peer"], peers)):
            raise ScheduleError(f"rank {rank}'s program is not rank 0's, rotated")
        name = np.full(schedule.blocks, -1)
        fold = first["action"] == Action.FOLD
        ours = np.concatenate([_spread(first[~fold]), first["into"][fold]])
        theirs = np.concatenate([_spread(program[~fold]), program["into"][fold]])
        name[ours] = theirs
        used = np.unique(ours)
        if np.any(name[ours] != theirs) or len(np.unique(theirs)) != len(used):
            raise ScheduleError(f"rank {rank} uses its blocks in another way than rank 0")
        for mine, other in zip(first[fold], program[fold], strict=True):
            known = {block for block in name[_spread(mine[None])].tolist() if block >= 0}
            if not known <= set(_spread(other[None]).tolist()):
                raise ScheduleError(f"rank {rank} folds other blocks than rank 0")
        for home in (schedule.source, schedule.target):
            if np.any((home(0, blocks)[used] >= 0) != (home(rank, blocks)[name[used]] >= 0)):
                raise ScheduleError(f"blocks of rank {rank} have other homes than those of rank 0")


def _spread(steps: npt.NDArray[np.void]) -> Ints:
    """The blocks of all steps, one by one."""
    ends = np.cumsum(steps["blocks"])
    return np.repeat(steps["block"] - ends + steps["blocks"], steps["blocks"]) + np.arange(ends[-1] if len(ends) else 0)
