"""What has happened so far in a run: the screen, the report and the plot are made of it. It knows no process and no clock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

WINDOW = 25
"""Steps over which rates are averaged."""


class Step(NamedTuple):
    """A committed step, as the first peer to report it saw it."""

    step: int
    at: float
    loss: float
    world: int
    epoch: str
    images: int
    attempts: int
    seconds: float


class Event(NamedTuple):
    """Something that a plot should mark."""

    at: float
    step: int
    kind: str
    """"kill", "recovered", "join" or "note"."""
    text: str


@dataclass(slots=True)
class Peer:
    """A process."""

    name: str
    pid: int
    state: str = "starting"
    """starting, ready, joining, training, killed, finished."""
    rank: int | None = None
    world: int = 0
    epoch: str = ""
    step: int | None = None
    loss: float = 0.0
    fetched: int = 0
    """Bytes of state that it received from others."""
    committed: list[int] = field(default_factory=list)
    retried: list[int] = field(default_factory=list)
    digest: str = ""
    accuracy: float = 0.0


class History:
    """Made of what the workers say, and of what the driver does."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.peers: dict[str, Peer] = {}
        self.log: list[Step] = []
        self.events: list[Event] = []
        self.began = 0.0
        self.killed_at: float | None = None
        self.kill_step: int | None = None
        self.recovered_at: float | None = None
        """When the last survivor had committed the step of the kill."""
        self._latest = 0.0

    def started(self, name: str, pid: int) -> None:
        """A process was started."""
        self.peers[name] = Peer(name, pid)

    def heard(self, name: str, message: Mapping[str, Any]) -> None:
        """A worker has said something."""
        peer = self.peers[name]
        handle = {"ready": self._ready, "joined": self._joined, "step": self._step, "finished": self._finished}.get(message["event"])
        if handle:
            handle(peer, message)

    def killed(self, name: str, step: int, at: float) -> None:
        """The driver has killed a process."""
        self.peers[name].state = "killed"
        self.killed_at, self.kill_step = at, step
        self.note(at, "kill", f"{name} gets SIGKILL inside the all-reduce of step {step}")

    def note(self, at: float, kind: str, text: str) -> None:
        """Something happened at the step at which the run is."""
        self.events.append(Event(at, self.step, kind, text))

    @property
    def step(self) -> int:
        """Number of steps that are committed."""
        return self.log[-1].step + 1 if self.log else 0

    @property
    def lost(self) -> int:
        """Steps up to the last that were never committed."""
        return self.step - len(self.log)

    @property
    def retried(self) -> int:
        """Steps that needed another attempt."""
        return sum(step.attempts > 1 for step in self.log)

    @property
    def survivors(self) -> list[Peer]:
        """The peers that nobody has killed."""
        return [peer for peer in self.peers.values() if peer.state != "killed"]

    @property
    def recovery(self) -> float | None:
        """Seconds from the kill until the last survivor had committed the step in which it fell."""
        return None if self.recovered_at is None or self.killed_at is None else self.recovered_at - self.killed_at

    def rates(self) -> tuple[float, float]:
        """Images and steps per second, lately."""
        recent = self.log[-WINDOW:]
        if len(recent) < 2 or recent[-1].at <= recent[0].at:
            return 0.0, 0.0
        seconds = recent[-1].at - recent[0].at
        return sum(s.images for s in recent[1:]) / seconds, (len(recent) - 1) / seconds

    def problems(self) -> list[str]:
        """Steps that a peer has skipped or made twice."""
        found = []
        for peer in self.peers.values():
            twice = [step for step, times in Counter(peer.committed).items() if times > 1]
            skipped = set(range(peer.committed[0], peer.committed[-1])) - set(peer.committed) if peer.committed else set()
            found += [f"{peer.name} committed step {step} twice" for step in twice]
            found += [f"{peer.name} skipped step {step}" for step in sorted(skipped)]
        return found

    def _ready(self, peer: Peer, message: Mapping[str, Any]) -> None:
        peer.state = "ready"

    def _joined(self, peer: Peer, message: Mapping[str, Any]) -> None:
        peer.state, peer.rank, peer.world, peer.epoch = "training", message["rank"], message["world"], message["epoch"]

    def _step(self, peer: Peer, message: Mapping[str, Any]) -> None:
        step, at = message["step"], message["at"]
        if not peer.committed and self.killed_at is not None:
            self.note(
                at, "join", f"{peer.name} makes its first step, {step}, with {message['fetched'] / 1e6:.1f} MB of state from the others"
            )
        peer.rank, peer.world, peer.epoch = message["rank"], message["world"], message["epoch"]
        peer.step, peer.loss = step, message["loss"]
        peer.fetched += message["fetched"]
        peer.committed.append(step)
        if message["attempts"] > 1:
            peer.retried.append(step)
        if not self.log or step > self.log[-1].step:
            names = Step._fields
            self.log.append(Step(**{name: message[name] for name in names}))
        if step == self.kill_step:
            self._latest = max(self._latest, at)
            if all(step in other.committed for other in self.survivors if other.state == "training"):
                self.recovered_at = self._latest
                self.note(at, "recovered", f"the survivors have committed step {step}, {1000 * (self.recovery or 0):.0f} ms after the kill")

    def _finished(self, peer: Peer, message: Mapping[str, Any]) -> None:
        peer.state, peer.digest, peer.accuracy = "finished", message["digest"], message["accuracy"]
