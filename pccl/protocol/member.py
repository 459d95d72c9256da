"""A member's side of one communicator: the order of its calls, and how each of them ends.

The counterpart of the master's ledger. A call is HELD or RUNNING, then DONE when this member has its result, and ends by a verdict, by the
decision of an epoch change, or, before it is done, by the member's own word (deadline, cancellation), which is final for all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import xxhash

from pccl.core import codec
from pccl.core.errors import InternalError, InvalidArgument
from pccl.core.messages import (
    Agreed,
    CallReport,
    CommReport,
    Decision,
    Done,
    Enter,
    Failed,
    Flag,
    Leave,
    Leaving,
    Link,
    NewEpoch,
    Overdue,
    Reason,
    TagUse,
    UpdateAsk,
    Verdict,
)
from pccl.core.types import LOCAL_CALLS, CallId, Epoch, Pair, Tag, View
from pccl.protocol.progress import Progress
from pccl.protocol.record import MOVING, OPEN, Host, Op, Outcome, Record, State, Stored

ANNOUNCE_AFTER = 0.01
"""Seconds that a call may take before the master is told of it; most are over by then."""


def view_of(m: NewEpoch, uid: int) -> View:
    """The view of a new epoch that the member with this uid has."""
    rank = next((i for i, x in enumerate(m.members) if x.uid == uid), -1)
    return View(m.epoch, rank, m.members, m.min_world_size, m.joined, m.left, m.lost)


class Membership:
    """One communicator at one member."""

    def __init__(
        self,
        host: Host,
        comm: int,
        view: View,
        *,
        uid: int,
        fresh: bool = False,
        next_index: int = 0,
        tags: Iterable[TagUse] = (),
        ack: int = 0,
        max_in_flight: int = 4096,
        grace: float = 3.0,
        takeover_timeout: float = 15.0,
    ) -> None:
        self.host = host
        self.comm = comm
        self.view = view
        self.uid = uid
        self.fresh = fresh
        """An admission has just ended: the next call, if it is an update, returns at once and takes no place."""
        self.broken: tuple[Link, ...] = ()
        self.near = False
        """Every two members share memory."""
        self.departed: dict[int, bool] = {}
        """Uids of former members -> whether they left of their own will"""
        self.next_index = next_index
        self.ack = ack
        """Number of the last verdict that this member has"""
        self.stopped = False
        self.synced = 0
        """Number of the communicator's last sync_state"""
        self.took_part = 0
        """Number of the last one that this member took part in"""
        self.last_skip = -1
        """Index of the last update that this member skipped"""
        self.next_uid = 0
        self._uses: dict[tuple[Tag, Pair | None], int] = {(t.tag, t.pair): t.uses for t in tags}
        self._records: dict[CallId, Record] = {}
        """Open calls, and ended ones whose verdict not all members have."""
        self._open: dict[CallId, Record] = {}
        self._queue: deque[Record] = deque()
        self._draining = False
        self._settled: deque[Record] = deque()
        """Those of them that have ended with a verdict, by its number."""
        self._skipped: deque[Record] = deque()
        """Updates that were skipped, until everyone has passed them."""
        self._local: deque[tuple[CallId, int, int]] = deque(maxlen=LOCAL_CALLS)
        """The last calls that this member has committed in shared memory, their epochs' numbers, and what they said of
        newcomers: others may not be so far"""
        self._stored: dict[CallId, Stored] = {}
        self._bits: dict[int, int] = {}
        """index -> what the verdict of that untagged call said of newcomers"""
        self._unannounced: deque[Record] = deque()
        self._expired: list[Record] = []
        """Calls that their own member has ended, or wants to end"""
        self._update: Record | None = None
        self._leaving: dict[int, Progress] = {}
        self._left = False
        self._news = False
        self._entered_before = Progress()
        """What some survivor had entered when the epoch began, as far as this one can tell"""
        self._max_in_flight = max_in_flight
        self._grace = grace
        self._takeover_timeout = takeover_timeout

    @property
    def epoch(self) -> Epoch:
        """The present one."""
        return self.view.epoch

    @property
    def in_flight(self) -> int:
        """Calls that have not ended."""
        return len(self._open) + len(self._queue)

    # --- what the caller does ---------------------------------------------------------------------------------------

    def enter(self, record: Record, now: float) -> None:
        """Make a call; the record is new.

        Raises:
            InvalidArgument: too many are in flight, or one with the same tag.
        """
        op = record.op
        if self.in_flight >= self._max_in_flight:
            raise InvalidArgument(f"{op.description}: {self._max_in_flight} calls are in flight already, as many as max_in_flight allows")
        pending = [r.op for r in (*self._open.values(), *self._queue) if not r.told] if op.tag is not None else []
        if any((other.tag, other.pair) == (op.tag, op.pair) for other in pending):
            raise InvalidArgument(f"tag: {op.tag!r} is in use by a call that has not ended; a tag is free again when its call has")
        if self.stopped or self._update or self._queue:
            self._queue.append(record)
        else:
            self._begin(record, now)

    @property
    def is_clear(self) -> bool:
        """Whether nothing is under way, and nothing known of what is to come."""
        held = self.stopped or self._open or self._queue or self.fresh or self._news or self._leaving or self._left or self._stored
        return not held

    @property
    def has_way(self) -> bool:
        """Whether an untagged call that is made now begins at once, and nothing is known of it."""
        held = self.stopped or self._update or self._queue or self.fresh or self._news or self._leaving or self._stored
        return not held and self.view.world_size >= self.view.min_world_size and self.in_flight < self._max_in_flight

    def resume(self, record: Record, call: CallId, now: float) -> None:
        """Take on a call that was begun without a record, in the place before `next_index` that is its."""
        record.state, record.id, record.attempts = State.RUNNING, call, 1
        record.began, record.number = now, self.epoch.number
        self._records[call] = self._open[call] = record
        self._unannounced.append(record)

    def complete(self, record: Record, now: float) -> None:
        """The call's result is here, its sends are out, and nothing holds its memory."""
        if record.state is not State.RUNNING or self.stopped:
            return
        op = record.op
        if self._ends_itself(op):
            if record.announced:
                self.host.send(Done(self.comm, self.epoch, record.id, self._sign(op), op.description, b"", self.ack))
            if op.atomic:
                self.committed(record.id, op.waiting)
            self._end(record, State.ENDED, Outcome(True, self.view), now)
            return
        record.state = State.DONE
        payload = b"" if record.payload else op.payload()
        flags = 0 if record.announced else self._after_skip(record)
        self.host.send(Done(self.comm, self.epoch, record.id, self._sign(op), op.description, payload, self.ack, flags))
        record.announced = True

    def committed(self, call: CallId, waiting: bool) -> None:
        """A call is committed in shared memory."""
        self._local.append((call, self.epoch.number, int(waiting)))
        self._bits[call.n] = int(waiting)
        if len(self._bits) > 2 * LOCAL_CALLS:
            self._forget_bits()
        self._pass_skipped(call.n)

    def give(self, record: Record) -> None:
        """What the member gives to the call took time to make, and is there now."""
        if record.state is State.RUNNING and not self.stopped:
            self._announce(record, record.op.payload())

    def expire(self, record: Record, reason: int, detail: str, now: float) -> None:
        """The call's deadline has passed, its caller cancelled it, its round's body raised, or a frame does not match."""
        if record.expired or record.op.decided or (record.state is State.DONE and reason == Reason.MISMATCH):
            return
        record.expired, record.expired_at = (reason, detail), now
        self._expired.append(record)
        if record.state is State.QUEUED:
            self._tell(record, Outcome(False, self.view, reason, detail, by=self.uid))
        elif self.stopped:
            pass  # what was reported stands until the decision; if that is to try again, its own word goes out then
        elif record.op.exposed:
            if not record.announced:
                self._announce(record, b"")
            self._overdue(record)
        elif record.state in (State.HELD, State.RUNNING):
            self._fail(record, now)
        elif record.state is State.DONE:
            record.state = State.OVERDUE
            self._overdue(record)

    def leave(self) -> None:
        """Leave in the place of the next update; no call is open."""
        self._left = True
        commits = tuple(call.n for call, number, _ in self._local if number == self.epoch.number)
        self.host.send(Leave(self.comm, self.epoch, self.next_index, self._tag_uses(), commits))

    # --- what the master says ---------------------------------------------------------------------------------------

    def abandon(self) -> list[Record]:
        """This peer is out of its group: returns the calls whose callers have not been told how they ended."""
        owed = [r for r in self._expired if r.owes_finish]
        left = [r for r in (*self._open.values(), *owed, *self._queue) if not r.told]
        for record in left:
            record.told = True
        self._open.clear()
        self._expired.clear()
        self._queue.clear()
        self.stopped = True
        return left

    def receive(self, m: object, now: float) -> None:
        """A message about this communicator from the master that this peer obeys."""
        if isinstance(m, Verdict):
            self._verdict(m, now)
        elif isinstance(m, NewEpoch):
            self._new_epoch(m, now)
        elif isinstance(m, Agreed):
            record = self._open.get(m.call)
            if record and m.epoch == self.epoch and record.state is State.RUNNING:
                record.payload = m.payload
                self.host.agreed(self.comm, record, m.payload)
        elif isinstance(m, Leaving) and m.epoch == self.epoch:
            self._leaving[m.uid] = Progress.of(m.index, m.uses)

    def stop(self) -> CommReport:
        """Stop every call, and say what there is to say about each."""
        if not self.stopped:
            self.stopped = True
            for record in self._open.values():
                if record.state in MOVING:
                    self.host.halt(self.comm, record)
        calls = []
        letters = {State.DONE: "D", State.OVERDUE: "D", State.COMMITTED: "C", State.ABORTED: "A", State.SKIPPED: "U"}
        for r in self._records.values():
            payload = r.payload or (r.op.payload() if r.state in (State.DONE, State.OVERDUE) else b"")
            if r.op.decided:
                calls.append(CallReport(r.id, "C", r.number, int(r.op.waiting), False, payload))
            else:
                calls.append(CallReport(r.id, letters.get(r.state, "R"), r.number, r.waiting, r.admitted, payload))
        calls += [CallReport(call, "C", number, waiting, False, b"") for call, number, waiting in self._local if call not in self._records]
        return CommReport(
            self.comm,
            self.epoch,
            self.view.members,
            self.view.min_world_size,
            self.next_index,
            self._tag_uses(),
            tuple(calls),
            self.broken,
            self.next_uid,
            self.synced,
        )

    def _verdict(self, m: Verdict, now: float) -> None:
        if m.epoch != self.epoch:
            return
        self.ack = max(self.ack, m.seq)
        self._forget(m.low)
        if self._news and self._is_new(m.call):
            self._news = False
        outcome = Outcome(m.verdict == "C", self.view, m.reason, m.detail, m.payload, m.by, m.missing, m.claims)
        record = self._records.get(m.call)
        if record is None:
            if not self._passed(m.call):
                self._stored[m.call] = Stored(m.verdict, outcome, m.waiting, m.seq)
        elif m.verdict != "N":
            self._learn(record, outcome, m.waiting, m.seq, now)
        if m.verdict == "A":  # it is halted now: what tells the others so is the last that they get of it
            self.host.discard(self.comm, m.epoch, m.call)
        self._release(now)

    def _new_epoch(self, m: NewEpoch, now: float) -> None:
        if m.epoch <= self.epoch:
            return
        old = self.view
        self.view = view_of(m, self.uid)
        old_members = {x.uid for x in old.members}
        self.departed.update({**{x.uid: True for x in m.left}, **{x.uid: False for x in m.lost}})
        self.broken, self.next_uid, self.synced, self.near = m.broken, m.next_uid, m.synced, m.near
        self.host.epoch_changed(self.comm, old, self.view)  # which complains of links that are missing and not known to be broken
        self.ack = max(self.ack, m.seq)
        self._leaving = {}
        self._news, self._entered_before = m.news, Progress(m.floor, dict(self._uses))
        self.fresh = self.fresh or any(x.uid not in old_members for x in m.joined)
        again: list[Record] = []
        for d in m.decisions:
            self._apply(d, m.seq, again, now)
        self.stopped = False
        for record in again:
            self._restart(record, now)
        if self._left:
            self.leave()  # the master that was told may be no more
        self._check_update(now)
        self._drain(now)

    def _apply(self, d: Decision, seq: int, again: list[Record], now: float) -> None:
        """One decision of an epoch change."""
        outcome = Outcome(d.verdict == "C", self.view, d.reason, d.detail, d.payload)
        record = self._records.get(d.call)
        if record is None:
            if not self._passed(d.call):
                self._stored[d.call] = Stored(d.verdict, outcome, d.waiting, seq)
        elif d.verdict == "R" and record.state in OPEN and self._tries_again(record.op, outcome):
            again.append(record)
        else:
            if record.state in OPEN and d.admitted:
                record.admitted = self.fresh = True
            if outcome.committed and record.state in (State.HELD, State.RUNNING) and not (record.op.is_update or record.op.exposed):
                outcome = Outcome(False, self.view, Reason.MISMATCH, "other members skipped an update in this place")
            self._learn(record, outcome, d.waiting, seq, now)

    def _tries_again(self, op: Op, stopped: Outcome) -> bool:
        """Whether a call that an epoch change has stopped goes on after it. The same on all members."""
        gone = stopped.view.lost or stopped.view.left or stopped.reason in (Reason.LOSS, Reason.LINK, Reason.STALL, Reason.TAKEOVER)
        return (op.retry or (op.atomic and not gone)) and op.can_retry(self.view)  # else it was stopped for another call's sake

    # --- inside: the order of calls ---------------------------------------------------------------------------------

    def _begin(self, record: Record, now: float) -> None:
        """Give a call its place, and let it run if it may."""
        op = record.op
        fresh, self.fresh = self.fresh, False
        if op.is_update and fresh and op.tag is None:
            record.state = State.ENDED
            self._tell(record, Outcome(True, self.view))
            return
        record.state, record.id = State.HELD, self._next_id(op)
        record.began, record.number = now, self.epoch.number
        self._records[record.id] = record
        self._open[record.id] = record
        stored = self._stored.pop(record.id, None)
        retried = stored and stored.verdict == "R" and self._tries_again(op, stored.outcome)
        if stored and stored.verdict != "N" and not retried:
            self._learn(record, stored.outcome, stored.waiting, stored.seq, now)
        elif record.expired:
            self._fail(record, now)
        elif op.is_update:
            self._update = record
            record.state = State.RUNNING
            self._check_update(now)
        else:
            self._run(record, now)

    def _run(self, record: Record, now: float) -> None:
        """Begin an attempt, unless the call has to be held, or the group is too small."""
        if self.view.world_size < self.view.min_world_size:
            self._end(record, State.ENDED, Outcome(False, self.view, Reason.TOO_FEW), now)
            return
        held = (self._news and self._is_new(record.id)) or self._meets_leaver(record)
        record.state = State.HELD if held else State.RUNNING
        payload = record.op.payload()
        if held or payload:
            self._announce(record, payload)
        elif not record.announced:
            self._unannounced.append(record)
        if not held:
            record.attempts += 1
            self.host.start(self.comm, record)

    def _restart(self, record: Record, now: float) -> None:
        """The next attempt of a call, in a new epoch."""
        record.number, record.announced, record.payload = self.epoch.number, False, b""
        held, record.state = record.state is State.HELD, State.RUNNING
        if not held and not record.op.is_update:
            self.host.restore(self.comm, record)
        if record.expired:
            self._fail(record, now)
        elif not record.op.is_update:
            self._run(record, now)

    def _check_update(self, now: float) -> None:
        """Take an open update a step further: skip or announce it once the verdict of the call before it is known; it is done when all
        earlier calls have ended."""
        update = self._update
        if update is None or update.state is not State.RUNNING or self.stopped:
            return
        if not update.announced:
            before = self._records.get(CallId(None, update.id.n - 1))
            if before and (before.state in OPEN or (before.state is State.ABORTED and before.seq < 0)):
                return
            if self._bits.get(update.id.n - 1) == 0 and not (self._news and self._is_new(update.id)):
                self._end(update, State.SKIPPED, Outcome(True, self.view), now)
                return
            update.attempts += 1
            self._announce(update, update.op.payload())
        if len(self._open) == 1:
            self.complete(update, now)

    def _next_id(self, op: Op) -> CallId:
        if op.tag is None and op.pair is None:
            self.next_index += 1
            return CallId(None, self.next_index - 1)
        name = (op.tag, op.pair)
        n = self._uses.get(name, 0)
        self._uses[name] = n + 1
        return CallId(op.tag, n, op.pair)

    def _passed(self, call: CallId) -> bool:
        return Progress(self.next_index, self._uses).passed(call)

    def _is_new(self, call: CallId) -> bool:
        """Whether no survivor had entered the call when the epoch began, as far as this one can tell."""
        return not self._entered_before.passed(call)

    def _meets_leaver(self, record: Record) -> bool:
        pair = record.id.pair
        return any((pair is None or uid in pair) and not progress.passed(record.id) for uid, progress in self._leaving.items())

    def _release(self, now: float) -> None:
        """Held calls may begin once nothing holds them."""
        if self.stopped:
            return
        for record in [r for r in self._open.values() if r.state is State.HELD]:
            if not (self._news and self._is_new(record.id)) and not self._meets_leaver(record):
                self._run(record, now)

    # --- inside: how calls end --------------------------------------------------------------------------------------

    def _announce(self, record: Record, payload: bytes) -> None:
        op = record.op
        flags = Flag.RETRY * op.retry | Flag.SEALED * op.sealed | Flag.PLAIN * self._ends_itself(op) | self._after_skip(record)
        self.host.send(Enter(self.comm, self.epoch, record.id, self._sign(op), op.description, payload, flags))
        record.announced = True

    def _ends_itself(self, op: Op) -> bool:
        """Whether no verdict comes unless it fails."""
        return not op.atomic or (op.local and self.near)

    def _after_skip(self, record: Record) -> int:
        before = self._records.get(CallId(None, record.id.n - 1)) if record.untagged else None
        return int(Flag.AFTER_SKIP) if before and before.state is State.SKIPPED else 0

    def _fail(self, record: Record, now: float) -> None:
        """This member ends the call before it is done, for all."""
        assert record.expired
        reason, detail = record.expired
        if record.state is State.RUNNING:
            self.host.halt(self.comm, record)
        op = record.op
        self.host.send(Failed(self.comm, self.epoch, record.id, self._sign(op), op.description, reason, detail))
        if reason in (Reason.DEADLINE, Reason.MISMATCH):
            record.owes_finish = True
            self._settle(record, State.ABORTED)
            self._after(now)
        else:
            self._end(record, State.ABORTED, Outcome(False, self.view, reason, detail, by=self.uid), now)

    def _overdue(self, record: Record) -> None:
        assert record.expired
        self.host.send(Overdue(self.comm, self.epoch, record.id, *record.expired))

    def _learn(self, record: Record, outcome: Outcome, waiting: int, seq: int, now: float) -> None:
        """The master has spoken: the call ends, if this member has not ended it itself."""
        if record.seq < 0:
            record.seq, record.waiting = seq, waiting
            self._settled.append(record)
            if waiting >= 0 and record.untagged and record.op.atomic and not record.op.is_update:
                self._bits[record.id.n] = waiting
        if record.owes_finish:
            self._pay(record, outcome)
        elif record.state in OPEN:
            if outcome.committed and not (record.state in (State.DONE, State.OVERDUE) or record.op.is_update or record.op.exposed):
                raise InternalError(f"{record.op.description} {record.id}: a commit met a call that is {record.state.value} here")
            record.payload = outcome.payload or record.payload
            if record.state in MOVING and not outcome.committed and not self.stopped:
                self.host.halt(self.comm, record)
            if record.op.is_update and outcome.reason in (Reason.LOSS, Reason.LINK, Reason.STALL, Reason.TAKEOVER):
                outcome = Outcome(True, self.view)  # it has nothing to undo, and tells the news by what it returns
            self._end(record, State.COMMITTED if outcome.committed else State.ABORTED, outcome, now)
        self._check_update(now)

    def _pay(self, record: Record, outcome: Outcome) -> None:
        record.owes_finish = False
        self._tell(record, outcome)

    def _end(self, record: Record, state: State, outcome: Outcome, now: float) -> None:
        self._settle(record, state)
        self._tell(record, outcome)
        self._after(now)

    def _tell(self, record: Record, outcome: Outcome) -> None:
        """Once: what expires while it is queued ends for its caller before it has its place."""
        if not record.told:
            record.told = True
            self.host.finish(self.comm, record, outcome)

    def _settle(self, record: Record, state: State) -> None:
        """Move a call from the open ones to those that are remembered as long as somebody may need that."""
        record.state = state
        self._open.pop(record.id, None)
        if self._update is record:
            self._update = None
        if state is State.ENDED:
            self._records.pop(record.id, None)
        elif state is State.SKIPPED:
            self.last_skip = record.id.n
            self._skipped.append(record)
        elif state is State.COMMITTED and record.untagged:
            self._pass_skipped(record.id.n)

    def _pass_skipped(self, n: int) -> None:
        """Everyone has entered this untagged call."""
        while self._skipped and self._skipped[0].id.n < n:
            self._records.pop(self._skipped.popleft().id, None)

    def _after(self, now: float) -> None:
        """A call has ended: an update may have waited for that."""
        self._forget_bits()
        self._check_update(now)
        self._drain(now)

    def _forget_bits(self) -> None:
        for index in [i for i in self._bits if i < self.next_index - 2]:
            del self._bits[index]

    def _drain(self, now: float) -> None:
        """Begin the calls that had to wait."""
        if self._draining:
            return  # a call that ends at once comes back here
        self._draining = True
        while self._queue and not self.stopped and not self._update:
            self._begin(self._queue.popleft(), now)
        self._draining = False

    def _forget(self, low: int) -> None:
        """Verdicts up to this one have reached everyone."""
        while self._settled and self._settled[0].seq <= low:
            record = self._settled.popleft()
            if record.state not in OPEN:
                self._records.pop(record.id, None)

    # --- time -------------------------------------------------------------------------------------------------------

    def timer(self) -> float | None:
        """When `tick` is due."""
        while self._unannounced and (self._unannounced[0].announced or self._unannounced[0].state is not State.RUNNING):
            self._unannounced.popleft()
        due = self._unannounced[0].began + ANNOUNCE_AFTER if self._unannounced else None
        if not self._expired:
            return due
        self._expired = [r for r in self._expired if r.owes_finish or r.state in OPEN or r.state is State.QUEUED]
        times = [
            r.expired_at + (self._grace if r.owes_finish else self._takeover_timeout) for r in self._expired if r.state is not State.QUEUED
        ]
        return min(times if due is None else [due, *times], default=None)

    def tick(self, now: float) -> None:
        """Announce calls that take a while, and stop waiting for what does not come."""
        while self._unannounced and self._unannounced[0].began + ANNOUNCE_AFTER <= now:
            record = self._unannounced.popleft()
            if record.state is State.RUNNING and not record.announced and not self.stopped and record.op.sealed:
                self._announce(record, b"")
        for record in [r for r in self._expired if r.owes_finish and r.expired_at + self._grace <= now]:
            assert record.expired
            self._pay(record, Outcome(False, self.view, *record.expired, by=self.uid))
        if any(r.state in OPEN and r.expired_at + self._takeover_timeout <= now for r in self._expired):
            self.host.give_up("no verdict")

    def _tag_uses(self) -> tuple[TagUse, ...]:
        return tuple(TagUse(tag, pair, n) for (tag, pair), n in self._uses.items())

    def update_ask(self) -> bytes:
        """The payload of an update."""
        return codec.encode(UpdateAsk(tuple(TagUse(tag, pair, n) for (tag, pair), n in self._uses.items() if pair is None)))

    def _sign(self, op: Op) -> int:
        """The signature of a call; an update's covers the uses of all tags, since they are handed to newcomers."""
        total = op.signature
        if not op.is_update:
            return total
        for (tag, pair), n in self._uses.items():
            if pair is None:
                total ^= xxhash.xxh3_64_intdigest(f"{tag!r}:{n}".encode())
        return total
