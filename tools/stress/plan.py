"""What is to happen: the whole list of faults, drawn from a seed before the run begins."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from pccl.core.errors import InvalidArgument
from pccl.tools.stress.page import Phase

FEWEST = 2
"""Processes that always remain."""
MOST = 10
"""Members for which the sizes of tensors are made, and their sums exact."""
STOP_SECONDS = (0.2, 6.0)
MASTER_RATE = 0.08
"""Deaths of the master per second, where they are wanted."""
MASTER_SECONDS = (0.0, 1.5)
"""How long there is no master."""
AIMED = 0.7
"""Share of the faults that wait for a phase of their victim."""
PLANTS = ("result", "input", "hash", "hang", "leak", "silence")
"""Faults of a worker that the checks have to find."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A run. Rates are events per second, times are seconds."""

    peers: int = 6
    max_peers: int = 10
    seconds: float = 60.0
    seed: int = 1
    kill: float = 0.4
    stop: float = 0.1
    join: float = 0.6
    leave: float = 0.0
    kill_master: bool = False
    elements: int = 1 << 19
    """In the largest tensor."""
    in_flight: int = 8
    """Collectives that a worker has in flight."""
    min_world_size: int = 1
    heartbeat_timeout: float = 3.0
    gap: float = 12.0
    """How long there may be no commit while nobody is stopped."""
    require_phases: bool = False
    plant: str = ""
    """What the first worker does wrong, to prove the checks."""

    def __post_init__(self) -> None:
        for name in ("kill", "stop", "join", "leave"):
            if not getattr(self, name) >= 0:
                raise InvalidArgument(f"{name}: a rate of at least 0 per second is needed, not {getattr(self, name)}")
        for name in ("seconds", "heartbeat_timeout", "gap"):
            if not getattr(self, name) > 0:
                raise InvalidArgument(f"{name}: a time above 0 s is needed, not {getattr(self, name)}")
        for name in ("elements", "in_flight", "min_world_size"):
            if getattr(self, name) < 1:
                raise InvalidArgument(f"{name}: at least 1 is needed, not {getattr(self, name)}")
        if not FEWEST <= self.peers <= self.max_peers <= MOST:
            text = f"peers, max_peers: {FEWEST} <= peers <= max_peers <= {MOST} is needed, not {self.peers} and {self.max_peers}"
            raise InvalidArgument(text)
        if self.plant and self.plant not in PLANTS:
            raise InvalidArgument(f"plant: one of {', '.join(PLANTS)} is needed, not {self.plant!r}")

    def as_dict(self) -> dict[str, Any]:
        """For reports."""
        return asdict(self)


class Event(NamedTuple):
    """A fault, or a newcomer. Workers are numbered in the order in which they are started, from 0."""

    at: float
    """Seconds after the group has formed."""
    kind: str
    """kill, stop, join, leave, master"""
    target: int
    """A worker; the number of the new one for join; the number of the master's death, from 0, for master."""
    seconds: float = 0.0
    """How long a worker is stopped, or there is no master."""
    aim: str = ""
    """Phase of the target that the fault waits for, for a moment."""

    def __str__(self) -> str:
        who = "the master" if self.kind == "master" else f"w{self.target}"
        for_ = f" for {self.seconds:.2f} s" if self.seconds else ""
        return (
            f"{self.at:7.2f} s  {self.kind if self.kind != 'master' else 'kill'} {who}{for_}{f', aimed at {self.aim}' if self.aim else ''}"
        )


def draw_events(config: Config) -> list[Event]:
    """The events of a run: the same for the same configuration, whatever happens."""
    rng = random.Random(f"events {config.seed}")
    rates = {"kill": config.kill, "stop": config.stop, "join": config.join, "leave": config.leave}
    rates["master"] = MASTER_RATE if config.kill_master else 0.0
    events: list[Event] = []
    crowd = _Crowd(config.peers)
    now, deaths = 0.0, 0
    while sum(rates.values()) and (now := now + rng.expovariate(sum(rates.values()))) < config.seconds:
        kind = rng.choices(list(rates), list(rates.values()))[0]
        aim = rng.choice([p for p in Phase if p.counts]) if rng.random() < AIMED else None
        seconds = rng.uniform(*STOP_SECONDS)
        awake = crowd.awake(now)
        if kind in ("kill", "leave") and len(awake if kind == "leave" else crowd) <= FEWEST:
            kind = "join"
        elif kind == "join" and len(crowd) >= config.max_peers:
            kind = "kill"
        if kind == "master":
            events.append(Event(now, kind, deaths, rng.uniform(*MASTER_SECONDS)))
            deaths += 1
        elif kind == "join":
            events.append(Event(now, kind, crowd.join()))
        elif kind == "leave":
            events.append(Event(now, kind, crowd.lose(rng.choice(awake))))
        elif kind == "kill" or len(awake) > FEWEST:
            target = rng.choice(list(crowd) if kind == "kill" else awake)
            if aim in (Phase.WAITING, Phase.WIRING) and len(crowd) < config.max_peers:
                target = crowd.join()  # only newcomers go through these
                events.append(Event(now, "join", target))
            if kind == "kill":
                events.append(Event(now, kind, crowd.lose(target), 0.0, aim.value if aim else ""))
            else:
                events.append(Event(now, kind, crowd.stop(target, now + seconds), seconds, aim.value if aim else ""))
    return events


class _Crowd(dict[int, float]):
    """The processes that are there, and until when each is stopped."""

    def __init__(self, size: int) -> None:
        super().__init__(dict.fromkeys(range(size), 0.0))
        self._born = size

    def awake(self, now: float) -> list[int]:
        return [worker for worker, until in self.items() if until <= now]

    def join(self) -> int:
        self[self._born] = 0.0
        self._born += 1
        return self._born - 1

    def lose(self, worker: int) -> int:
        del self[worker]
        return worker

    def stop(self, worker: int, until: float) -> int:
        self[worker] = until
        return worker
