"""The simulator proves itself: rules are switched off one at a time, and each time some seed has to break a promise."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pccl.calls import Collective
from pccl.collectives import transfer
from pccl.collectives.executor import Executor
from pccl.collectives.flow import CallKey
from pccl.collectives.lane import DONE, IN, OUT, RING, Lane, phase_in
from pccl.collectives.pull import Pull
from pccl.core.messages import Reason
from pccl.core.types import CallId
from pccl.engine import Engine
from pccl.lanes import Lanes
from pccl.protocol import decide as decide_module
from pccl.protocol import group as group_module
from pccl.protocol.ledger import Ledger, Phase
from pccl.protocol.member import Membership
from pccl.protocol.record import State
from tests.sim.program import Violation
from tests.sim.run import hosts, run

SEEDS = 1000

Plant = Callable[[pytest.MonkeyPatch], None]
PLANTS: dict[str, Plant] = {}


NEAR: set[str] = set()
"""Those that show only where members share memory"""


def plant(f: Plant) -> Plant:
    PLANTS[f.__name__] = f
    return f


def near(f: Plant) -> Plant:
    NEAR.add(f.__name__)
    return plant(f)


@plant
def inputs_are_not_restored(m: pytest.MonkeyPatch) -> None:
    m.setattr(transfer.Undo, "restore", lambda self: None)


@plant
def what_is_overwritten_is_saved_too_late(m: pytest.MonkeyPatch) -> None:
    def save(self: transfer.Undo, start: int, stop: int) -> None:
        self._saved.append((start, stop))

    def restore(self: transfer.Undo) -> None:
        for start, stop in self._saved:
            self._spare[start:stop] = self._memory[start:stop]

    m.setattr(transfer.Undo, "save", save)
    m.setattr(transfer.Undo, "restore", restore)


@plant
def a_retry_begins_without_restoring(m: pytest.MonkeyPatch) -> None:
    m.setattr(Engine, "restore", lambda self, comm, record: None)


@plant
def the_first_done_commits(m: pytest.MonkeyPatch) -> None:
    def check(self: Ledger, call: Any) -> None:
        if self.phase is Phase.RUN and not call.verdict and call.mismatch_at is None and call.asks is None:
            self.commit(call, b"")
        else:
            original(self, call)

    original = Ledger._check_done
    m.setattr(Ledger, "_check_done", check)


@plant
def frames_of_an_older_epoch_are_taken(m: pytest.MonkeyPatch) -> None:
    def find(self: Executor, key: CallKey) -> Any:
        return next((t for k, t in self._transfers.items() if (k.call, k.sub) == (key.call, key.sub)), None)

    m.setattr(Executor, "transfer", find)


@plant
def a_halted_transfer_keeps_its_memory(m: pytest.MonkeyPatch) -> None:
    m.setattr(Executor, "halt", lambda self, t: self._transfers.pop(t.key, None))


@plant
def outcomes_are_forgotten_when_the_master_is_lost(m: pytest.MonkeyPatch) -> None:
    original = Membership.stop

    def stop(self: Membership) -> Any:
        report = original(self)
        return report._replace(calls=tuple(c for c in report.calls if c.state not in "CA"))

    m.setattr(Membership, "stop", stop)


@plant
def what_a_member_ended_is_retried(m: pytest.MonkeyPatch) -> None:
    original = decide_module._is
    m.setattr(decide_module, "_is", lambda report, states: states != "A" and original(report, states))


@plant
def after_done_a_deadline_only_waits(m: pytest.MonkeyPatch) -> None:
    m.setattr(Membership, "_overdue", lambda self, record: setattr(record, "state", State.OVERDUE))


@plant
def the_uses_of_a_tag_are_not_told_apart(m: pytest.MonkeyPatch) -> None:
    original = CallId.key.fget
    assert original
    m.setattr(CallId, "key", property(lambda self: original(self if self.tag is None else CallId(self.tag, 0))))


@plant
def a_newcomers_state_may_win(m: pytest.MonkeyPatch) -> None:
    original = group_module.elect

    def elect(offers: Any) -> Any:
        return original({u: (dataclasses.replace(o, synced=0, known=0, strategy="elect"), n) for u, (o, n) in offers.items()})

    m.setattr(group_module, "elect", elect)


@plant
def an_update_is_skipped_without_a_verdict(m: pytest.MonkeyPatch) -> None:
    original = Membership._check_update

    def check(self: Membership, now: float) -> None:
        if self._update and not self._update.announced:
            self._bits.setdefault(self._update.id.n - 1, 0)
        original(self, now)

    m.setattr(Membership, "_check_update", check)


@plant
def only_newcomers_are_fresh(m: pytest.MonkeyPatch) -> None:
    original = Membership._new_epoch

    def new_epoch(self: Membership, message: Any, now: float) -> None:
        fresh = self.fresh
        original(self, message, now)
        self.fresh = fresh

    m.setattr(Membership, "_new_epoch", new_epoch)


@plant
def a_broken_link_is_not_complained_of(m: pytest.MonkeyPatch) -> None:
    m.setattr(Engine, "flow_broken", lambda self, uid, error, lacking: None)
    m.setattr(Engine, "_check_links", lambda self, view: None)


@plant
def requests_that_come_early_are_not_answered(m: pytest.MonkeyPatch) -> None:
    from pccl.collectives.exchange import Exchange

    m.setattr(Exchange, "refresh", lambda self: None)


@plant
def fetched_blocks_are_not_checked(m: pytest.MonkeyPatch) -> None:
    """With a holder that sends garbage now and then; its hash is what gives it away."""
    from pccl import state
    from pccl.collectives import exchange

    original = exchange._Out.pull

    def pull(self: Any) -> Any:
        frame = original(self)
        if self._channel == exchange.BLOCK and frame.payload is not None and len(frame.payload) > 100:
            return frame._replace(payload=memoryview(bytes(len(frame.payload))))
        return frame

    m.setattr(exchange._Out, "pull", pull)
    m.setattr(state.Item, "hash_of", lambda self, block: None)


@plant
def a_reason_is_not_looked_at(m: pytest.MonkeyPatch) -> None:
    """A loss is answered as if nothing had been lost: members of the old epoch stay in the list."""
    original = Ledger.drop

    def drop(self: Ledger, uid: int, *, left: bool, detail: str) -> None:
        if left:
            original(self, uid, left=left, detail=detail)
        else:
            self.stop(Reason.LOSS, detail)

    m.setattr(Ledger, "drop", drop)


# --- of members that share memory -------------------------------------------------------------------------------------


def state_of(lane: Lane, n: int) -> int:
    """One's own phase in a call."""
    return phase_in(lane._last[n % RING]) if lane._last[n % RING] >> 4 == n + 1 else 0


@near
def done_is_said_before_the_work(m: pytest.MonkeyPatch) -> None:
    original = Pull._work

    def work(self: Pull) -> Iterator[bool]:
        if self.commits:
            self._lane.publish(self._n, DONE)
        yield from original(self)

    m.setattr(Pull, "_work", work)


@near
def the_first_done_that_is_seen_commits(m: pytest.MonkeyPatch) -> None:
    original = Lane.phase

    def phase(self: Lane, rank: int, n: int) -> int:
        found = original(self, rank, n)
        if found == IN and state_of(self, n) == DONE and any(original(self, r, n) == DONE for r in self.others):
            return DONE
        return found

    m.setattr(Lane, "phase", phase)


@near
def a_fenced_member_forgets_its_commits(m: pytest.MonkeyPatch) -> None:
    original = Membership.committed

    def committed(self: Membership, call: CallId, waiting: bool) -> None:
        original(self, call, waiting)
        self._local.clear()

    m.setattr(Membership, "committed", committed)


@near
def after_done_a_member_ends_a_call_alone(m: pytest.MonkeyPatch) -> None:
    m.setattr(Collective, "exposed", False)


@near
def an_input_is_not_withdrawn(m: pytest.MonkeyPatch) -> None:
    def withdraw(self: Pull) -> None:
        self._entered = False
        self._lane.step_out(self._n)

    m.setattr(Pull, "withdraw", withdraw)


@near
def a_slot_is_used_while_others_are_in_it(m: pytest.MonkeyPatch) -> None:
    m.setattr(Lane, "is_free", lambda self, n: not 0 < phase_in(self._last[n % RING]) < OUT)


@near
def a_slot_is_used_while_its_own_member_is_in_it(m: pytest.MonkeyPatch) -> None:
    def is_free(self: Lane, n: int) -> bool:
        last = self._last[n % RING]
        return not last or all(self._is_out(rank, last, n % RING) for rank in self.others)

    m.setattr(Lane, "is_free", is_free)


@near
def who_is_out_does_not_wait_for_readers(m: pytest.MonkeyPatch) -> None:
    original = Lane.phase
    m.setattr(Lane, "phase", lambda self, rank, n: OUT if state_of(self, n) == OUT else original(self, rank, n))


@near
def signatures_in_shared_memory_are_not_compared(m: pytest.MonkeyPatch) -> None:
    m.setattr(Pull, "_has_met", lambda self, rank: self._lane.phase(rank, self._n) in (IN, DONE, OUT))


@near
def a_new_epoch_of_the_same_members_goes_on_in_the_old_lane(m: pytest.MonkeyPatch) -> None:
    original = Lanes.open

    def open_lane(self: Lanes, membership: Membership) -> None:
        lane = self.get(membership.comm)
        if lane is None or len(lane.others) + 1 != membership.view.world_size:
            original(self, membership)

    m.setattr(Lanes, "open", open_lane)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def find(name: str, first: int = 0) -> int:
    """The first seed that finds a fault."""
    with pytest.MonkeyPatch.context() as m:
        PLANTS[name](m)
        for seed in range(first, first + SEEDS):
            if name in NEAR and not hosts(seed).count:
                continue
            try:
                run(seed)
            except Violation:
                return seed
    raise AssertionError(f"{name}: not found within {SEEDS} seeds")


@pytest.mark.sim
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", PLANTS)
def test_the_simulator_finds(name: str) -> None:
    find(name)
