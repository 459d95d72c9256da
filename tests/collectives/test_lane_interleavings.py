"""The commit of one host (design section 7) with every interleaving of single reads and writes of what the members share.

Each member runs the real `Lane`, `Pull` and `Executor`. What it does next follows from what it has read so far; so a member is run again
and again with what it read up to some point, until it wants to read or write once more, and the search does that for it, in every order.
Where a step has ended, a member's past is worth only what is left of it in its variables: members that agree in these are the same.
Not covered: processors that reorder a store and a later load (`full_fence` is there for the one place where that matters).
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from pccl.collectives import lane as lanes
from pccl.collectives import pull as pulls
from pccl.collectives.executor import Executor
from pccl.collectives.flow import CallKey
from pccl.collectives.lane import DONE, OUT, VOID, Commons, Lane
from pccl.collectives.pull import Pull, errand
from pccl.core.messages import CallReport, CommReport, Reason
from pccl.core.types import CallId, Epoch, Member
from pccl.protocol.decide import decide
from pccl.transports.region import ASLEEP, OtherShared, OwnShared

EPOCH = Epoch(1, 7, 3)
LEAVINGS = -(10**9)
"""What callers write into their buffers once these are theirs again"""
WORD = 8
SILENCE, FENCE, ABORT, CANCEL = range(4)
"""What a member may find in its inbox"""


@dataclass(frozen=True)
class Scenario:
    """What the members do, and what befalls them."""

    world: int
    calls: int
    atomic: bool = True
    large: bool = False
    """Too large for a slot: parts are folded, and inputs lie in their owners' own memory."""
    readable: bool = True
    """Which the others can read"""
    collective: str = "all_reduce"
    in_place: bool = False
    at_once: int = 1
    """Calls in flight"""
    slots: int = 2
    mortal: tuple[int, ...] = ()
    """One of these dies, or none, anywhere."""
    cancel: int | None = None
    """This member's caller cancels its first call, or its deadline passes."""
    taken: bool = False
    """Another process has a dead member's number, and other things in its memory."""
    late: bool = False
    """Members come into the epoch one after the other."""
    coarse: bool = False
    """Only the first word of a slot is read and written at moments of its own."""


class Pause(BaseException):
    """The run comes to something that the member has not done yet."""


class Violation(Exception):
    """A promise is broken."""


Op = tuple[str, tuple[Hashable, ...], Any]
"""Read or write, where, and what"""


class Past:
    """One member's run: it reads what it read before, until that is used up."""

    def __init__(self, rank: int, history: tuple[Any, ...]) -> None:
        self.rank = rank
        self.next: Op | None = None
        self.knows: Hashable = None
        """What the member knows, if it has just ended a step"""
        self._history = history
        self._ops = 0
        self._written: dict[str, bytes] = {}
        self._memories: dict[str, np.ndarray[Any, Any]] = {}

    def memory(self, name: str, nbytes: int) -> np.ndarray[Any, Any]:
        """Memory of this member that others may read: what is written there counts when the member does something else next."""
        made = self._memories[name] = np.zeros(nbytes, np.uint8)
        self._written[name] = made.tobytes()
        return made

    def read(self, *where: Hashable) -> Any:
        return self._op("read", where, None)

    def write(self, value: Any, *where: Hashable) -> None:
        self._op("write", where, value)

    def flush(self) -> None:
        """Each word that was written is one write."""
        for name, memory in self._memories.items():
            before, now = self._written[name], memory.tobytes()
            if now != before:
                self._written[name] = now
                for at in range(0, len(now), WORD):
                    if now[at : at + WORD] != before[at : at + WORD]:
                        self._do("write", (name, self.rank, at), now[at : at + WORD])

    def ends_step(self, knows: Callable[[], Hashable]) -> None:
        self.flush()
        if self._ops == len(self._history):
            self.knows = knows()

    def _op(self, kind: str, where: tuple[Hashable, ...], value: Any) -> Any:
        self.flush()
        return self._do(kind, where, value)

    def _do(self, kind: str, where: tuple[Hashable, ...], value: Any) -> Any:
        if self._ops == len(self._history):
            self.next = (kind, where, value)
            raise Pause
        self._ops += 1
        return self._history[self._ops - 1]


# --- what members share -----------------------------------------------------------------------------------------------


class OwnWords(dict[int, int]):
    def __init__(self, past: Past) -> None:
        self._past = past
        self.quiet = False

    def __setitem__(self, at: int, value: int) -> None:
        super().__setitem__(at, value)
        if not self.quiet:
            self._past.write(value, "word", self._past.rank, at)


class Own(OwnShared):
    def __init__(self, past: Past, size: int) -> None:
        self.memory = past.memory("shared", size)
        self.words: Any = OwnWords(past)

    def fileno(self) -> int:
        return -1

    def notify(self, callback: Any) -> None: ...

    def receive(self) -> None: ...

    def release(self, offset: int, nbytes: int) -> None: ...

    def close(self) -> None: ...


class OtherWords:
    def __init__(self, past: Past, rank: int, known: dict[int, int]) -> None:
        self._past, self._rank, self._known = past, rank, known

    def __getitem__(self, at: int) -> int:
        return self._known[at] if at in self._known else self._past.read("word", self._rank, at)


class Mapped:
    """Another member's memory, which is read when it is used."""

    def __init__(self, fetch: Callable[[], np.ndarray[Any, Any]]) -> None:
        self._fetch = fetch

    def view(self, dtype: Any) -> Mapped:
        return Mapped(lambda: self._fetch().view(dtype))

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray[Any, Any]:
        return self._fetch()


class Other(OtherShared):
    def __init__(self, past: Past, rank: int, readable: bool, taken: bool, known: dict[int, int]) -> None:
        self.readable = readable
        self._taken = taken
        self.words: Any = OtherWords(past, rank, known)
        self._past, self._rank = past, rank

    def _fetch(self, name: str, at: int, nbytes: int) -> np.ndarray[Any, Any]:
        words = [self._past.read(name, self._rank, at + k) or bytes(WORD) for k in range(0, nbytes, WORD)]
        return np.frombuffer(b"".join(words), np.uint8)

    def view(self, offset: int, nbytes: int) -> Any:
        return Mapped(lambda: self._fetch("shared", offset, nbytes))

    def read(self, address: int, into: Any) -> None:
        if self._past.read("dead", self._rank):
            if not self._taken:
                raise ProcessLookupError(errno.ESRCH, "it is no more")
            into[:] = LEAVINGS
            return
        into.view(np.uint8)[:] = self._fetch("private", address, into.nbytes)

    def is_alive(self) -> bool:
        return not self._past.read("dead", self._rank)

    def ring(self) -> None: ...

    def close(self) -> None: ...


class Sum:
    """Arithmetic that takes its arguments one by one."""

    def combine(self, out: Any, a: Any, b: Any) -> None:
        raise AssertionError

    def finish(self, x: Any) -> None:
        raise AssertionError

    def fold(self, out: Any, parts: list[Any], final: bool) -> None:
        out[:] = sum(map(np.asarray, parts))


# --- a member ---------------------------------------------------------------------------------------------------------


def given(rank: int, call: int, count: int) -> np.ndarray[Any, Any]:
    return np.arange(1, count + 1) * 10**rank + 1000 * (call + 1)


class MemberHost:
    """The engine of a member, as far as transfers go."""

    def __init__(self) -> None:
        self.ended: list[Pull] = []

    def transfer_done(self, transfer: Any) -> None:
        self.ended.append(transfer)

    def transfer_mismatch(self, transfer: Any, uid: int) -> None:
        raise Violation(f"a mismatch with {uid}, where all calls match")

    def transfer_failed(self, transfer: Any, error: Exception) -> None:
        raise error

    def flow_broken(self, uid: int, error: Exception, *, lacking: bool) -> None:
        raise Violation(f"{uid} should be readable")

    def flush_lazy_soon(self) -> None: ...

    def step_soon(self) -> None: ...


class Peer:
    """One member's program: calls, and what the fence, a verdict or its own caller does to them."""

    def __init__(self, past: Past, s: Scenario) -> None:
        self._past, self._s = past, s
        self.rank = past.rank
        self._count = s.world if s.large or s.collective != "all_reduce" else 1
        out = self._count * (s.world if s.collective == "all_gather" else 1) if not s.in_place else 0
        self._need = (self._count + out) * WORD
        private = past.memory("private", self._need * s.calls)
        self._private = private
        self._base = private.__array_interface__["data"][0]
        self._host = MemberHost()
        self._executor = Executor(self._host)
        self._open: dict[int, tuple[Pull, Any, Any]] = {}
        self._begun = 0
        self._heard = SILENCE
        self.outcomes: dict[int, str] = {}

    def address(self, data: Any) -> int:
        return int(data.__array_interface__["data"][0]) - self._base

    def run(self) -> None:
        past, s = self._past, self._s
        self._lane = self._enter_epoch()
        while True:
            while len(self._open) < s.at_once and self._begun < s.calls:
                self._begin(self._begun)
                self._begun += 1
            past.ends_step(self._knows)
            found = past.read("inbox", self.rank)
            if found != self._heard:
                self._heard = found
                if found == FENCE:
                    self._fenced()
                    return
                self._end_first(found)
            self._step()

    def _enter_epoch(self) -> Lane:
        own, known = Own(self._past, ROOM_BYTES), {ASLEEP: 0}
        own.words.quiet = not self._s.late
        others = {r: Other(self._past, r, self._s.readable, self._s.taken, known) for r in range(self._s.world) if r != self.rank}
        lane = Lane(Commons(own), EPOCH, self.rank, others)
        if own.words.quiet:
            known.update(own.words)  # everyone's are alike
        own.words.quiet = False
        return lane

    @property
    def is_idle(self) -> bool:
        """Nothing is left to do, unless the master asks."""
        return not self._open and self._begun == self._s.calls

    def _step(self) -> None:
        self._executor.step()
        for pull in self._host.ended:
            self._commit(next(n for n, (p, _, _) in self._open.items() if p is pull))
        self._host.ended.clear()

    def _begin(self, n: int) -> None:
        s = self._s
        memory = self._private[n * self._need :][: self._need].view(np.int64)
        x, y = memory[: self._count], memory[self._count :]
        x[:] = given(self.rank, n, self._count)
        y[:] = 0
        todo = errand(s.collective, s.world, self.rank, 0, self._count, WORD)
        target = x if s.in_place else y[: self._count] if s.collective == "all_reduce" else y
        pull = Pull(self._executor, CallKey(EPOCH, n, 0), 77, self._lane, range(s.world), todo, x, target, Sum(), commits=s.atomic)
        self._open[n] = pull, x, target
        self._executor.start(pull)

    def _fenced(self) -> None:
        """Stop, report, and do what is decided."""
        past = self._past
        for pull, _, _ in list(self._open.values()):
            self._executor.halt(pull)
        past.write(tuple(self.outcomes.get(n) or self.says(self._open[n][0]) for n in range(self._begun)), "report", self.rank)
        decision = 0
        while not decision:
            past.ends_step(self._knows)
            decision = past.read("decision")
        for n in list(self._open):
            self._commit(n) if dict(decision).get(n) == "C" else self._abort(n)

    def says(self, pull: Pull) -> str:
        """What it reports of an open call."""
        return "C" if pull.committed else "R"

    def _end_first(self, why: int) -> None:
        """The first call has failed elsewhere, or its caller has had enough of it."""
        pull = self._open[0][0] if 0 in self._open else None
        if pull is None:
            return
        if why == CANCEL and pull.ready:
            if not pull.committed:
                self._past.write(1, "overdue")  # the master is to decide
            return
        if why == ABORT and pull.committed:
            raise Violation(f"member {self.rank} has committed a call that another one has ended")
        self._abort(0)
        if why == CANCEL:
            self._past.write(1, "failed")

    def _commit(self, n: int) -> None:
        pull, x, y = self._open.pop(n)
        pull.conclude()
        pull.forget()
        members = [given(r, n, self._count) for r in range(self._s.world)]
        want = sum(members) if self._s.collective == "all_reduce" else np.concatenate(members)
        if y.tolist() != want.tolist():
            raise Violation(f"member {self.rank} returns {y.tolist()} from call {n}, not {want.tolist()}")
        self.outcomes[n] = "C"
        x[:] = y[:] = LEAVINGS - n  # its caller goes on with them

    def _abort(self, n: int) -> None:
        pull, x, y = self._open.pop(n)
        if self._executor.transfer(pull.key):
            self._executor.halt(pull)
        pull.withdraw()
        pull.forget()
        if self._s.atomic and x.tolist() != given(self.rank, n, self._count).tolist():
            raise Violation(f"member {self.rank} aborts call {n} and has {x.tolist()} as its input")
        self.outcomes[n] = "A"
        x[:] = y[:] = LEAVINGS - n

    def _knows(self) -> Hashable:
        lane = self._lane
        own = (tuple(lane._last), tuple(map(tuple, lane._kept)), tuple(sorted(lane._found.items())), tuple(lane.commons._taken.items()))
        calls = tuple((n, freeze(vars(pull)), y.tobytes()) for n, (pull, _, y) in self._open.items())
        return own, calls, tuple(self.outcomes.items()), self._private.tobytes(), self._heard


def freeze(value: Any) -> Hashable:
    """What can differ between two runs of the same member."""
    if value is None or isinstance(value, (bool, int, str, bytes)):
        return value
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, (tuple, list)):
        return tuple(map(freeze, value))
    if isinstance(value, dict):
        return tuple((k, freeze(v)) for k, v in value.items())
    if hasattr(value, "gi_frame"):
        frame = value.gi_frame
        return frame and (
            frame.f_lasti,
            tuple((k, freeze(v)) for k, v in frame.f_locals.items() if k != "self"),
            freeze(value.gi_yieldfrom),
        )
    return type(value).__name__


# --- the search -------------------------------------------------------------------------------------------------------

ROOM_BYTES = 8192
GONE = -1


@dataclass(slots=True)
class Node:
    """What a member has done and read."""

    rank: int
    history: tuple[Any, ...]
    next: Op | None
    idle: bool
    outcomes: dict[int, str]
    broken: str


class Search:
    """Every state that the members can come to."""

    def __init__(self, s: Scenario) -> None:
        self._s = s
        self._nodes: list[Node] = []
        self._known: dict[Hashable, int] = {}
        self._children: dict[tuple[int, Any], int] = {}
        self._places: dict[Hashable, int] = {}
        self._contents: list[tuple[Any, ...]] = [()]
        """Of all memory, by place"""
        self._numbers: dict[tuple[Any, ...], int] = {(): 0}
        self._puts: dict[tuple[int, int, Any], int] = {}

    def node(self, rank: int, history: tuple[Any, ...]) -> int:
        """The member with this past."""
        past = Past(rank, history)
        broken = ""
        peer = Peer(past, self._s)
        try:
            with addresses_of(peer):
                peer.run()
        except Pause:
            pass
        except Violation as e:
            broken = str(e)
        if past.knows is not None and (rank, past.knows) in self._known:
            return self._known[rank, past.knows]
        self._nodes.append(Node(rank, history, past.next, past.next is None or peer.is_idle, dict(peer.outcomes), broken))
        number = len(self._nodes) - 1
        if past.knows is not None:
            self._known[rank, past.knows] = number
        return number

    def child(self, number: int, value: Any) -> int:
        """The member after its next op."""
        key = number, value
        if key not in self._children:
            node = self._nodes[number]
            self._children[key] = self.node(node.rank, (*node.history, value))
        return self._children[key]

    def get(self, memory: int, *where: Hashable) -> Any:
        at = self._places.setdefault(where, len(self._places))
        content = self._contents[memory]
        return content[at] if at < len(content) else 0

    def put(self, memory: int, value: Any, *where: Hashable) -> int:
        at = self._places.setdefault(where, len(self._places))
        key = memory, at, value
        if key not in self._puts:
            content = self._contents[memory]
            content += (0,) * (at + 1 - len(content))
            content = (*content[:at], value, *content[at + 1 :])
            self._puts[key] = number = self._numbers.setdefault(content, len(self._contents))
            if number == len(self._contents):
                self._contents.append(content)
        return self._puts[key]

    def step(self, memory: int, number: int) -> tuple[int, int, str]:
        """What memory and a member are after its next op, and what that was."""
        op = self._nodes[number].next
        assert op
        rank, (kind, where, value) = self._nodes[number].rank, op
        if kind == "write":
            return self.put(memory, value, *where), self.child(number, None), f"{rank} writes {where} = {value}"
        seen = self.get(memory, *where)
        return memory, self.child(number, seen), f"{rank} reads {where}: {seen}"

    def is_alone(self, op: Op) -> bool:
        """Whether an op needs no moment of its own, but is done with the one before it: nobody else cares."""
        name, *place = op[1]
        coarse = self._s.coarse and ((name == "word" and place[1] % 8) or name in ("dead", "shared"))
        return bool(coarse or (name == "private" and not (self._s.large and self._s.readable)))

    def turn(self, memory: int, number: int) -> tuple[int, int, str]:
        """One op; a look into the inbox goes with the next op, since it might as well be as late."""
        texts: list[str] = []
        met: set[tuple[int, int]] = set()
        over = False
        while (memory, number) not in met and (op := self._nodes[number].next) and not (over and not self.is_alone(op)):
            met.add((memory, number))
            over = over or op[1][0] != "inbox"
            memory, number, text = self.step(memory, number)
            texts.append(text)
        return memory, number, "; ".join(texts)

    def successors(self, state: State) -> Iterator[tuple[str, State]]:
        memory, *members = state
        for rank, number in enumerate(members):
            if number == GONE or not self._nodes[number].next:
                continue
            then, after, text = self.turn(memory, number)
            yield text, (then, *members[:rank], after, *members[rank + 1 :])
        yield from self._befalls(memory, members)

    def _befalls(self, memory: int, members: list[int]) -> Iterator[tuple[str, State]]:
        s, ranks = self._s, range(self._s.world)
        live = [r for r in ranks if members[r] != GONE]
        if len(live) == s.world:
            for r in s.mortal:
                yield f"{r} dies", (self.put(memory, 1, "dead", r), *members[:r], GONE, *members[r + 1 :])
        inbox = {r: self.get(memory, "inbox", r) for r in live}
        if s.cancel is not None and not inbox[s.cancel]:
            yield f"{s.cancel} is cancelled", (self.put(memory, CANCEL, "inbox", s.cancel), *members)
        for r in live:
            if (len(live) < s.world or self.get(memory, "overdue")) and inbox[r] != FENCE:
                yield f"{r} is fenced", (self.put(memory, FENCE, "inbox", r), *members)
            elif self.get(memory, "failed") and not inbox[r]:
                yield f"{r} is told to abort", (self.put(memory, ABORT, "inbox", r), *members)
        reports = {r: self.get(memory, "report", r) for r in live}
        if not self.get(memory, "decision") and all(isinstance(report, tuple) for report in reports.values()):
            decision = rule(reports, ends=bool(self.get(memory, "overdue")), loss=len(live) < s.world)
            yield f"it is decided: {decision}", (self.put(memory, decision, "decision"), *members)

    def broken(self, state: State) -> str:
        """Which promise is, if any."""
        live = [self._nodes[number] for number in state[1:] if number != GONE]
        for node in live:
            if node.broken:
                return node.broken
        if self._s.atomic:
            for n in range(self._s.calls):
                if len({node.outcomes[n] for node in live if n in node.outcomes}) > 1:
                    return f"call {n} is committed on some members only"
        return ""

    def ended(self, state: State) -> bool:
        return all(number == GONE or self._nodes[number].idle for number in state[1:])

    def run(self) -> int:
        """Returns how many states there are.

        Raises:
            Violation: a promise is broken in one of them; how it came to that.
        """
        first: State = (0, *(self.node(r, ()) for r in range(self._s.world)))
        came: dict[State, tuple[State, str] | None] = {first: None}
        before: dict[State, list[State]] = {}
        todo, ended = deque([first]), []

        def trace(state: State) -> str:
            steps: list[str] = []
            where: State | None = state
            while where and (origin := came[where]):
                where, text = origin
                steps.append(text)
            return "\n".join(reversed(steps))

        while todo:
            state = todo.popleft()
            if fault := self.broken(state):
                raise Violation(f"{fault}\n{trace(state)}")
            if self.ended(state):
                ended.append(state)
            for text, after in self.successors(state):
                if after == state:
                    continue
                before.setdefault(after, []).append(state)
                if after not in came:
                    came[after] = state, text
                    todo.append(after)
        assert ended
        lively, left = set(ended), ended
        while left:
            for state in before.get(left.pop(), ()):
                if state not in lively:
                    lively.add(state)
                    left.append(state)
        if stuck := came.keys() - lively:
            raise Violation(f"members wait for ever\n{trace(next(s for s in came if s in stuck))}")
        return len(came)


Explore = Callable[[Scenario], int]
State = tuple[int, ...]
"""Number of what is in all memory, and of what each member has done"""


def rule(reports: dict[int, Any], *, ends: bool, loss: bool) -> tuple[tuple[int, str], ...]:
    """What the master decides."""
    members = tuple(Member(r, f"P{r}", "here") for r in reports)
    told = {}
    for r, report in reports.items():
        calls = tuple(CallReport(CallId(None, n), state, EPOCH.number, 0, False, b"") for n, state in enumerate(report))
        told[r] = CommReport(0, EPOCH, members, 1, len(report), (), calls, (), 9, 0)
    first = CallId(None, 0)
    ruling = decide(
        told,
        verdicts={first: "A"} if ends else {},
        failures={},
        cause=(Reason.LOSS, ""),
        loss=loss,
        resolve=lambda call, payloads: b"",
    )
    return tuple((d.call.n, d.verdict) for d in ruling.decisions) or ((-1, ""),)


@contextmanager
def addresses_of(peer: Peer) -> Iterator[None]:
    """Addresses are places in the member's own memory, the same in every run."""
    before, pulls._address = pulls._address, peer.address
    try:
        yield
    finally:
        pulls._address = before


@pytest.fixture
def explore(monkeypatch: pytest.MonkeyPatch) -> Explore:
    """Searches with slots of one word and few of them."""

    def go(s: Scenario) -> int:
        line = 8 * WORD
        monkeypatch.setattr(lanes, "RING", s.slots)
        monkeypatch.setattr(lanes, "SMALL", line)
        monkeypatch.setattr(lanes, "LANES", 1)
        monkeypatch.setattr(lanes, "_TABLE", WORD)  # behind the word for the bell
        monkeypatch.setattr(lanes, "_LANES_AT", line)
        monkeypatch.setattr(lanes, "_WORDS_BYTES", line * (s.slots + 1))
        monkeypatch.setattr(lanes, "_LANE_BYTES", line * (2 * s.slots + 1))
        monkeypatch.setattr(lanes, "ROOM", line * (2 * s.slots + 2))
        monkeypatch.setattr(pulls, "SMALL", 0 if s.large else line)
        monkeypatch.setattr(pulls, "ALIGN", WORD)
        return Search(s).run()

    return go


SCENARIOS = {
    "a crash": Scenario(2, 4, mortal=(0, 1)),
    "a crash in large calls": Scenario(2, 2, large=True, mortal=(0, 1)),
    "a crash in large calls in place": Scenario(2, 2, large=True, in_place=True, mortal=(0, 1)),
    "a process that takes the number of a dead one": Scenario(2, 2, large=True, taken=True, mortal=(0, 1)),
    "a crash with several calls at once": Scenario(2, 3, at_once=2, slots=1, mortal=(0, 1)),
    "more calls at once than slots": Scenario(2, 4, at_once=3, slots=1),
    "members that come into the epoch one after the other": Scenario(2, 2, late=True),
    "a cancelled call": Scenario(2, 2, cancel=0),
    "a cancelled large call in place": Scenario(2, 2, large=True, in_place=True, cancel=1),
    "a cancelled plain call": Scenario(2, 2, atomic=False, large=True, cancel=0),
    "a cancelled plain call in place": Scenario(2, 2, atomic=False, large=True, in_place=True, cancel=1),
    "a cancelled plain call of members who cannot read": Scenario(2, 2, atomic=False, large=True, readable=False, cancel=1),
    "plain calls": Scenario(2, 3, atomic=False, slots=1),
    "large all_gathers": Scenario(2, 3, collective="all_gather", large=True, mortal=(0, 1)),
    "plain large all_gathers": Scenario(2, 3, atomic=False, collective="all_gather", large=True, slots=1),
    "three members and a crash": Scenario(3, 1, coarse=True, mortal=(0,)),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_order(name: str, explore: Explore, record_property: Callable[[str, object], None]) -> None:
    record_property("states", explore(SCENARIOS[name]))


# --- planted faults ---------------------------------------------------------------------------------------------------


def no_looking(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Lane, "is_free", lambda self, n: True)


def no_line(patch: pytest.MonkeyPatch) -> None:
    def is_free(self: Lane, n: int) -> bool:
        last = self._last[n % lanes.RING]
        return all(last >> 4 < self._state(r, n % lanes.RING) >> 4 or self.phase(r, (last >> 4) - 1) >= OUT for r in self.others if last)

    patch.setattr(Lane, "is_free", is_free)


def in_before_input(patch: pytest.MonkeyPatch) -> None:
    enter = Lane.enter

    def early(self: Lane, n: int, *what: int) -> None:
        self.publish(n, lanes.IN)
        enter(self, n, *what)

    patch.setattr(Lane, "enter", early)


def out_before_reading(patch: pytest.MonkeyPatch) -> None:
    work = Pull._work

    def late(self: Pull) -> Iterator[bool]:
        self._lane.publish(self._n, OUT)
        yield True
        yield from work(self)

    patch.setattr(Pull, "_work", late)


def done_before_the_result(patch: pytest.MonkeyPatch) -> None:
    work = Pull._work

    def early(self: Pull) -> Iterator[bool]:
        self._lane.publish(self._n, DONE)
        yield from work(self)

    patch.setattr(Pull, "_work", early)


def not_withdrawn(patch: pytest.MonkeyPatch) -> None:
    publish = Lane.publish
    patch.setattr(Lane, "publish", lambda self, n, phase: phase == VOID or publish(self, n, phase))


def not_confirmed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Pull, "_confirm", lambda self: iter(()))


def done_reported_as_committed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Peer, "says", lambda self, pull: "C" if pull.ready else "R")


def committed_only_if_all_saw_it(patch: pytest.MonkeyPatch) -> None:
    def all_saw_it(reports: dict[int, Any], **why: bool) -> tuple[tuple[int, str], ...]:
        return ((0, max(report[0] if report else "A" for report in reports.values())),)

    patch.setitem(globals(), "rule", all_saw_it)


FAULTS: dict[Callable[[pytest.MonkeyPatch], None], tuple[Scenario, str]] = {
    no_looking: (Scenario(2, 2, slots=1), "returns|for ever"),
    no_line: (Scenario(2, 3, at_once=2, slots=1), "returns"),
    in_before_input: (Scenario(2, 2), "mismatch|returns"),
    out_before_reading: (Scenario(2, 2, atomic=False, slots=1), "returns"),
    done_before_the_result: (Scenario(2, 1, large=True), "returns"),
    not_withdrawn: (Scenario(2, 2, atomic=False, large=True, cancel=0), "returns"),
    not_confirmed: (Scenario(2, 1, large=True, taken=True, mortal=(0,)), "returns"),
    done_reported_as_committed: (Scenario(2, 1, cancel=0), "returns"),
    committed_only_if_all_saw_it: (Scenario(2, 1, cancel=0), "committed on some members only"),
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_planted_faults_are_found(fault: Callable[[pytest.MonkeyPatch], None], explore: Explore, monkeypatch: pytest.MonkeyPatch) -> None:
    scenario, found = FAULTS[fault]
    fault(monkeypatch)
    with pytest.raises(Violation, match=found):
        explore(scenario)
