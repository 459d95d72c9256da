"""A seeded adversary: programs in lockstep on real machines, with messages as late as it likes, deaths, false evictions,
restarts of the master, deadlines and cancellations at any step. In the end time passes, everything is delivered, and every
call must have ended.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from pccl.core.codec import encode
from pccl.core.messages import Reason, SplitAsk
from pccl.core.options import Options
from pccl.protocol.member import Membership
from pccl.protocol.peer import ROOT
from tests.protocol.cluster import Call, Cluster, Node


@dataclass
class Limits:
    """How often the adversary may do what."""

    deaths: int = 1
    evictions: int = 0
    restarts: int = 0
    stops: int = 0
    joins: int = 0
    leaves: int = 0
    links: int = 0
    freezes: int = 0


class Adversary:
    """Runs one program text on all nodes. u update, c collective, r collective with retry, t tagged, p plain (atomic=False), s
    split, x a collective of the communicator that the last split made; several of them in flight where `window` allows.
    """

    def __init__(self, seed: int, *, nodes: str = "ABC", text: str = "uc", limits: Limits, window: int = 1, calls: int = 6) -> None:
        self.random = random.Random(seed)
        self.cluster = Cluster(nodes, options=Options(stall_timeout=1000.0))
        self.text = text
        self.limits = limits
        self.window = window
        self.calls = calls
        self.place = dict.fromkeys(self.cluster.nodes, 0)
        self.made: dict[Node, list[Call]] = {n: [] for n in self.cluster.nodes}
        self.leavers: set[Node] = set()
        self.joined = 0
        self.log: list[str] = []

    def run(self, steps: int = 400) -> None:
        for _ in range(steps):
            actions = self.actions()
            if not actions:
                break
            name, _, action = self.random.choices(actions, [w for _, w, _ in actions])[0]
            self.log.append(name)
            action()
            self.cluster.check()
        self.settle()

    def settle(self) -> None:
        """No more faults: everything that can happen, happens; the programs run to their end."""
        c = self.cluster
        for n in c.nodes:
            if not n.over and n.conn is None:
                n.connect()
        for _ in range(60):
            self.find_gone()
            c.run()
            for n in list(c.nodes):
                while self.may_call(n) and self.place[n] < self.calls:
                    self.call(n)
            c.run()
            c.tick(0.3)
            c.check()
        self.finish_programs()

    def find_gone(self) -> None:
        for n in self.cluster.nodes:
            if n.over and n.conn is not None:
                self.cluster.notice(n)

    def finish_programs(self) -> None:
        """Whoever is behind (it joined late, or a member left) brings the others' calls to an end by making its own; then all
        must have ended.
        """
        c = self.cluster
        for _ in range(200):
            self.find_gone()
            c.run()
            c.tick(0.3)
            members = [n for n in c.nodes if n.member and n not in self.leavers]
            if all(x.outcome for n in members for x in self.made[n]):
                break
            for n in members:
                if self.may_call(n) and self.is_behind(n, members):
                    self.call(n)
        for n in c.nodes:
            if n.alive and n not in self.leavers:
                hanging = [f"{x.description} {x.record.id} {x.record.state}" for x in self.made[n] if x.outcome is None]
                assert not hanging, f"{n.name} (ended: {n.ended}) hangs in {hanging}"
        mismatches = [(n.name, x) for n in c.nodes for x in self.made[n] if x.outcome and x.outcome.reason == Reason.MISMATCH]
        assert not mismatches, f"one text, yet {mismatches[0]}"

    # --- what may happen ---

    def actions(self):  # type: ignore[no-untyped-def]
        c, lim = self.cluster, self.limits
        out = []
        for n in c.nodes:
            if n.outbox:
                out.append((f"master hears {n.name}", 6, lambda n=n: c.to_master(n)))
            if n.over and n.conn is not None and not n.outbox:
                out.append((f"master finds {n.name} gone", 3, lambda n=n: c.notice(n)))
            if not n.alive:
                continue
            if n.inbox:
                out.append((f"{n.name} hears", 6, lambda n=n: c.to_node(n)))
            if n.ended is not None:
                continue
            if n.conn is None:
                out.append((f"{n.name} connects again", 1, n.connect))
            ready = [x for x in n.moving if n.can_complete(x)]
            out += [(f"{n.name} done with {x.record.id}", 5, lambda n=n, x=x: n.complete(x)) for x in ready]
            if self.may_call(n) and self.place[n] < self.calls:
                out.append((f"{n.name} calls", 5, lambda n=n: self.call(n)))
            if lim.stops:
                for call in [x for x in self.made[n] if x.outcome is None and not x.record.expired]:
                    reason = self.random.choice((Reason.DEADLINE, Reason.CANCELLED))
                    out.append((f"{n.name} stops {call.record.id} ({reason.name})", 0.3, lambda n=n, x=call, r=reason: self.stop(n, x, r)))
            alive = [x for x in c.nodes if x.alive and x.ended is None]
            if lim.deaths and len(alive) > 1:
                out.append((f"{n.name} dies", 0.2, lambda n=n: self.die(n)))
            if lim.evictions and n.member and len(alive) > 1:
                out.append((f"master takes {n.name} for lost", 0.2, lambda n=n: self.evict(n)))
            if lim.freezes and n.member and n.conn is not None and len(alive) > 1:
                out.append((f"{n.name} freezes", 0.2, lambda n=n: self.freeze(n)))
            if lim.leaves and n.member and len(alive) > 1 and self.at_update(n) and n not in self.leavers:
                out.append((f"{n.name} leaves", 0.3, lambda n=n: self.leave(n)))
            if lim.links and n.member and len(n.peer.root.view.members) > 1:
                out.append((f"{n.name} complains", 0.2, lambda n=n: self.complain(n)))
        if lim.restarts:
            out.append(("master restarts", 0.2, self.restart))
        if lim.joins:
            out.append(("someone connects", 0.4, self.join))
        out.append(("time passes", 0.5, lambda: c.tick(0.05)))
        out.append(("much time passes", 0.1, lambda: c.tick(1.0)))
        return out

    def is_behind(self, n: Node, members: list[Node]) -> bool:
        """Whether another member has made a call that this one has not come to."""

        def position(m: Membership) -> int:
            return m.next_index + sum(m._uses.values()) + len(m._queue)

        newest = max(n.peer.comms)
        return any(position(n.peer.comms[k]) < position(o.peer.comms[k]) for k in {ROOT, newest} for o in members if k in o.peer.comms)

    def may_call(self, n: Node) -> bool:
        if not n.member or n in self.leavers:
            return False
        open_ = [x for x in self.made[n] if x.outcome is None]
        kind = self.kind(n)
        if (kind == "t" and any(x.tag for x in open_)) or (kind == "x" and any(x.description == "s" for x in open_)):
            return False
        return len(open_) < self.window

    def kind(self, n: Node) -> str:
        return self.text[self.place[n] % len(self.text)]

    def at_update(self, n: Node) -> bool:
        return self.kind(n) == "u" and all(x.outcome for x in self.made[n])

    def call(self, n: Node) -> None:
        kind = self.kind(n)
        self.place[n] += 1
        if kind == "x" and not n.subs:
            return  # it came after the split
        made = {
            "u": lambda: Call("update()", is_update=True, retry=True),
            "c": lambda: Call("c"),
            "r": lambda: Call("r", retry=True),
            "t": lambda: Call("t", tag="t", retry=True),
            "p": lambda: Call("p", atomic=False),
            "s": lambda: Call("s", body=encode(SplitAsk(0, 0)), retry=True),
            "x": lambda: Call("x", comm=n.subs[-1].comm, retry=True),
        }[kind]()
        self.made[n].append(made)
        n.call(made)

    def stop(self, n: Node, call: Call, reason: Reason) -> None:
        self.limits.stops -= 1
        n.expire(call, reason)

    def die(self, n: Node) -> None:
        self.limits.deaths -= 1
        n.die()

    def evict(self, n: Node) -> None:
        self.limits.evictions -= 1
        self.cluster.notice(n)
        if n.alive and n.ended is None:
            n.connect()  # it finds its connection gone, and comes back

    def leave(self, n: Node) -> None:
        self.limits.leaves -= 1
        self.leavers.add(n)
        n.leave()

    def freeze(self, n: Node) -> None:
        """The master takes it for lost, and it hears of that when it connects again; until then it goes on, unheard."""
        self.limits.freezes -= 1
        self.cluster.notice(n)

    def restart(self) -> None:
        self.limits.restarts -= 1
        self.cluster.restart(reconnect=False)

    def join(self) -> None:
        self.limits.joins -= 1
        self.joined += 1
        n = self.cluster.add(f"J{self.joined}")
        self.made[n] = []
        self.place[n] = 0

    def complain(self, n: Node) -> None:
        self.limits.links -= 1
        other = self.random.choice([m.uid for m in n.peer.root.view.members if m.uid != n.peer.uid])
        n.peer.link_lost(other, "test", lacking=False)


TEXTS = ("c", "uc", "cu", "r", "ur", "rc", "t", "ut", "urc", "ucr", "pc", "p", "us", "usr", "utr", "usx", "sxc", "sx")


def adversary(seed: int) -> Adversary:
    """One out of many kinds of runs."""
    choice = random.Random(seed).choice
    text = choice(TEXTS)
    limits = Limits(
        deaths=choice([0, 1, 2]),
        evictions=choice([0, 0, 1]),
        restarts=choice([0, 0, 1, 2]),
        stops=choice([0, 0, 1, 2]),
        joins=choice([0, 0, 1, 2]) if "u" in text else 0,
        leaves=choice([0, 0, 1]) if "u" in text else 0,
        links=choice([0, 0, 1]),
        freezes=choice([0, 0, 1]),
    )
    return Adversary(seed, nodes=choice(["AB", "ABC", "ABCD"]), text=text, limits=limits, window=choice([1, 1, 2, 3]))
