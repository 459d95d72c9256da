"""Real protocol machines (a `Group` and one `Peer` per process) with queues between them, and a test that decides what happens
next.

Data is abstracted as in the models: a member may have a call's result as soon as every member of its epoch has started the
call in that epoch. Everything else (messages in order per connection and arbitrarily late, crashes, restarts of the master)
is up to the test.
"""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from pccl.core import codec
from pccl.core.messages import PeerInfo, Prepare, SplitAsk, SplitResult, Waiting
from pccl.core.options import Options
from pccl.core.types import CallId, Epoch, Pair, Tag, View
from pccl.protocol.group import Group
from pccl.protocol.member import Membership
from pccl.protocol.peer import ROOT, Peer
from pccl.protocol.record import Outcome, Record, State


@dataclass(eq=False)
class Call:
    """An Op without data."""

    description: str = "all_reduce(float32[4], sum)"
    tag: Tag = None
    pair: Pair | None = None
    atomic: bool = True
    retry: bool = False
    is_update: bool = False
    sealed: bool = True
    local: bool = False
    exposed: bool = False
    decided: bool = False
    waiting: bool = False
    body: bytes = b""
    owner: Any = None
    comm: int = ROOT
    record: Record = field(init=False)
    outcome: Outcome | None = None
    restored: int = 0

    def __post_init__(self) -> None:
        self.record = Record(self)

    @property
    def signature(self) -> int:
        return hash(self.description) & 0xFFFFFFFF | 1

    def payload(self) -> bytes:
        return self.owner.peer.comms[self.comm].update_ask() if self.is_update else self.body

    def can_retry(self, view: View) -> bool:
        return self.pair is None or {m.uid for m in view.members} >= set(self.pair)


class Node:
    """A process: a `Peer`, its calls, and what it has heard."""

    def __init__(self, cluster: Cluster, name: str, *, min_world_size: int = 1) -> None:
        self.cluster = cluster
        self.name = name
        self.alive = True
        self.conn: object | None = None
        self.inbox: deque[tuple[int, bytes]] = deque()
        self.outbox: deque[tuple[object, bytes]] = deque()
        self.calls: list[Call] = []
        self.started: set[tuple[Epoch, CallId]] = set()
        """attempts whose data this node has put on its way"""
        self.moving: dict[Call, None] = {}
        self.views: list[View] = []
        self.ended: str | None = None
        self.links: list[Prepare] = []
        self.subs: list[Membership] = []
        self.committed: dict[tuple[int, CallId], int] = {}
        """-> number of the epoch whose members contributed"""
        self.aborted: dict[tuple[int, CallId], str] = {}
        options = Options(min_world_size=min_world_size)
        self.peer = Peer(self, "g", PeerInfo(name.encode().ljust(16), name, "host", (name,), min_world_size), options)

    # --- what a test does ---

    def connect(self) -> None:
        self.conn = (self.name, next(self.cluster.counter))
        self.cluster.conns[self.conn] = self
        self.inbox.clear()
        self.peer.connected()

    def call(self, call: Call) -> Call:
        call.owner = self
        self.calls.append(call)
        self.peer.comms[call.comm].enter(call.record, self.cluster.now)
        return call

    def update(self) -> Call:
        return self.call(Call("update()", is_update=True, retry=True))

    def can_complete(self, call: Call) -> bool:
        """Whether everyone whose data the call needs has started it in this attempt."""
        comm = self.peer.comms[call.comm]
        if call not in self.moving or comm.stopped or call.record.state is not State.RUNNING:
            return False
        names = [m.name for m in comm.view.members if call.record.id.pair is None or m.uid in call.record.id.pair]
        nodes = [n for n in self.cluster.nodes if n.name in names]
        return all((comm.epoch, call.record.id) in n.started for n in nodes)

    def complete(self, call: Call) -> None:
        self.moving.pop(call, None)
        self.peer.comms[call.comm].complete(call.record, self.cluster.now)

    def expire(self, call: Call, reason: int, detail: str = "test") -> None:
        self.peer.comms[call.comm].expire(call.record, reason, detail, self.cluster.now)

    def leave(self) -> None:
        self.peer.root.leave()

    def die(self) -> None:
        """SIGKILL: the system closes its connections; when the master hears of it is the test's business."""
        self.alive = False
        self.inbox.clear()

    # --- PeerHost ---

    def send(self, message: object) -> None:
        if self.conn is not None:
            self.outbox.append((self.conn, codec.encode(message)))

    def start(self, comm: int, record: Record) -> None:
        call = record.op
        assert isinstance(call, Call)
        self.started.add((self.peer.comms[comm].epoch, record.id))
        self.moving[call] = None
        if call.body and isinstance(codec.decode(call.body), SplitAsk):
            self.complete(call)

    def halt(self, comm: int, record: Record) -> None:
        self.moving.pop(record.op, None)  # type: ignore[call-overload]

    def restore(self, comm: int, record: Record) -> None:
        assert isinstance(record.op, Call)
        record.op.restored += 1

    def discard(self, comm: int, epoch: Epoch, call: CallId) -> None:
        pass

    def agreed(self, comm: int, record: Record, payload: bytes) -> None:
        pass

    def finish(self, comm: int, record: Record, outcome: Outcome) -> None:
        call = record.op
        assert isinstance(call, Call)
        assert call.outcome is None, "a caller was told twice"
        call.outcome = outcome
        self.moving.pop(call, None)
        self.views.append(outcome.view)
        if record.id.n >= 0 and not call.is_update:
            if outcome.committed and call.atomic:
                self.committed[comm, record.id] = record.number
            elif not outcome.committed:
                self.aborted[comm, record.id] = outcome.detail
        if outcome.committed and (outcome.payload or record.payload) and call.body:
            found = codec.decode(outcome.payload or record.payload)
            if isinstance(found, SplitResult):
                made = self.peer.adopt(self.peer.comms[comm], found)
                if made:
                    self.subs.append(made)
                    if not made.stopped:
                        self.note_epoch(made.comm, made.view)

    def epoch_changed(self, comm: int, old: View, new: View) -> None:
        self.views.append(new)
        self.note_epoch(comm, new)

    def note_epoch(self, comm: int, view: View) -> None:
        """No two epochs have the same number."""
        uids = tuple(m.uid for m in view.members)
        assert self.cluster.epochs.setdefault((comm, view.epoch), uids) == uids, f"epoch {view.epoch} of {comm} was given twice"

    def give_up(self, detail: str) -> None:
        self.gone(0, detail)

    def make_links(self, m: Prepare) -> None:
        self.links.append(m)
        failed = tuple(u for u in m.dial if (m.uid, u) in self.cluster.unreachable)
        self.peer.links_made(m.admission, failed)

    def admitted(self, view: View) -> None:
        self.views.append(view)
        self.note_epoch(ROOT, view)

    def refused(self, reason: int, detail: str) -> None:
        self.ended = detail

    def gone(self, reason: int, detail: str) -> None:
        if self.ended is None:
            self.ended = detail
            for comm in self.peer.comms.values():
                for record in comm.abandon():
                    assert isinstance(record.op, Call)
                    record.op.outcome = Outcome(False, comm.view, reason, detail)

    def waits_for(self, comm: int, m: Waiting) -> None:
        pass

    @property
    def over(self) -> bool:
        """Whether its connection is closed, or about to be: it is dead, or has ended."""
        return not self.alive or self.ended is not None

    @property
    def member(self) -> bool:
        return self.alive and self.ended is None and ROOT in self.peer.comms


class Cluster:
    """Nodes and a master."""

    def __init__(self, names: str = "", *, options: Options | None = None, recover: bool = False) -> None:
        self.now = 0.0
        self.counter = itertools.count(1)
        self.options = options or Options()
        self.conns: dict[object, Node] = {}
        self.nodes: list[Node] = []
        self.unreachable: set[tuple[int, int]] = set()
        """(dialer, other) uids"""
        self.epochs: dict[tuple[int, Epoch], tuple[int, ...]] = {}
        """Every (communicator, epoch) that any node was ever in, and who its members were."""
        self.rid = 0
        self.group: Group
        self.start_master()
        if names:
            for name in names:
                self.add(name, min_world_size=len(names))
            self.run()
            for node in self.nodes:
                node.peer.root.fresh = False  # as if each had called update() once
                for member in node.peer.comms.values():
                    member.view = member.view.__class__(member.view.epoch, member.view.rank, member.view.members)
            assert self.group.root
            self.group.root.min_world_size = 1

    def __getitem__(self, name: str) -> Node:
        return next(n for n in self.nodes if n.name == name)

    def add(self, name: str, *, min_world_size: int = 1) -> Node:
        node = Node(self, name, min_world_size=min_world_size)
        self.nodes.append(node)
        node.connect()
        return node

    def start_master(self, *, recover: bool = False) -> None:
        self.rid += 1
        random = (bytes([i % 256]) for i in itertools.count())
        until = self.now + self.options.heartbeat_timeout if recover else 0.0
        self.group = Group("g", self.rid, self.options, lambda n: next(random) * n, recover_until=until)

    def restart(self, *, reconnect: bool = True) -> None:
        """The master is lost with everything that was on its way; another one serves the same address."""
        for node in self.nodes:
            node.outbox.clear()
            node.inbox.clear()
            node.conn = None
        self.conns.clear()
        self.start_master(recover=True)
        if reconnect:
            for node in self.nodes:
                if node.alive and node.ended is None:
                    node.connect()

    # --- one step each ---

    def to_master(self, node: Node) -> bool:
        """The master hears the next message of a node."""
        if not node.outbox:
            return False
        conn, data = node.outbox.popleft()
        if self.conns.get(conn) is node:
            self.group.receive(conn, codec.decode(data), self.now)
            self.collect()
        return True

    def to_node(self, node: Node) -> bool:
        """A node hears the next message of the master."""
        if not node.inbox or not node.alive:
            return False
        _, data = node.inbox.popleft()
        if node.ended is None:
            node.peer.receive(codec.decode(data), self.now)
        return True

    def collect(self) -> None:
        outbox, self.group.outbox = self.group.outbox, []
        for conns, message in outbox:
            data = codec.encode(message)
            for conn in conns:
                node = self.conns.get(conn)
                if node and node.alive and node.conn == conn:
                    node.inbox.append((self.rid, data))

    def notice(self, node: Node) -> None:
        """The master finds that a node's connection is closed."""
        conn, node.conn = node.conn, None
        if conn in self.conns:
            del self.conns[conn]
            self.group.disconnect(conn, self.now)
            self.collect()

    def tick(self, seconds: float = 0.0) -> None:
        """Time passes."""
        self.now += seconds
        self.group.tick(self.now)
        self.collect()
        for node in self.nodes:
            if node.member:
                for comm in list(node.peer.comms.values()):
                    comm.tick(self.now)

    # --- as far as it goes ---

    def pump(self) -> bool:
        """Deliver all messages."""
        moved = False
        while any([self.to_master(n) for n in self.nodes] + [self.to_node(n) for n in self.nodes]):
            moved = True
        return moved

    def finish_data(self) -> bool:
        """Every call that can have its result has it."""
        moved = False
        for node in self.nodes:
            for call in list(node.moving):
                if node.alive and node.ended is None and node.can_complete(call):
                    node.complete(call)
                    moved = True
        return moved

    def run(self) -> None:
        """Until nothing moves any more (time stands still)."""
        while self.pump() or self.finish_data():
            pass

    def check(self) -> None:
        """P1 among the nodes that are members of the same epoch; and nobody was told that a commit met a running call."""
        members = [n for n in self.nodes if n.member]
        for a, b in itertools.combinations(members, 2):
            if a.peer.root.epoch != b.peer.root.epoch:
                continue
            for key in a.committed.keys() & b.committed.keys():
                assert a.committed[key] == b.committed[key], f"{key}: {a.name} in {a.committed[key]}, {b.name} in {b.committed[key]}"
            for one, other in ((a, b), (b, a)):
                both = one.committed.keys() & other.aborted.keys()
                assert not both, f"{one.name} has committed {both}, {other.name} has aborted it"
