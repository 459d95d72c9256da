"""What is to happen: the whole list of faults, drawn from a seed before the run begins."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from typing import NamedTuple

from pccl.tools.stress.page import NEWCOMERS, Phase
from pccl.tools.stress.program import MOST

FEWEST = 2
"""Processes that always remain."""
STOP_SECONDS = (0.2, 6.0)
MASTER_RATE = 0.08
"""Deaths of the master per second, where they are wanted."""
MASTER_SECONDS = (0.0, 1.5)
"""How long there is no master."""
AIMED = 0.75
"""Share of the faults that wait for a phase of their victim."""


@dataclass(frozen=True, slots=True)
class Config:
    """A run. Rates are events per second, times are seconds."""

    peers: int = 6
    seconds: float = 60.0
    seed: int = 1
    kill: float = 0.4
    stop: float = 0.1
    join: float = 0.6
    kill_master: bool = False
    gap: float = 20.0
    """How long a worker that is not stopped may commit nothing."""
    require_phases: bool = False
    plant: str = ""
    """What the first worker does wrong, to prove the checks: result, state, hang or leak."""


class Event(NamedTuple):
    """A fault, or a newcomer. Workers are numbered in the order in which they are started, from 0."""

    at: float
    """Seconds after the group has formed."""
    kind: str
    """kill, stop, join, master"""
    target: int
    """A worker; the number of the new one for join; the number of the master's death, from 0, for master."""
    seconds: float = 0.0
    """How long a worker is stopped, or there is no master."""
    aim: str = ""
    """Phase of the target that the fault waits for, for a moment."""

    def __str__(self) -> str:
        what = "kill the master" if self.kind == "master" else f"{self.kind} w{self.target}"
        return what + (f" for {self.seconds:.2f} s" if self.seconds else "") + (f", aimed at {self.aim}" if self.aim else "")


def draw_events(config: Config) -> list[Event]:
    """The events of a run: the same for the same configuration, whatever happens."""
    rng = random.Random(f"events {config.seed}")
    rates = {"kill": config.kill, "stop": config.stop, "join": config.join, "master": MASTER_RATE if config.kill_master else 0.0}
    phases = [phase for phase in Phase if phase.counts]
    aims = itertools.cycle(rng.sample(phases, len(phases)))
    events: list[Event] = []
    stopped_until = dict.fromkeys(range(config.peers), 0.0)
    now, born, deaths = 0.0, config.peers, 0
    while sum(rates.values()) and (now := now + rng.expovariate(sum(rates.values()))) < config.seconds:
        kind = rng.choices(list(rates), list(rates.values()))[0]
        if kind == "master":
            events.append(Event(now, kind, deaths, rng.uniform(*MASTER_SECONDS)))
            deaths += 1
            continue
        awake = [worker for worker, until in stopped_until.items() if until <= now]
        if kind == "join" and len(stopped_until) == MOST:
            kind = "kill"
        elif kind == "kill" and len(stopped_until) == FEWEST:
            kind = "join"
        elif kind == "stop" and len(awake) <= FEWEST:
            continue
        aim = next(aims) if kind != "join" and rng.random() < AIMED else None
        target = rng.choice(awake if kind == "stop" else list(stopped_until))
        if kind == "join" or (aim in NEWCOMERS and len(stopped_until) < MOST):
            stopped_until[born] = 0.0
            events.append(Event(now, "join", born))
            if aim in NEWCOMERS and (aim is Phase.JOINING or rng.random() < 0.5):
                target = born  # otherwise an incumbent is hit while it lets in this one
            born += 1
        if kind == "kill":
            events.append(Event(now, kind, target, 0.0, aim.value if aim else ""))
            del stopped_until[target]
        elif kind == "stop":
            events.append(Event(now, kind, target, rng.uniform(*STOP_SECONDS), aim.value if aim else ""))
            stopped_until[target] = now + events[-1].seconds
    return events
