"""What has happened so far: made of what the workers say and of what the driver does. The judge, the screen and the report read it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from pccl.tools.child import Message
from pccl.tools.stress.page import Phase
from pccl.tools.stress.plan import Event

PER_MEMBER = {"descriptors": 5, "sockets": 2}
"""What a process holds for each other one of its host: a link of two connections, a region, its bell, and the process"""


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
    due_at: float
    """When it was last seen to do what it has to do: it started, committed a step, or was let go on"""
    state: str = "starting"
    """starting, connecting, member, finished, killed, ended"""
    uid: int = -1
    joined_at: float = 0.0
    last: Message | None = None
    """The last step of this connection"""
    steps: int = 0
    stopped: bool = False
    stops: int = 0
    evictions: int = 0
    samples: list[dict[str, int]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """As the screen and the logs call it."""
        return f"w{self.ordinal}"

    @property
    def alive(self) -> bool:
        """Whether its process is there."""
        return self.state not in ("finished", "killed", "ended")


@dataclass(slots=True)
class Played:
    """An event, and what came of it."""

    event: Event
    at: float
    """Seconds after the group has formed."""
    phases: list[str]
    """Where it hit."""
    recovered: float | None = None
    """Seconds until the next step of others without the victim, or under another master."""


class History:
    """Times are those of time.monotonic, which all processes share."""

    def __init__(self) -> None:
        self.peers: dict[int, Peer] = {}
        self.master_samples: list[list[dict[str, int]]] = []
        """One list for each process that was the master"""
        self.master_away = False
        self.played: list[Played] = []
        self.violations: list[Violation] = []
        self.totals: Counter[str] = Counter()
        self.evictions: Counter[str] = Counter()
        """By reason: a busy machine may be late with a heartbeat, so they are no violations"""
        self.hits: dict[str, Counter[str]] = {"kill": Counter(), "stop": Counter()}
        """kind of fault -> phase -> how often it was hit"""
        self.began = 0.0
        self.commit_at = 0.0
        """When anybody last committed a step"""
        self.longest_gap = 0.0
        """Between two steps of anybody"""
        self.newest: Message | None = None
        """The last step of anybody"""
        self.lineages: list[int] = []
        self.log: list[str] = []
        self._recovering: list[tuple[Played, float, int]] = []
        """Events that others have to recover from: when it was, and the uid of the victim, or minus the term of the old master"""

    # --- what the driver does ---------------------------------------------------------------------------------------

    def started(self, ordinal: int, pid: int, at: float) -> None:
        """A worker was started."""
        self.peers[ordinal] = Peer(ordinal, pid, at)

    def hit(self, event: Event, at: float, phases: set[Phase], *, recovers: int | None = None) -> None:
        """An event has happened.

        Args:
            recovers: the uid of a member without which the others have to go on.
        """
        played = Played(event, at - self.began, sorted(phase.value for phase in phases))
        self.played.append(played)
        if event.kind in self.hits:
            self.hits[event.kind].update(played.phases)
        if recovers is not None or event.kind == "master":
            self._recovering.append((played, at, -_term(self.newest) if recovers is None else recovers))
        self.note(at, f"{event}; it was in {' and '.join(played.phases)}" if phases else str(event))

    def resumed(self, peer: Peer, at: float) -> None:
        """A worker goes on after a stop."""
        peer.stopped = False
        peer.due_at = at

    def master_back(self, at: float) -> None:
        """There is a master again."""
        self.master_away = False
        for peer in self.peers.values():
            peer.due_at = at

    def note(self, at: float, text: str) -> None:
        """Something for the screen and the log."""
        self.log.append(f"{at - self.began if self.began else 0.0:7.2f} s  {text}")

    def violate(self, who: str, what: str, at: float) -> None:
        """Something that must not be."""
        self.violations.append(Violation(at - self.began if self.began else 0.0, who, what))
        self.note(at, f"VIOLATION {who}: {what}")

    # --- what workers say -------------------------------------------------------------------------------------------

    def joined(self, peer: Peer, m: Message) -> None:
        """It is a member."""
        peer.state, peer.uid, peer.joined_at, peer.last = "member", m["uid"], m["at"], None
        self.totals["admissions"] += 1

    def stepped(self, peer: Peer, m: Message) -> None:
        """It has committed a step."""
        peer.last, peer.due_at = m, max(peer.due_at, m["at"])
        peer.steps += 1
        if self.commit_at and self.began:
            self.longest_gap = max(self.longest_gap, m["at"] - max(self.commit_at, self.began))
        self.commit_at = max(self.commit_at, m["at"])
        self.newest = m
        if m["lineage"] not in self.lineages:
            self.lineages.append(m["lineage"])
        self.totals["steps"] += 1
        self.totals.update(m["counts"])
        # its links to fellow members apart
        apart = {name: m["usage"][name] - each * len(m["uids"]) for name, each in PER_MEMBER.items()}
        peer.samples.append(m["usage"] | apart)
        for recovery in [r for r in self._recovering if m["at"] > r[1] and (r[2] not in m["uids"] if r[2] >= 0 else _term(m) > -r[2])]:
            recovery[0].recovered = m["at"] - recovery[1]
            self._recovering.remove(recovery)

    def out(self, peer: Peer, m: Message) -> None:
        """It is no member any more."""
        peer.state, peer.last = "connecting", None
        peer.evictions += 1
        self.totals["evictions"] += 1
        self.evictions[m["error"]] += 1
        self.note(m["at"], f"{peer.name} is out: {m['error']}")

    # --- what follows -----------------------------------------------------------------------------------------------

    @property
    def alive(self) -> list[Peer]:
        """Workers whose process is there."""
        return [peer for peer in self.peers.values() if peer.alive]

    def phases(self) -> dict[str, int]:
        """How often each phase was hit by any fault."""
        return {p.value: sum(hits[p.value] for hits in self.hits.values()) for p in Phase}

    def missed(self) -> list[str]:
        """Phases that no fault has hit."""
        counts = self.phases()
        return [p.value for p in Phase if p.counts and not counts[p.value]]

    def recoveries(self, kind: str) -> list[float]:
        """Seconds from faults of a kind to the next step."""
        return sorted(p.recovered for p in self.played if p.event.kind == kind and p.recovered is not None)


def _term(m: Message | None) -> int:
    return int(m["epoch"].partition(".")[0]) if m else 0
