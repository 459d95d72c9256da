"""The rules that no worker can check alone: what several of them say is compared, and so is what they say with what was done to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from pccl.tools.child import Message
from pccl.tools.stress.history import History, Peer
from pccl.tools.stress.plan import Config

REMEMBERED = 5000
"""Steps whose outcome is remembered."""
FEWEST_SAMPLES = 60
"""Samples without which nothing is said of growth."""
WARM = 0.2
"""Share of the samples that come before caches and pools are full."""
ALLOWED = {"memory": 64 << 20, "descriptors": 6, "sockets": 4, "threads": 6, "tasks": 4}
"""By how much the late median may exceed the early one."""


class Judge:
    """Finds violations, as the run goes on and at its end."""

    def __init__(self, config: Config, history: History) -> None:
        self._config = config
        self._history = history
        self._agreed: dict[tuple[Any, ...], tuple[Any, str]] = {}
        """A step, or a call between two -> what the first of those who went on said of it, and who that was"""

    # --- what workers say -------------------------------------------------------------------------------------------

    def heard(self, ordinal: int, m: Message) -> None:
        """A worker has said something."""
        peer, history = self._history.peers[ordinal], self._history
        event = m["event"]
        if event == "step":
            self._step(peer, m)
            history.stepped(peer, m)
        elif event == "joined":
            history.joined(peer, m)
        elif event == "evicted":
            history.out(peer, m)
        elif event == "finished":
            peer.state = "finished"
            if peer.last:
                self._went_on(peer, peer.last)
            if m["sockets"] > m["sockets_before"]:
                self._violate(peer, m["at"], f"{m['sockets']} sockets are left after it left, {m['sockets_before']} were there before")
        elif event == "violation":
            self._violate(peer, m["at"], m["what"])
        else:
            history.totals[event] += 1
            history.note(m["at"], f"{peer.name} {event}: {m.get('error', '')}")

    def _step(self, peer: Peer, m: Message) -> None:
        before = peer.last
        if before is None:
            others = [p for p in self._history.peers.values() if p is not peer and p.last and p.last["at"] < peer.joined_at]
            newest = max((p.last["step"] for p in others if p.last and p.last["lineage"] == m["lineage"]), default=0)
            if m["step"] < newest:
                self._violate(peer, m["at"], f"its first step is {m['step']}, when others had committed {newest} before it was admitted")
        else:
            self._went_on(peer, before)
            if (m["lineage"], m["step"]) != (before["lineage"], before["step"] + 1):
                was, now = (f"{x['step']} of lineage {x['lineage']}" for x in (before, m))
                self._violate(peer, m["at"], f"after step {was} it made step {now}")
            if m["fetched"]:
                what = f"sync_state moved {m['fetched']} bytes to a member whose state should be the others' (step {m['step']})"
                self._violate(peer, m["at"], what)

    def _went_on(self, peer: Peer, m: Message) -> None:
        """A worker went on after a step: so all who went on have to agree on it."""
        where = m["lineage"], m["step"]
        self._agree(peer, m["at"], where, f"{m['hash']} {m['outcomes']}", f"step {m['step']}")
        for pair, committed in m["pairs"].items():
            self._agree(peer, m["at"], (*where, pair), committed, f"step {m['step']}, call {pair}")

    def _agree(self, peer: Peer, at: float, key: tuple[Any, ...], said: Any, what: str) -> None:
        known, who = self._agreed.setdefault(key, (said, peer.name))
        if known != said:
            self._violate(peer, at, f"{what}: {who} has {known}, this one {said}")
        elif len(self._agreed) > REMEMBERED:
            del self._agreed[next(iter(self._agreed))]
        else:
            self._history.totals["compared"] += who != peer.name

    # --- time -------------------------------------------------------------------------------------------------------

    def hangs(self, now: float) -> str:
        """Why this is a hang; empty if it is none."""
        history, gap = self._history, self._config.gap
        if history.master_away:
            return ""
        for peer in history.alive:
            if not peer.stopped and now - peer.due_at > gap:
                return f"{peer.name} has committed nothing for {now - peer.due_at:.1f} s"
        silence = now - max(history.commit_at, history.began)
        return f"nobody has committed anything for {silence:.1f} s" if silence > 2 * gap else ""

    # --- the end ----------------------------------------------------------------------------------------------------

    def conclude(self, now: float) -> None:
        """What can be said only of the whole."""
        history = self._history
        for name in ("committed", "checked", "compared"):
            if not history.totals[name]:
                history.violate("run", f"nothing was {name}: the run proves nothing", now)
        for peer in history.peers.values():
            for what in growth(peer.samples):
                self._violate(peer, now, what)
        for samples in history.master_samples:
            for what in growth(samples):
                history.violate("master", what, now)
        if self._config.require_phases and history.missed():
            history.violate("run", f"no fault hit these phases: {', '.join(history.missed())}", now)

    def _violate(self, peer: Peer, at: float, what: str) -> None:
        self._history.violate(peer.name, what, at)


def windows(samples: Sequence[Mapping[str, int]], name: str) -> tuple[float, float]:
    """What a process held: the medians of the first and of the last third, after warming up."""
    values = [sample[name] for sample in samples[int(len(samples) * WARM) :]]
    third = max(1, len(values) // 3)
    return median(values[:third]), median(values[-third:])


def growth(samples: Sequence[Mapping[str, int]]) -> list[str]:
    """What a process came to hold more and more of."""
    if len(samples) < FEWEST_SAMPLES:
        return []
    found = []
    for name, limit in ALLOWED.items():
        early, late = windows(samples, name)
        if late > early + limit:
            found.append(f"{name} grew from {early:,.0f} to {late:,.0f} (medians of {len(samples)} samples; {limit:,} more are allowed)")
    return found
