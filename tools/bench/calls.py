"""What calls take. Everything that is compared is measured by turns, a few calls each, while the others are quiet: noise hits all alike."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pccl.tools.bench.buffers import REDUCING, ROOTED
from pccl.tools.bench.crew import Team
from pccl.tools.bench.report import Ratio, Report, spread
from pccl.tools.bench.systems import How
from pccl.tools.bench.teams import TeamOf

TURN = 0.05
"""Seconds that a turn is to take."""
LONGEST = 1000
"""Calls in a turn at most."""
TURNS = 5
"""Turns of each side at least, however long they take."""
MICROSECOND = 1e-6


class Side(NamedTuple):
    """One of the things that are compared."""

    label: str
    team: str
    how: How


class Pace(NamedTuple):
    """How many calls are measured."""

    seconds: float
    """Turns are taken for so long."""
    iters: int | None = None
    """Calls in a turn; None: as many as fit into TURN."""
    warmup: int = 2
    """Calls before the first turn, which are not counted."""
    check: int = 1
    """Calls whose results are checked."""


@dataclass
class Found:
    """What was measured of a side."""

    turns: list[list[float]] = field(default_factory=list)
    """Seconds that each call of each turn took the member that needed longest."""
    cpu: float = 0.0
    """Seconds of CPU time that they took all members' processes together."""

    def add(self, answers: Sequence[Mapping[str, Any]]) -> None:
        """A turn, as every member has seen it."""
        self.cpu += sum(answer["cpu"] for answer in answers)
        self.turns.append([max(times) for times in zip(*(answer["times"] for answer in answers), strict=True)])

    @property
    def times(self) -> list[float]:
        """Of all calls."""
        return [seconds for turn in self.turns for seconds in turn]

    def ratio(self, other: Found) -> Ratio:
        """How many times as fast as another side, turn by turn."""
        pairs = zip(self.turns, other.turns, strict=True)
        return Ratio.of([statistics.median(theirs) / statistics.median(mine) for mine, theirs in pairs])


class Case(NamedTuple):
    """A call to measure."""

    collective: str
    size: int
    dtype: str = "float32"
    op: str = "sum"
    root: int = 0


def bus_factor(collective: str, peers: int) -> float:
    """Bytes per byte of the buffer that cross each peer's connection at least; as in nccl-tests."""
    share = (peers - 1) / peers
    return {"all_reduce": 2 * share, "broadcast": 1.0, "reduce": 1.0, "sendrecv": 1.0}.get(collective, share)


async def compare(teams: Mapping[str, Team], sides: Sequence[Side], pace: Pace) -> dict[str, Found]:
    """Measure the sides by turns. A call's time is that of the member that needs longest for it."""
    found = {side.label: Found() for side in sides}
    counts = [await _count(teams, side, pace) for side in sides]
    began, turns = time.perf_counter(), 0
    while turns < TURNS or time.perf_counter() - began < pace.seconds:
        for side, count in zip(sides, counts, strict=True):
            found[side.label].add(await _turn(teams, side, count))
        turns += 1
    return found


async def _count(teams: Mapping[str, Team], side: Side, pace: Pace) -> int:
    """Warm up, and find how many calls make a turn."""
    first = Found()
    if pace.warmup:
        first.add(await _turn(teams, side, pace.warmup))
    return pace.iters or max(1, min(LONGEST, int(TURN / min(first.times, default=TURN))))


async def _turn(teams: Mapping[str, Team], side: Side, count: int) -> list[dict[str, Any]]:
    return await teams[side.team].ask("run", how=side.how, count=count)


async def measure(
    report: Report,
    peers: Sequence[int],
    cases: Sequence[Case],
    pace: Pace,
    teams: Mapping[str, TeamOf],
    sides: Sequence[Side],
    against: Sequence[str],
) -> None:
    """A row per number of peers, case and side.

    Args:
        teams: of the sides, by name.
        against: labels of the sides that the others are compared with.
    """
    for count in peers:
        async with contextlib.AsyncExitStack() as stack:
            started = {name: await stack.enter_async_context(start(count)) for name, start in teams.items()}
            for case in cases:
                await _case(report, count, started, case, pace, sides, against)


async def _case(
    report: Report, peers: int, teams: Mapping[str, Team], case: Case, pace: Pace, sides: Sequence[Side], against: Sequence[str]
) -> None:
    for team in teams.values():
        buffers = (await team.ask("prepare", **case._asdict()))[0]
    wrong = {side.label: [sum(await teams[side.team].ask("check", how=side.how)) for _ in range(pace.check)] for side in sides}
    measured = await compare(teams, sides, pace)
    nbytes = buffers["size"]
    for side in sides:
        calls = measured[side.label]
        figures = spread(calls.times, MICROSECOND)
        algbw = nbytes / (figures["median"] * 1e3)  # GB/s
        rivals = [label for label in against if side.label not in against]
        report.row(
            **buffers,
            dtype=case.dtype,
            op=case.op if case.collective in REDUCING else "none",
            root=case.root if case.collective in ROOTED else -1,
            peers=peers,
            system=side.label,
            **figures,
            algbw=algbw,
            busbw=algbw * bus_factor(case.collective, peers),
            wrong=sum(wrong[side.label]) if pace.check else None,
            cpu=calls.cpu / (len(calls.times) * nbytes / 1e9),
            **{f"x {label}": calls.ratio(measured[label]) for label in rivals},
        )
