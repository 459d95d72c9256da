"""What losses and newcomers take."""

from __future__ import annotations

import asyncio
import random
import signal
import statistics
import time
from collections.abc import Sequence
from typing import Any

import pccl
from pccl.tools.bench.calls import Case, Pace, Side, compare
from pccl.tools.bench.crew import BenchFailed, Crew, ask_all, crew
from pccl.tools.bench.report import Report, spread

MILLISECOND = 1e-3
CALL = Side("call", "pccl", {"atomic": True})
MISSES = 3
"""How often, for each time that it is to hit, a signal may come when the call is over."""


async def losses(report: Report, peers: int, size: int, strikes: dict[signal.Signals, int], seed: int) -> None:
    """Send one of the peers a signal in the middle of an all-reduce, again and again; a new process replaces it each time."""
    chance = random.Random(seed)
    async with pccl.Master() as master, crew(peers) as team:
        await ask_all(team.workers, "join", address=master.address, peers=peers)
        await ask_all(team.workers, "prepare", **Case("all_reduce", size)._asdict())
        for number, times in strikes.items():
            hits: list[dict[str, Any]] = []
            for _ in range(times * (1 + MISSES)):
                if len(hits) < times:
                    hit = await _strike(team, number, chance)
                    hits += [hit] if hit else []
                    await _replace(team, master.address, size)
            if len(hits) < times:
                raise BenchFailed(f"{number.name}: only {len(hits)} of {times * (1 + MISSES)} came before the end of the call")
            normal = statistics.median(hit["normal"] for hit in hits)
            retried = [time for hit in hits for time in hit["retried"]]
            rows = {"survivor raised": [time for hit in hits for time in hit["raised"]], "retry": retried}
            for what, found in {**rows, "normal call": [hit["normal"] for hit in hits]}.items():
                figures = spread(found, MILLISECOND)
                ratio = None if what == "survivor raised" else statistics.median(found) / normal
                report.row(signal=number.name, what=what, **figures, ratio=ratio, peers=peers, size=size, hits=len(hits))


async def _strike(team: Crew, number: signal.Signals, chance: random.Random) -> dict[str, Any] | None:
    """Measure a few calls; send the signal during another one. None if that came too late."""
    normal = statistics.median((await compare({"pccl": team}, [CALL], Pace(0.0)))["call"].times)
    workers = list(team.workers)
    victim = workers[chance.randrange(len(workers))]
    survivors = [worker for worker in workers if worker is not victim]
    for worker in workers:
        worker.tell("strike", value=worker.number + 1)
    entered = await asyncio.gather(*(worker.hear() for worker in workers))
    begun = max(message["at"] for message in entered)
    await asyncio.sleep(max(0.0, begun + chance.uniform(0.05, 0.7) * normal - time.monotonic()))
    struck = time.monotonic()
    if number is signal.SIGKILL:
        team.kill(victim)
    else:
        victim.stop()
    found = [(await worker.hear())["result"] for worker in survivors]
    if number is not signal.SIGKILL:
        team.kill(victim)
    raised = [result["raised"] for result in found]
    if any(raised) != all(raised):
        raise BenchFailed(f"{number.name}: the call failed on some survivors only")
    right = float(sum(worker.number + 1 for worker in (survivors if all(raised) else workers)))
    if any(result["low"] != right or result["high"] != right for result in found):
        raise BenchFailed(f"{number.name}: the sum should be {right:g} everywhere, and is not: {found}")
    if not all(raised):
        return None
    return {"normal": normal, "raised": [at - struck for at in raised], "retried": [result["retried"] for result in found]}


async def _replace(team: Crew, address: str, size: int) -> None:
    """A new process in the place of the one that is gone. Whether the others have noticed that depends on when it was struck."""
    others = list(team.workers)
    newcomer = await team.add()
    await asyncio.gather(newcomer.ask("join", address=address, peers=len(team.workers)), ask_all(others, "admit"))
    await newcomer.ask("prepare", **Case("all_reduce", size)._asdict())


async def newcomers(report: Report, holders: Sequence[int], visits: int, size: int) -> None:
    """Have a newcomer join groups that only update, fetch their state if they have one, and leave, many times."""
    for count in holders:
        async with pccl.Master() as master, crew(count + 1) as team:
            hosts, newcomer = team.workers[:-1], team.workers[-1]
            await ask_all(hosts, "join", address=master.address, peers=count)
            hosting = asyncio.gather(ask_all(hosts, "host", visits=visits + 1, size=size))
            took = await newcomer.ask("visit", address=master.address, visits=visits + 1, size=size)
            await hosting
            what = "fetch" if size else "connect"
            report.row(what=what, holders=count, size=size, **spread(took[what][1:], MILLISECOND))  # the first one imports modules


async def equals(report: Report, peers: Sequence[int], count: int, size: int) -> None:
    """Synchronise a state that all members have."""
    for members in peers:
        async with pccl.Master() as master, crew(members) as team:
            await team.ask("join", address=master.address, peers=members)
            found = await team.ask("agree", size=size, count=count)
            times = [max(each) for each in zip(*found, strict=True)]
            report.row(what="nothing to move", holders=members, size=size, **spread(times, MILLISECOND))
