"""What calls take. Everything that is compared is measured by turns, a few calls each, in the same processes: noise hits all alike."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pccl
from pccl.tools.bench.crew import Crew, crew
from pccl.tools.bench.report import Report, spread
from pccl.tools.bench.systems import How

TURN = 0.05
"""Seconds that a turn of the slowest side is to take."""
LONGEST = 100
"""Calls in a turn at most."""
TURNS = 3
"""Turns of each side at least, however long they take."""
MICROSECOND = 1e-6


class Side(NamedTuple):
    """One of the things that are compared."""

    label: str
    system: str
    how: How


@dataclass
class Found:
    """What was measured of a side."""

    times: list[float] = field(default_factory=list)
    """Seconds that each call took the member that needed longest."""
    cpu: float = 0.0
    """Seconds of CPU time that they took all members' processes together."""

    def add(self, answers: Iterable[dict[str, Any]]) -> None:
        """A turn, as every member has seen it."""
        answers = list(answers)
        self.cpu += sum(answer["cpu"] for answer in answers)
        self.times += [max(times) for times in zip(*(answer["times"] for answer in answers), strict=True)]


class Case(NamedTuple):
    """A call to measure, and how long."""

    collective: str
    size: int
    dtype: str
    op: str
    seconds: float


def bus_factor(collective: str, peers: int) -> float:
    """Bytes per byte of the buffer that cross each peer's connection at least; as in nccl-tests."""
    return {"all_reduce": 2 * (peers - 1) / peers, "broadcast": 1.0}.get(collective, (peers - 1) / peers)


async def compare(team: Crew, sides: Sequence[Side], seconds: float) -> dict[str, Found]:
    """Measure the sides by turns for so long. A call's time is that of the member that needs longest for it.

    The first turns warm up, and are not counted.
    """
    found = {side.label: Found() for side in sides}
    slowest = 0.0
    for side in sides:
        first = Found()
        first.add(await _turn(team, side, 2))
        slowest = max(slowest, first.times[-1])
    count = max(1, min(LONGEST, int(TURN / slowest)))
    began, turns = time.perf_counter(), 0
    while turns < TURNS or time.perf_counter() - began < seconds:
        for side in sides:
            found[side.label].add(await _turn(team, side, count))
        turns += 1
    return found


async def _turn(team: Crew, side: Side, count: int) -> list[dict[str, Any]]:
    return await team.ask("run", system=side.system, how=side.how, count=count)


async def measure(report: Report, peers: Sequence[int], cases: Sequence[Case], sides: Sequence[Side], against: str | None) -> None:
    """A row per number of peers, case and side.

    Args:
        against: the label of the side that the others are compared with.
    """
    for count in peers:
        with tempfile.TemporaryDirectory(prefix="pccl-bench-") as folder:
            async with pccl.Master() as master, crew(count) as team:
                await team.ask("join", address=master.address, peers=count)
                if any(side.system == "gloo" for side in sides):
                    await team.ask("join_gloo", path=str(Path(folder) / "gloo"))
                for case in cases:
                    await _case(report, team, case, sides, against)


async def _case(report: Report, team: Crew, case: Case, sides: Sequence[Side], against: str | None) -> None:
    collective, size, dtype, op, seconds = case
    nbytes = (await team.ask("prepare", collective=collective, size=size, dtype=dtype, op=op))[0]
    wrong = {side.label: sum(await team.ask("check", system=side.system, how=side.how)) for side in sides}
    measured = await compare(team, sides, seconds)
    found = {side.label: spread(measured[side.label].times, MICROSECOND) for side in sides}
    for side in sides:
        figures, calls = found[side.label], measured[side.label]
        algbw = nbytes / (figures["median"] * 1e3)  # GB/s
        report.row(
            size=nbytes,
            dtype=dtype,
            op=op if collective in ("all_reduce", "reduce_scatter") else "-",
            peers=len(team.workers),
            system=side.label,
            **figures,
            algbw=algbw,
            busbw=algbw * bus_factor(collective, len(team.workers)),
            cpu=calls.cpu / (len(calls.times) * nbytes / 1e9),
            ratio=found[against]["median"] / figures["median"] if against else None,
            wrong=wrong[side.label],
        )
