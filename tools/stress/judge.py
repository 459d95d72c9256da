"""The rules that no worker can check alone: what several of them say is compared, and so is what they say with what was done to them."""

from __future__ import annotations

from typing import Any

from pccl.tools.stress.child import Message
from pccl.tools.stress.growth import growth
from pccl.tools.stress.history import History, Peer
from pccl.tools.stress.plan import Config

REMEMBERED = 5000
"""Steps whose outcome is remembered."""
SLACK = 1.0
"""Seconds by which a busy machine may be late."""
DETECTION = 1.0
"""Seconds beyond the heartbeat timeout after which a stopped worker must be out."""
AFTERMATH = 8.0
"""Seconds for which a stopped worker, or a dead master, explains that links to others could not be made."""
LATE = 2.0
"""Seconds within which a worker that goes on may still say what it did before."""


class Judge:
    """Finds violations, as the run goes on and at its end."""

    def __init__(self, config: Config, history: History) -> None:
        self._config = config
        self._history = history
        self._agreed: dict[tuple[Any, ...], tuple[Any, str]] = {}
        """What the first of those who went on said of a step, or of a call between two -> and who that was"""
        self._due: dict[int, tuple[int, float]] = {}
        """Workers that were stopped for too long: the connection that must be over by that time"""

    # --- what workers say -------------------------------------------------------------------------------------------

    def heard(self, ordinal: int, m: Message) -> None:
        """A worker has said something."""
        peer, history = self._history.peers[ordinal], self._history
        event = m["event"]
        if event == "step":
            self._step(peer, m)
            history.stepped(peer, m)
        elif event == "joined":
            self._due.pop(ordinal, None)
            history.joined(peer, m)
        elif event == "evicted":
            self._evicted(peer, m)
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
            current = self._history.lineages[-1:] == [m["lineage"]]
            newest = max((p.last["step"] for p in self._others(peer, m["lineage"]) if p.commit_at < peer.joined_at and p.last), default=0)
            if current and m["step"] < newest:
                self._violate(peer, m["at"], f"its first step is {m['step']}, when others had committed {newest} before it was admitted")
        else:
            self._went_on(peer, before)
            if (m["lineage"], m["step"]) != (before["lineage"], before["step"] + 1):
                was, now = (f"{x['step']} of lineage {x['lineage']}" for x in (before, m))
                self._violate(peer, m["at"], f"after step {was} it made step {now}")
            if m["fetched"]:
                self._violate(
                    peer, m["at"], f"sync_state changed {m['fetched']} bytes of a state that should be the others' (step {m['step']})"
                )
        if m["lineage"] in self._history.lineages[:-1] and not peer.stopped_within(LATE, m["at"]):
            self._violate(peer, m["at"], f"it made step {m['step']} of lineage {m['lineage']} after another had begun")
        connection, by = self._due.get(peer.ordinal, (-1, 0.0))
        if connection == m["connection"] and m["at"] > by:
            del self._due[peer.ordinal]
            self._violate(peer, m["at"], f"it was stopped for {_last_stop(peer):.1f} s, and is still a member")

    def _others(self, peer: Peer, lineage: int) -> list[Peer]:
        return [p for p in self._history.peers.values() if p is not peer and p.last and p.last["lineage"] == lineage]

    def _went_on(self, peer: Peer, m: Message) -> None:
        """A worker went on after a step: so all who went on have to agree on it."""
        where = m["lineage"], m["step"]
        self._agree(peer, m["at"], where, f"{m['hash']} {m['outcomes']}", f"step {m['step']}")
        for pair, committed in m["pairs"].items():
            self._agree(peer, m["at"], (*where, pair), committed, f"step {m['step']}, call {pair}")

    def _agree(self, peer: Peer, at: float, key: tuple[Any, ...], said: Any, what: str) -> None:
        known, who = self._agreed.setdefault(key, (said, peer.name))
        if known != said:
            self._violate(peer, at, f"{what}: {who} has {_brief(known, said)}, this one {_brief(said, known)}")
        elif len(self._agreed) > REMEMBERED:
            del self._agreed[next(iter(self._agreed))]
        else:
            self._history.totals["compared"] += 1

    # --- evictions --------------------------------------------------------------------------------------------------

    def _evicted(self, peer: Peer, m: Message) -> None:
        self._due.pop(peer.ordinal, None)
        if not self._explains(peer, m["reason"], m["at"]):
            self._violate(peer, m["at"], f"it was put out of the group without a cause: {m['reason']}")

    def _explains(self, peer: Peer, reason: str, now: float) -> bool:
        """Whether what was done to the workers accounts for an eviction."""
        limit = self._config.heartbeat_timeout
        if peer.stopped_within(AFTERMATH, now, at_least=limit - SLACK):
            return True
        upheaval = any(p.stopped_within(AFTERMATH, now) for p in self._history.peers.values()) or self._master_died_within(AFTERMATH, now)
        if "can reach too few" in reason:
            return upheaval
        return self._master_died_within(AFTERMATH, now) and peer.stopped_within(AFTERMATH, now)

    def _master_died_within(self, seconds: float, now: float) -> bool:
        return any(not back or back >= now - seconds for _, back in self._history.master_deaths)

    def resumed(self, peer: Peer, began: float, ended: float) -> None:
        """A worker was stopped, and goes on now."""
        limit = self._config.heartbeat_timeout + DETECTION
        undisturbed = not any(died <= ended and (not back or back >= began - limit) for died, back in self._history.master_deaths)
        if peer.state == "member" and peer.joined_at < began and ended - began > limit + SLACK and undisturbed:
            self._due[peer.ordinal] = peer.connection, ended + SLACK

    # --- time -------------------------------------------------------------------------------------------------------

    def hangs(self, now: float) -> str:
        """Why this is a hang; empty if it is none."""
        history = self._history
        if len(history.alive) < 2:
            return ""
        silence = now - max(history.commit_at, history.began)
        resumed = max((stop.ended for peer in history.peers.values() for stop in peer.stops), default=0.0)
        back = max((back for _, back in history.master_deaths), default=0.0)
        absent = bool(history.master_deaths and not history.master_deaths[-1][1])
        undisturbed = now - max(history.commit_at, history.began, resumed, back)
        if undisturbed > self._config.gap and not history.anyone_stopped and not absent:
            return f"nobody has committed anything for {silence:.1f} s, {undisturbed:.1f} s of which nobody was stopped"
        if silence > 2 * self._config.gap:
            return f"nobody has committed anything for {silence:.1f} s"
        return ""

    # --- the end ----------------------------------------------------------------------------------------------------

    def conclude(self, now: float) -> None:
        """What can be said only of the whole."""
        history = self._history
        for name in ("steps", "checked", "compared"):
            if not history.totals[name]:
                history.violate("run", f"nothing was {'committed' if name == 'steps' else name}: the run proves nothing", now)
        for peer in history.peers.values():
            for what in growth(peer.samples):
                self._violate(peer, now, what)
        for what in growth(history.master_samples):
            history.violate("master", what, now)
        if self._config.require_phases and history.missed():
            history.violate("run", f"no fault hit these phases: {', '.join(history.missed())}", now)

    def _violate(self, peer: Peer, at: float, what: str) -> None:
        self._history.violate(peer.name, what, at)


def _last_stop(peer: Peer) -> float:
    return peer.stops[-1].ended - peer.stops[-1].began if peer.stops else 0.0


def _brief(said: Any, other: Any) -> str:
    """The first word in which it differs."""
    words, others = str(said).split(" "), str(other).split(" ")
    return next((f"{word!r} (word {i})" for i, (word, o) in enumerate(zip(words, others, strict=False)) if word != o), str(said)[:200])
