"""What has happened so far: made of what the workers say and of what the driver does. The judge, the view and the report read it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pccl.tools.stress.child import Message
from pccl.tools.stress.page import Phase
from pccl.tools.stress.plan import Event


class Stop(NamedTuple):
    """A worker was stopped, and went on."""

    began: float
    ended: float


class Violation(NamedTuple):
    """Something that must not be."""

    at: float
    who: str
    what: str


@dataclass(slots=True, eq=False)
class Peer:
    """A worker."""

    ordinal: int
    pid: int
    state: str = "starting"
    """starting, connecting, member, finished, killed, ended"""
    connection: int = 0
    uid: int = -1
    joined_at: float = 0.0
    last: Message | None = None
    """The last step of this connection"""
    step: int = -1
    epoch: str = ""
    world: int = 0
    commit_at: float = 0.0
    """When it last committed a step"""
    steps: int = 0
    stopped_at: float | None = None
    stops: list[Stop] = field(default_factory=list)
    evictions: int = 0
    samples: list[dict[str, int]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """As the view and the logs call it."""
        return f"w{self.ordinal}"

    @property
    def alive(self) -> bool:
        """Whether its process is there."""
        return self.state not in ("finished", "killed", "ended")

    def stopped_within(self, seconds: float, now: float, at_least: float = 0.0) -> bool:
        """Whether it was stopped for so long, and is, or was not long ago."""
        stops = [*self.stops, *([Stop(self.stopped_at, now)] if self.stopped_at is not None else [])]
        return any(stop.ended >= now - seconds and stop.ended - stop.began >= at_least for stop in stops)


@dataclass(slots=True)
class Played:
    """An event, and what came of it."""

    event: Event
    at: float
    """Seconds after the group has formed."""
    phases: list[str]
    """Where it hit."""
    step: int
    recovered: float | None = None
    """Seconds until the next commit without the victim."""


@dataclass(slots=True)
class _Recovery:
    """Of the others, from a fault."""

    played: Played
    began: float
    uid: int
    term: int


class History:
    """Times are those of time.monotonic, which all processes share."""

    def __init__(self) -> None:
        self.peers: dict[int, Peer] = {}
        self.master_samples: list[dict[str, int]] = []
        self.master_deaths: list[tuple[float, float]] = []
        """When it died, and when the next one was there (0 if not yet)"""
        self.played: list[Played] = []
        self.violations: list[Violation] = []
        self.totals: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.hits: dict[str, Counter[str]] = {"kill": Counter(), "stop": Counter()}
        """kind of fault -> phase -> how often it was hit"""
        self.began = 0.0
        self.commit_at = 0.0
        """When anybody last committed a step"""
        self.step = -1
        self.lineages: list[int] = []
        self.log: list[str] = []
        self._recovering: list[_Recovery] = []
        self._term = 0

    # --- what the driver does ---------------------------------------------------------------------------------------

    def started(self, ordinal: int, pid: int) -> None:
        """A worker was started."""
        self.peers[ordinal] = Peer(ordinal, pid)

    def hit(self, event: Event, at: float, phases: set[Phase]) -> Played:
        """A fault has happened."""
        played = Played(event, at - self.began, sorted(phase.value for phase in phases), self.step)
        self.played.append(played)
        if event.kind in self.hits:
            self.hits[event.kind].update(played.phases)
        self.note(at, f"{event}; it was in {' and '.join(played.phases)}" if phases else str(event))
        return played

    def recovers(self, played: Played, at: float, uid: int = -1) -> None:
        """The others have to go on without this member; or, if it was the master, under a new one."""
        self._recovering.append(_Recovery(played, at, uid, self._term))

    def note(self, at: float, text: str) -> None:
        """Something that the view shows."""
        self.log.append(f"{at - self.began if self.began else 0.0:7.2f} s  {text}")

    def violate(self, who: str, what: str, at: float) -> None:
        """Something that must not be."""
        self.violations.append(Violation(at - self.began if self.began else 0.0, who, what))
        self.note(at, f"VIOLATION {who}: {what}")

    # --- what workers say -------------------------------------------------------------------------------------------

    def joined(self, peer: Peer, m: Message) -> None:
        """It is a member."""
        peer.state, peer.connection, peer.uid = "member", m["connection"], m["uid"]
        peer.epoch, peer.world, peer.joined_at, peer.last = m["epoch"], m["world"], m["at"], None
        self.totals["admissions"] += 1

    def stepped(self, peer: Peer, m: Message) -> None:
        """It has committed a step."""
        peer.step, peer.epoch, peer.world, peer.commit_at = m["step"], m["epoch"], len(m["uids"]), m["at"]
        peer.steps += 1
        peer.last = m
        self.commit_at = max(self.commit_at, m["at"])
        self.step = max(self.step, m["step"]) if self.lineages and self.lineages[-1] == m["lineage"] else m["step"]
        self._term = max(self._term, _term(m))
        if m["lineage"] not in self.lineages:
            self.lineages.append(m["lineage"])
        self.totals["steps"] += 1
        self.totals.update({name: m[name] for name in ("committed", "aborted", "retried", "checked", "restored")})
        self.errors.update(m["reasons"])
        self.sample(peer.samples, m["usage"], peer.world)
        for recovery in [r for r in self._recovering if self._is_recovered(r, m)]:
            recovery.played.recovered = m["at"] - recovery.began
            self._recovering.remove(recovery)

    def _is_recovered(self, r: _Recovery, m: Message) -> bool:
        return m["at"] > r.began and (_term(m) > r.term if r.uid < 0 else r.uid not in m["uids"])

    def sample(self, samples: list[dict[str, int]], usage: dict[str, int], world: int) -> None:
        """What a process holds, links to its fellow members apart."""
        adjusted = dict(usage)
        adjusted["descriptors"] -= world
        adjusted["sockets"] -= world
        samples.append(adjusted)

    def out(self, peer: Peer, m: Message) -> None:
        """It is no member any more."""
        peer.state, peer.last = "connecting", None
        peer.evictions += 1
        self.totals["evictions"] += 1
        self.errors[f"evicted: {m['reason']}"] += 1

    # --- what follows -----------------------------------------------------------------------------------------------

    @property
    def alive(self) -> list[Peer]:
        """Workers whose process is there."""
        return [peer for peer in self.peers.values() if peer.alive]

    @property
    def anyone_stopped(self) -> bool:
        """Whether a worker is stopped."""
        return any(peer.stopped_at is not None for peer in self.alive)

    def phases(self) -> dict[str, int]:
        """How often each phase was hit by any fault."""
        return {p.value: sum(hits[p.value] for hits in self.hits.values()) for p in Phase}

    def missed(self) -> list[str]:
        """Phases that no fault has hit."""
        counts = self.phases()
        return [p.value for p in Phase if p.counts and not counts[p.value]]

    def recoveries(self, kind: str) -> list[float]:
        """Seconds from faults of a kind to the next commit."""
        return sorted(p.recovered for p in self.played if p.event.kind == kind and p.recovered is not None)


def _term(m: dict[str, Any]) -> int:
    return int(m["epoch"].partition(".")[0])
